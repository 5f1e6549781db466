"""The ops on a CPU: the reference's, but the one that reads most of what a SparQ step reads is made for speed.

A CPU gains from reading less only if nothing large is allocated and nothing is copied in small pieces. So rows and KV
heads are taken one after the other, in chunks of slots whose chosen channels stay in the processor's cache, in memory
that is used again. Channel-major keys are what this is for; token-major ones are read whole, which beats gathering
single numbers.
"""

import math
import threading

import torch

from .reference import (
    append,
    attend,
    channel_scores,
    compact,
    prefill,
    running_mean,
    slot_weights,
    tempered,
    top_channels,
    top_slots,
)
from .reference import top_by_channels as _in_one_go

__all__ = [
    "append",
    "attend",
    "channel_scores",
    "compact",
    "prefill",
    "running_mean",
    "slot_weights",
    "top_by_channels",
    "top_channels",
    "top_slots",
]

_SMALL = (
    2**17
)  # channel values of one KV head: up to here one operation over all heads is quicker than one a head
_CHUNK = 8192  # slots: 32 channels of them in float32 are 1 MiB


class _Workspace(threading.local):
    """Memory that calls of one thread share: making a large tensor anew costs more than filling it."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """Uninitialised memory, valid until this name is taken again."""
        size = math.prod(shape)
        held = self.held.get((name, dtype))
        if held is None or held.numel() < size:
            held = self.held[name, dtype] = torch.empty(size, dtype=dtype)
        return held[:size].view(shape)


_workspace = _Workspace()


def top_by_channels(
    query: torch.Tensor,
    keys: torch.Tensor,
    lengths: torch.Tensor,
    channels: torch.Tensor,
    k: int,
    *,
    size: int,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    group_score: str = "softmax",
    newest: int = 0,
    forced: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `reference.top_by_channels`."""
    if size * channels.shape[2] <= _SMALL:
        return _in_one_go(
            query,
            keys,
            lengths,
            channels,
            k,
            size=size,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            group_score=group_score,
            newest=newest,
            forced=forced,
        )
    chosen, factor = tempered(query, channels, scale)
    slots = lengths.new_empty(*lengths.shape, k)
    missed = query.new_empty(query.shape[:3], dtype=torch.float32)
    order = torch.arange(size)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            dead = order >= lengths[b, h]
            first = order >= lengths[b, h] - newest if forced is None else forced[b, h]
            logits = _logits(query[b, h], chosen[b, h], keys[b, h], channels[b, h], size)
            logits.mul_(factor[b, h, :, None])
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap)
            logits.masked_fill_(dead, -math.inf)
            ranking = logits.sum(0) if group_score == "logits" else None
            peak = logits.amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)
            if sinks is not None:
                peak = torch.maximum(peak, sinks[h, :, None].float())
            logits.sub_(peak).exp_()
            live = logits.sum(1)
            total = live if sinks is None else live + torch.exp(sinks[h].float() - peak[:, 0])
            share = 1 / total.clamp(min=torch.finfo(torch.float32).tiny)
            if ranking is None:
                ranking = torch.mv(logits.t(), share)
            ranking.masked_fill_(first, math.inf).masked_fill_(dead, -math.inf)
            slots[b, h] = ranking.topk(k).indices
            missed[b, h] = (live - logits[:, slots[b, h]].sum(1)) * share
    missed.clamp_(min=0).masked_fill_((lengths <= k)[..., None], 0)
    return slots, lengths.clamp(max=k), missed


def _logits(
    query: torch.Tensor, chosen: torch.Tensor, keys: torch.Tensor, channels: torch.Tensor, size: int
) -> torch.Tensor:
    """The products of `query [G, D]`, or of its `chosen [G, r]`, with one KV head's keys in `channels [r]`.

    A float32 workspace `[G, T]`, T = `size`.
    """
    logits = _workspace.take("logits", torch.float32, query.shape[0], size)
    by_channel = keys.movedim(-1, 0)  # [D, T], or [D, T/n, n] of blocks
    if keys.stride(-1) == 1 and by_channel.stride(1) > 1:  # token-major
        only_chosen = torch.zeros_like(query).index_copy_(1, channels, chosen)
        return logits.copy_(torch.mm(only_chosen, by_channel))
    per_slot = by_channel[0, 0].numel()
    step = _CHUNK // per_slot
    for begin in range(0, by_channel.shape[1], step):
        part = by_channel[:, begin : begin + step]
        rows = _workspace.take("channels", keys.dtype, len(channels), *part.shape[1:])
        torch.index_select(part, 0, channels, out=rows)
        products = torch.mm(chosen, rows.flatten(1))
        begin_slot = begin * per_slot
        end = min(begin_slot + products.shape[1], size)
        logits[:, begin_slot:end] = products[:, : end - begin_slot]
    return logits
