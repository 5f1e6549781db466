"""Watches the forwards of a model, for a cache whose policy needs what attention does not see."""

from __future__ import annotations

import inspect
import weakref
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from ..policy import Wants

if TYPE_CHECKING:
    from .kv_cache import KVCache


def watch(cache: KVCache, model: PreTrainedModel) -> None:
    """Watch each forward of the model that is given this cache, until the cache is collected.

    The cache takes the ids of the tokens, and feeds the model their places within it, as its policy declares.
    Whoever calls the model (`decode`, `generate()`, a user) gives the positions of the text, or none.
    """
    names = list(inspect.signature(model.forward).parameters)
    watched = weakref.ref(cache)

    def before(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        used = given.get("past_key_values")
        if used is watched() and used is not None:
            if Wants.IDS in used.wants:
                used.take_ids(given.get("input_ids"))
            if used.counts_places:
                given["position_ids"] = used.places_of(_real(given))
        return (), given

    hook = model.register_forward_pre_hook(before, with_kwargs=True)
    weakref.finalize(cache, hook.remove)


def _real(given: dict[str, Any]) -> torch.Tensor:
    """`[B, Q]` bool: the new tokens of a forward that are not padding."""
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    tokens = given["inputs_embeds"][..., 0] if ids is None else ids
    return torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask[:, -tokens.shape[1] :].bool()
