"""Key layouts: how the keys of one layer lie in memory.

- `single`, `[B, K, C, D]`: token-major, a token's key is contiguous.
- `double`, `[B, K, C, D]` and `[B, K, D, C]`: with a channel-major copy, in which a channel of all tokens is
  contiguous, too.
- `blocked`, `[B, K, C/n, D, n]`: one copy, channel-major inside blocks of n tokens: a channel's piece of a
  block fills whole memory sectors.
- `auto`: of these the fastest for a policy that reads by channels, which depends on the device.

The ops see all of them slots first, as strided views: `[B, K, T, D]`, or `[B, K, T/n, n, D]` of a blocked
store. The key of slot t is at `(t // n, t % n)` of such a view; nothing else tells the layouts apart.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..errors import UserError, unknown

KINDS = ("single", "double", "blocked")
AUTO = "auto"
BLOCKS = (16, 32, 64)
_ALIGNED = 128  # slots: a channel of the channel-major copy is whole pieces, which start on memory sectors

TOKENS, CHANNELS, BLOCKED = "keys", "keys_by_channel", "keys_in_blocks"
KEY_STORES = (TOKENS, CHANNELS, BLOCKED)


@dataclass(frozen=True)
class KeyLayout:
    """Which layout a policy wants its keys in. Raises UserError for one that does not exist."""

    kind: Literal["auto", "single", "double", "blocked"] = "single"
    block: int = 16  # tokens in a block of "blocked"

    def __post_init__(self) -> None:
        if self.kind not in (AUTO, *KINDS):
            raise UserError(unknown("key layout", self.kind, (AUTO, *KINDS)))
        if self.block not in BLOCKS:
            raise UserError(f"a block of keys holds {', '.join(map(str, BLOCKS))} tokens, not {self.block}")

    def on(self, device: torch.device) -> KeyLayout:
        """The layout itself, where this one is "auto": `double` on a CPU, `blocked` on any other device.

        On a CPU `double` was the fastest in every measurement (docs/performance.md). On a GPU `blocked` reads
        almost as few memory sectors, and holds keys once, where memory is what is short.
        """
        if self.kind != AUTO:
            return self
        return replace(self, kind="double" if device.type == "cpu" else "blocked")

    def stores(self, like: torch.Tensor, capacity: int) -> dict[str, torch.Tensor]:
        """Zero-filled storage for `capacity` keys like `like [B, K, Q, D]`; not of "auto"."""
        rows, heads, _, size = like.shape
        empty: dict[str, dict[str, tuple[int, ...]]] = {
            "single": {TOKENS: (0, size)},
            "double": {TOKENS: (0, size), CHANNELS: (size, 0)},
            "blocked": {BLOCKED: (0, size, self.block)},
        }
        shapes = empty[self.kind].items()
        return {name: resized(name, like.new_empty(rows, heads, *shape), capacity) for name, shape in shapes}


def resized(name: str, store: torch.Tensor, capacity: int) -> torch.Tensor:
    """A zero-filled store in the layout of `store`, for `capacity` slots."""
    shape = list(store.shape)
    if name == CHANNELS:
        shape[3] = _ceil(capacity, _ALIGNED) * _ALIGNED
    elif name == BLOCKED:
        shape[2] = _ceil(capacity, shape[4])
    else:
        shape[2] = capacity
    return store.new_zeros(shape)


def slots_first(name: str, store: torch.Tensor) -> torch.Tensor:
    """The store as the ops take it: a view `[B, K, C, ...]`, or `[B, K, C/n, n, D]` of a blocked one."""
    if name == CHANNELS:
        return store.transpose(2, 3)
    return store.transpose(3, 4) if name == BLOCKED else store


def first_slots(name: str, store: torch.Tensor, used: int) -> torch.Tensor:
    """`slots_first`, cut to the slots below `used`, or to the blocks that hold them."""
    view = slots_first(name, store)
    return view[:, :, : _ceil(used, view.shape[3]) if name == BLOCKED else used]


def by_token(keys: torch.Tensor, used: int) -> torch.Tensor:
    """A view that the ops take as `[B, K, T, D]`; blocks are copied apart."""
    return keys if keys.dim() == 4 else keys.flatten(2, 3)[:, :, :used]


def _ceil(count: int, unit: int) -> int:
    return -(-count // unit)
