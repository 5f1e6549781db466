"""Where slots stand in storage of any layout, and which of them may be read."""

import torch


def unpacked(stored: torch.Tensor, starts: torch.Tensor, shape: tuple[int, ...], size: int) -> torch.Tensor:
    """A padded copy `[B, K, T, ...]` of a packed `[1, 1, S, ...]`, with `shape` (B, K) and T = `size`.

    Beyond what a head has, numbers of others.
    """
    slots = torch.arange(size, device=stored.device).expand(*shape, size)
    return stored[0, 0, within(first_of(starts, slots) + slots, stored.shape[2])]


def first_of(starts: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
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


def index_of(storage: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The index that makes `storage[...]` the slots `[B, K, S]`, in blocks or not."""
    rows = torch.arange(slots.shape[0], device=slots.device)[:, None, None]
    heads = torch.arange(slots.shape[1], device=slots.device)[:, None]
    return rows, heads, *split_of(storage, slots)


def split_of(storage: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A slot's place in blocked storage: block, and slot within. Elsewhere: the slot."""
    return (slots // storage.shape[3], slots % storage.shape[3]) if storage.dim() == 5 else (slots,)
