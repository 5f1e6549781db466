"""Every op in plain torch. It defines what is correct; kernels are compared with it and never import it.

Letters: B rows, H = K * G query heads, K KV heads, G query heads per KV head, T slots, S chosen slots, D head
size, Q new tokens, r channels. Weights and scores are float32 whatever the cache holds. Keys may be
`[B, K, T, D]` of any strides, or in blocks, `[B, K, T/n, n, D]`, of which the last may reach beyond T.

Keys and values may be packed, `[1, 1, S, D]`: then `starts [B * K + 1]` int64 says where row b and head k
have their slots, from `starts[b * K + k]` to `starts[b * K + k + 1]`.

Whatever a policy answers, nothing outside its row and head is read or written:

- `lengths [B, K]`: slots below are live. A dead slot gets no weight, and its content, NaN included, reaches
  no output.
- `slots [B, K, S]` with `counts [B, K]`: counts are clamped to [0, S]. A slot outside [0, length) is not read
  and gets no weight and no mass.
- `channels [B, K, r]`: one outside [0, D) adds nothing.
- A ranking may hold NaN and infinities: the slots found are below T, and live ones come first.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from .four_bits import unquantised

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

_LOWEST = torch.finfo(torch.float32).min
_FEW = 8  # tokens written one by one: a decode step may write so many and not look at the device
_PREFILL_BLOCK = 2**22  # attention weights held at once during prefill: 16 MiB


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
        keys, values = keys[places(keys, slots)], values[places(values, slots)]
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
    step = max(1, _PREFILL_BLOCK // (rows * heads * group * total))
    held = 0 if fresh else int(starts.max())
    for first in range(0, new, step):
        block = slice(first, min(first + step, new))
        # No query of the block sees a slot beyond, or before.
        start = 0 if since is None else int(since[:, :, block].min())
        reach = slice(start, min(held + block.stop, total))
        slots = torch.arange(reach.start, reach.stop, device=query.device)
        last_seen = starts[..., None] + torch.arange(block.start, block.stop, device=query.device)
        seen = slots <= last_seen[..., None]
        seen &= real[:, None, block, None]
        if since is not None:
            seen &= slots >= since[:, :, block, None]
        if visible is not None:
            seen &= visible[:, None, block, reach]
        logits = _logits(query[:, :, :, block].flatten(2, 3), keys[:, :, reach], scale, softcap)
        logits = logits.unflatten(2, (group, -1))
        weights = _softmax(logits, seen[:, :, None], sinks)
        blended = torch.matmul(weights.to(values.dtype).flatten(2, 3), values[:, :, reach])
        output[:, :, :, block] = blended.unflatten(2, (group, -1))
        if mass is not None:
            mass[..., reach] += weights.sum(3) if by_head else weights.mean(2).sum(2)
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
    step = max(1, _PREFILL_BLOCK // (rows * heads * group * total))
    for first in range(0, window, step):
        token = torch.arange(first, min(first + step, window), device=query.device)
        own = (lengths - counts[:, None])[..., None] + token
        visible = (slots <= own[..., None]) & (token < counts[:, None])[:, None, :, None]
        logits = _logits(query[:, :, :, first : first + step].flatten(2, 3), keys, scale, softcap)
        weights += _softmax(logits.unflatten(2, (group, -1)), visible[:, :, None], sinks).sum(3)
    return weights


def top_channels(query: torch.Tensor, r: int) -> torch.Tensor:
    """The r channels `[B, K, r]` with the highest sum of |q| over the group's `query [B, K, G, D]`."""
    return query.float().abs().sum(2).topk(r).indices


