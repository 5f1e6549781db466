"""Everything that happens to the one new token of a step, in one kernel."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .storage import first_slot, head_start, slot_strides, strides


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
    """`reference.append_token`: a program for each row and KV head, which counts its own tokens."""
    rows, heads = lengths.shape
    slots = torch.empty(rows, heads, 1, dtype=torch.int64, device=lengths.device)
    each = limits.expand(rows, heads) if isinstance(limits, torch.Tensor) else None
    _append_token[(rows * heads,)](
        stores=tuple(store for store, _ in stores),
        places=tuple(tuple(slot_strides("", store).values()) for store, _ in stores),
        news=tuple(new for _, new in stores),
        new_places=tuple(_places(new) for _, new in stores),
        positions=positions,
        **strides("position", positions, "row head slot"),
        starts=starts,
        capacity=positions.shape[2],
        lengths=lengths,
        seen=seen,
        limit=limits if isinstance(limits, int) else 0,
        limits=each,
        limit_row=0 if each is None else each.stride(0),
        limit_head=0 if each is None else each.stride(1),
        lowest=lowest,
        active=active,
        active_row=0 if active is None else active.stride(0),
        means=tuple(mean for mean, _ in means),
        vectors=tuple(vector for _, vector in means),
        vector_places=tuple(_places(vector) for _, vector in means),
        slots=slots,
        heads=heads,
        WIDTHS=tuple(1 if store.dim() == 3 else store.shape[-1] for store, _ in stores),
        MEAN_WIDTHS=tuple(mean.shape[2] for mean, _ in means),
        num_warps=1,
    )
    return slots


def _places(new: torch.Tensor | None) -> tuple[int, int, int]:
    """The strides of rows, heads and channels of `[B, K, 1]` or `[B, K, 1, D]`."""
    if new is None:
        return 0, 0, 0
    return new.stride(0), new.stride(1), new.stride(3) if new.dim() == 4 else 0


@triton.jit
def _load(vector, place, pair, heads, WIDTH: tl.constexpr):
    d = tl.arange(0, triton.next_power_of_2(WIDTH))
    return tl.load(vector + head_start(pair, heads, place[0], place[1]) + d * place[2], mask=d < WIDTH)


@triton.jit(do_not_specialize=["capacity", "limit"])
def _append_token(
    stores,  # [B, K, C, D], in blocks or packed, or columns [B, K, C]
    places,  # the strides of each: row, head, block, slot, channel; and the slots in a block
    news,  # what each gets: [B, K, 1, D] or [B, K, 1]; None: zero
    new_places,  # the strides of each: row, head, channel
    positions,  # [B, K, C]
    position_row,
    position_head,
    position_slot,
    starts,  # [B * K + 1] of packed stores, or None
    capacity,
    lengths,  # [B, K]
    seen,  # [B, K]
    limit,
    limits,  # [B, K] or None: `limit` for all heads
    limit_row,
    limit_head,
    lowest,  # [B, K], or None: no head is full
    active,  # [B] or None
    active_row,
    means,  # [B, K, D] float32 each
    vectors,  # [B, K, 1, D] each
    vector_places,  # as of `news`
    slots,  # [B, K]
    heads,
    WIDTHS: tl.constexpr,
    MEAN_WIDTHS: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    length, token = tl.load(lengths + pair), tl.load(seen + pair)
    slot = length
    if lowest is not None:
        if limits is not None:
            limit = tl.load(limits + head_start(pair, heads, limit_row, limit_head))
        slot = tl.where(length < limit, length, tl.load(lowest + pair))
    tl.store(slots + pair, slot)
    if active is not None:
        if tl.load(active + pair // heads * active_row) == 0:
            return
    if starts is not None:
        capacity = tl.load(starts + pair + 1) - tl.load(starts + pair)
    inside = (slot >= 0) & (slot < capacity)
    for i in tl.static_range(len(stores)):
        row, head, block, within, channel, n = places[i]
        d = tl.arange(0, triton.next_power_of_2(WIDTHS[i]))
        number = stores[i].dtype.element_ty
        if news[i] is None:
            value = tl.zeros([triton.next_power_of_2(WIDTHS[i])], number)
        else:
            value = _load(news[i], new_places[i], pair, heads, WIDTHS[i]).to(number)
        start = first_slot(starts, pair, heads, row, head, block) + slot // n * block + slot % n * within
        tl.store(stores[i] + start + d * channel, value, mask=d < tl.where(inside, WIDTHS[i], 0))
    start = first_slot(starts, pair, heads, position_row, position_head, position_slot)
    one = tl.arange(0, 1)  # Triton's interpreter masks no single number
    tl.store(positions + start + slot * position_slot + one, token + one, mask=one < tl.where(inside, 1, 0))
    for i in tl.static_range(len(means)):
        d = tl.arange(0, triton.next_power_of_2(MEAN_WIDTHS[i]))
        vector = _load(vectors[i], vector_places[i], pair, heads, MEAN_WIDTHS[i]).to(tl.float32)
        mean = means[i] + pair * MEAN_WIDTHS[i] + d
        before = tl.load(mean, mask=d < MEAN_WIDTHS[i])
        tl.store(mean, before + (vector - before) / (token + 1).to(tl.float32), mask=d < MEAN_WIDTHS[i])
    tl.debug_barrier()  # every thread has read the length and the count
    tl.store(lengths + pair, length + (slot == length).to(tl.int64))
    tl.store(seen + pair, token + 1)
