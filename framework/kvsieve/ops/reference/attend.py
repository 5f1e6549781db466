"""Attention of a decode step and of a prompt, and the weights that the newest queries give."""

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from .blend import blend, kept_mass, logits_of, softmax, with_tail
from .places import below, index_of, readable, unpacked

_QUERIES = 64  # of a row at once, during prefill: fewer would read the keys again for little work
_WEIGHTS = 2**22  # held at once at most: 16 MiB
_CACHED = 2**20  # of several rows at once: 4 MiB, which stay in the last-level cache


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
    """Attention of one query token over all live slots, or over the first `counts` of `slots [B, K, S]`.

    `query [B, K, G, D]`; `keys`, `values [B, K, T, D]`, or packed: with `starts`, and T = `total`; `sinks
    [K, G]`: a logit per head that takes weight and gives no value. `far`: more slots `[B, K, F]`, how many of
    them are read `[B, K]`, and the query `[B, K, G, D]` that reads them, weighed in the same softmax. Returns
    the output `[B, K, G, D]` and, if wanted, the mass `[B, K, T]`: mean weight over the group, or `[B, K, G,
    T]` `by_head`; it is added to `add_mass_to` instead, of the same shape, if that is given. Without a slot
    to read, the output before the tail is zero.
    """
    if starts is not None:
        keys, values = (unpacked(stored, starts, lengths.shape, total) for stored in (keys, values))
    size = values.shape[2]
    if slots is None:
        keys = keys if keys.dim() == 4 else keys.flatten(2, 3)[:, :, :size]
        live = below(lengths, size)
    else:
        assert counts is not None
        slots, live = readable(slots, counts, lengths, far)
        keys, values = keys[index_of(keys, slots)], values[index_of(values, slots)]
    values = values.masked_fill(~live[..., None], 0)  # 0 * NaN is NaN
    output, weights = blend(query, keys, values, live, scale, softcap, sinks, far)
    if tail_weight is not None:
        assert tail_value is not None
        output = with_tail(output, tail_weight, tail_value)
    return output, kept_mass(weights, slots, size, by_head, add_mass_to) if want_mass else None


def prefill(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor,
    counts: torch.Tensor,
    *,
    fresh: bool,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    since: torch.Tensor | None = None,
    visible: torch.Tensor | None = None,
    want_mass: bool = False,
    by_head: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Dense causal attention of Q new tokens: token i of a row sees slots up to its own, `starts + i`.

    `query [B, K, G, Q, D]`; `keys`, `values [B, K, T, D]`, the new tokens in them; `starts [B, K]`: slots in
    use before; `counts [B]`: how many of the Q are real, the rest follow them. `fresh`: all starts are zero,
    T = Q, and what follows the real tokens is finite. `since [B, K, Q]` int64: a token sees no slot before
    it, its own at the latest; None: from 0 on. `visible [B, Q, T]` bool: of the slots up to its own, a token
    sees those, its own among them; None: all. Returns the output `[B, K, G, Q, D]`, zero where not real, and,
    if wanted, the mass `[B, K, T]` summed over the real queries, `[B, K, G, T]` `by_head`. Works in blocks of
    queries: no T x T matrix.
    """
    (rows, heads, group, new, size), total = query.shape, keys.shape[2]
    real = torch.arange(new, device=query.device) < counts[:, None]
    plain = softcap is None and sinks is None and since is None and visible is None
    if fresh and plain and not want_mass:
        flat = query.reshape(rows, heads * group, new, size)
        output = F.scaled_dot_product_attention(
            flat, keys, values, is_causal=True, scale=scale, enable_gqa=group > 1
        )
        output = output.view(query.shape)
        return output.masked_fill(~real[:, None, None, :, None], 0), None
    output = torch.empty_like(query)
    mass = None
    if want_mass:
        each = (rows, heads, group, total) if by_head else (rows, heads, total)
        mass = query.new_zeros(each, dtype=torch.float32)
    values = values.masked_fill(~below(starts + counts[:, None], total)[..., None], 0)  # 0 * NaN is NaN
    for these, block in _blocks(rows, new, heads * group * total):
        # No query of the block sees a slot beyond, or before.
        held = 0 if fresh else int(starts[these].max())
        start = 0 if since is None else int(since[these, :, block].min())
        reach = slice(start, min(held + block.stop, total))
        slots = torch.arange(reach.start, reach.stop, device=query.device)
        last_seen = starts[these, :, None] + torch.arange(block.start, block.stop, device=query.device)
        seen = slots <= last_seen[..., None]
        seen &= real[these, None, block, None]
        if since is not None:
            seen &= slots >= since[these, :, block, None]
        if visible is not None:
            seen &= visible[these, None, block, reach]
        asking = query[these, :, :, block].flatten(2, 3)
        logits = logits_of(asking, keys[these, :, reach], scale, softcap).unflatten(2, (group, -1))
        weights = softmax(logits, seen[:, :, None], sinks)
        blended = torch.matmul(weights.to(values.dtype).flatten(2, 3), values[these, :, reach])
        output[these, :, :, block] = blended.unflatten(2, (group, -1))
        if mass is not None:
            mass[these, ..., reach] += weights.sum(3) if by_head else weights.mean(2).sum(2)
    return output, mass


def window_weights(
    query: torch.Tensor,
    keys: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weight `[B, K, G, T]` float32 that slots receive from the newest tokens' queries, summed over them.

    `query [B, K, G, W, D]`: the first `counts [B]` are real, and belong to the last `counts` of the live
    slots of `keys [B, K, T, D]`; each sees the slots up to its own. Works in blocks of queries.
    """
    (rows, heads, group, window, _), total = query.shape, keys.shape[2]
    weights = query.new_zeros(rows, heads, group, total, dtype=torch.float32)
    slots = torch.arange(total, device=query.device)
    for these, block in _blocks(rows, window, heads * group * total):
        token = torch.arange(block.start, block.stop, device=query.device)
        own = (lengths[these] - counts[these, None])[..., None] + token
        visible = (slots <= own[..., None]) & (token < counts[these, None])[:, None, :, None]
        logits = logits_of(query[these, :, :, block].flatten(2, 3), keys[these], scale, softcap)
        weights[these] += softmax(logits.unflatten(2, (group, -1)), visible[:, :, None], sinks).sum(3)
    return weights


def _blocks(rows: int, queries: int, each: int) -> Iterator[tuple[slice, slice]]:
    """Slices of rows and of their queries that are worked on at once; a query of a row has `each` weights.

    Rows are the outer loop: blocks of a row read the same keys.
    """
    block = min(queries, _QUERIES, max(1, _WEIGHTS // each))
    together = max(1, _CACHED // max(1, each * block))
    for first, start in itertools.product(range(0, rows, together), range(0, queries, max(1, block))):
        yield slice(first, min(first + together, rows)), slice(start, min(start + block, queries))
