"""SnapKV: the end of a prompt knows which of its tokens will be needed (arXiv:2404.14469).

The one idea: heads attend to the same prompt tokens throughout a generation, and the last queries of the
prompt already show which. Let these vote once, keep the winners and their neighbours, drop the rest, and
never drop again.

Choices between the repositories, which differ (window / budget / kernel / pooling: 32 / 2048 / 5 / avg and
64 / 320 / 5 / avg in the authors' code, 32 / - / 7 / max in the paper):

- The budget counts the window, as everywhere. Generated tokens come on top.
- One set per KV head, the votes of its query group averaged before pooling (KVCache-Factory, kvpress); the
  authors store a set, and a copy of the keys, per query head. `group="max"` lets the loudest head of a group
  decide.
- Average pooling divides by the kernel at the edges too. Maximum pooling makes exact ties; the oldest stays.
- Every turn of several tokens in a conversation is a prompt: what was kept and generated before is cut
  again, and pooling then runs over neighbours in the cache.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvsieve import KVView

from .window_votes import WindowVotes


@dataclass(frozen=True)
class SnapKV(WindowVotes):
    """Keeps the window and the `budget - window` earlier tokens with the most votes; then the cache grows."""

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "arXiv:2404.14469"

    @property
    def keeps(self) -> int:
        return self.budget

    def cut(self, kv: KVView) -> torch.Tensor:
        return self._best(kv, self._votes(kv), self.budget - self.window)
