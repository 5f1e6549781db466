"""The loops of a decode step, compiled: every number of the cache is read once, and nothing large is written.

Pairs are rows times KV heads. A piece of a pair is what one thread works on at a time, small enough for the
cache beside it. Weights stand relative to the largest logit of their piece; whoever joins pieces scales them.
Logits are in base 2. Letters: P pairs, G query heads of a pair, N pieces, T slots, S chosen slots, D head
size, r channels.

A `place [4]` says where a slot stands in the memory of a pair: `block, slot, channel, n`: three strides in
numbers and the slots in a block; the number of slot t and channel c is at
`t // n * block + t % n * slot + c * channel`.
"""

from typing import Any

import numpy as np
from numba import njit

from .numbers import LOWEST, exp2, finite, larger, widen

PIECE = 1024  # slots
NOT_BLOCKED = 2**40  # more slots than any block has
LOG2_E = np.float32(1.4426950408889634)

compiled = njit(parallel=True, fastmath=True, nogil=True, cache=True, error_model="numpy")
compiled_alone = njit(fastmath=True, nogil=True, cache=True, error_model="numpy")
compiled_exactly = njit(nogil=True, cache=True, error_model="numpy")  # infinities are numbers here
inlined = njit(fastmath=True, nogil=True, error_model="numpy")


@inlined
def weights_of(logits: Any) -> Any:
    """Turn logits into weights relative to the largest, LOWEST into 0; return the largest and their sum."""
    peak, total = LOWEST, np.float32(0)
    for i in range(logits.shape[0]):
        peak = larger(peak, logits[i])
    for i in range(logits.shape[0]):
        logits[i] = exp2(logits[i] - peak) if logits[i] > LOWEST else np.float32(0)
        total += logits[i]
    return peak, total


@inlined
def cap(logits: Any, softcap: Any) -> None:
    """Cap logits softly, where `softcap` is not 0, and bring them to base 2; not finite ones to LOWEST."""
    if softcap > 0:
        for i in range(logits.shape[0]):
            if logits[i] > LOWEST:
                logits[i] = softcap * np.tanh(logits[i] / softcap) * LOG2_E
    for i in range(logits.shape[0]):
        logits[i] = finite(logits[i])


@inlined
def scale_pieces(peaks: Any, sums: Any, sink: Any, scales: Any) -> Any:
    """Find the `scales` that make the weights of a head's pieces one softmax, its sink counted in.

    Returns the weight of all slots: 1 without a sink.
    """
    sink = sink * LOG2_E
    peak, total = sink, np.float32(0)
    for n in range(scales.shape[0]):
        peak = larger(peak, peaks[n])
    for n in range(scales.shape[0]):
        scales[n] = exp2(peaks[n] - peak)
        total += scales[n] * sums[n]
    everything = total + (exp2(sink - peak) if sink > LOWEST else np.float32(0))
    everything = max(everything, np.float32(1e-30))  # no slot at all
    for n in range(scales.shape[0]):
        scales[n] /= everything
    return total / everything


@inlined
def place_of(slot: Any, start: Any, place: Any) -> Any:
    """Where a slot of the pair that starts at `start` begins in memory, in numbers."""
    n = place[3]
    if n >= NOT_BLOCKED:  # a division takes longer than a product of keys
        return start + slot * place[1]
    return start + slot // n * place[0] + slot % n * place[1]


@inlined
def copy_row(stored: Any, begin: Any, channel: Any, row: Any) -> None:
    """Widen into `row [D]` what stands from `begin` on, every `channel` numbers."""
    if channel == 1:
        numbers = stored[begin : begin + row.shape[0]]
        for d in range(row.shape[0]):
            row[d] = widen(numbers[d])
    else:
        for d in range(row.shape[0]):
            row[d] = widen(stored[begin + d * channel])
