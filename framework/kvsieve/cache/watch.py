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

_AT_ONCE = 2**24  # logits


def watch(cache: KVCache, model: PreTrainedModel) -> None:
    """Watch each forward of the model that is given this cache, until the cache is collected.

    As its policy declares, the cache takes the ids of the tokens, feeds the model their places within it, and
    takes the logits of all of them, of which the caller gets those it asked for. Whoever calls the model
    (`decode`, `generate()`, a user) gives the positions of the text, or none.
    """
    names = list(inspect.signature(model.forward).parameters)
    watched = weakref.ref(cache)
    asked: list[Any] = [0]  # `logits_to_keep` of the forward that runs

    def before(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        used = given.get("past_key_values")
        if used is watched() and used is not None:
            if used.wants:
                used.take_ids(given.get("input_ids"))
            if used.counts_places:
                given["position_ids"] = used.places_of(_real(given))
            if Wants.SURPRISE in used.wants:
                asked[0] = given.get("logits_to_keep", 0)
                given["logits_to_keep"] = 0
        return (), given

    def after(_: torch.nn.Module, __: tuple[Any, ...], given: dict[str, Any], output: Any) -> Any:
        used = given.get("past_key_values")
        if used is watched() and used is not None:
            used.take_logits(output.logits, given["input_ids"], _real(given))
            kept = slice(-asked[0], None) if isinstance(asked[0], int) else asked[0]
            output.logits = output.logits[:, kept]
        return output

    hooks = [model.register_forward_pre_hook(before, with_kwargs=True)]
    if Wants.SURPRISE in cache.wants:
        hooks.append(model.register_forward_hook(after, with_kwargs=True))
    for hook in hooks:
        weakref.finalize(cache, hook.remove)


def surprise(
    logits: torch.Tensor, ids: torch.Tensor, real: torch.Tensor, before: torch.Tensor
) -> torch.Tensor:
    """-log P `[B, Q]` float32 of the tokens `ids [B, Q]`, a row's `real [B, Q]` ones first, NaN beyond.

    From `logits [B, Q, V]`, and for a row's first token those `before [B, V]` it.
    """
    rows, new = ids.shape
    told = logits.new_empty(rows, new, dtype=torch.float32)
    step = max(1, _AT_ONCE // logits[:, 0].numel())
    for start in range(1, new, step):
        part = slice(start, min(start + step, new))
        told[:, part] = _minus_log(logits[:, part.start - 1 : part.stop - 1], ids[:, part])
    first = real.long().argmax(1, keepdim=True)
    told.scatter_(1, first, _minus_log(before[:, None], ids.gather(1, first)))
    order = (~real).to(torch.uint8).argsort(dim=1, stable=True)
    beyond = torch.arange(new, device=ids.device) >= real.sum(1, keepdim=True)
    return told.gather(1, order).masked_fill(beyond, torch.nan)


def _minus_log(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    logits = logits.float()
    return logits.logsumexp(2) - logits.gather(2, ids[..., None])[..., 0]


def _real(given: dict[str, Any]) -> torch.Tensor:
    """`[B, Q]` bool: the new tokens of a forward that are not padding."""
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    tokens = given["inputs_embeds"][..., 0] if ids is None else ids
    return torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask[:, -tokens.shape[1] :].bool()
