"""CPU ops: the reference, with SparQ's hot path optimised.

A CPU gains from reading less only if nothing large is allocated, copied or passed over twice. So an embedding
bag makes the approximate logits: a weighted sum of chosen rows of a table, each read where it stands. In a
channel-major layout a piece of a channel is such a row. Token-major keys are read whole, which beats
gathering single numbers.

Dead slots are made harmless bit by bit: `x & 0` is zero for every x, NaN included, and takes a tenth of the
time of `masked_fill`. Attention over all slots is the exception: there dead slots must be finite, because
masking them would copy every value. The cache fills its storage with zeros at a reset.
"""

import math
import threading
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from . import reference
from .reference.attend import prefill, window_weights
from .reference.blend import blend, kept_mass, with_tail
from .reference.places import below, readable, unpacked, within
from .reference.scores import channel_scores, page_scores, slot_weights, tempered
from .reference.select import holding, lowest, slots_of_pages, top_channels, top_slots
from .reference.store import FEW, compact

__all__ = [
    "append",
    "append_token",
    "attend",
    "channel_scores",
    "code_scores",
    "compact",
    "lowest",
    "page_scores",
    "prefill",
    "slot_weights",
    "slots_of_pages",
    "top_by_channels",
    "top_channels",
    "top_p",
    "top_slots",
    "widen_bounds",
    "window_weights",
]

_AT_ONCE = 2**21  # logits in one batch of rows: 8 MiB, which stay in the last-level cache
_UNPACKED = 2**20  # numbers made of four bits at a time: 4 MiB
_PIECE = 512  # slots of a channel in one row of the table, at most
_PARTS = 16  # of a ranking, in the search for its largest
_LOG2_E = math.log2(math.e)  # exp2 takes half the time of exp
_LOWEST = torch.finfo(torch.float32).min
_TINY = torch.finfo(torch.float32).tiny
_MINUS_INFINITY = -(2**23)  # the bits of float32 -inf
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


