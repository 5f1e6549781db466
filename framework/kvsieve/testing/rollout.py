"""Run a policy on plain tensors, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..attention import attend, decode_step
from ..cache.forward import Forward
from ..cache.kv import Scoring
from ..cache.layer import LayerCache
from ..cache.rotary import Rotary
from ..errors import UserError
from ..plans import checked_plan, schedule
from ..policy import Observe, Policy, Positions


def rollout(
    policy: Policy,
    prefill_queries: torch.Tensor | None,
    step_queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor | None = None,
    scale: float | None = None,
    layer: LayerCache | None = None,
    prefill_chunk: int | None = None,
    rope_theta: float | None = None,
    ids: torch.Tensor | None = None,
    surprise: torch.Tensor | None = None,
    segments: Sequence[Sequence[int]] | None = None,
    index: int = 0,
    layers: int = 1,
) -> torch.Tensor:
    """Attention outputs `[B, H, N, D]` of N decode steps of one layer under a policy.

    Args:
        policy: the policy; where it differs by layer, its layer `index` of `layers` is taken.
        prefill_queries: `[B, H, P, D]`; None for policies that do not look at them.
        step_queries: `[B, H, N, D]`, one a step.
        keys, values: `[B, K, P + N, D]`: the prompt's, then one more token a step.
        lengths: `[B]`: row b's prompt is its first `lengths[b]` tokens, right-padded to P; None: all P.
        scale: of the logits; None is `D ** -0.5`.
        layer: an empty `LayerCache(policy)` to look into afterwards: `layer.kv` is what the policy sees. Of
            several layers, `LayerCache(policy.for_layer(index, layers), index=index)`.
        prefill_chunk: feed the prompt in pieces of this many tokens.
        rope_theta: queries and keys come rotated with it (half-split), at the positions of their row's text;
            for policies that turn them. None: for those that do not.
        ids, surprise: `[B, P + N]`, laid out as the keys, for policies that want token ids or surprise.
        segments: of each row's prompt, for policies that read it by a plan. Of a probe, text and token ids
            are left out: they have no keys here.
        index, layers: which layer of how many.

    Raises: UserError: shapes that do not fit together, or no prefill queries for a policy that observes
        the attention of the prompt, no rope_theta for one that turns queries or keys, or no ids or
        surprise for one that wants them; or an `index` that is none of the `layers`.
    """
    rows, heads, steps, size = step_queries.shape
    kv_heads, prompt = keys.shape[1], keys.shape[2] - steps
    if not 0 <= index < layers:
        raise UserError(f"index must be a layer from 0 to layers - 1 = {layers - 1}, not {index}")
    policy = policy.for_layer(index, layers)
    if layers > 1 and layer is not None and (layer.policy, layer.index) != (policy, index):
        raise UserError(
            f"layer is not layer {index} of {layers} under this policy: give "
            f"LayerCache(policy.for_layer({index}, {layers}), index={index})"
        )
    if prompt < 1 or heads % kv_heads or values.shape[:3] != keys.shape[:3]:
        raise UserError(
            f"keys {list(keys.shape)} and values {list(values.shape)} must be [B, K, P + N, D] with P >= 1, "
            f"and the H = {heads} query heads of step_queries {list(step_queries.shape)} a multiple of K"
        )
    if prefill_queries is None:
        if policy.observes in (Observe.MASS, Observe.HEADS) or policy.last_queries:
            raise UserError(f"{policy.name} observes the attention of the prompt: give prefill_queries")
        prefill_queries = step_queries.new_zeros(rows, heads, prompt, size)
    layer = layer or LayerCache(policy, index=index)
    layer.scoring, layer.group = Scoring(size**-0.5 if scale is None else scale), heads // kv_heads
    rotary = None if rope_theta is None else Rotary.of_theta(rope_theta, size)
    if policy.positions is not Positions.TEXT:
        if rotary is None:
            raise UserError(f"{policy.name} turns queries or keys: give the rope_theta they are rotated with")
        layer.turn_by(rotary)
    prompts = prefill_queries, keys[:, :, :prompt], values[:, :, :prompt]
    sizes = [prompt] * rows if lengths is None else lengths.tolist()
    read_prompts(layer, *prompts, sizes, segments, ids, surprise, prefill_chunk, rotary)
    outputs = []
    for step in range(steps):
        at = slice(prompt + step, prompt + step + 1)
        layer.ids = None if ids is None else ids[:, at]
        outputs.append(one_step(layer, step_queries[:, :, step], keys[:, :, at], values[:, :, at], rotary))
        _tell(layer, None if surprise is None else surprise[:, at])
    return torch.stack(outputs, 3).flatten(1, 2)


def _tell(layer: LayerCache, surprise: torch.Tensor | None) -> None:
    if layer.arrived is not None:
        if surprise is None:
            raise UserError(f"{layer.policy.name} wants the surprise of tokens: give it")
        layer.take_surprise(surprise)


def read_prompts(
    layer: LayerCache,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: list[int],
    segments: Sequence[Sequence[int]] | None = None,
    ids: torch.Tensor | None = None,
    surprise: torch.Tensor | None = None,
    chunk: int | None = None,
    rotary: Rotary | None = None,
    pad_left: bool = False,
) -> None:
    """Read one layer's prompts as its policy plans it: `queries [B, H, P, D]`, `keys`, `values [B, K, P, D]`.

    Row b's prompt is its first `lengths[b]` tokens.
    """
    policy, device = layer.policy, keys.device
    parts = segments or [[length] for length in lengths]
    plans = [checked_plan(policy.plan(part), n, policy) for part, n in zip(parts, lengths, strict=True)]
    # A token's id is its number in the prompt.
    stages = schedule([list(range(length)) for length in lengths], plans, lambda part: [])
    for stage in stages:
        layer.make_way(stage.rooms_of(device))
        counts = torch.tensor([len(tokens) for tokens in stage.tokens], device=device)
        size = int(counts.max())
        if size:
            layer.begin_pass(stage.kind, counts > 0, torch.tensor(stage.spans, device=device))
            fill = [[0] * (size - len(tokens)) for tokens in stage.tokens]
            rows = zip(stage.tokens, fill, strict=True)
            index = torch.tensor(
                [rest + row if pad_left else row + rest for row, rest in rows], device=device
            )
            place = torch.arange(size, device=device) - (size - counts[:, None] if pad_left else 0)
            turns = None
            if policy.positions is Positions.CACHE or (stage.kind is Forward.PROBE and rotary is not None):
                held = 0 if layer.is_empty else layer.kv.lengths[:, :1]
                cached = policy.positions is Positions.CACHE
                begins = held if cached else torch.tensor(stage.begins, device=device)[:, None]
                turns = begins + place - index
            given = _taken((queries, keys, values), index, turns, rotary)
            named = [None if each is None else each.gather(1, index) for each in (ids, surprise)]
            _feed(layer, stage.kind, given, named, (place >= 0) & (place < counts[:, None]), chunk)
        if stage.completes and stage.kind is not Forward.PROMPT:
            layer.end_prompt()
    if len(stages) > 1:
        layer.slots.trim()


def _taken(
    tensors: Sequence[torch.Tensor], index: torch.Tensor, turns: torch.Tensor | None, rotary: Rotary | None
) -> list[torch.Tensor]:
    """Queries, keys and values of tokens `index [B, Q]`; the first two `turns [B, Q]` positions later."""
    taken = [t.gather(2, index[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3])) for t in tensors]
    if turns is not None:
        assert rotary is not None
        taken[:2] = [rotary.turned(t, turns[:, None]).to(t) for t in taken[:2]]
    return taken


def _feed(
    layer: LayerCache,
    kind: Forward,
    given: list[torch.Tensor],
    named: list[torch.Tensor | None],
    real: torch.Tensor,
    chunk: int | None,
) -> None:
    """One stage of a reading, in pieces of `chunk` tokens."""
    size = real.shape[1]
    for first in range(0, size, chunk or size):
        piece = slice(first, min(first + (chunk or size), size))
        query, key, value = (tensor[:, :, piece] for tensor in given)
        layer.expected = Forward.CHUNK if piece.stop < size and kind is Forward.PROMPT else kind
        layer.update(key, value)
        ids, surprise = (None if each is None else each[:, piece] for each in named)
        layer.ids = ids
        attend(layer, query.unflatten(1, (key.shape[1], -1)), real[:, piece])
        real_first = (~real[:, piece]).to(torch.uint8).argsort(dim=1, stable=True)
        _tell(layer, None if surprise is None else surprise.gather(1, real_first))
    layer.end_pass(ragged=True)


def one_step(
    layer: LayerCache, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rotary: Rotary | None
) -> torch.Tensor:
    """One decode step `[B, K, G, D]`: `query [B, H, D]`, `key`, `value [B, K, 1, D]` of a row's next token.

    They come rotated at its position in the text. A model has it at its place, where the policy counts so.
    """
    if layer.policy.positions is Positions.CACHE:
        assert rotary is not None
        by = (layer.kv.lengths[:, 0] - layer.kv.seen)[:, None]
        key, query = rotary.turned(key, by[..., None]).to(key), rotary.turned(query, by).to(query)
    layer.update(key, value)
    return decode_step(layer, query.unflatten(1, (key.shape[1], -1)))


class Inputs(NamedTuple):
    """Random queries, keys and values of a ragged batch, as `rollout` takes them."""

    prefill_queries: torch.Tensor
    step_queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def random(cls, lengths: tuple[int, ...] = (40, 33, 3), steps: int = 6, seed: int = 0) -> Inputs:
        """B rows of these prompt lengths, H = 4, K = 2, D = 16; logits spread enough that tokens differ."""
        random = torch.Generator().manual_seed(seed)

        def normal(heads: int, tokens: int) -> torch.Tensor:
            return torch.randn(len(lengths), heads, tokens, 16, generator=random)

        prompt = max(lengths)
        queries, new = 2 * normal(4, prompt), 2 * normal(4, steps)
        return cls(queries, new, normal(2, prompt + steps), normal(2, prompt + steps), torch.tensor(lengths))

    def row(self, b: int) -> Inputs:
        """Row b alone, without padding."""
        length, prompt = int(self.lengths[b]), self.prefill_queries.shape[2]
        tokens = [*range(length), *range(prompt, self.keys.shape[2])]
        keys, values = self.keys[b : b + 1, :, tokens], self.values[b : b + 1, :, tokens]
        queries, new = self.prefill_queries[b : b + 1, :, :length], self.step_queries[b : b + 1]
        return Inputs(queries, new, keys, values, self.lengths[b : b + 1])
