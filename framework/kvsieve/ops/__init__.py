"""What policies are made of. Each op takes the layer's cache `kv`, counts what it reads, and runs an implementation.

The implementations know nothing of caches or meters: tensors in, tensors out. Which one runs is explicit:
`kvsieve.ops.use("reference")`, by default "triton" on a GPU and "cpu" on a CPU, and never another than was chosen.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Literal, cast

import torch

from ..errors import UserError, unknown
from . import reference

if TYPE_CHECKING:
    from ..cache.layer import LayerCache
    from ..policy import Selection

IMPLEMENTATIONS = ("reference", "cpu", "triton")
_chosen: str | None = None
_loaded: dict[str, ModuleType] = {"reference": reference}


@contextlib.contextmanager
def use(implementation: str) -> Iterator[None]:
    """Run every op inside with this implementation, whatever the device.

    Raises:
        UserError: there is no such implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UserError(unknown("implementation of the ops", implementation, IMPLEMENTATIONS))
    global _chosen  # noqa: PLW0603  (a context variable would break a traced graph)
    before, _chosen = _chosen, implementation
    try:
        yield
    finally:
        _chosen = before


def implementation(device: torch.device) -> ModuleType:
    """The module that runs the ops on this device.

    Raises:
        UserError: the implementation that was chosen cannot run there.
    """
    on_gpu = device.type == "cuda"
    name = _chosen or ("triton" if on_gpu else "cpu")
    if name == "triton" and not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(
            f"the triton ops need a GPU, but the model is on {str(device)!r}: choose 'reference', or set "
            "TRITON_INTERPRET=1 before Python starts, and Triton interprets its kernels (for tests: it is slow)"
        )
    if name not in _loaded:  # kept by name: an import inside a traced step would break the trace
        _loaded[name] = importlib.import_module(f".{name}", __name__)
    return _loaded[name]


def attend(
    query: torch.Tensor, kv: LayerCache, selection: Selection | None = None, want_mass: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of `query [B, K, G, D]` over the selection, or over every live slot.

    Returns the output `[B, K, G, D]` and, if wanted, the mass `[B, K, T]` float32 that each slot received, averaged
    over the group. Reads `2 * D` numbers per slot read and KV head.
    """
    run = implementation(query.device)
    if selection is None:
        kv.count_read("keys", kv.lengths, kv.head_size)
        kv.count_read("values", kv.lengths, kv.head_size)
        return run.attend(query, kv.live_keys, kv.live_values, kv.lengths, want_mass=want_mass, **kv.scoring)
    kv.count_read("keys", selection.counts, kv.head_size)
    kv.count_read("values", selection.counts, kv.head_size)
    weight, value = selection.tail or (None, None)
    return run.attend(
        query,
        kv.live_keys,
        kv.live_values,
        kv.lengths,
        slots=selection.slots,
        counts=selection.counts,
        tail_weight=weight,
        tail_value=value,
        want_mass=want_mass,
        **kv.scoring,
    )


def top_channels(query: torch.Tensor, r: int) -> torch.Tensor:
    """The r channels `[B, K, r]` in which the group's `query [B, K, G, D]` is largest: the highest sum of |q|."""
    return implementation(query.device).top_channels(query, r)


def channel_scores(query: torch.Tensor, kv: LayerCache, channels: torch.Tensor) -> torch.Tensor:
    """Approximate logits `[B, K, G, T]` float32 from `channels [B, K, r]` of the keys alone; dead slots get -inf.

    Scaled, soft-capped and tempered for the missing channels. Reads r numbers per live slot and KV head.
    """
    kv.count_read("channels", kv.lengths, channels.shape[2])
    scale, softcap = kv.scoring["scale"], kv.scoring["softcap"]
    run = implementation(query.device)
    scores = run.channel_scores(query, kv.live_channels, kv.lengths, channels, scale=scale, softcap=softcap)
    return cast(torch.Tensor, scores[..., : kv.used])


def slot_weights(scores: torch.Tensor, kv: LayerCache) -> torch.Tensor:
    """Softmax of `scores [B, K, G, T]` over the slots, the model's attention sinks counted in."""
    return implementation(scores.device).slot_weights(scores, kv.scoring["sinks"])


def top_slots(
    ranking: torch.Tensor, kv: LayerCache, k: int, newest: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k live slots with the highest `ranking [B, K, T]`, the `newest` tokens forced in.

    Returns slots `[B, K, k]` and how many of them are live `[B, K]`: `min(k, length)`. A set: order and ties are free.
    """
    run = implementation(ranking.device)
    return run.top_slots(ranking, kv.lengths, k, newest=newest, forced=_newest_by_position(kv, newest))


def top_by_channels(
    query: torch.Tensor,
    kv: LayerCache,
    channels: torch.Tensor,
    k: int,
    *,
    newest: int = 0,
    group_score: Literal["softmax", "logits"] = "softmax",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`channel_scores`, added up over the group, and the `top_slots` of that, in one op that stores few of them.

    `group_score` "softmax" ranks slots by the sum of the heads' weights, "logits" by the sum of their logits. Returns
    slots `[B, K, k]`, how many of them are live `[B, K]`, and the approximate attention weight `[B, K, G]` float32 of
    the live slots that were left out. Reads r numbers per live slot and KV head.
    """
    kv.count_read("channels", kv.lengths, channels.shape[2])
    return implementation(query.device).top_by_channels(
        query,
        kv.live_channels,
        kv.lengths,
        channels,
        k,
        size=kv.used,
        group_score=group_score,
        newest=newest,
        forced=_newest_by_position(kv, newest),
        **kv.scoring,
    )


def _newest_by_position(kv: LayerCache, n: int) -> torch.Tensor | None:
    """The newest n tokens as a mask `[B, K, T]`, where slots do not stand in the order of tokens."""
    return None if kv.in_order else kv.newest(n)


def running_mean(
    mean: torch.Tensor, new: torch.Tensor, counts: torch.Tensor, seen: torch.Tensor
) -> torch.Tensor:
    """The mean `[B, K, D]` after `counts [B]` more vectors `new [B, K, Q, D]` (zero beyond), `seen [B]` of them in
    all."""
    return implementation(new.device).running_mean(mean, new, counts, seen)
