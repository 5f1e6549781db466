"""Log-probabilities of a given text, fed through the decode path so that the policy acts on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from transformers import PreTrainedModel

from .cache.kv_cache import KVCache
from .errors import UserError
from .loop import Decoding, Runner, policy_of
from .plans import Segments
from .policy import Policy
from .prompts import Prompts, token_lists
from .reading import Begun, Reader, check_positions
from .sampling import Given


def score(
    model: PreTrainedModel,
    prompts: Prompts,
    continuations: Prompts,
    policy: Policy | None = None,
    *,
    prefill_chunk: int | None = None,
    segments: Segments | None = None,
    cache: KVCache | None = None,
    eager: bool = False,
) -> list[torch.Tensor]:
    """Natural-log probability of every token of `continuations[b]` after `prompts[b]`.

    Returns one float32 tensor a row.

    The tokens are fed one at a time through the decode path, so that the policy acts on all but the first.
    Both arguments take every form that `decode` takes; `segments` are those of the prompts.

    Raises:
        UserError: as `decode`.
    """
    scoring = Scoring(
        model,
        prompts,
        continuations,
        policy,
        prefill_chunk=prefill_chunk,
        segments=segments,
        cache=cache,
        eager=eager,
    )
    return [row.log_probabilities for row in scoring.result()]


class TokenScores(NamedTuple):
    """The model's view of a given continuation, token by token."""

    log_probabilities: torch.Tensor  # [n] float32, natural
    likeliest: torch.Tensor  # [n] bool: greedy decoding would have chosen this token


class Scoring:
    """Feeds given continuations through the decode path; takes the arguments of `score`, and a `reader` of
    the prompts in place of the model.

    Iterate over the steps, the first of which is the prefill, to time them or to show progress; then call
    `result()`.

    Raises:
        UserError: before anything is computed, for a prompt or continuation that is empty or too long.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Prompts,
        continuations: Prompts,
        policy: Policy | None = None,
        *,
        prefill_chunk: int | None = None,
        segments: Segments | None = None,
        cache: KVCache | None = None,
        eager: bool = False,
        reader: Reader | Begun | None = None,
    ) -> None:
        rows, self.continuations = (
            token_lists(model, prompts),
            token_lists(model, continuations, "continuation"),
        )
        if len(rows) != len(self.continuations):
            raise UserError(f"{len(rows)} prompts, but {len(self.continuations)} continuations")
        self.steps = max(map(len, self.continuations))
        check_positions(model, rows, self.steps, policy_of(policy, cache))
        runner = Runner(model, rows, policy, self.steps, prefill_chunk, cache, segments, reader)
        self.decoding = Decoding(runner, Given(self.continuations, model.device), eager)
        self._steps = self._run()

    def _run(self) -> Iterator[None]:
        try:
            self.decoding.begin()
            yield
            for _ in range(self.steps - 1):
                self.decoding.advance()
                yield
        finally:
            self.decoding.end()

    def __iter__(self) -> Iterator[None]:
        return self._steps

    def result(self) -> list[TokenScores]:
        """Make the steps that are left; return the scores of each continuation.

        Raises:
            UserError: the model's logits are NaN.
        """
        for _ in self:
            pass
        if bool(self.decoding.state.status[0]):
            raise self.decoding.broken()
        given = cast(Given, self.decoding.choice)
        table, likeliest = given.log_probabilities.cpu(), given.likeliest.cpu()
        sizes = map(len, self.continuations)
        return [TokenScores(table[b, :n], likeliest[b, :n]) for b, n in enumerate(sizes)]
