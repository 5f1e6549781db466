"""Pages of slots: their channel-wise bounds, a query's best product with them, the slots of chosen ones."""

import torch
import triton
import triton.language as tl

from .storage import head_start, strides

_TILE = 4096  # numbers of each bound, or slots, that a program holds at a time


def widen_bounds(
    low: torch.Tensor,
    high: torch.Tensor,
    keys: torch.Tensor,
    slots: torch.Tensor,
    counts: torch.Tensor,
    page: int,
) -> None:
    """`reference.widen_bounds`, one program for each page that the new keys can touch."""
    rows, heads, new, size = keys.shape
    columns = triton.next_power_of_2(size)
    tokens = min(triton.next_power_of_2(min(page, new)), max(1, _TILE // 2 // columns))
    _widen_bounds[(rows * heads, triton.cdiv(new - 1, page) + 1)](
        low=low,
        **strides("low", low, "row head page channel"),
        high=high,
        **strides("high", high, "row head page channel"),
        keys=keys,
        **strides("keys", keys, "row head token channel"),
        slots=slots,
        **strides("slots", slots, "row head token"),
        counts=counts.contiguous(),
        heads=heads,
        new=new,
        pages=low.shape[2],
        PAGE=page,
        D=size,
        COLUMNS=columns,
        TOKENS=tokens,
        num_warps=1 if tokens * columns <= 256 else 4,
        num_stages=1,
    )


def page_scores(
    query: torch.Tensor, low: torch.Tensor, high: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """`reference.page_scores`; each bound is read once for the whole group."""
    rows, heads, group, size = query.shape
    pages, columns = low.shape[2], triton.next_power_of_2(size)
    block = max(1, min(triton.next_power_of_2(pages), _TILE // columns))
    scores = torch.empty(rows, heads, group, pages, dtype=torch.float32, device=query.device)
    _page_scores[(rows * heads, triton.cdiv(pages, block))](
        query=query,
        **strides("query", query, "row head group channel"),
        low=low,
        **strides("low", low, "row head page channel"),
        high=high,
        **strides("high", high, "row head page channel"),
        lengths=lengths.contiguous(),
        scores=scores,
        heads=heads,
        pages=pages,
        G=group,
        D=size,
        COLUMNS=columns,
        BLOCK=block,
    )
    return scores


def slots_of_pages(
    pages: torch.Tensor, counts: torch.Tensor, page: int, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.slots_of_pages`, in the order of `pages`: a page begun leaves no gap."""
    rows, heads, many = pages.shape
    slots = torch.empty(rows, heads, many * page, dtype=torch.int64, device=pages.device)
    found = torch.empty(rows, heads, dtype=torch.int64, device=pages.device)
    columns = triton.next_power_of_2(page)
    _slots_of_pages[(rows * heads,)](
        pages=pages.contiguous(),
        counts=counts.contiguous(),
        lengths=lengths.contiguous(),
        slots=slots,
        found=found,
        many=many,
        PAGE=page,
        COLUMNS=columns,
        BLOCK=max(1, min(triton.next_power_of_2(many), _TILE // columns)),
    )
    return slots, found


@triton.jit(do_not_specialize=["new", "pages"])
def _widen_bounds(
    low,  # [B, K, N, D]
    low_row,
    low_head,
    low_page,
    low_channel,
    high,  # [B, K, N, D]
    high_row,
    high_head,
    high_page,
    high_channel,
    keys,  # [B, K, Q, D]
    keys_row,
    keys_head,
    keys_token,
    keys_channel,
    slots,  # [B, K, Q]: the first is where the row's new keys begin
    slots_row,
    slots_head,
    slots_token,
    counts,  # [B]
    heads,
    new,  # Q
    pages,  # N
    PAGE: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    first = tl.load(slots + head_start(pair, heads, slots_row, slots_head))
    count = tl.minimum(tl.load(counts + pair // heads), new)
    page = first // PAGE + tl.program_id(1)
    begin = tl.maximum(page * PAGE - first, 0)
    end = tl.minimum((page + 1) * PAGE - first, count)
    if (begin >= end) | (first < 0) | (page >= pages):
        return
    d = tl.arange(0, COLUMNS)
    low += head_start(pair, heads, low_row, low_head) + page * low_page + d * low_channel
    high += head_start(pair, heads, high_row, high_head) + page * high_page + d * high_channel
    keys += head_start(pair, heads, keys_row, keys_head)
    began = d < tl.where(page * PAGE < first, D, 0)  # else the page begins with these keys
    lowest = tl.load(low, mask=began, other=float("inf")).to(tl.float32)
    highest = tl.load(high, mask=began, other=float("-inf")).to(tl.float32)
    for start in range(begin, end, TOKENS):
        token = start + tl.arange(0, TOKENS)
        mask = (token < end)[:, None] & (d < D)[None, :]
        at = token[:, None].to(tl.int64) * keys_token + d[None, :] * keys_channel
        key = tl.load(keys + at, mask=mask, other=0.0).to(tl.float32)
        lowest = tl.minimum(lowest, tl.min(tl.where(mask, key, float("inf")), 0))
        highest = tl.maximum(highest, tl.max(tl.where(mask, key, float("-inf")), 0))
    tl.store(low, lowest.to(low.dtype.element_ty), mask=d < D)
    tl.store(high, highest.to(high.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["pages"])
def _page_scores(
    query,  # [B, K, G, D]
    query_row,
    query_head,
    query_group,
    query_channel,
    low,  # [B, K, N, D]
    low_row,
    low_head,
    low_page,
    low_channel,
    high,  # [B, K, N, D]
    high_row,
    high_head,
    high_page,
    high_channel,
    lengths,  # [B, K], in pages
    scores,  # [B, K, G, N] float32
    heads,
    pages,  # N
    G: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    page, d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, COLUMNS)
    live = page < tl.minimum(tl.load(lengths + pair), pages)
    mask = live[:, None] & (d < D)[None, :]
    row = page.to(tl.int64)[:, None]
    low += head_start(pair, heads, low_row, low_head)
    high += head_start(pair, heads, high_row, high_head)
    query += head_start(pair, heads, query_row, query_head)
    bottom = tl.load(low + row * low_page + d[None, :] * low_channel, mask=mask, other=0.0).to(tl.float32)
    top = tl.load(high + row * high_page + d[None, :] * high_channel, mask=mask, other=0.0).to(tl.float32)
    for g in range(G):
        q = tl.load(query + g * query_group + d * query_channel, mask=d < D, other=0.0).to(tl.float32)
        best = tl.where((q > 0)[None, :], top, bottom) * q[None, :]
        score = tl.where(live, tl.sum(best, 1), float("-inf"))
        tl.store(scores + (pair * G + g) * pages + page, score, mask=page < pages)


@triton.jit(do_not_specialize=["many"])
def _slots_of_pages(
    pages,  # [B, K, N]
    counts,  # [B, K], pages that count
    lengths,  # [B, K], in slots
    slots,  # [B, K, N * page]
    found,  # [B, K], slots that are live
    many,  # N
    PAGE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    length, count = tl.load(lengths + pair), tl.minimum(tl.load(counts + pair), many)
    n, offset = tl.arange(0, BLOCK), tl.arange(0, COLUMNS)
    slots += pair * many * PAGE
    written = tl.full([], 0, tl.int64)
    for first in range(0, many, BLOCK):
        page = tl.load(pages + pair * many + first + n, mask=first + n < count, other=-1)
        live = (page >= 0) & (page < tl.cdiv(length, PAGE))
        size = tl.where(live, tl.minimum(length - page * PAGE, PAGE), 0)
        place = written + tl.cumsum(size, 0) - size
        mask = offset[None, :] < size[:, None]
        tl.store(slots + place[:, None] + offset[None, :], page[:, None] * PAGE + offset[None, :], mask=mask)
        written += tl.sum(size)
    tl.store(found + pair, written)
    behind = tl.arange(0, BLOCK * COLUMNS)
    for first in range(written, many * PAGE, BLOCK * COLUMNS):  # must be slots too
        tl.store(
            slots + first + behind, tl.zeros([BLOCK * COLUMNS], tl.int64), mask=first + behind < many * PAGE
        )
