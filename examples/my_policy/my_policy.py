"""Keep the keys with the smallest norms (arXiv:2406.11430): a policy in a package of its own."""

from dataclasses import dataclass
from typing import ClassVar

import torch

import kvsieve


@dataclass(frozen=True)
class KeyNorm(kvsieve.Policy):
    """Keeps `budget` tokens per KV head: the newest `recent`, and those whose keys are shortest."""

    budget: int = 256  # tokens kept per KV head, the current one included
    recent: int = 16  # of these the newest, always kept

    name: ClassVar[str] = "key_norm"
    paper: ClassVar[str] = "arXiv:2406.11430"
    columns = {"norm": torch.float32}  # one number per cached token; the framework moves it with the token

    @property
    def keeps(self) -> int:
        return self.budget

    def on_append(self, kv: kvsieve.KVView, new: kvsieve.NewTokens) -> None:
        kv.write("norm", new, new.keys.float().norm(dim=-1))

    def priority(self, kv: kvsieve.KVView) -> torch.Tensor:  # the lowest goes when storage is full
        return (-kv["norm"]).masked_fill(kv.newest(self.recent), torch.inf)

    @classmethod
    def for_compression(cls, ratio: float, head_size: int, context: int) -> "KeyNorm":
        budget = round(ratio * context)
        return cls(budget=budget, recent=max(1, budget // 8))


@kvsieve.hookimpl
def register_policies(register):
    register(KeyNorm)
