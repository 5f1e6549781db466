"""Quest: read the pages of the cache that can matter most to the query (arXiv:2406.10774).

The one idea: the smallest and the largest number of every channel among a page's keys bound each product of
the query with one of them from above, by the sum of `max(q * low, q * high)`. Read the bounds of all pages,
then the pages with the highest ones whole.

Paper and code differ. The authors' kernels always read the newest page, counted among the `pages`; their
evaluation code forces none, so that the current token may be left out, and takes at least three pages:
`newest_page=False, floor=3`. Both leave layers 0 and 1 dense: see `dense_layers`.

Deviations: their code chooses pages per query head. Here a query group reads one set, and `group_score` says
how the heads' bounds rank it: by the largest or by the mean (the paper has no groups). The last page of a
row is read as far as it is filled.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch

from kvsieve import KEYS, Column, KVView, NewTokens, Paged, Policy, Selection, UserError, ops

from . import budgets


@dataclass(frozen=True)
class Quest(Policy):
    """Reads `pages` pages, chosen by channel-wise bounds of their keys."""

    pages: int = 64  # read per step, the newest included
    page: int = 16  # tokens in each
    group_score: Literal["max", "mean"] = "max"  # how a query group ranks pages
    newest_page: bool = True  # read it always
    floor: int = 1  # pages read at least, whatever `pages` says

    name: ClassVar[str] = "quest"
    paper: ClassVar[str] = "arXiv:2406.10774"

    def __post_init__(self) -> None:
        for field in ("pages", "page", "floor"):
            if getattr(self, field) < 1:
                raise UserError(f"quest.{field} must be at least 1, not {getattr(self, field)}")
        if self.group_score not in ("max", "mean"):
            raise UserError(f"quest.group_score must be 'max' or 'mean', not {self.group_score!r}")

    @property
    def columns(self) -> Mapping[str, Column]:
        bound = Paged((KEYS, "D"), self.page)
        return {"low": bound, "high": bound}

    def on_append(self, kv: KVView, new: NewTokens) -> None:
        ops.widen_bounds(kv, "low", "high", new)

    def select(self, query: torch.Tensor, kv: KVView) -> Selection | None:
        most = max(self.pages, self.floor)
        if kv.slots_in_use <= most * self.page:
            return None  # nothing to leave out
        bounds = ops.page_scores(query, kv, "low", "high")
        ranking = bounds.amax(2) if self.group_score == "max" else bounds.mean(2)
        pages, counts = ops.top_pages(ranking, kv, most, self.page, newest=int(self.newest_page))
        return Selection(*ops.slots_of_pages(pages, counts, kv, self.page))

    @classmethod
    def for_compression(cls, ratio: float, head_size: int, context: int, page: int | None = None) -> Self:
        """Spend what the bounds leave on pages: bounds cost `1 / page` of dense attention's bytes.

        Pages are of 16 tokens, or larger where the bounds would take more than half.
        """
        page = page or max(16, math.ceil(2 / ratio))
        vector = budgets.vector(head_size)

        def least(page: int) -> int:
            """Bytes of the bounds and one page."""
            return 2 * vector * (math.ceil(context / page) + page)

        left = ratio * budgets.dense(head_size, context) - least(page)
        if left < 0:
            smallest = min(map(least, range(1, context + 1)))
            raise budgets.too_small("quest", smallest, budgets.dense(head_size, context))
        return cls(pages=1 + int(left / (2 * vector * page)), page=page)

    @classmethod
    def for_tokens(cls, tokens: int, head_size: int, context: int, page: int = 16) -> Self:
        """Read as many whole pages as that is; the newest may not be full."""
        if tokens < page:
            raise UserError(f"quest reads whole pages: at least {page} tokens are needed")
        return cls(pages=tokens // page, page=page)
