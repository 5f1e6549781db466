"""CPU ops whose loops numba compiles: what happens at every decode step.

What is not here is `ops/cpu.py`'s. Numbers of 16 bits are widened in registers, so they cost half the bytes
and no more arithmetic. Runs on as many threads as torch does.
"""

import math
import threading
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch

from .. import cpu, reference
from ..cpu import (
    append,
    channel_scores,
    compact,
    prefill,
    slot_weights,
    slots_of_pages,
    top_p,
    widen_bounds,
    window_weights,
)
from .attend import attend_pieces, join_pieces
from .codes import score_codes
from .loops import NOT_BLOCKED, PIECE
from .numbers import LOWEST
from .pages import score_pages
from .scores import LOGITS, MAX, SOFTMAX, channel_weights
from .select import best_slots, choose_channels, ranked_slots
from .token import find_lowest, place_token, put_token, update_mean

__all__ = [
    "append",
    "append_token",
    "attend",
    "channel_scores",
    "code_scores",
    "compact",
    "lowest",
    "page_scores",
    "prefill",
    "slot_weights",
    "slots_of_pages",
    "top_by_channels",
    "top_channels",
    "top_p",
    "top_slots",
    "widen_bounds",
    "window_weights",
]

_config: Any = numba.config
if _config.THREADING_LAYER == "default":
    _config.THREADING_LAYER = "threadsafe"  # several threads may decode side by side
_BITS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}  # by bytes
_PIECE = 512  # slots of attention that a thread reads at a time
_NO_SLOTS, _NO_MASK, _NOTHING = (np.empty((0, 0), dtype) for dtype in (np.int64, np.bool_, np.float32))
_NO_VALUES, _NO_MASS = np.empty((0, 0), np.uint32), np.empty((0, 0, 0), np.float32)
_GROUP_SCORES = {"softmax": SOFTMAX, "logits": LOGITS, "max": MAX}


class _Held(threading.local):
    """Of a thread: memory used again at every step, and the number of threads that numba was told."""

    def __init__(self) -> None:
        self.memory: dict[str, np.ndarray] = {}
        self.threads = 0

    def take(self, name: str, *shape: int) -> np.ndarray:
        """A float32 array with any content, valid until the name is taken again in this thread."""
        size, held = math.prod(shape), self.memory.get(name)
        if held is None or held.size < size:
            held = self.memory[name] = np.empty(size, np.float32)
        return held[:size].reshape(shape)

    def set_threads(self) -> None:
        threads = torch.get_num_threads()
        if threads != self.threads:
            numba.set_num_threads(min(threads, _config.NUMBA_NUM_THREADS))
            # numba's threads may be those of torch's OpenMP: starting them, it asks for one a core.
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            self.threads = threads