def tempered(query: torch.Tensor, channels: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The chosen channels of the query `[B, K, G, r]`, and the factor of its logits `[B, K, G]` float32.

    The dot product over r of D channels is smaller than the whole one; it is divided by `sqrt(coverage)`,
    coverage being the share of |query| that the channels hold (SparQ, equation 9: with the usual scale this
    is the paper's temperature). A channel outside [0, D) is chosen as a zero.
    """
    inside = within(channels, query.shape[3])
    chosen = query.gather(3, inside[:, :, None].expand(-1, -1, query.shape[2], -1))
    chosen = chosen.masked_fill((inside != channels)[:, :, None], 0)
    norm = query.float().abs().sum(3)
    coverage = chosen.float().abs().sum(3) / norm.clamp(min=torch.finfo(torch.float32).tiny)
    # A zero query (the embedding of a pad token, say) covers nothing of nothing: 0 / 0. Its logits are zero.
    temperature = torch.where(norm > 0, coverage, 1).clamp(min=1e-6).rsqrt()
    return chosen, scale * temperature


def channel_scores(
    query: torch.Tensor,
    keys: torch.Tensor,
    lengths: torch.Tensor,
    channels: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Logits from the chosen channels only, `[B, K, G, T]` float32; dead slots get -inf.

    For keys in blocks, T counts all slots of the blocks.

    `channels [B, K, r]`, scaled as `tempered` says.
    """
    chosen, factor = tempered(query, channels, scale)
    index = within(channels, query.shape[3])[:, :, None]
    if keys.dim() == 5:
        part = keys.gather(4, index[:, :, None].expand(-1, -1, *keys.shape[2:4], -1)).flatten(2, 3)
    else:
        part = keys.gather(3, index.expand(-1, -1, keys.shape[2], -1))
    logits = torch.matmul(chosen, part.transpose(2, 3)).float() * factor[..., None]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    live = below(lengths, part.shape[2])[:, :, None]
    return logits.masked_fill(~live, -math.inf)


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
    """Logits `[B, K, G, T]` float32 of `query [B, K, G, r]` with vectors in four bits; dead slots get -inf.

    `codes [B, K, T, r/2]`, `ranges [B, K, T, 2]` as `four_bits.quantised` makes them. With `slots [B, K, S]`
    the logits `[B, K, G, S]` of these; all but the first `counts [B, K]` get -inf.
    """
    if slots is None:
        live = below(lengths, codes.shape[2])
    else:
        assert counts is not None
        slots, live = readable(slots, counts, lengths)
        codes, ranges = codes[places(codes, slots)], ranges[places(ranges, slots)]
    logits = _logits(query.float(), unquantised(codes, ranges), scale, softcap)
    return logits.masked_fill(~live[:, :, None], -math.inf)


def top_p(weights: torch.Tensor, counts: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The fewest of the first `counts [B, K]` places that hold p of the `weights [B, K, N, S]` of every head.

    A head's are the heaviest, down to the weight at which they sum to p, all of that weight included; all of
    them if they never do. Returns the union over the heads: places `[B, K, S]`, those taken first, and how
    many they are `[B, K]`.
    """
    weights = weights.masked_fill(~below(counts, weights.shape[3])[:, :, None], 0)
    return holding(p, weights, weights.sort(-1, descending=True).values, counts)


def holding(
    p: float, weights: torch.Tensor, ordered: torch.Tensor, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`top_p` of weights that are zero from the count on, and that are given in falling order too."""
    missing = ordered.cumsum(-1) - ordered < p  # those before do not sum to p
    last = missing.sum(-1, keepdim=True).clamp(min=1) - 1
    taken = (weights >= ordered.gather(-1, last)).any(2) & below(counts, weights.shape[3])
    return (~taken).to(torch.uint8).argsort(dim=2, stable=True), taken.sum(2)


def slot_weights(scores: torch.Tensor, sinks: torch.Tensor | None = None) -> torch.Tensor:
    """Softmax of `scores [B, K, G, T]` over the slots; with sinks the weights of a head sum to less than one.

    Slots of -inf, the dead ones, get zero. A NaN makes a head's weights NaN.
    """
    return _softmax(scores, scores != -math.inf, sinks)


def top_slots(
    ranking: torch.Tensor,
    lengths: torch.Tensor,
    k: int,
    *,
    newest: int = 0,
    forced: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best live slots of `ranking [B, K, T]`, the last `newest` ones forced in.

    Returns slots `[B, K, min(k, T)]` and how many of them are live `[B, K]`: `min(k, length)`. Those come
    first; what fills the rest is below T, and dead.

    Where slots do not stand in the order of tokens, `forced [B, K, T]` bool marks the newest instead. A set,
    not a ranking: among equal scores any may be taken, and NaN counts as the highest.
    """
    size = ranking.shape[2]
    slots = torch.arange(size, device=lengths.device)
    if forced is None:
        forced = slots >= (lengths - newest)[..., None]
    ranking = ranking.float().masked_fill(forced, math.inf).clamp(min=_LOWEST)
    ranking = ranking.masked_fill(slots >= lengths[..., None], -math.inf)
    return ranking.topk(min(k, size), dim=2).indices, lengths.clamp(max=min(k, size))


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
    """`channel_scores` over T = `size` slots, added up over the group, and the `top_slots` of that.

    `group_score` "softmax" adds the heads' weights, "logits" their logits; "max" takes the largest logit.
    Returns slots `[B, K, min(k, T)]`, how many are live `[B, K]`, and the approximate weight `[B, K, G]` of
    the live slots left out, zero where none was.
    """
    scores = channel_scores(query, keys, lengths, channels, scale=scale, softcap=softcap)[..., :size]
    weights = slot_weights(scores, sinks)
    if group_score == "max":
        ranking = scores.amax(2)
    else:
        ranking = (weights if group_score == "softmax" else scores).sum(2)
    slots, counts = top_slots(ranking, lengths, k, newest=newest, forced=forced)
    held = weights.gather(3, slots[:, :, None].expand(-1, -1, weights.shape[2], -1))
    missed = (weights.sum(3) - held.sum(3)).clamp(min=0)
    return slots, counts, missed.masked_fill((lengths <= k)[..., None], 0)


def append(
    storage: torch.Tensor,
    new: torch.Tensor,
    slots: torch.Tensor,
    active: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
) -> None:
    """Write `new [B, K, Q, ...]` at `slots [B, K, Q]` of `storage [B, K, C, ...]`.

    The storage may be of any strides, in blocks, and packed with `starts`: C is then what a head has. Nothing
    is written for a slot outside [0, C), nor in rows that are not `active [B]`.
    """
    count = slots.shape[2]
    if 1 < count <= _FEW or (starts is not None and count > 1):
        for i in range(count):
            append(storage, new[:, :, i : i + 1], slots[:, :, i : i + 1], active, starts)
        return
    if starts is not None:
        rooms = starts.diff().view(*slots.shape[:2], 1)
        inside = slots.clamp(min=0).minimum(rooms - 1)
    else:
        inside = within(slots, capacity(storage))
    written = inside == slots
    if active is not None:
        written &= active[:, None, None]
    if count == 1:  # a decode step: the device is not looked at
        index = places(storage, inside) if starts is None else (0, 0, _first(starts, inside) + inside)
        written = written.view(*written.shape, *[1] * (new.dim() - 3))
        storage[index] = torch.where(written, new, storage[index])
    else:
        rows, heads, tokens = written.nonzero(as_tuple=True)
        within_row = _split(storage, slots[rows, heads, tokens])
        storage[rows, heads, *within_row] = new[rows, heads, tokens]


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
    """All that happens to one new token a row: stores, position, means, `lengths [B, K]` and `seen [B, K]`.

    It is written to the first free slot, or, where a head holds its limit (`limits`: of all, `[K]` or `[B,
    K]`), over the slot `lowest [B, K]`. Each of the stores gets its `new [B, K, 1, ...]` there, zero where
    that is None, and `positions [B, K, C]` the number of the token. `means` are pairs of a mean `[B, K, D]`
    float32 of all that has come and the new `[B, K, 1, D]`. Rows that are not `active [B]` stay as they are.
    Stores may be as `append` takes them. Returns the slots `[B, K, 1]`.
    """
    return write_token(
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


def write_token(
    write: Callable[..., None],
    stores: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    positions: torch.Tensor,
    lengths: torch.Tensor,
    seen: torch.Tensor,
    *,
    means: Sequence[tuple[torch.Tensor, torch.Tensor]],
    active: torch.Tensor | None,
    limits: int | torch.Tensor | None,
    lowest: torch.Tensor | None,
    starts: torch.Tensor | None,
) -> torch.Tensor:
    """`append_token`, with an `append` of another implementation."""
    counts = torch.ones_like(seen) if active is None else active[:, None].expand(seen.shape).long()
    slots = lengths.clone()
    if lowest is not None:
        assert limits is not None
        slots = torch.where(lengths < limits, lengths, lowest)
    slots = slots[..., None]
    for storage, new in (*stores, (positions, seen[..., None])):
        write(storage, or_zero(new, storage, slots), slots, active, starts=starts)
    lengths += counts * (slots[..., 0] == lengths)
    seen += counts
    for mean, vector in means:
        real = vector if active is None else vector.masked_fill(~active[:, None, None, None], 0)
        mean.copy_(running_mean(mean, real, counts[:, 0], seen[:, 0]))
    return slots


def or_zero(new: torch.Tensor | None, storage: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The numbers for `slots [B, K, Q]` of a storage: `new`, in its type; zero where that is None."""
    if new is None:
        return storage.new_zeros(()).expand(*slots.shape, *storage.shape[3:])
    return new.to(storage.dtype)


def compact(storage: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> None:
    """Copy `slots [B, K, S]` of `storage [B, K, C, ...]` to the first S slots of another storage, `out`.

    Their order is kept. A slot outside [0, C) becomes zeros.
    """
    target = torch.arange(slots.shape[2], device=slots.device).expand_as(slots)
    inside = within(slots, capacity(storage))
    kept = storage[places(storage, inside)]
    missing = (inside != slots).view(*slots.shape, *[1] * (kept.dim() - 3))
    out[places(out, target)] = kept.masked_fill(missing, 0)


def lowest(
    priority: torch.Tensor,
    lengths: torch.Tensor,
    *,
    positions: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
    newest: int = 0,
    oldest: int = 0,
) -> torch.Tensor:
    """The live slot `[B, K]` with the lowest `priority [B, K, T]`, of equal ones the first; else 0.

    Compared as float32, and 64 bits as float64. NaN is as high as infinity; so are slots whose `positions
    [B, K, T]` are below `oldest`, or among the last `newest` of `seen [B, K]` tokens.
    """
    ranks = priority.double() if priority.element_size() == 8 else priority.float()
    stays = ranks.isnan() | ~below(lengths, ranks.shape[2])
    if positions is not None:
        assert seen is not None
        stays |= (positions >= (seen - newest)[..., None]) | (positions < oldest)
    return ranks.masked_fill(stays, math.inf).argmin(2)


def running_mean(
    mean: torch.Tensor, new: torch.Tensor, counts: torch.Tensor, seen: torch.Tensor
) -> torch.Tensor:
    """The mean `[B, K, D]` float32 after `counts [B]` more vectors `new [B, K, Q, D]`, zero beyond.

    `seen [B]`: all vectors so far, these included.
    """
    total = seen.clamp(min=1).view(-1, 1, 1)
    return mean + (new.sum(2, dtype=torch.float32) - counts.view(-1, 1, 1) * mean) / total


def widen_bounds(
    low: torch.Tensor,
    high: torch.Tensor,
    keys: torch.Tensor,
    slots: torch.Tensor,
    counts: torch.Tensor,
    page: int,
) -> None:
    """Widen the bounds `[B, K, N, D]` of pages, in place, so that they hold new keys `[B, K, Q, D]`.

    The first `counts [B]` keys of a row stand in consecutive slots from `slots[:, :, 0]` on, of `[B, K, Q]`.
    A page whose first slot is among them begins anew. Other pages, and pages outside [0, N), are not touched.
    """
    first = slots[:, :, :1]
    pages = torch.arange(low.shape[2], device=keys.device) * page  # their first slots
    begins = (pages >= first)[..., None]
    touched = ((pages + page > first) & (pages < first + counts[:, None, None]))[..., None]
    index = slots // page
    real = below(counts, keys.shape[2])[:, None] & (index >= 0) & (index < low.shape[2])
    index = within(index, low.shape[2])[..., None].expand(keys.shape)
    for bound, nothing, reduce in ((low, math.inf, "amin"), (high, -math.inf, "amax")):
        numbers = keys.to(bound.dtype).masked_fill(~real[..., None], nothing)
        held = bound.masked_fill(begins, nothing)
        bound.copy_(torch.where(touched, held.scatter_reduce(2, index, numbers, reduce), bound))


def page_scores(
    query: torch.Tensor, low: torch.Tensor, high: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """The largest product `[B, K, G, N]` float32 of a query with any key within a page's bounds.

    `query [B, K, G, D]`; `low`, `high [B, K, N, D]`; `lengths [B, K]`: pages below are live, the others get
    -inf.
    """
    query, live = query.float(), below(lengths, low.shape[2])
    low, high = (bound.float().masked_fill(~live[..., None], 0).transpose(2, 3) for bound in (low, high))
    scores = torch.matmul(query.clamp(min=0), high) + torch.matmul(query.clamp(max=0), low)
    return scores.masked_fill(~live[:, :, None], -math.inf)


def slots_of_pages(
    pages: torch.Tensor, counts: torch.Tensor, page: int, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The live slots of the first `counts [B, K]` of `pages [B, K, N]`, and how many there are `[B, K]`.

    Slots `[B, K, N * page]`: live ones first, in any order; the last page of a row may be begun only. A page
    without a live slot, or outside the row, adds none.
    """
    taken = below(counts, pages.shape[2]) & (pages >= 0) & (pages < -(-lengths // page)[..., None])
    ordered = pages.masked_fill(~taken, torch.iinfo(torch.int64).max // page - 1).sort(2).values
    slots = (ordered[..., None] * page + torch.arange(page, device=pages.device)).flatten(2)
    live = slots < lengths[..., None]
    return slots * live, live.sum(2)


def unpacked(stored: torch.Tensor, starts: torch.Tensor, shape: tuple[int, ...], size: int) -> torch.Tensor:
    """A padded copy `[B, K, T, ...]` of a packed `[1, 1, S, ...]`, with `shape` (B, K) and T = `size`.

    Beyond what a head has, numbers of others.
    """
    slots = torch.arange(size, device=stored.device).expand(*shape, size)
    return stored[0, 0, within(_first(starts, slots) + slots, stored.shape[2])]


def _first(starts: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The packed slot `[B, K, 1]` at which each head of `slots [B, K, S]` begins."""
    return starts[:-1].view(*slots.shape[:2], 1)


def readable(
    slots: torch.Tensor,
    counts: torch.Tensor,
    lengths: torch.Tensor,
    far: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The slots `[B, K, S + F]`, 0 where not read, and a mask of those read: live, and before their count."""
    real = below(counts, slots.shape[2])
    if far is not None:
        slots, real = torch.cat([slots, far[0]], 2), torch.cat([real, below(far[1], far[0].shape[2])], 2)
    live = real & (slots >= 0) & (slots < lengths[..., None])
    return slots * live, live


def within(index: torch.Tensor, size: int) -> torch.Tensor:
    """The index brought into [0, size)."""
    return index.clamp(0, size - 1)


def below(lengths: torch.Tensor, size: int) -> torch.Tensor:
    """`[..., size]` bool: true at places below the length."""
    return torch.arange(size, device=lengths.device) < lengths[..., None]


def capacity(storage: torch.Tensor) -> int:
    """The number of slots in the storage, in blocks or not."""
    return storage.shape[2] * storage.shape[3] if storage.dim() == 5 else storage.shape[2]


def places(storage: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The index that makes `storage[...]` the slots `[B, K, S]`, in blocks or not."""
    rows = torch.arange(slots.shape[0], device=slots.device)[:, None, None]
    heads = torch.arange(slots.shape[1], device=slots.device)[:, None]
    return rows, heads, *_split(storage, slots)


def _split(storage: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A slot's place in blocked storage: block, and slot within. Elsewhere: the slot."""
    return (slots // storage.shape[3], slots % storage.shape[3]) if storage.dim() == 5 else (slots,)


def blend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    live: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    far: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of `query [B, K, G, D]` over `keys, values [B, K, S, D]` where `live [B, K, S]`.

    The last of them are those of `far`, as `readable` has put them. Returns the output and the weights
    `[B, K, G, S]`. Values must be finite where not live.
    """
    if far is None:
        logits = _logits(query, keys, scale, softcap)
    else:
        near = keys.shape[2] - far[0].shape[2]
        parts = (query, keys[:, :, :near]), (far[2].to(query.dtype), keys[:, :, near:])
        logits = torch.cat([_logits(q, k, scale, softcap) for q, k in parts], 3)
    weights = _softmax(logits, live[:, :, None], sinks)
    return torch.matmul(weights.to(values.dtype), values), weights


def with_tail(output: torch.Tensor, weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The output `[B, K, G, D]`, a share `weight [B, K, G]` of it replaced by `value [B, K, D]`."""
    weight = weight[..., None]
    return ((1 - weight) * output.float() + weight * value[:, :, None].float()).to(output.dtype)


def mass_by_slot(weights: torch.Tensor, slots: torch.Tensor | None, size: int, by_head: bool) -> torch.Tensor:
    """The mass `[B, K, T]`, or `[B, K, G, T]` `by_head`, from weights `[B, K, G, S]` of chosen slots `[B, K,
    S]`, or of all.
    """
    mass = weights if by_head else weights.mean(2)
    if slots is None:
        return mass
    if by_head:
        slots = slots[:, :, None].expand(mass.shape)
    return mass.new_zeros(*mass.shape[:-1], size).scatter_add_(-1, slots, mass)


def kept_mass(
    weights: torch.Tensor,
    slots: torch.Tensor | None,
    size: int,
    by_head: bool,
    add_to: torch.Tensor | None,
) -> torch.Tensor | None:
    """`mass_by_slot`; None, if it is added to a tensor instead."""
    mass = mass_by_slot(weights, slots, size, by_head)
    if add_to is None:
        return mass
    add_to += mass
    return None


def _logits(query: torch.Tensor, keys: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    logits = torch.matmul(query * scale, keys.transpose(-1, -2)).float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _softmax(logits: torch.Tensor, visible: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the last dimension; exactly zero where not visible, also where nothing is."""
    logits = torch.where(visible, logits, _LOWEST)  # on a CPU half the time of `masked_fill`
    if sinks is None:
        return torch.softmax(logits, -1) * visible.any(-1, keepdim=True)
    column = sinks.float().view(*sinks.shape, *[1] * (logits.dim() - 3)).expand(*logits.shape[:-1], 1)
    return torch.softmax(torch.cat([logits, column], -1), -1)[..., :-1].masked_fill(~visible, 0)
