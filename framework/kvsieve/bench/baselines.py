"""Every dense attention that is installed, so that a policy is judged by the best of them.

All do the same work as our step: the new token's key and value are written to a preallocated cache, then one
query token a row attends to T tokens. Each has the memory layout that it wants, copied beforehand.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import UserError, unknown
from .layer_step import Tokens

Attend = Callable[[], torch.Tensor]  # [B, K, G, D]
Builder = Callable[[Tokens], Attend]

_BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
OURS = "kvsieve"
FAMILIES = ("sdpa", "flex", "flashinfer", "flash-attn", OURS)
_TOLERANCE = {torch.float32: 1e-3}  # of the norm of the difference; 16-bit types: 3e-2


def families(device: torch.device, asked: list[str]) -> list[str]:
    """Those that can run here. FlexAttention on a CPU compiles for minutes, so there it must be asked for.

    Raises:
        UserError: an unknown one, or one that was asked for and is not installed.
    """
    modules = {"flashinfer": "flashinfer", "flash-attn": "flash_attn"}
    missing = {name for name, module in modules.items() if importlib.util.find_spec(module) is None}
    for name in asked:
        if name not in FAMILIES:
            raise UserError(unknown("dense attention", name, FAMILIES))
        if name in missing:
            raise UserError(f"--dense {name}: the package {modules[name]} is not installed")
    if asked:
        return asked
    return [name for name in FAMILIES if name not in missing and (name != "flex" or device.type == "cuda")]


def builders(names: list[str], tokens: Tokens, repeat_fits: bool) -> Iterator[tuple[str, Builder]]:
    """Name and builder of every variant of these families but ours, which is a policy step like others."""
    grouped = tokens.query.shape[2] > 1
    forms = ["gqa", "rows", "repeat"] if grouped else ["mha"]
    if "sdpa" in names:
        for backend in _BACKENDS:
            if backend in ("efficient", "cudnn") and tokens.query.device.type == "cpu":
                continue
            for form in forms:
                repeats = form == "repeat" or (form == "gqa" and backend == "math")  # it does so inside
                if repeats and not repeat_fits:
                    continue
                yield f"sdpa {backend} {form}", _sdpa(backend, form)
    if "flex" in names:
        yield "flex", _flex
    if "flashinfer" in names:
        yield "flashinfer", _flashinfer
    if "flash-attn" in names:
        yield "flash-attn", _flash_attn


def agrees(output: torch.Tensor, ours: torch.Tensor) -> bool:
    """Whether a candidate computed the same attention; one that did not is out."""
    error = (output.float() - ours.float()).norm() / ours.float().norm()
    return bool(error < _TOLERANCE.get(ours.dtype, 3e-2))


class _Slots:
    """A plain preallocated cache `[B, K, T, D]`, and the token that a step writes last."""

    def __init__(self, tokens: Tokens) -> None:
        self.keys, self.values = tokens.keys, tokens.values
        self.new = tokens.keys[:, :, -1:].clone(), tokens.values[:, :, -1:].clone()
        self.last = tokens.keys[:, :, -1:], tokens.values[:, :, -1:]

    def append(self) -> None:
        for place, new in zip(self.last, self.new, strict=True):
            place.copy_(new)


def _sdpa(backend: str, form: str) -> Builder:
    """Three ways: enable_gqa; the group's heads as rows of one query; as many keys as heads, repeated."""

    def build(tokens: Tokens) -> Attend:
        cache = _Slots(tokens)
        shape = tokens.query.shape
        query = tokens.query if form == "rows" else tokens.query.flatten(1, 2)[:, :, None]

        def attend() -> torch.Tensor:
            cache.append()
            keys, values = cache.keys, cache.values
            if form == "repeat":
                keys, values = (t.repeat_interleave(shape[2], 1) for t in (keys, values))
            with sdpa_kernel(_BACKENDS[backend]):
                output = F.scaled_dot_product_attention(query, keys, values, enable_gqa=form == "gqa")
            return output.view(shape)

        return attend

    return build


def _flex(tokens: Tokens) -> Attend:
    from torch.nn.attention.flex_attention import flex_attention

    cache, compiled = _Slots(tokens), torch.compile(flex_attention, dynamic=False)
    shape, query = tokens.query.shape, tokens.query.flatten(1, 2)[:, :, None].contiguous()

    def attend() -> torch.Tensor:
        cache.append()
        output: Any = compiled(query, cache.keys, cache.values, enable_gqa=shape[2] > 1)
        return torch.as_tensor(output).view(shape)

    return attend


def _flashinfer(tokens: Tokens) -> Attend:
    """Its paged batch decode, planned once, pages of 16 tokens."""
    import flashinfer  # type: ignore[import-not-found,unused-ignore]

    page = 16
    rows, kv_heads, group, size = tokens.query.shape
    context, device = tokens.keys.shape[2], tokens.query.device
    pages = -(-context // page)
    paged = torch.zeros(rows, pages * page, 2, kv_heads, size, dtype=tokens.query.dtype, device=device)
    paged[:, :context, 0], paged[:, :context, 1] = tokens.keys.transpose(1, 2), tokens.values.transpose(1, 2)
    new = paged[:, context - 1].clone()
    cache = paged.view(rows * pages, page, 2, kv_heads, size).permute(0, 2, 3, 1, 4).contiguous()  # HND
    del paged
    last = torch.arange(1, rows + 1, device=device) * pages - 1
    workspace = torch.zeros(2**27, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=group >= 4)
    wrapper.plan(
        torch.arange(rows + 1, dtype=torch.int32, device=device) * pages,
        torch.arange(rows * pages, dtype=torch.int32, device=device),
        torch.full((rows,), (context - 1) % page + 1, dtype=torch.int32, device=device),
        kv_heads * group,
        kv_heads,
        size,
        page,
        q_data_type=tokens.query.dtype,
        kv_data_type=tokens.query.dtype,
    )
    query = tokens.query.flatten(1, 2).contiguous()

    def attend() -> torch.Tensor:
        cache[last, :, :, (context - 1) % page] = new
        return torch.as_tensor(wrapper.run(query, cache)).view(tokens.query.shape)

    return attend


def _flash_attn(tokens: Tokens) -> Attend:
    """flash_attn_with_kvcache: split over the sequence, appends by itself."""
    import flash_attn  # type: ignore[import-not-found,unused-ignore]

    keys, values = (t.transpose(1, 2).contiguous() for t in (tokens.keys, tokens.values))  # [B, T, K, D]
    new_keys, new_values = keys[:, -1:].clone(), values[:, -1:].clone()
    before = torch.full((len(keys),), keys.shape[1] - 1, dtype=torch.int32, device=keys.device)
    query = tokens.query.flatten(1, 2)[:, None].contiguous()

    def attend() -> torch.Tensor:
        output = flash_attn.flash_attn_with_kvcache(
            query, keys, values, k=new_keys, v=new_values, cache_seqlens=before, causal=True
        )
        return torch.as_tensor(output).view(tokens.query.shape)

    return attend
