"""Write new tokens, running means and bounds of pages, and move the slots that stay."""

import math
from collections.abc import Callable, Sequence

import torch

from .places import below, capacity, first_of, index_of, split_of, within

FEW = 8  # tokens written one by one: a decode step may write so many and not look at the device


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
    if 1 < count <= FEW or (starts is not None and count > 1):
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
        index = index_of(storage, inside) if starts is None else (0, 0, first_of(starts, inside) + inside)
        written = written.view(*written.shape, *[1] * (new.dim() - 3))
        storage[index] = torch.where(written, new, storage[index])
    else:
        rows, heads, tokens = written.nonzero(as_tuple=True)
        within_row = split_of(storage, slots[rows, heads, tokens])
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
    kept = storage[index_of(storage, inside)]
    missing = (inside != slots).view(*slots.shape, *[1] * (kept.dim() - 3))
    out[index_of(out, target)] = kept.masked_fill(missing, 0)


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
