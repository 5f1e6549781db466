"""The ops on a CPU: the reference's, but what a SparQ step does is made for speed.

A CPU gains from reading less only if nothing large is allocated, copied or passed over twice. So the approximate logits
are made by an embedding bag, a weighted sum of chosen rows of a table, each read where it stands: in a channel-major
layout a piece of a channel is such a row. Token-major keys are read whole, which beats gathering single numbers.
"""

import math
import threading
from typing import Any

import torch
import torch.nn.functional as F

from .reference import (
    append,
    channel_scores,
    compact,
    prefill,
    running_mean,
    slot_weights,
    tempered,
    top_channels,
    top_slots,
)
from .reference import attend as _attend

__all__ = [
    "append",
    "attend",
    "channel_scores",
    "compact",
    "prefill",
    "running_mean",
    "slot_weights",
    "top_by_channels",
    "top_channels",
    "top_slots",
]

_AT_ONCE = (
    2**21
)  # logits of as many rows as fit are worked on together: 8 MiB, which stay in the last-level cache
_PIECE = 512  # slots of a channel that are one row of the table, at most
_PARTS = 16  # of a ranking, in the search for its largest
_LOG2_E = math.log2(math.e)  # exp2 takes half the time of exp
_LOWEST = torch.finfo(torch.float32).min
_TINY = torch.finfo(torch.float32).tiny


