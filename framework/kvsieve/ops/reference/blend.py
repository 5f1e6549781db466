"""Softmax, the blended values, and what becomes of the weights."""

import torch

_LOWEST = torch.finfo(torch.float32).min


def blend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    live: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    far: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of `query [B, K, G, D]` over `keys, values [B, K, S, D]` where `live [B, K, S]`.

    The last of them are those of `far`, as `readable` has put them. Returns the output and the weights
    `[B, K, G, S]`. Values must be finite where not live.
    """
    if far is None:
        logits = logits_of(query, keys, scale, softcap)
    else:
        near = keys.shape[2] - far[0].shape[2]
        parts = (query, keys[:, :, :near]), (far[2].to(query.dtype), keys[:, :, near:])
        logits = torch.cat([logits_of(q, k, scale, softcap) for q, k in parts], 3)
    weights = softmax(logits, live[:, :, None], sinks)
    return torch.matmul(weights.to(values.dtype), values), weights


def with_tail(output: torch.Tensor, weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The output `[B, K, G, D]`, a share `weight [B, K, G]` of it replaced by `value [B, K, D]`."""
    weight = weight[..., None]
    return ((1 - weight) * output.float() + weight * value[:, :, None].float()).to(output.dtype)


def mass_by_slot(weights: torch.Tensor, slots: torch.Tensor | None, size: int, by_head: bool) -> torch.Tensor:
    """The mass `[B, K, T]`, or `[B, K, G, T]` `by_head`, from weights `[B, K, G, S]` of chosen slots `[B, K,
    S]`, or of all.
    """
    mass = weights if by_head else weights.mean(2)
    if slots is None:
        return mass
    if by_head:
        slots = slots[:, :, None].expand(mass.shape)
    return mass.new_zeros(*mass.shape[:-1], size).scatter_add_(-1, slots, mass)


def kept_mass(
    weights: torch.Tensor,
    slots: torch.Tensor | None,
    size: int,
    by_head: bool,
    add_to: torch.Tensor | None,
) -> torch.Tensor | None:
    """`mass_by_slot`; None, if it is added to a tensor instead."""
    mass = mass_by_slot(weights, slots, size, by_head)
    if add_to is None:
        return mass
    add_to += mass
    return None


def logits_of(query: torch.Tensor, keys: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    logits = torch.matmul(query * scale, keys.transpose(-1, -2)).float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def softmax(logits: torch.Tensor, visible: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the last dimension; exactly zero where not visible, also where nothing is."""
    logits = torch.where(visible, logits, _LOWEST)  # on a CPU half the time of `masked_fill`
    if sinks is None:
        return torch.softmax(logits, -1) * visible.any(-1, keepdim=True)
    column = sinks.float().view(*sinks.shape, *[1] * (logits.dim() - 3)).expand(*logits.shape[:-1], 1)
    return torch.softmax(torch.cat([logits, column], -1), -1)[..., :-1].masked_fill(~visible, 0)
