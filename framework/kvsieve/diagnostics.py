"""Diagnostics: what a policy reads and what that changes, by layer and head, beside dense attention.

Everything that a layer is given is kept aside, whatever the policy drops of it, and every decode step is
compared with what dense attention over all of it would have answered.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from . import transfer
from .arguments import whole
from .cache.forward import Forward
from .cache.kv_cache import KVCache
from .cache.layer import LayerCache
from .cache.new_tokens import NewTokens
from .errors import UserError
from .loop import decode
from .ops import reference
from .ops.reference.places import readable
from .plans import Segments
from .policy import Policy, Selection
from .prompts import Prompts, end_tokens, token_lists
from .reading import Reader, read
from .scoring import Scoring

_LEAST = torch.finfo(torch.float32).tiny


class Diagnosis(NamedTuple):
    """A policy's decode steps beside dense attention's: float32 `[B, N, L, H]` each, on the CPU.

    N steps, L layers on which the policy acts, H query heads. NaN where a row had ended.
    """

    # Share of dense's attention that goes to the tokens read whole, in [0, 1].
    mass: torch.Tensor
    # Of the n tokens read whole, the share that is among the n to which dense attends most, in [0, 1].
    recall: torch.Tensor
    # |output - dense's| / |dense's|, of the head's output, 2-norms.
    error: torch.Tensor
    # Weight of what stands for the tokens that were not read (`Tail`): 1 - alpha in SparQ's paper; else 0.
    tail: torch.Tensor
    # Of the L layers, their numbers in the model.
    layers: tuple[int, ...]


def diagnose(
    model: PreTrainedModel,
    prompts: Prompts,
    policy: Policy | None = None,
    *,
    steps: int = 8,
    questions: Prompts | None = None,
    answers: Prompts | None = None,
    segments: Segments | None = None,
    prefill_chunk: int | None = None,
    reader: Reader | None = None,
) -> Diagnosis:
    """Decode under `policy`, and compare every step with dense attention, per layer and head.

    The tokens fed are not the policy's own: they are `answers`, by default those that dense attention
    decodes (greedy, up to the model's end token), so that every policy reads the same text. The query is the
    one that the layer is asked under the policy. In the first layer it is dense's own; further up it follows
    from what the policy has answered below and before. "Dense" is dense attention in this layer, for this
    query, over every token that the layer was given, at its position in the text; the op that defines it
    (`ops.reference`) computes it, in float32. Dense itself gives mass 1, recall 1, tail 0, and for error the
    rounding of its kernel.

    Steps run from Python, never as a CUDA graph; no meter counts them. Holds the keys and values of dense
    attention beside the policy's cache, in memory of the model's device.

    Args:
        prompts, policy, segments, prefill_chunk: as in `decode`.
        steps: decode steps, at most; as in `decode`, the first new token comes from the prompt, so that N
            steps are fed the first N tokens of an answer of N + 1.
        questions: one for every prompt, asked once the policy has read it and decided who stays, as in
            `kvsieve.read(..., leave=0)`. None: the prompts ask.
        answers: a text for every prompt to go on with; of each, steps + 1 tokens are taken.
        reader: reads the prompts in place of the model: a recording of them, made by it.

    Raises:
        UserError: as `decode`; where the answers are so short that no step is made; a model with layers that
            borrow the keys of others (gemma3n), or one that several processes share.
    """
    steps = whole("steps", steps, 1)
    rows = token_lists(model, prompts)
    asked = [[] for _ in rows] if questions is None else token_lists(model, questions, "question")
    if len(asked) != len(rows):
        raise UserError(f"{len(rows)} prompts, but {len(asked)} questions")
    texts = [[*row, *question] for row, question in zip(rows, asked, strict=True)]
    cache = KVCache(model, policy)
    _check_model(model, cache)
    with transfer.measure():  # the steps count in this meter alone
        if answers is None:
            given = dense_answers(model, texts, steps, prefill_chunk)
        else:
            given = [row[: steps + 1] for row in token_lists(model, answers, "continuation")]
        if max(map(len, given)) < 2:
            raise UserError(
                "there is no step to diagnose: every answer is a single token, which comes from the prompt; "
                "give longer `answers`"
            )
        records = [Record(layer, max(map(len, texts)) + steps) for layer in cache.policy_layers]
        if questions is not None:
            read(model, rows, cache, segments=segments, leave=0, prefill_chunk=prefill_chunk, reader=reader)
            rows, segments, reader = asked, None, None
        scoring = Scoring(
            model,
            rows,
            given,
            policy,
            prefill_chunk=prefill_chunk,
            segments=segments,
            cache=cache,
            eager=True,
            reader=reader,
        )
        next(iter(scoring))  # the prefill
        for record in records:
            record.compares = True
        scoring.result()
    mass, recall, error, tail = torch.stack([torch.stack(record.found, 2) for record in records], 3)
    return Diagnosis(mass, recall, error, tail, tuple(layer.index for layer in cache.policy_layers))


def dense_answers(
    model: PreTrainedModel, rows: list[list[int]], steps: int, prefill_chunk: int | None = None
) -> list[list[int]]:
    """Decode rows of token ids with dense attention: `steps + 1` tokens, or up to the model's end token."""
    made = decode(model, rows, max_new_tokens=steps + 1, prefill_chunk=prefill_chunk, eager=True)
    ends = set(end_tokens(model, None))
    return [_until(row, ends) for row in torch.stack(list(made), 1).tolist()]


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    """The tokens up to the first of the ends."""
    return next((tokens[: n + 1] for n, token in enumerate(tokens) if token in ends), tokens)


def _check_model(model: PreTrainedModel, cache: KVCache) -> None:
    if not cache.policy_layers:
        raise UserError(
            f"every attention layer of {type(model).__name__} has a sliding window, on which policy "
            f"{cache.policy.name} does not act: wrap it in inside_windows"
        )
    if any(layer.lends for layer in cache.policy_layers):
        raise UserError(
            f"{type(model).__name__} has layers that borrow the keys of others: diagnose cannot tell apart "
            "which of them asks"
        )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise UserError("diagnose needs all heads of a model in one process: run it without torchrun")


class Record:
    """Everything that one layer was given, in the order of the text, and what its answers are beside dense's.

    Args:
        layer: whose observer it becomes.
        room: tokens of the longest row.
    """

    def __init__(self, layer: LayerCache, room: int) -> None:
        self.room = room
        self.keys = self.values = torch.empty(0)  # [B, K, room, D], from the first tokens on
        self.compares = False  # decode steps; not the steps of a plan, by which a prompt is read
        self.found: list[torch.Tensor] = []  # of each step, [4, B, H]: the numbers of a Diagnosis
        layer.observer = self

    def wrote(self, layer: LayerCache, new: NewTokens) -> None:
        """Keep new tokens aside; not those of a probe, which are taken back."""
        if layer.forward is Forward.PROBE:
            return
        slots = layer.slots
        if self.keys.numel() == 0:
            rows, heads, _, size = new.keys.shape
            self.keys, self.values = new.keys.new_zeros(2, rows, heads, self.room, size)
        tokens = (slots.seen - new.counts)[:, None] + torch.arange(new.keys.shape[2], device=slots.device)
        # In CACHE positions a key comes rotated at its slot.
        keys = _turned(layer, new.keys, (tokens - new.slots[:, 0])[:, None])
        for b, (end, count) in enumerate(zip(slots.seen.tolist(), new.counts.tolist(), strict=True)):
            self.keys[b, :, end - count : end] = keys[b, :, :count]
            self.values[b, :, end - count : end] = new.values[b, :, :count]

    def answered(
        self, layer: LayerCache, query: torch.Tensor, selection: Selection | None, output: torch.Tensor
    ) -> None:
        """Compare the output of a decode step `[B, K, G, D]` with dense attention's."""
        if not self.compares:
            return
        slots = layer.slots
        size, seen = int(slots.seen.max()), slots.seen[:, None].expand_as(slots.lengths)
        query = _turned(layer, query, (slots.seen - slots.lengths[:, 0])[:, None, None])
        keys, values = self.keys[:, :, :size].float(), self.values[:, :, :size].float()
        first = torch.zeros_like(slots.seen) if layer.window is None else layer.window.first(slots.seen - 1)
        if layer.window is not None:  # dense attention sees no more
            shown = (first[:, None] + torch.arange(size, device=slots.device)).clamp(max=size - 1)
            keys, values = (of.take_along_dim(shown[:, None, :, None], 2) for of in (keys, values))
            seen = seen - first[:, None]
        dense, weights = reference.attend(
            query.float(), keys, values, seen, want_mass=True, by_head=True, **layer.scoring._asdict()
        )
        assert weights is not None
        # A model's attention sinks take weight, and are no tokens.
        weights = weights / weights.sum(3, keepdim=True)
        read = _tokens_read(layer, selection, size, first)[:, :, None]  # [B, K, 1, N]
        count = read.sum(3)
        last = weights.sort(3, descending=True).values.take_along_dim((count - 1).clamp(min=0)[..., None], 3)
        numbers = [
            (weights * read).sum(3),
            (read & (weights >= last)).sum(3) / count.clamp(min=1),
            (output.float() - dense).norm(dim=3) / dense.norm(dim=3).clamp(min=_LEAST),
            torch.zeros_like(dense[..., 0])
            if selection is None or selection.tail is None
            else selection.tail.weight,
        ]
        found = torch.stack(numbers).flatten(2)
        if layer.active is not None:
            found = found.masked_fill(~layer.active[:, None], torch.nan)
        self.found.append(found.cpu())


def _turned(layer: LayerCache, vectors: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Turn vectors from places in the cache, if they come so, to positions in the text, `by` further on."""
    rotary = layer.slots.rotary
    return vectors if rotary is None else rotary.turned(vectors, by)


def _tokens_read(
    layer: LayerCache, selection: Selection | None, size: int, first: torch.Tensor
) -> torch.Tensor:
    """`[B, K, size]` bool: the tokens that a step reads whole, by their place behind token `first [B]`."""
    slots = layer.slots
    tokens, read = slots.positions - first[:, None, None], slots.live()
    if selection is not None:
        chosen, read = readable(selection.slots, selection.counts, slots.lengths, selection.far)
        tokens = tokens.gather(2, chosen)
    found = torch.zeros(*slots.lengths.shape, size + 1, dtype=torch.bool, device=slots.device)
    return found.scatter_(2, tokens.masked_fill(~read, size), True)[..., :size]
