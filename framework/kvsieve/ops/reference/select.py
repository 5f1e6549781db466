"""Choose the slots that are read, and the one that is given up."""

import math

import torch

from .places import below
from .scores import channel_scores, slot_weights

_LOWEST = torch.finfo(torch.float32).min


def top_channels(query: torch.Tensor, r: int) -> torch.Tensor:
    """The r channels `[B, K, r]` with the highest sum of |q| over the group's `query [B, K, G, D]`."""
    return query.float().abs().sum(2).topk(r).indices


def top_slots(
    ranking: torch.Tensor,
    lengths: torch.Tensor,
    k: int,
    *,
    newest: int = 0,
    forced: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best live slots of `ranking [B, K, T]`, the last `newest` ones forced in.

    Returns slots `[B, K, min(k, T)]` and how many of them are live `[B, K]`: `min(k, length)`. Those come
    first; what fills the rest is below T, and dead.

    Where slots do not stand in the order of tokens, `forced [B, K, T]` bool marks the newest instead. A set,
    not a ranking: among equal scores any may be taken, and NaN counts as the highest.
    """
    size = ranking.shape[2]
    slots = torch.arange(size, device=lengths.device)
    if forced is None:
        forced = slots >= (lengths - newest)[..., None]
    ranking = ranking.float().masked_fill(forced, math.inf).clamp(min=_LOWEST)
    ranking = ranking.masked_fill(slots >= lengths[..., None], -math.inf)
    return ranking.topk(min(k, size), dim=2).indices, lengths.clamp(max=min(k, size))


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
    """`channel_scores` over T = `size` slots, added up over the group, and the `top_slots` of that.

    `group_score` "softmax" adds the heads' weights, "logits" their logits; "max" takes the largest logit.
    Returns slots `[B, K, min(k, T)]`, how many are live `[B, K]`, and the approximate weight `[B, K, G]` of
    the live slots left out, zero where none was.
    """
    scores = channel_scores(query, keys, lengths, channels, scale=scale, softcap=softcap)[..., :size]
    weights = slot_weights(scores, sinks)
    if group_score == "max":
        ranking = scores.amax(2)
    else:
        ranking = (weights if group_score == "softmax" else scores).sum(2)
    slots, counts = top_slots(ranking, lengths, k, newest=newest, forced=forced)
    held = weights.gather(3, slots[:, :, None].expand(-1, -1, weights.shape[2], -1))
    missed = (weights.sum(3) - held.sum(3)).clamp(min=0)
    return slots, counts, missed.masked_fill((lengths <= k)[..., None], 0)


def top_p(weights: torch.Tensor, counts: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The fewest of the first `counts [B, K]` places that hold p of the `weights [B, K, N, S]` of every head.

    A head's are the heaviest, down to the weight at which they sum to p, all of that weight included; all of
    them if they never do. Returns the union over the heads: places `[B, K, S]`, those taken first, and how
    many they are `[B, K]`.
    """
    weights = weights.masked_fill(~below(counts, weights.shape[3])[:, :, None], 0)
    return holding(p, weights, weights.sort(-1, descending=True).values, counts)


def holding(
    p: float, weights: torch.Tensor, ordered: torch.Tensor, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`top_p` of weights that are zero from the count on, and that are given in falling order too."""
    missing = ordered.cumsum(-1) - ordered < p  # those before do not sum to p
    last = missing.sum(-1, keepdim=True).clamp(min=1) - 1
    taken = (weights >= ordered.gather(-1, last)).any(2) & below(counts, weights.shape[3])
    return (~taken).to(torch.uint8).argsort(dim=2, stable=True), taken.sum(2)


def slots_of_pages(
    pages: torch.Tensor, counts: torch.Tensor, page: int, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The live slots of the first `counts [B, K]` of `pages [B, K, N]`, and how many there are `[B, K]`.

    Slots `[B, K, N * page]`: live ones first, in any order; the last page of a row may be begun only. A page
    without a live slot, or outside the row, adds none.
    """
    taken = below(counts, pages.shape[2]) & (pages >= 0) & (pages < -(-lengths // page)[..., None])
    ordered = pages.masked_fill(~taken, torch.iinfo(torch.int64).max // page - 1).sort(2).values
    slots = (ordered[..., None] * page + torch.arange(page, device=pages.device)).flatten(2)
    live = slots < lengths[..., None]
    return slots * live, live.sum(2)


def lowest(
    priority: torch.Tensor,
    lengths: torch.Tensor,
    *,
    positions: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
    newest: int = 0,
    oldest: int = 0,
) -> torch.Tensor:
    """The live slot `[B, K]` with the lowest `priority [B, K, T]`, of equal ones the first; else 0.

    Compared as float32, and 64 bits as float64. NaN is as high as infinity; so are slots whose `positions
    [B, K, T]` are below `oldest`, or among the last `newest` of `seen [B, K]` tokens.
    """
    ranks = priority.double() if priority.element_size() == 8 else priority.float()
    stays = ranks.isnan() | ~below(lengths, ranks.shape[2])
    if positions is not None:
        assert seen is not None
        stays |= (positions >= (seen - newest)[..., None]) | (positions < oldest)
    return ranks.masked_fill(stays, math.inf).argmin(2)
