"""The attention function that transformers calls in every attention module (AttentionInterface), and its
masks.

The layer of a KVCache is found on the keys that its `update` returned; without one (no cache, or
transformers' own) the attention is plain.
"""

import contextlib
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import attention
from ..cache.kv import Scoring
from ..cache.kv_cache import ATTENTION
from ..cache.layer import LayerCache
from ..errors import UserError

_NOT_SERVED = {
    "position_bias": "a bias on the logits",
    "sinks": "sinks that depend on the query",
    "cache": "a paged cache (generate_batch)",
}


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`query [B, H, Q, D]`, `key` and `value [B, K, Q or T, D]` -> `[B, Q, H, D]`, as transformers asks.

    `attention_mask` is what `attention_mask_for` returned: None, padding `[B, T]`, or a whole mask `[B, 1, Q,
    T]`.
    """
    rows, heads, new, size = query.shape
    scale = size**-0.5 if scaling is None else scaling
    if unknown := [name for name in _NOT_SERVED if kwargs.get(name) is not None]:
        raise UserError(
            f"{type(module).__name__} asks attention for {_NOT_SERVED[unknown[0]]}, which kvsieve does not "
            "serve"
        )
    layer = cast(LayerCache | None, getattr(key, "kvsieve_layer", None))
    if layer is None:
        causal = kwargs.get("is_causal")
        causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
        output = _plain(query, key, value, attention_mask, scale, softcap, s_aux, causal)
        return output.transpose(1, 2).contiguous(), None
    if attention_mask is not None:
        _check_mask(attention_mask, layer, new, type(module).__name__)
    kv_heads = key.shape[1]
    group = heads // kv_heads
    layer.scoring = Scoring(scale, softcap, None if s_aux is None else s_aux.view(kv_heads, group))
    valid = None if attention_mask is None else attention_mask[:, -new:].bool()
    # Kernels are launched on the current device, and the layers of one model may be on several.
    with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():
        output = attention.attend(layer, query.view(rows, kv_heads, group, new, size), valid)
    return output.reshape(rows, heads, new, size).transpose(1, 2).contiguous(), None


def _check_mask(mask: torch.Tensor, layer: LayerCache, new: int, module: str) -> None:
    """Raise UserError for a mask that the cache cannot follow."""
    if mask.dim() == 4:
        raise UserError(
            f"{module} asks for a mask beyond causal order and padding, which a policy cannot follow; "
            "give a 2-dimensional attention_mask, or use transformers' own cache"
        )
    if new > 1 and layer.slots.used > 0 and layer.counts_steps and layer.incoming is not None:
        layer.check_earlier(mask[:, :-new])  # not in decode steps: it waits for the device


def _plain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    causal: bool,
) -> torch.Tensor:
    """Compute what transformers' own attention does: no policy, nothing stored."""
    heads, new, total = query.shape[1], query.shape[2], key.shape[2]
    # The new tokens are the last ones; if they are all, is_causal will do.
    if mask is None or mask.dim() == 2:
        padding = None if mask is None else mask[:, None, None, :total].bool()
        in_order = None
        if causal and new > 1 and (total > new or padding is not None):
            in_order = torch.ones(new, total, dtype=torch.bool, device=query.device).tril(total - new)
        mask = padding if in_order is None else in_order if padding is None else padding & in_order
    causal = causal and new > 1 and mask is None
    if mask is not None:
        mask = mask[..., :total]
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=heads > key.shape[1]
        )
    key, value = (t.repeat_interleave(heads // key.shape[1], 1) for t in (key, value))
    logits = torch.matmul(query * scale, key.transpose(2, 3)).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if causal:
        mask = torch.ones(new, total, dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        logits = logits.masked_fill(~mask, torch.finfo(torch.float32).min)
    if sinks is not None:
        column = sinks.float().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, column], -1)
    weights = torch.softmax(logits, -1)[..., :total]
    return torch.matmul(weights.to(value.dtype), value)


def attention_mask_for(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Make the mask for `attention_forward`: the padding `[B, T]` or None for plain causal attention.

    A T x T mask is made only where the model asks for more than causal order, or where a cache that is not
    ours hands out more slots than tokens. The layers of a KVCache, which ask for a mask of length 0, keep to
    causal order and to their windows themselves.
    """
    # transformers lets a mask be left out where it is causal order, windows and chunks, and nothing beyond.
    plain_or_window = mask_function is causal_mask_function or kwargs.get("allow_is_causal_skip", False)
    if kv_length == 0 and plain_or_window:
        return attention_mask
    plain = mask_function is causal_mask_function and isinstance(q_offset, int) and kv_offset == 0
    if plain and kv_length == q_offset + q_length:
        return attention_mask
    if not isinstance(q_offset, int) or kv_offset + kv_length > q_offset + q_length:
        # There are slots behind the last token (StaticCache): None would not tell.
        kwargs["allow_is_causal_skip"] = False
    kwargs |= {"q_offset": q_offset, "kv_offset": kv_offset, "mask_function": mask_function}
    return sdpa_mask(batch_size, q_length, kv_length, attention_mask=attention_mask, **kwargs)


def register(function: Callable[..., tuple[torch.Tensor, None]] = attention_forward) -> None:
    """Register our name with transformers; done when a model is prepared, not at import.

    Another function than ours is for measurements: it stands for everything that a layer does with its cache.
    """
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, function)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, attention_mask_for)
