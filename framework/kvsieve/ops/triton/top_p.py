"""The fewest places that hold p of the attention of every head, without sorting.

Weights are not negative, so the bits of their float32 are in their order. First, for every head, the largest
number is found, four bits at a time from the highest, such that the weights at or above it sum to p; then the
places at or above that edge of any head are taken, in their order.
"""

import torch
import triton
import triton.language as tl

from .storage import shaped

_TILE = 1024  # places at a time; in the search each is compared with 16 numbers


def top_p(weights: torch.Tensor, counts: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.top_p`, the places in ascending order; behind those taken stand zeros."""
    rows, heads, many, size = weights.shape
    weights, counts = weights.float().contiguous(), shaped(counts, rows, heads)
    edges = torch.empty(rows, heads, many, dtype=torch.int32, device=weights.device)
    places = torch.empty(rows, heads, size, dtype=torch.int64, device=weights.device)
    found = torch.empty(rows, heads, dtype=torch.int64, device=weights.device)
    tile = min(_TILE, triton.next_power_of_2(size))
    _find_edges[(rows * heads * many,)](
        weights=weights, counts=counts, edges=edges, size=size, p=p, HEADS=many, TILE=tile, num_warps=8
    )
    _take[(rows * heads,)](
        weights=weights,
        counts=counts,
        edges=edges,
        places=places,
        found=found,
        size=size,
        HEADS=many,
        TILE=tile,
    )
    return places, found


@triton.jit(do_not_specialize=["size"])
def _find_edges(
    weights,  # [B, K, N, S] float32
    counts,  # [B, K]
    edges,  # [B, K, N] int32, the bits of a weight
    size,  # S
    p,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
):
    head, n = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
    count = tl.minimum(tl.load(counts + head // HEADS), size).to(tl.int32)
    digit = tl.arange(0, 16)
    edge = tl.full([], 0, tl.uint32)
    for place in range(8):
        candidate = edge | (digit.to(tl.uint32) << (28 - 4 * place))
        held = tl.zeros([16], tl.float32)
        for first in range(0, count, TILE):
            weight = tl.load(weights + head * size + first + n, mask=first + n < count, other=0.0)
            above = weight.to(tl.uint32, bitcast=True)[:, None] >= candidate[None, :]
            held += tl.sum(tl.where(above, weight[:, None], 0.0), 0)
        best = tl.max(tl.where(held >= p, digit, 0))
        edge |= best.to(tl.uint32) << (28 - 4 * place)
    tl.store(edges + head, edge.to(tl.int32, bitcast=True))


@triton.jit(do_not_specialize=["size"])
def _take(
    weights,  # [B, K, N, S] float32
    counts,  # [B, K]
    edges,  # [B, K, N]
    places,  # [B, K, S] int64
    found,  # [B, K] int64
    size,  # S
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
):
    pair, n = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
    count = tl.minimum(tl.load(counts + pair), size).to(tl.int32)
    places += pair * size
    written = tl.full([], 0, tl.int32)
    for first in range(0, count, TILE):
        taken = tl.zeros([TILE], tl.int32)
        for i in range(HEADS):
            head = pair * HEADS + i
            weight = tl.load(weights + head * size + first + n, mask=first + n < count, other=0.0)
            taken |= (weight.to(tl.int32, bitcast=True) >= tl.load(edges + head)).to(tl.int32)
        taken = tl.where(first + n < count, taken, 0)
        place = written + tl.cumsum(taken, 0) - 1
        tl.store(places + place, (first + n).to(tl.int64), mask=taken > 0)
        written += tl.sum(taken)
    tl.store(found + pair, written.to(tl.int64))
    for first in range(written, size, TILE):  # must be places too
        tl.store(places + first + n, tl.zeros([TILE], tl.int64), mask=first + n < size)
