"""Softmax over slots."""

import math

import torch


def slot_weights(scores: torch.Tensor, sinks: torch.Tensor | None = None) -> torch.Tensor:
    """`reference.slot_weights`, in torch: a softmax over whole rows is one fused kernel there already.

    For policies that need every weight; it reads the capacity. `top_by_channels` stores few and follows the length.
    """
    lse = torch.logsumexp(scores, -1, keepdim=True)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.float()[..., None])
    # a row without live slots: exp(-inf - 0) = 0 instead of exp(-inf - -inf)
    return torch.exp(scores - lse.masked_fill(lse == -math.inf, 0))
