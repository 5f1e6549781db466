"""What a model thinks of a given text: its tokens are fed through the decode path, so that the policy acts on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from transformers import PreTrainedModel

from .cache.kv_cache import KVCache
from .errors import UserError
from .loop import Decoder, Generation
from .policy import Policy
from .prompts import Prompts, check_lengths, token_lists
from .sampling import Given


class Forced(NamedTuple):
    """What a model thinks of a given continuation, token by token."""

    log_probabilities: torch.Tensor  # [n] float32, natural
    likeliest: torch.Tensor  # [n] bool: greedy decoding would have said this token


def score(
    model: PreTrainedModel,
    prompts: Prompts,
    continuations: Prompts,
    policy: Policy | None = None,
    *,
    prefill_chunk: int | None = None,
    cache: KVCache | None = None,
    eager: bool = False,
) -> list[torch.Tensor]:
    """Natural-log probability of every token of `continuations[b]` after `prompts[b]`: one float32 tensor a row.

    The tokens are fed one at a time through the decode path, so that the policy acts on all but the first.
    """
    forcing = Forcing(
        model, prompts, continuations, policy, prefill_chunk=prefill_chunk, cache=cache, eager=eager
    )
    return [row.log_probabilities for row in forcing.result()]


class Forcing:
    """Feeds given continuations through the decode path, as `score` does, which has the same arguments.

    Iterate for the steps, the first of which is the prefill, to time them or to show progress; then `result()`.

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
        cache: KVCache | None = None,
        eager: bool = False,
    ) -> None:
        rows, self.forced = token_lists(model, prompts), token_lists(model, continuations, "continuation")
        if len(rows) != len(self.forced):
            raise UserError(f"{len(rows)} prompts, but {len(self.forced)} continuations")
        self.steps = max(map(len, self.forced))
        check_lengths(model, rows, self.steps - 1)  # the last token is predicted, and takes no position
        decoder = Decoder(model, rows, policy, self.steps, prefill_chunk, cache)
        self.generation = Generation(decoder, Given(self.forced, model.device), eager)
        self._run = self._all_steps()

    def _all_steps(self) -> Iterator[None]:
        self.generation.begin()
        yield
        for _ in range(self.steps - 1):
            self.generation.advance()
            yield

    def __iter__(self) -> Iterator[None]:
        return self._run

    def result(self) -> list[Forced]:
        """What the model thinks of each continuation; makes the steps that are still to be made."""
        for _ in self:
            pass
        given = cast(Given, self.generation.choice)
        table, said = given.log_probabilities.cpu(), given.likeliest.cpu()
        return [Forced(table[b, : len(row)], said[b, : len(row)]) for b, row in enumerate(self.forced)]