class _Workspace(threading.local):
    """A thread's memory, used again at every step: allocating costs more than the arithmetic in it."""

    def __init__(self) -> None:
        self.held: dict[str, torch.Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """A tensor of this shape with any content, valid until the name is taken again in this thread."""
        size = math.prod(shape)
        held = self.held.get(name)
        if held is None or held.numel() < size or held.dtype != dtype:
            with torch.inference_mode(False):  # else it could not be written to outside of inference mode
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
    tail_weight: torch.Tensor | None = None,
    tail_value: torch.Tensor | None = None,
    far: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    want_mass: bool = False,
    by_head: bool = False,
    add_mass_to: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    total: int = 0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`reference.attend`, but over all slots dead ones must be finite.

    Over all slots, torch's fused attention takes the group as queries of one sequence; packed heads one by
    one, each where it stands. Chosen slots are copied as whole rows, four times as fast as number by number.
    """
    if starts is not None:
        if slots is None and softcap is None and sinks is None and not want_mass and tail_weight is None:
            return _attend_packed(query, keys, values, lengths, starts, scale), None
        keys, values = (unpacked(stored, starts, lengths.shape, total) for stored in (keys, values))
    size = values.shape[2]
    if slots is None:
        keys = keys if keys.dim() == 4 else keys.flatten(2, 3)[:, :, :size]
        live = below(lengths, size)
        plain = softcap is None and sinks is None and not want_mass
        if plain and _token_major(keys) and _token_major(values):
            output = F.scaled_dot_product_attention(query, keys, values, live[:, :, None], scale=scale)
        else:
            output, weights = blend(query, keys, values, live, scale, softcap, sinks)
    else:
        assert counts is not None
        slots, live = readable(slots, counts, lengths, far)
        # In float32, because most CPUs multiply 16-bit numbers one by one.
        keys, values = _at(keys, slots).float(), _at(values, slots).float()
        _zero_where_not(live.int().neg_()[..., None], values)
        output, weights = blend(query.float(), keys, values, live, scale, softcap, sinks, far)
    if tail_weight is not None:
        assert tail_value is not None
        output = with_tail(output, tail_weight, tail_value)
    output = output.to(query.dtype)
    return output, kept_mass(weights, slots, size, by_head, add_mass_to) if want_mass else None


def _attend_packed(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention over all live slots of packed keys and values: nothing is copied, no dead slot is read."""
    output = torch.zeros_like(query)
    queries, results, first = query.flatten(0, 1), output.flatten(0, 1), starts.tolist()
    for head, length in enumerate(lengths.flatten().tolist()):
        if length:
            k, v = (stored[0, 0, first[head] : first[head] + length] for stored in (keys, values))
            results[head] = F.scaled_dot_product_attention(queries[head], k, v, scale=scale)
    return output


def append(
    storage: torch.Tensor,
    new: torch.Tensor,
    slots: torch.Tensor,
    active: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
) -> None:
    """`reference.append`; one token a row, or a run of slots, needs no index of rows and heads."""
    if storage.dim() < 5 and starts is None and active is None:
        first = _run_from(slots, storage.shape[2])
        if first is not None:
            storage[:, :, first : first + slots.shape[2]] = new
            return
    if slots.shape[2] > 1 or storage.dim() == 5 or starts is not None:
        reference.append(storage, new, slots, active, starts)
        return
    inside = within(slots, storage.shape[2])
    written = inside == slots
    if active is not None:
        written &= active[:, None, None]
    if new.dim() == 4:
        inside, written = inside[..., None].expand(new.shape), written[..., None]
    # As integers: torch copies all storage to scatter 16-bit floats.
    integers = _INTEGERS[storage.element_size()]
    bits = storage.view(integers)
    bits.scatter_(2, inside, torch.where(written, new.view(integers), bits.gather(2, inside)))


def _run_from(slots: torch.Tensor, capacity: int) -> int | None:
    """The first of more than a few slots that exist and follow one another, alike in all heads; or None."""
    count = slots.shape[2]
    if count <= FEW or not slots.numel():
        return None
    first = int(slots[0, 0, 0])
    run = torch.arange(first, first + count)
    return first if 0 <= first <= capacity - count and torch.equal(slots, run.expand_as(slots)) else None


def append_token(
    stores: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    positions: torch.Tensor,
    lengths: torch.Tensor,
    seen: torch.Tensor,
    *,
    means: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
    active: torch.Tensor | None = None,
    limits: int | torch.Tensor | None = None,
    lowest: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """`reference.append_token`."""
    return reference.store.write_token(
        append,
        stores,
        positions,
        lengths,
        seen,
        means=means,
        active=active,
        limits=limits,
        lowest=lowest,
        starts=starts,
    )


def widen_bounds(
    low: torch.Tensor,
    high: torch.Tensor,
    keys: torch.Tensor,
    slots: torch.Tensor,
    counts: torch.Tensor,
    page: int,
) -> None:
    """`reference.widen_bounds`; one token a row touches one page, and only that one."""
    if slots.shape[2] > 1:
        reference.widen_bounds(low, high, keys, slots, counts, page)
        return
    index = within(slots // page, low.shape[2])
    written = ((index == slots // page) & (counts > 0)[:, None, None])[..., None]
    begins = (slots % page == 0)[..., None]
    index = index[..., None].expand(keys.shape)
    for bound, widest in ((low, torch.minimum), (high, torch.maximum)):
        held, new = bound.gather(2, index), keys.to(bound.dtype)
        wider = torch.where(begins, new, widest(held, new))
        bound.scatter_(2, index, torch.where(written, wider, held))


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
    """`reference.top_by_channels`, a few rows at a time."""
    (rows, heads, group, head_size), k = query.shape, min(k, size)
    chosen, factor = tempered(query, channels, scale)
    channels = within(channels, head_size)
    if softcap is None:
        factor = factor * _LOG2_E
    slots = lengths.new_empty(rows, heads, k)
    missed = query.new_empty(rows, heads, group, dtype=torch.float32)
    order = torch.arange(_width(keys, size), dtype=torch.int32)
    together = max(1, _AT_ONCE // (heads * group * size))
    for first in range(0, rows, together):
        some = slice(first, first + together)
        alive = lengths[some, :, None].int()
        live = order - alive >> 31  # [B, K, T']: all bits of a live slot are set, and none of a dead one
        dead = live.bitwise_not().bitwise_and_(_MINUS_INFINITY).view(torch.float32)  # 0 or -inf
        logits = _logits(query[some], chosen[some], factor[some, ..., None], keys[some], channels[some], live)
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap * _LOG2_E)
        logits.add_(dead[:, :, None])
        ranking = None
        if group_score != "softmax":
            ranking = (logits.sum(2) if group_score == "logits" else logits.amax(2)).clamp_(min=_LOWEST)
        peak = logits.amax(3, keepdim=True).clamp_(min=_LOWEST)
        if sinks is not None:
            peak = torch.maximum(peak, sinks[..., None].float() * _LOG2_E)
        weights = logits.sub_(peak).exp2_()
        total = weights.sum(3)
        with_sink = total if sinks is None else total + torch.exp2(sinks.float() * _LOG2_E - peak[..., 0])
        share = 1 / with_sink.clamp(min=_TINY)
        if ranking is None:
            ranking = torch.matmul(share[:, :, None], weights)[:, :, 0]
        if forced is None:
            newest_slots = (alive - 1 - order[: max(newest, 0)]).clamp_(min=0).long()
            ranking.scatter_(2, newest_slots, math.inf)
        else:
            ranking[..., :size].masked_fill_(forced[some], math.inf)
        _zero_where_not(live, ranking)
        ranking.add_(dead)
        slots[some] = best = _top(ranking, k).clamp_(max=size - 1)
        held = weights.gather(3, best[:, :, None].expand(-1, -1, group, -1)).sum(3)
        missed[some] = (total - held) * share
    missed.clamp_(min=0).masked_fill_((lengths <= k)[..., None], 0)
    return slots, lengths.clamp(max=k), missed


def code_scores(
    query: torch.Tensor,
    codes: torch.Tensor,
    ranges: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    slots: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """`reference.code_scores`; codes are multiplied as they are, a few slots at a time.

    A byte is low + 16 high, so `a low + b high` is `a byte + (b - 16 a) high`: nothing is masked or put
    together. The step and the lowest number of a vector come in afterwards.
    """
    if slots is None:
        live = below(lengths, codes.shape[2])
    else:
        assert counts is not None
        slots, live = readable(slots, counts, lengths)
        codes, ranges = (stored[reference.places.index_of(stored, slots)] for stored in (codes, ranges))
    (rows, heads, size, half), group = codes.shape, query.shape[2]
    low, high = (query.float() * scale).split(half, -1)
    whole = (low + high).sum(-1, keepdim=True)
    high = high - 16 * low
    scores = torch.empty(rows, heads, group, size)
    together = max(256, _UNPACKED // (rows * heads * half))
    for first in range(0, size, together):
        some = slice(first, first + together)
        byte = codes[:, :, some]
        lowest, step = ranges[:, :, some].float().transpose(2, 3).split(1, 2)
        products = torch.matmul(low, byte.float().transpose(2, 3))
        products += torch.matmul(high, (byte >> 4).float().transpose(2, 3))
        torch.addcmul(whole * lowest, products, step, out=scores[..., some])
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    return scores.masked_fill_(~live[:, :, None], -math.inf)


def top_p(weights: torch.Tensor, counts: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.top_p`; numpy sorts numbers without their places, in a quarter of torch's time."""
    weights = weights.masked_fill(~below(counts, weights.shape[3])[:, :, None], 0)
    ordered = torch.from_numpy(np.sort(weights.detach().numpy(), -1)).flip(-1)
    return holding(p, weights, ordered, counts)


def _logits(
    query: torch.Tensor,
    chosen: torch.Tensor,
    factor: torch.Tensor,
    keys: torch.Tensor,
    channels: torch.Tensor,
    live: torch.Tensor,
) -> torch.Tensor:
    """Logits from `chosen [B, K, G, r]`, the query in `channels [B, K, r]`, times `factor [B, K, G, 1]`.

    A float32 workspace `[B, K, G, T']`; zero where no bit of `live [B, K, T']` is set.
    """
    if _in_pieces(keys):
        products = _bags(chosen, keys, channels, live.shape[2])
    else:
        index = channels[:, :, None].expand_as(chosen)
        only_chosen = torch.zeros_like(query).scatter_add_(3, index, chosen)
        products = torch.matmul(only_chosen, keys.transpose(2, 3))[..., None, :]
    logits = _workspace.take("logits", torch.float32, *products.shape)
    live = live.view(*live.shape[:2], 1, *products.shape[3:])
    if products.dtype == torch.float32:
        torch.bitwise_and(products.view(torch.int32), live, out=logits.view(torch.int32))  # copies as well
    else:
        _zero_where_not(live, products)
        logits.copy_(products)
    return logits.mul_(factor[..., None]).flatten(3)


def _zero_where_not(live: torch.Tensor, numbers: torch.Tensor) -> None:
    """Zero, in place, the numbers where `live`, an integer with all bits set or none, is 0."""
    integers = _INTEGERS[numbers.element_size()]
    numbers.view(integers).bitwise_and_(live.to(integers))


def _bags(chosen: torch.Tensor, keys: torch.Tensor, channels: torch.Tensor, width: int) -> torch.Tensor:
    """The products with channel-major or blocked keys: `[B, K, G, n, T'/n]`, for n pieces of a channel."""
    rows, heads, group, r = chosen.shape
    row, head, *block, channel = keys.stride()
    piece = _piece(keys)
    step = block[0] if keys.dim() == 5 else piece
    table = _table(keys, piece)
    pieces = width // piece
    dtype = torch.int32 if len(table) < 2**31 else torch.int64

    def places(count: int, stride: int) -> torch.Tensor:
        return torch.arange(count, dtype=dtype) * (stride // piece)

    starts = places(rows, row)[:, None, None] + places(heads, head)[:, None] + places(pieces, step)
    # The heads of a group in turn: what the first has read is still in the CPU's cache for the others.
    bags = _workspace.take("bags", dtype, rows, heads, pieces, r)
    torch.add(starts[..., None], channels[:, :, None].to(dtype), alpha=channel // piece, out=bags)
    index = _workspace.take("index", dtype, rows, heads, pieces, group, r).copy_(bags[:, :, :, None])
    weights = _workspace.take("weights", chosen.dtype, *index.shape).copy_(chosen[:, :, None])
    products = F.embedding_bag(index.view(-1, r), table, per_sample_weights=weights.view(-1, r), mode="sum")
    return products.view(rows, heads, pieces, group, piece).transpose(2, 3)


def _top(ranking: torch.Tensor, k: int) -> torch.Tensor:
    """The places `[B, K, k]` of the k largest of `ranking [B, K, T]`.

    The row is folded into 16 parts. The k columns with the largest maxima hold all winners: only those are
    sorted.
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
    """A copy of `slots [B, K, S]` of `stored`: `[B, K, S, D]`."""
    if not _token_major(stored):
        return stored[reference.places.index_of(stored, slots)]
    (rows, heads, _, size), strides = stored.shape, stored.stride()
    table = _table(stored, size)
    starts = torch.arange(rows)[:, None] * strides[0] + torch.arange(heads) * strides[1]
    return table.index_select(0, (starts[..., None] // size + slots).flatten()).view(*slots.shape, size)


def _token_major(stored: torch.Tensor) -> bool:
    """Whether all storage is a table of tokens' vectors."""
    size = stored.shape[-1]
    row, head, *token = stored.stride()
    return stored.dim() == 4 and token == [size, 1] and row % size == 0 and head % size == 0


def _in_pieces(keys: torch.Tensor) -> bool:
    """Whether a channel of neighbouring slots is contiguous: layouts double and blocked."""
    return keys.stride(-2) == 1 and keys.stride(-1) >= 16


def _piece(keys: torch.Tensor) -> int:
    """Slots of a channel that are contiguous and start at a multiple of their number: a row of the table."""
    return keys.shape[3] if keys.dim() == 5 else math.gcd(keys.stride(3), _PIECE)


def _width(keys: torch.Tensor, size: int) -> int:
    """T': the slots T = `size`, or whole pieces that hold them."""
    return -(-size // _piece(keys)) * _piece(keys) if _in_pieces(keys) else size


def _table(stored: torch.Tensor, width: int) -> torch.Tensor:
    """The memory of `stored`, from its first number on, as rows of `width` numbers."""
    last = sum((count - 1) * stride for count, stride in zip(stored.shape, stored.stride(), strict=True))
    return stored.as_strided((last // width + 1, width), (width, 1))