_held = _Held()


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    tail_weight: torch.Tensor | None = None,
    tail_value: torch.Tensor | None = None,
    far: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    want_mass: bool = False,
    by_head: bool = False,
    add_mass_to: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    total: int = 0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`reference.attend`; slots by another query are `ops/cpu.py`'s."""
    if far is not None:
        return cpu.attend(
            query,
            keys,
            values,
            lengths,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            slots=slots,
            counts=counts,
            tail_weight=tail_weight,
            tail_value=tail_value,
            far=far,
            want_mass=want_mass,
            by_head=by_head,
            add_mass_to=add_mass_to,
            starts=starts,
            total=total,
        )
    _held.set_threads()
    rows, heads, group, head_size = query.shape
    pairs, size = rows * heads, values.shape[2] if starts is None else total
    listed = size if slots is None else slots.shape[2]
    pieces = max(1, -(-listed // _PIECE))
    weights = _held.take("attention", pairs, group, pieces * _PIECE)
    partial = _held.take("partial", pairs, pieces, group, head_size)
    peaks, sums = np.empty((2, pairs, group, pieces), np.float32)
    live = _pairs(lengths)
    which = (_NO_SLOTS, live)
    if slots is not None and counts is not None:
        which = _pairs(slots.contiguous(), listed), _pairs(counts)
    stored = *_memory(keys, starts), *_memory(values, starts)
    made = weights, peaks, sums
    bits = _bits(query).reshape(pairs, group, head_size)
    attend_pieces(pairs * pieces, bits, *stored, live, *which, scale, softcap or 0.0, *made, partial)
    output = torch.empty(query.shape, dtype=torch.float32)
    mass = torch.zeros((rows, heads, group, size) if by_head else (rows, heads, size)) if want_mass else None
    tail = (_NOTHING, _NO_VALUES)
    if tail_weight is not None and tail_value is not None:
        tail = (_pairs(tail_weight.float(), group), _bits(tail_value).reshape(pairs, head_size))
    masses = _NO_MASS if mass is None else mass.numpy().reshape(pairs, -1, size)
    sink_logits, outputs = _sinks(sinks, rows, heads, group), _pairs(output, group, head_size)
    join_pieces(pairs, partial, *made, sink_logits, *which, live, *tail, outputs, masses)
    if mass is not None and add_mass_to is not None:
        add_mass_to += mass
        mass = None
    return output.to(query.dtype), mass


def lowest(
    priority: torch.Tensor,
    lengths: torch.Tensor,
    *,
    positions: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
    newest: int = 0,
    oldest: int = 0,
) -> torch.Tensor:
    """`reference.lowest`."""
    slots = torch.empty_like(lengths)
    ranks, size = priority if priority.element_size() >= 4 else priority.float(), priority.shape[2]
    tokens, end = _NO_SLOTS, lengths
    if positions is not None and seen is not None:
        tokens, end = _pairs(positions, size), seen
    find_lowest(_pairs(ranks, size), _pairs(lengths), tokens, _pairs(end), newest, oldest, _pairs(slots))
    return slots


def top_channels(query: torch.Tensor, r: int) -> torch.Tensor:
    """`reference.top_channels`."""
    rows, heads, group, head_size = query.shape
    channels = torch.empty(rows, heads, r, dtype=torch.int64)
    choose_channels(_bits(query).reshape(rows * heads, group, head_size), _pairs(channels, r))
    return channels


def top_slots(
    ranking: torch.Tensor,
    lengths: torch.Tensor,
    k: int,
    *,
    newest: int = 0,
    forced: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.top_slots`."""
    _held.set_threads()
    (rows, heads, size), k = ranking.shape, min(k, ranking.shape[2])
    pairs, slots = rows * heads, torch.empty(rows, heads, k, dtype=torch.int64)
    first = max(newest, 0), _NO_MASK if forced is None else _pairs(forced, size)
    given = _pairs(ranking.float().contiguous(), size), _pairs(lengths), *first
    ranked_slots(pairs, *given, _held.take("ranking", pairs, size), _pairs(slots, k))
    return slots, lengths.clamp(max=k)


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
    """`reference.top_by_channels`."""
    _held.set_threads()
    (rows, heads, group, head_size), k = query.shape, min(k, size)
    pairs, pieces, ranked_by = rows * heads, -(-size // PIECE), _GROUP_SCORES[group_score]
    weights, ranking = _held.take("weights", pairs, group, size), _held.take("ranking", pairs, size)
    peaks, sums = np.empty((2, pairs, group, pieces), np.float32)
    live = _pairs(lengths)
    asked = _bits(query).reshape(pairs, group, head_size), _pairs(channels.contiguous(), channels.shape[2])
    made = weights, peaks, sums
    jobs = pairs * pieces
    channel_weights(jobs, *asked, *_memory(keys), live, scale, softcap or 0.0, ranked_by, *made, ranking)
    slots = torch.empty(rows, heads, k, dtype=torch.int64)
    missed = torch.empty(rows, heads, group)
    first = max(newest, 0), _NO_MASK if forced is None else _pairs(forced, size)
    found = _pairs(slots, k), _pairs(missed, group)
    sink_logits = _sinks(sinks, rows, heads, group)
    best_slots(pairs, *made, live, *first, sink_logits, ranked_by, ranking, *found)
    return slots, lengths.clamp(max=k), missed


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
    """`reference.code_scores`."""
    _held.set_threads()
    rows, heads, group, r = query.shape
    size = codes.shape[2] if slots is None else slots.shape[2]
    scores, ends = torch.zeros(rows, heads, group, size), _pairs(lengths)
    which = (_NO_SLOTS, ends)
    if slots is not None and counts is not None:
        which = _pairs(slots.contiguous(), size), _pairs(counts)
    asked, pairs = _pairs((query.float() * scale).contiguous(), group, r), rows * heads
    stored = *_memory(codes), *_memory(ranges)
    jobs = pairs * -(-size // PIECE)
    score_codes(jobs, asked, *stored, ends, *which, _pairs(scores, group, size))
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if slots is None or counts is None:
        live = reference.places.below(lengths, size)
    else:
        _, live = reference.places.readable(slots, counts, lengths)
    return scores.masked_fill_(~live[:, :, None], -math.inf)


def page_scores(
    query: torch.Tensor, low: torch.Tensor, high: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """`reference.page_scores`."""
    _held.set_threads()
    rows, heads, group, head_size = query.shape
    pairs, pages = rows * heads, low.shape[2]
    scores = torch.full((rows, heads, group, pages), -math.inf)
    asked, bounds = _bits(query).reshape(pairs, group, head_size), (*_memory(low), *_memory(high))
    score_pages(pairs, asked, *bounds, _pairs(lengths), _pairs(scores, group, pages))
    return scores


def append_token(
    stores: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    positions: torch.Tensor,
    lengths: torch.Tensor,
    seen: torch.Tensor,
    *,
    means: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
    active: torch.Tensor | None = None,
    limits: int | torch.Tensor | None = None,
    lowest: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """`reference.append_token`."""
    rows, heads = lengths.shape
    pairs, token = rows * heads, seen[..., None].clone()
    slots = torch.empty(rows, heads, 1, dtype=torch.int64)
    at, rows_on = np.empty(pairs, np.int64), np.empty(0, np.bool_) if active is None else active.numpy()
    full = np.empty(0, np.int64), np.empty(0, np.int64)
    if lowest is not None and limits is not None:
        most = torch.as_tensor(limits).expand(rows, heads)
        full = _pairs(most), _pairs(lowest)
    place_token(_pairs(lengths), _pairs(seen), *full, rows_on, _pairs(slots), at)
    packed = None if starts is None else starts.diff().numpy()
    for storage, new in (*stores, (positions, token)):
        rooms = np.full(pairs, reference.places.capacity(storage)) if packed is None else packed
        bits = _bits(reference.store.or_zero(new, storage, slots)).reshape(pairs, -1)
        numbers = storage[..., None] if storage.dim() == 3 else storage
        put_token(*_memory(numbers, starts), rooms, bits, at)
    for mean, vector in means:
        size = mean.shape[2]
        update_mean(_pairs(mean, size), _bits(vector).reshape(pairs, size), at, _pairs(seen))
    return slots


def _pairs(numbers: torch.Tensor, *shape: int) -> np.ndarray:
    """Numbers `[B, K, ...]` as `[P, ...]`: the same memory, or a copy of strided ones."""
    return numbers.detach().numpy().reshape(-1, *shape)


def _bits(numbers: torch.Tensor) -> np.ndarray:
    """The bits of numbers, as `loops` takes them: float16 is told from bfloat16 by its sign.

    Side by side, a copy of strided ones: numba compiles a loop again, for seconds, for an array with strides.
    """
    kind = torch.int16 if numbers.dtype == torch.float16 else _BITS[numbers.element_size()]
    return numbers.detach().contiguous().view(kind).numpy()


def _sinks(sinks: torch.Tensor | None, rows: int, heads: int, group: int) -> np.ndarray:
    """Sinks `[K, G]` as `[P, G]`; LOWEST where there are none."""
    if sinks is None:
        return np.full((rows * heads, group), LOWEST, np.float32)
    return np.tile(sinks.detach().float().numpy(), (rows, 1))


def _memory(
    stored: torch.Tensor, starts: torch.Tensor | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The bits of a store, where each pair `[P]` begins, and a slot's place: see `loops`.

    `starts [P + 1]` are the first slots of the pairs in a packed store.
    """
    shape, strides = stored.shape, stored.stride()
    last = sum((count - 1) * step for count, step in zip(shape, strides, strict=True))
    memory = _bits(stored.as_strided((last + 1,), (1,)))
    if starts is not None:
        begins = starts[:-1].numpy() * strides[2]
    else:
        begins = np.add.outer(np.arange(shape[0]) * strides[0], np.arange(shape[1]) * strides[1]).ravel()
    block, per_block = (strides[2], shape[3]) if len(shape) == 5 else (0, NOT_BLOCKED)
    return memory, begins, np.array((block, strides[-2], strides[-1], per_block))
