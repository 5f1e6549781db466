"""Scores of slots and of pages, by less than their keys."""

import math

import torch

from ..four_bits import unquantised
from .blend import logits_of, softmax
from .places import below, index_of, readable, within


def tempered(query: torch.Tensor, channels: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The chosen channels of the query `[B, K, G, r]`, and the factor of its logits `[B, K, G]` float32.

    The dot product over r of D channels is smaller than the whole one; it is divided by `sqrt(coverage)`,
    coverage being the share of |query| that the channels hold (SparQ, equation 9: with the usual scale this
    is the paper's temperature). A channel outside [0, D) is chosen as a zero.
    """
    inside = within(channels, query.shape[3])
    chosen = query.gather(3, inside[:, :, None].expand(-1, -1, query.shape[2], -1))
    chosen = chosen.masked_fill((inside != channels)[:, :, None], 0)
    norm = query.float().abs().sum(3)
    coverage = chosen.float().abs().sum(3) / norm.clamp(min=torch.finfo(torch.float32).tiny)
    # A zero query (the embedding of a pad token, say) covers nothing of nothing: 0 / 0. Its logits are zero.
    temperature = torch.where(norm > 0, coverage, 1).clamp(min=1e-6).rsqrt()
    return chosen, scale * temperature


def channel_scores(
    query: torch.Tensor,
    keys: torch.Tensor,
    lengths: torch.Tensor,
    channels: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Logits from the chosen channels only, `[B, K, G, T]` float32; dead slots get -inf.

    For keys in blocks, T counts all slots of the blocks.

    `channels [B, K, r]`, scaled as `tempered` says.
    """
    chosen, factor = tempered(query, channels, scale)
    index = within(channels, query.shape[3])[:, :, None]
    if keys.dim() == 5:
        part = keys.gather(4, index[:, :, None].expand(-1, -1, *keys.shape[2:4], -1)).flatten(2, 3)
    else:
        part = keys.gather(3, index.expand(-1, -1, keys.shape[2], -1))
    logits = torch.matmul(chosen, part.transpose(2, 3)).float() * factor[..., None]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    live = below(lengths, part.shape[2])[:, :, None]
    return logits.masked_fill(~live, -math.inf)


def code_scores(
    query: torch.Tensor,
    codes: torch.Tensor,
    ranges: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    slots: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits `[B, K, G, T]` float32 of `query [B, K, G, r]` with vectors in four bits; dead slots get -inf.

    `codes [B, K, T, r/2]`, `ranges [B, K, T, 2]` as `four_bits.quantised` makes them. With `slots [B, K, S]`
    the logits `[B, K, G, S]` of these; all but the first `counts [B, K]` get -inf.
    """
    if slots is None:
        live = below(lengths, codes.shape[2])
    else:
        assert counts is not None
        slots, live = readable(slots, counts, lengths)
        codes, ranges = codes[index_of(codes, slots)], ranges[index_of(ranges, slots)]
    logits = logits_of(query.float(), unquantised(codes, ranges), scale, softcap)
    return logits.masked_fill(~live[:, :, None], -math.inf)


def page_scores(
    query: torch.Tensor, low: torch.Tensor, high: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """The largest product `[B, K, G, N]` float32 of a query with any key within a page's bounds.

    `query [B, K, G, D]`; `low`, `high [B, K, N, D]`; `lengths [B, K]`: pages below are live, the others get
    -inf.
    """
    query, live = query.float(), below(lengths, low.shape[2])
    low, high = (bound.float().masked_fill(~live[..., None], 0).transpose(2, 3) for bound in (low, high))
    scores = torch.matmul(query.clamp(min=0), high) + torch.matmul(query.clamp(max=0), low)
    return scores.masked_fill(~live[:, :, None], -math.inf)


def slot_weights(scores: torch.Tensor, sinks: torch.Tensor | None = None) -> torch.Tensor:
    """Softmax of `scores [B, K, G, T]` over the slots; with sinks the weights of a head sum to less than one.

    Slots of -inf, the dead ones, get zero. A NaN makes a head's weights NaN.
    """
    return softmax(scores, scores != -math.inf, sinks)
