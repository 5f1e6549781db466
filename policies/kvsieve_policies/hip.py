"""HiP: find the tokens to read in a tree of chunks, each judged by one key (arXiv:2406.09827).

The one idea: neighbouring keys are alike, so that one key in the middle of a chunk speaks for it. Cut the
context into 2 k chunks, ask the key in the middle of each, keep the k best and halve them, until single
tokens are left: about `2 k log2(T / k)` keys are asked instead of T. And neighbouring queries are alike: the
tokens found are read for `refresh` steps.

`k` does not count the first `sinks` and the newest `window` tokens, which are always read. Between searches
the window moves on: a token that leaves it is not read before the next search, unless all are, because the
row had no more than `sinks + k + window` tokens at the last one.

Written from the paper; the licence of the authors' code forbids its use here, and none of it was read. The
tree is of tokens, as in the paper's definition: their kernels keep blocks of keys and search for blocks of
queries.

Deviations: the paper searches per query head. Here a query group reads one set, and `group_score` says how it
judges a key: by its largest or mean product. The prompt is attended densely; the paper searches for blocks of
its queries, too. The paper leaves the first layers dense: see `dense_layers`. With `refresh` above 1, steps
are not alike: they run from Python, and the search is really left out. With 1, a step can be a CUDA graph.
"""

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch

from kvsieve import KVView, Policy, Selection, Shape, UserError

from . import budgets


@dataclass(frozen=True)
class HiP(Policy):
    """Reads k tokens that a tree search finds, the first `sinks` and the newest `window`."""

    k: int = 512
    sinks: int = 16
    window: int = 256
    refresh: int = 8  # steps from one search to the next
    group_score: Literal["max", "mean"] = "max"  # how a query group judges a key

    name: ClassVar[str] = "hip"
    paper: ClassVar[str] = "arXiv:2406.09827"

    def __post_init__(self) -> None:
        for field, least in (("k", 1), ("sinks", 0), ("window", 0), ("refresh", 1)):
            if getattr(self, field) < least:
                raise UserError(f"hip.{field} must be at least {least}, not {getattr(self, field)}")
        if self.group_score not in ("max", "mean"):
            raise UserError(f"hip.group_score must be 'max' or 'mean', not {self.group_score!r}")

    @property
    def summaries(self) -> Mapping[str, Shape]:
        return {"found": (torch.int32, self.k), "counts": torch.int32} if self.refresh > 1 else {}

    @property
    def capturable(self) -> bool:
        return self.refresh == 1

    def select(self, query: torch.Tensor, kv: KVView) -> Selection | None:
        age, always = self._age(kv), self.sinks + self.window
        most = always + self.k + age  # tokens of a row that left nothing out at the search
        if kv.slots_in_use <= most:
            return None
        if age == 0:
            found, counts = self._search(query, kv), torch.full_like(kv.lengths, self.k)
        else:
            found, counts = kv["found"].long(), kv["counts"].long()
        place = torch.arange(most, device=query.device).expand(*kv.lengths.shape, -1)
        newest = kv.lengths[..., None] - self.window + place[..., : self.window]
        chosen = torch.cat([place[..., : self.sinks], newest, found, place[..., :age]], 2)
        everything = kv.lengths <= most
        slots = torch.where(everything[..., None], place, chosen)
        return Selection(slots, torch.where(everything, kv.lengths, always + counts))

    def on_select(self, kv: KVView, selection: Selection | None) -> None:
        """Keep what was found; a wrapper may have chosen from it."""
        if selection is None or self.refresh == 1 or self._age(kv) > 0:
            return
        slots = selection.slots
        read = torch.arange(slots.shape[2], device=slots.device) < selection.counts[..., None]
        found = read & (slots >= self.sinks) & (slots < (kv.lengths - self.window)[..., None])
        order = (~found).to(torch.uint8).argsort(dim=2, stable=True)[..., : self.k]
        kv["found"], kv["counts"] = slots.gather(2, order), found.sum(2)

    def _age(self, kv: KVView) -> int:
        """Steps since the search, 0 at one."""
        return (kv.steps - 1) % self.refresh

    def _search(self, query: torch.Tensor, kv: KVView) -> torch.Tensor:
        """The k slots `[B, K, k]` found between sinks and window, in rows that have more."""
        between = (kv.lengths - self.sinks - self.window).clamp(min=0)[..., None]
        edges = torch.arange(2 * self.k + 1, device=query.device) * between // (2 * self.k) + self.sinks
        first, size = edges[..., :-1], edges.diff(dim=2)
        first, size = self._best(query, kv, first, size, size > 0)
        longest = math.ceil((kv.slots_in_use - self.sinks - self.window) / (2 * self.k))
        for _ in range((longest - 1).bit_length()):
            half = size // 2
            open_rows = (half > 0).any(2, keepdim=True)  # in others each chunk is one token
            first, size = torch.cat([first + half, first], 2), torch.cat([size - half, half], 2)
            first, size = self._best(query, kv, first, size, (size > 0) & open_rows)
        return first

    def _best(
        self, query: torch.Tensor, kv: KVView, first: torch.Tensor, size: torch.Tensor, asked: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The k best of 2 k chunks `[B, K, 2 k]`: first slots and sizes. Those of no token come last."""
        order = (~asked).to(torch.uint8).argsort(dim=2, stable=True)
        first, size, counts = first.gather(2, order), size.gather(2, order), asked.sum(2)
        keys = kv.at("keys", first + size // 2, counts)
        products = torch.matmul(query.float(), keys.float().transpose(2, 3))
        score = products.amax(2) if self.group_score == "max" else products.mean(2)
        score = score.masked_fill(size == 0, -torch.inf)
        best = score.topk(self.k, dim=2).indices
        return first.gather(2, best), size.gather(2, best)

    @classmethod
    def for_compression(cls, ratio: float, head_size: int, context: int) -> Self:
        """Spend a quarter on the window, and what the search leaves on k.

        Counted are the keys asked, over `refresh` steps, and the list that is read between, 4 k + 4 bytes.
        """
        vector, whole = budgets.vector(head_size), budgets.dense(head_size, context)
        budget, refresh = int(ratio * context), cls.refresh
        window, sinks = budget // 4, min(cls.sinks, budget // 16)

        def read(k: int, always: int) -> int:
            """Bytes of a step."""
            levels = 1 + max(0, math.ceil(math.log2((context - always) / (2 * k))))
            asked, listed = 2 * k * levels * vector, (4 * k + 4) * (refresh - 1)
            return math.ceil((asked + listed) / refresh) + 2 * (always + k) * vector

        most = range(1, max(1, budget) + 1)
        k = bisect.bisect_right(most, ratio * whole, key=lambda k: read(k, sinks + window))
        if k < 1:
            raise budgets.too_small("hip", read(1, 0), whole)
        return cls(k=k, sinks=sinks, window=window, refresh=refresh)

    @classmethod
    def for_tokens(cls, tokens: int, head_size: int, context: int) -> Self:
        """Spend a quarter on the window, a sixteenth on sinks, and the rest on k."""
        window, sinks = tokens // 4, min(cls.sinks, tokens // 16)
        return cls(k=tokens - window - sinks, sinks=sinks, window=window)
