"""Twilight: of the tokens another policy selects, read the fewest that hold p of the attention.

arXiv:2502.02770.

The one idea: a fixed number of tokens is too many for a peaked attention and too few for a flat one. So
estimate the weights of the selected tokens with keys in 4 bits, and read the smallest set whose weights sum
to p.

Paper and code differ. The authors' kernel searches its threshold between 0 and the weight of token 0, which
it takes for the sink: where another token dominates it keeps more than the smallest set, and where token 0
was not selected it prunes nothing. This is the paper's rule.

Deviations: a query group reads one set: the union of its heads' smallest sets, or the smallest set of their
mean weights. A tail of `inner` (SparQ's mean value) stays as `inner` weighs it: the tokens pruned here are
left out. On a CPU the tokens pruned are fetched all the same, because shapes do not depend on data; a GPU's
kernels stop at the count.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch

from kvsieve import KEYS, Column, KVView, NewTokens, Policy, Positions, Selection, UserError, Wrapper, ops

from . import budgets


@dataclass(frozen=True)
class Twilight(Wrapper):
    """Reads the fewest of `inner`'s tokens that hold `p` of the estimated attention."""

    inner: Policy
    p: float = 0.85  # share of the attention weight
    bits: Literal[4] = 4  # of the estimate's keys
    group_score: Literal["union", "mean"] = "union"  # how a query group agrees

    name: ClassVar[str] = "twilight"
    paper: ClassVar[str] = "arXiv:2502.02770"

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise UserError(f"twilight.p must be above 0 and at most 1, not {self.p}")
        if self.bits != 4:
            raise UserError(f"twilight.bits must be 4, not {self.bits}")
        if self.group_score not in ("union", "mean"):
            raise UserError(f"twilight.group_score must be 'union' or 'mean', not {self.group_score!r}")
        if self.inner.drops:
            raise UserError(
                f"twilight.inner is {self.inner.name}, which drops tokens: give a policy that keeps all, "
                "such as dense, quest or sparq"
            )
        if self.inner.positions is not Positions.TEXT:
            raise UserError(
                f"twilight.inner is {self.inner.name}, which turns queries or keys, so that weights cannot "
                "be estimated: give one that leaves them as they are, such as dense, quest or sparq"
            )

    @property
    def own_columns(self) -> Mapping[str, Column]:
        return {"codes": (torch.uint8, "D/2"), "range": (KEYS, 2)}

    @property
    def any_order(self) -> bool:
        return self.inner.any_order

    def check(self, head_size: int) -> None:
        super().check(head_size)
        if head_size % 2:
            raise UserError(f"twilight packs two numbers in a byte: heads of {head_size} channels are odd")

    def on_append(self, kv: KVView, new: NewTokens) -> None:
        super().on_append(kv, new)
        codes, span = ops.quantised(new.keys)
        kv.write(self.own("codes"), new, codes)
        kv.write(self.own("range"), new, span)

    def select(self, query: torch.Tensor, kv: KVView) -> Selection | None:
        selection = super().select(query, kv)
        scores = ops.code_scores(query, kv, self.own("codes"), self.own("range"), selection)
        weights = ops.slot_weights(scores, kv)
        if self.group_score == "mean":
            weights = weights.mean(2, keepdim=True)
        if selection is None:
            return Selection(*ops.top_p(weights, kv.lengths, self.p))
        places, counts = ops.top_p(weights, selection.counts, self.p)
        return selection._replace(slots=selection.slots.gather(2, places), counts=counts)

    @classmethod
    def for_compression(
        cls,
        ratio: float,
        head_size: int,
        context: int,
        inner: Callable[[float], Policy] | None = None,
        itemsize: int = 2,
    ) -> Self:
        """Read `ratio` where the attention is flat, and else less.

        So `inner` gets what 4-bit keys of all tokens that its bytes could buy leave.
        """
        if inner is None:
            raise UserError("twilight needs the policy `inner` to be asked for a compression")
        codes = (head_size // 2 + 2 * itemsize) / (2 * budgets.vector(head_size, itemsize))
        try:
            return cls(inner(ratio / (1 + codes)))
        except UserError as error:
            raise UserError(f"twilight.inner, at 1/{1 + codes:.2f} of that: {error}") from None

    @classmethod
    def for_tokens(
        cls, tokens: int, head_size: int, context: int, inner: Callable[[int], Policy] | None = None
    ) -> Self:
        """Let `inner` select so many; where attention is peaked fewer are read."""
        if inner is None:
            raise UserError("twilight needs the policy `inner` to be asked for tokens")
        return cls(inner(tokens))
