"""Rotary position embeddings, by which keys and queries can be turned to other positions.

Which one a model uses is measured, not read from its source: one token at two positions has keys that differ
by the turn alone, in every layer, because it attends to itself only. A layer without positions, in a model
where others have rotary ones, turns nothing. Where no turn explains the difference (learned positions),
there is no `Rotary`.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from ..errors import UserError

_TOKENS = (3, 5, 11, 17)
_APART = 101  # positions between the two of a token
# These change their frequencies with the length of the text: turns do not add up.
_CHANGING = ("dynamic", "longrope")
# Of each model, by layer.
_known: weakref.WeakKeyDictionary[PreTrainedModel, list[Rotary | None]] = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True, eq=False)
class Rotary:
    """Turns the first `2 * len(frequencies)` channels in pairs: a half with the other one, or neighbours."""

    frequencies: torch.Tensor  # radians per position of each pair
    interleaved: bool = False  # neighbours

    @classmethod
    def of_theta(cls, theta: float, head_size: int) -> Rotary:
        """The common one: all channels in halves, frequencies `theta ** (-2i / D)`."""
        return cls(theta ** (-torch.arange(0, head_size, 2) / head_size))

    def turned(self, vectors: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        """`vectors [..., D]` moved `by [...]` positions (broadcast; negative ones move back), in float32."""
        angles = by[..., None].float() * self.frequencies.to(vectors.device, torch.float32)
        cos, sin = angles.cos(), angles.sin()
        size = 2 * len(self.frequencies)
        rotary, rest = vectors[..., :size].float(), vectors[..., size:].float()
        pairs = rotary.unflatten(-1, (-1, 2)) if self.interleaved else rotary.unflatten(-1, (2, -1)).mT
        a, b = pairs.unbind(-1)
        turned = torch.stack(torch.broadcast_tensors(a * cos - b * sin, b * cos + a * sin), -1)
        turned = turned.flatten(-2) if self.interleaved else turned.mT.flatten(-2)
        return torch.cat([turned, rest.expand(*turned.shape[:-1], -1)], -1)


def rotary_of(model: PreTrainedModel, layer: int, policy: str) -> Rotary:
    """Return the rotary embedding of one layer of a model.

    Raises:
        UserError: it has none whose turns add up; `policy` is the one that needs it.
    """
    if model not in _known:
        _known[model] = _measured(model)
    found = _known[model][layer]
    if found is None:
        raise UserError(
            f"policy {policy} turns queries or keys to other positions, which needs rotary position "
            f"embeddings whose turns add up: {type(model).__name__} has none in layer {layer} (learned "
            "positions, ALiBi, or frequencies that change with the length of the text)"
        )
    return found


def _measured(model: PreTrainedModel) -> list[Rotary | None]:
    """The rotary embedding of every layer."""
    keys = _keys_at_two_positions(model)
    candidates = list(_candidates(model))
    found = [None if pair is None else _that_explains(candidates, *pair) for pair in keys]
    if not any(found):
        return found
    # This model goes by the positions that it is given: a layer where they change nothing has none.
    still = [Rotary(torch.zeros(1, device=model.device))]
    return [
        rotary if rotary or pair is None else _that_explains(still, *pair)
        for rotary, pair in zip(found, keys, strict=True)
    ]


def _candidates(model: PreTrainedModel) -> Iterator[Rotary]:
    config = model.config.get_text_config(decoder=True)
    if any(name in str(getattr(config, "rope_parameters", None)) for name in _CHANGING):
        return
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and "original" not in name:
            yield from (Rotary(buffer, interleaved) for interleaved in (False, True))


def _that_explains(candidates: list[Rotary], here: torch.Tensor, there: torch.Tensor) -> Rotary | None:
    loose = 1e-3 if here.dtype == torch.float32 else 5e-2
    for rotary in candidates:
        if 2 * len(rotary.frequencies) <= here.shape[-1]:
            turned = rotary.turned(here, torch.tensor(_APART, device=here.device))
            if (turned - there.float()).norm() < loose * there.float().norm():
                return rotary
    return None


@torch.no_grad()
def _keys_at_two_positions(model: PreTrainedModel) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    """Of each layer the keys `[tokens, K, 1, D]` of some tokens at position 0, and `_APART` positions later.

    None: the layer caches no keys (linear attention).
    """
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    tokens = torch.tensor(_TOKENS * 2, device=model.device)[:, None]
    positions = torch.zeros_like(tokens)
    positions[len(_TOKENS) :] = _APART
    model(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
    keys = [getattr(layer, "keys", None) for layer in cache.layers]
    return [None if both is None else (both[: len(_TOKENS)], both[len(_TOKENS) :]) for both in keys]
