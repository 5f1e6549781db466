"""Tell whether a model is the one that something was measured on, by all of its weights up to rounding.

Of every tensor its norm, and sums of its elements with fixed signs. Rounded to another type they stay, for
rounding errors cancel; weights that were trained further change them by about as much as they moved. A model
whose tensors all moved by less than a hundredth of their norm counts as the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import weakref

import torch
from transformers import PreTrainedModel

from .hf import parallel

_NEAR = 0.01  # of a tensor's norm; rounding to bfloat16 moves a signed sum by a tenth of that
_SUMS = 4
_AT_ONCE = 2**24  # numbers in float32 at a time

_known: weakref.WeakKeyDictionary[PreTrainedModel, tuple[int, str]] = weakref.WeakKeyDictionary()


def fingerprint(model: PreTrainedModel) -> str:
    """Measure a model, once as long as its weights are not changed: JSON of its shape and of its weights.

    Left out are weights that are not in memory, and integers: those of quantised layers.
    """
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    version = sum(0 if weight.is_inference() else weight._version for weight in weights.values())
    if model not in _known or _known[model][0] != version:
        local = {name: getattr(weight, "_local_tensor", weight) for name, weight in weights.items()}
        known = {
            "shape": _shape(model),
            "split": parallel.is_split(model),
            "weights": {
                name: _measured(weight)
                for name, weight in local.items()
                if weight.is_floating_point() and weight.device.type != "meta"
            },
        }
        _known[model] = version, json.dumps(known)
    return _known[model][1]


def same(one: str, other: str) -> bool:
    """Whether two fingerprints are of one model, as far as both know its weights.

    Of a model that is split over processes, the tensors that a process holds a part of are passed over.
    """
    try:
        first, second = json.loads(one), json.loads(other)
        shared = first["weights"].keys() & second["weights"].keys()
        pairs = [(first["weights"][name], second["weights"][name]) for name in shared]
        if first["split"] or second["split"]:
            pairs = [(a, b) for a, b in pairs if a[0] == b[0]]
        return first["shape"] == second["shape"] and bool(pairs) and all(_near(a, b) for a, b in pairs)
    except (ValueError, KeyError, TypeError, IndexError):
        return False  # not what `fingerprint` writes


def _shape(model: PreTrainedModel) -> str:
    config = model.config.get_text_config(decoder=True)
    fields = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
              "head_dim", "vocab_size")  # fmt: skip
    shape = json.dumps([str(getattr(config, field, None)) for field in fields])
    return hashlib.sha256(shape.encode()).hexdigest()[:12]


def _measured(weight: torch.Tensor) -> list[float]:
    """Number of elements, norm, and signed sums."""
    rows = weight.reshape(-1, weight.shape[-1]) if weight.dim() else weight.reshape(1, 1)
    step = max(1, _AT_ONCE // rows.shape[1])
    down, across = (_signs(n).to(weight.device) for n in rows.shape)
    squares, sums = 0.0, torch.zeros(_SUMS, device=weight.device)
    for first in range(0, len(rows), step):
        part = rows[first : first + step].float()
        squares += float(part.square().sum())
        sums += (down[first : first + step] * (part @ across)).sum(0)
    return [weight.numel(), *(float(f"{x:.4g}") for x in (math.sqrt(squares), *sums.tolist()))]


def _signs(n: int) -> torch.Tensor:
    """`[n, _SUMS]`, each 1 or -1, the same everywhere."""
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 2, (n, _SUMS), generator=generator).float() * 2 - 1


def _near(one: list[float], other: list[float]) -> bool:
    close = _NEAR * max(one[1], other[1])
    return one[0] == other[0] and all(abs(a - b) <= close for a, b in zip(one[1:], other[1:], strict=True))