class _Workspace(threading.local):
    """Memory that is used again at the next step: allocating it anew costs more than the arithmetic in it."""

    def __init__(self) -> None:
        self.held: dict[str, torch.Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """A tensor of this shape, valid until the same is taken again; its contents are whatever they are."""
        size = math.prod(shape)
        held = self.held.get(name)
        if held is None or held.numel() < size or held.dtype != dtype:
            held = self.held[name] = torch.empty(size, dtype=dtype)
        return held[:size].view(shape)


_workspace = _Workspace()


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    want_mass: bool = False,
    **tail: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `reference.attend`. All slots: torch's fused attention, the group as queries of one sequence. Chosen ones are
    copied as whole rows, four times quicker than number by number."""
    given: dict[str, Any] = {"scale": scale, "softcap": softcap, "sinks": sinks, **tail}
    token_major = _token_major(keys) and _token_major(values)
    if slots is None and softcap is None and sinks is None and not want_mass and token_major:
        live = torch.arange(keys.shape[2]) < lengths[..., None]
        return F.scaled_dot_product_attention(query, keys, values, live[:, :, None], scale=scale), None
    if slots is None or counts is None or want_mass or not token_major:
        return _attend(query, keys, values, lengths, slots=slots, counts=counts, want_mass=want_mass, **given)
    # In float32, for most CPUs multiply 16-bit numbers one by one.
    output, mass = _attend(
        query.float(), _at(keys, slots).float(), _at(values, slots).float(), counts, **given
    )
    return output.to(query.dtype), mass


def top_by_channels(
    query: torch.Tensor,
    keys: torch.Tensor,
    lengths: torch.Tensor,
    channels: torch.Tensor,
    k: int,
    *,
    size: int,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    group_score: str = "softmax",
    newest: int = 0,
    forced: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `reference.top_by_channels`."""
    (rows, heads, group, _) = query.shape
    chosen, factor = tempered(query, channels, scale)
    if softcap is None:
        factor = factor * _LOG2_E
    slots = lengths.new_empty(rows, heads, k)
    missed = query.new_empty(rows, heads, group, dtype=torch.float32)
    together = max(1, _AT_ONCE // (heads * group * size))
    for first in range(0, rows, together):
        some = slice(first, first + together)
        logits = _logits(query[some], chosen[some], factor[some, ..., None], keys[some], channels[some], size)
        order = torch.arange(logits.shape[3], dtype=torch.int32)
        alive = lengths[some, :, None].int()
        dead = torch.zeros(*alive.shape[:2], len(order)).masked_fill_(order >= alive, -math.inf)
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap * _LOG2_E)
        logits.add_(dead[:, :, None])  # adding takes a seventh of the time of masked_fill_
        ranking = logits.sum(2) if group_score == "logits" else None
        peak = logits.amax(3, keepdim=True).clamp_(min=_LOWEST)
        if sinks is not None:
            peak = torch.maximum(peak, sinks[..., None].float() * _LOG2_E)
        weights = logits.sub_(peak).exp2_()
        live = weights.sum(3)
        total = live if sinks is None else live + torch.exp2(sinks.float() * _LOG2_E - peak[..., 0])
        share = 1 / total.clamp(min=_TINY)
        if ranking is None:
            ranking = torch.matmul(share[:, :, None], weights)[:, :, 0]
        ranking.add_(dead)
        if forced is None:
            newest_slots = (alive - 1 - order[:newest]).clamp_(min=0).long()
            ranking.scatter_(2, newest_slots, math.inf)
        else:
            ranking[..., :size].masked_fill_(forced[some], math.inf)
        slots[some] = best = _top(ranking, k).clamp_(max=size - 1)
        held = weights.gather(3, best[:, :, None].expand(-1, -1, group, -1)).sum(3)
        missed[some] = (live - held) * share
    missed.clamp_(min=0).masked_fill_((lengths <= k)[..., None], 0)
    return slots, lengths.clamp(max=k), missed


def _logits(
    query: torch.Tensor,
    chosen: torch.Tensor,
    factor: torch.Tensor,
    keys: torch.Tensor,
    channels: torch.Tensor,
    size: int,
) -> torch.Tensor:
    """`factor [B, K, G, 1]` times the products of `query [B, K, G, D]`, or of its `chosen [B, K, G, r]`, with the keys
    in `channels [B, K, r]`: a float32 workspace `[B, K, G, T']`, T' at least T = `size`; what is beyond T is finite.
    """
    if _in_pieces(keys):
        products = _bags(chosen, keys, channels, size)
        logits = _workspace.take("logits", torch.float32, *products.shape)
        return logits.copy_(products).mul_(factor[..., None]).flatten(3)
    index = channels[:, :, None].expand_as(chosen)
    only_chosen = torch.zeros_like(query).scatter_(3, index, chosen)
    products = torch.matmul(only_chosen, keys.transpose(2, 3))
    logits = _workspace.take("logits", torch.float32, *products.shape)
    return logits.copy_(products).mul_(factor)


def _bags(chosen: torch.Tensor, keys: torch.Tensor, channels: torch.Tensor, size: int) -> torch.Tensor:
    """The products with channel-major or blocked keys, piece by piece: `[B, K, G, n, T'/n]`, n pieces of a channel."""
    rows, heads, group, r = chosen.shape
    row, head, *block, channel = keys.stride()
    piece = keys.shape[3] if keys.dim() == 5 else math.gcd(channel, _PIECE)
    step = block[0] if keys.dim() == 5 else piece
    table = _table(keys, piece)
    pieces = -(-size // piece)
    dtype = torch.int32 if len(table) < 2**31 else torch.int64

    def places(count: int, stride: int) -> torch.Tensor:
        return torch.arange(count, dtype=dtype) * (stride // piece)

    starts = places(rows, row)[:, None, None] + places(heads, head)[:, None] + places(pieces, step)
    # The heads of a group one after the other: what the first has read is still in the cache for the others.
    bags = _workspace.take("bags", dtype, rows, heads, pieces, r)
    torch.add(starts[..., None], channels[:, :, None].to(dtype), alpha=channel // piece, out=bags)
    index = _workspace.take("index", dtype, rows, heads, pieces, group, r).copy_(bags[:, :, :, None])
    weights = _workspace.take("weights", chosen.dtype, *index.shape).copy_(chosen[:, :, None])
    products = F.embedding_bag(index.view(-1, r), table, per_sample_weights=weights.view(-1, r), mode="sum")
    return products.view(rows, heads, pieces, group, piece).transpose(2, 3)


def _top(ranking: torch.Tensor, k: int) -> torch.Tensor:
    """The places `[B, K, k]` of the k largest of `ranking [B, K, T]`.

    Of 16 parts that lie over each other, the k columns with the largest maxima hold them all: only those are sorted.
    """
    size = ranking.shape[2]
    if size % _PARTS or size < 2 * _PARTS * k:
        return ranking.topk(k).indices
    parts = ranking.unflatten(2, (_PARTS, -1))
    columns = parts.amax(2).topk(k, sorted=False).indices
    candidates = parts.gather(3, columns[:, :, None].expand(-1, -1, _PARTS, -1)).flatten(2)
    best = candidates.topk(k).indices
    return columns.gather(2, best % k) + best // k * (size // _PARTS)


def _at(stored: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """`slots [B, K, S]` of token-major `stored [B, K, T, D]`: `[B, K, S, D]`."""
    (rows, heads, _, size), strides = stored.shape, stored.stride()
    table = _table(stored, size)
    starts = torch.arange(rows)[:, None] * strides[0] + torch.arange(heads) * strides[1]
    return table.index_select(0, (starts[..., None] // size + slots).flatten()).view(*slots.shape, size)


def _token_major(stored: torch.Tensor) -> bool:
    """Whether a token's vector is contiguous, one after the other, so that all storage is a table of them."""
    size = stored.shape[-1]
    return stored.dim() == 4 and stored.stride()[2:] == (size, 1) and stored.stride(1) % size == 0


def _in_pieces(keys: torch.Tensor) -> bool:
    """Whether a channel of neighbouring slots is contiguous: layouts double and blocked."""
    return keys.stride(-2) == 1 and keys.stride(-1) >= 16


def _table(stored: torch.Tensor, width: int) -> torch.Tensor:
    """The memory of `stored` as rows of `width` numbers, the first of them its own first."""
    last = sum((count - 1) * stride for count, stride in zip(stored.shape, stored.stride(), strict=True))
    return stored.as_strided((last // width + 1, width), (width, 1))
