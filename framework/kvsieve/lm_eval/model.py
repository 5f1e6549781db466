"""The model that lm_eval sees: HFLM in all that concerns text and tokens, kvsieve in all that concerns
computing.

Stock scoring is one prefill over context and continuation, in which no decode policy ever acts. Here a
continuation is fed token by token, and so is the last token of the context: even an answer of one token comes
from a decode step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import PreTrainedModel

from ..cache.kv_cache import KVCache
from ..errors import UserError, unknown
from ..loop import decode, policy_of
from ..policy import Policy
from ..prompts import end_tokens
from ..reading import cache_for
from ..scoring import Scoring
from . import quiet

Request = tuple[Any, list[int], list[int]]  # what lm_eval remembers it by, context, continuation
_SAMPLING = ("temperature", "top_k", "top_p")


class PolicyLM(HFLM):
    """A model from `kvsieve.load`, decoding under `policy` (None is dense).

    `kv_bytes` is the most that one batch's cache has held so far; bytes read are counted by
    `kvsieve.transfer.measure`.

    Args:
        batch_size: requests computed together.
        max_length: positions that a request may take; longer contexts lose their beginning. None: all of the
            model's.
        seed: of the sampling, for tasks that sample.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy | None = None,
        *,
        batch_size: int = 1,
        max_length: int | None = None,
        seed: int = 0,
    ) -> None:
        if getattr(model, "tokenizer", None) is None:
            raise UserError("lm_eval's tasks are text, but the model has no tokenizer")
        positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        with quiet():
            super().__init__(
                pretrained=model,
                tokenizer=model.tokenizer,
                backend="causal",
                batch_size=batch_size,
                max_length=max_length or positions,
            )
        self.policy, self.seed = policy, seed
        self.kv_bytes = 0
        self._drawn = 0  # rows that were sampled: none draws the numbers of another

    # ---------------------------------------------------------------- log-likelihoods
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Of each continuation: its natural-log probability, and whether greedy decoding would say it.

        `loglikelihood` and `loglikelihood_rolling` both come here; a rolling window has a context of one
        token, so that all of its text is fed token by token.
        """
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for batch in self._batches(requests, override_bs or int(self.batch_size)):
                for index, answer in zip(batch, self._score([requests[i] for i in batch]), strict=True):
                    found[index] = answer
                    if requests[index][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
                bar.update(len(batch))
        return found

    def _batches(self, requests: list[Request], size: int) -> Iterator[list[int]]:
        """Indexes of requests to score together, the longest first, so that memory fails early or never."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        batch: list[int] = []
        for index in order:
            together = [self._fed(requests[i]) for i in (*batch, index)]
            room = max(len(prompt) for prompt, _ in together) + max(len(forced) for _, forced in together)
            # A batch is as long as its longest prompt and its longest continuation.
            if batch and (len(batch) == size or room > self.max_length + 1):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _fed(self, request: Request) -> tuple[list[int], list[int]]:
        """Split a request: tokens to prefill, and tokens to feed singly from the last of the context on."""
        _, context, continuation = request
        # As HFLM: from the left, and the last token is predicted, but takes no position.
        context = context[-max(1, self.max_length + 1 - len(continuation)) :]
        if not continuation or len(context) + len(continuation) > self.max_length + 1:
            raise UserError(
                f"a continuation of {len(continuation)} tokens cannot be scored: 1 to {self.max_length} can"
            )
        before = max(1, len(context) - 1)
        return context[:before], context[before:] + continuation

    def _score(self, requests: list[Request]) -> list[tuple[float, bool]]:
        prompts, forced = zip(*map(self._fed, requests), strict=True)
        cache = self._cache(prompts, max(map(len, forced)))
        answers = []
        scored = Scoring(self.model, prompts, forced, self.policy, cache=cache).result()
        for (_, _, continuation), row in zip(requests, scored, strict=True):
            asked = slice(-len(continuation), None)  # not the context's own last token
            if row.log_probabilities[asked].isnan().any():
                raise UserError(
                    f"a log-probability is NaN: the model's weights or its dtype ({self.model.dtype}) are at "
                    "fault, or a custom policy is; try dtype float32 and policy dense"
                )
            answers.append((float(row.log_probabilities[asked].sum()), bool(row.likeliest[asked].all())))
        self.kv_bytes = max(self.kv_bytes, cache.memory())
        return answers

    # ---------------------------------------------------------------- generation
    def _model_generate(
        self,
        context: torch.Tensor,
        max_length: int,
        stop: list[str],
        attention_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """`[B, P + N]`: the padded contexts, each followed by what the model says after it."""
        mask = torch.ones_like(context) if attention_mask is None else attention_mask
        prompts = [row[kept.bool()].tolist() for row, kept in zip(context, mask, strict=True)]
        sampling = self._sampling(options, len(prompts))
        ends = sorted({*end_tokens(self.model, None), self.eot_token_id} - {None})
        said: list[list[int]] = [[] for _ in prompts]
        ended = [False for _ in prompts]
        # Tokens that a stop string may span.
        reach = max((len(text.encode()) for text in stop), default=0) + 2
        room = max_length - context.shape[1]
        cache = self._cache(prompts, room)
        for tokens in decode(
            self.model, prompts, self.policy, max_new_tokens=room, eos_token_id=ends, cache=cache, **sampling
        ):
            for b, token in enumerate(tokens.tolist()):
                if not ended[b]:
                    said[b].append(token)
                    tail = self.tok_decode(said[b][-reach:], skip_special_tokens=False)
                    ended[b] = token in ends or any(text in tail for text in stop)
            if all(ended):
                break
        self.kv_bytes = max(self.kv_bytes, cache.memory())
        longest = max(map(len, said))
        padded = [row + [self.tokenizer.pad_token_id] * (longest - len(row)) for row in said]
        return torch.cat([context, torch.tensor(padded, device=context.device)], 1)

    def _sampling(self, options: dict[str, Any], rows: int) -> dict[str, Any]:
        """`decode`'s arguments from a task's generation_kwargs; a temperature of 0, or no do_sample, is
        greedy.
        """
        draws = bool(options.pop("do_sample", False))
        given = {name: options.pop(name) for name in _SAMPLING if options.get(name) is not None}
        for name in _SAMPLING:
            options.pop(name, None)
        if options:
            legal = ("until", "max_gen_toks", "do_sample", *_SAMPLING)
            raise UserError(unknown("key of generation_kwargs", next(iter(options)), legal))
        if not draws or given.get("temperature") == 0:
            return {}
        self._drawn += rows
        return {"temperature": 1.0} | given | {"seed": self.seed + self._drawn - rows}

    def _cache(self, prompts: Sequence[list[int]], new_tokens: int) -> KVCache:
        return cache_for(self.model, list(prompts), policy_of(self.policy, None), new_tokens)

    def get_model_info(self) -> dict[str, Any]:
        """For lm_eval's results file; HFLM would ask the hub."""
        return {
            "model_num_parameters": sum(p.numel() for p in self.model.parameters()),
            "model_dtype": str(self.model.dtype),
            "model_revision": getattr(self.model.config, "_commit_hash", None) or "",
            "policy": self.policy.spec() if self.policy is not None else "dense",
        }
