"""Scores of pages by the bounds of their keys."""

from typing import Any

import numpy as np
from numba import prange

from .loops import compiled, copy_row, inlined, place_of
from .numbers import larger, widen


@inlined
def _score_pages(
    p: Any,
    query: Any,
    low: Any,
    low_starts: Any,
    low_place: Any,
    high: Any,
    high_starts: Any,
    high_place: Any,
    lengths: Any,
    scores: Any,
) -> None:
    """The largest product of `query [P, G, D]` with any key in a page's bounds, `scores [P, G, N]`.

    Of a pair's first `lengths [P]` pages; the others' scores stay as they are.
    """
    group, size = query.shape[1:]
    above, below = np.empty((group, size), np.float32), np.empty((group, size), np.float32)
    for g in range(group):
        for d in range(size):
            above[g, d] = larger(widen(query[p, g, d]), np.float32(0))
            below[g, d] = widen(query[p, g, d]) - above[g, d]
    least, most = np.empty(size, np.float32), np.empty(size, np.float32)
    for page in range(min(lengths[p], scores.shape[2])):
        copy_row(low, place_of(page, low_starts[p], low_place), low_place[2], least)
        copy_row(high, place_of(page, high_starts[p], high_place), high_place[2], most)
        for g in range(group):
            up, down, score = above[g], below[g], np.float32(0)
            for d in range(size):
                score += up[d] * most[d] + down[d] * least[d]
            scores[p, g, page] = score


@compiled
def score_pages(jobs: int, *given: Any) -> None:
    for job in prange(jobs):
        _score_pages(np.int64(job), *given)
