"""Intervals of a score and of its difference from dense on the same samples, and which differences count.

The formulas depend on the scores: 0/1 answers, numbers within known limits, or numbers without. They are
taken for 0/1 answers where all are 0 or 1 and the task says no other limits. Where it says 0 and 1 that is
harmless: a difference has the same interval and p either way, and a mean score has Wilson's interval in place
of a wider one.

Arrays may have leading axes (many tables at once, as in the simulations of the tests); samples are the last
axis.

Coverage of the nominal 95 % intervals of a difference with 16, 32 and 64 samples, by enumeration and
simulation (tests/compare/test_statistics.py): 0/1 and bounded scores above 94 %; unbounded ones 95 % if the
differences are normal, but 89 % at 16 samples and 92 % at 64 if they are skewed (log-normal), and less with
rare outliers: take at least 32 samples of a perplexity.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

LEVEL = 0.95
_EXACT = 12  # differences that are not 0: of up to so many all signs are tried
_DRAWN = 10_000  # signs that are drawn for more
Limits = tuple[float, float] | None  # the lowest and the highest score that a task can give
Array = Any  # of numpy; a float where there is one table

BETTER, WORSE, ALIKE, FEW = "better", "worse", "indistinguishable", "few"
CHANCE = "chance"  # dense itself does no better than a model that knows nothing: nothing is judged by it


class Difference(NamedTuple):
    """A policy's scores minus those of dense on the same samples."""

    mean: Array
    low: Array  # ends of the 95 % interval; NaN: there is none
    high: Array
    lost: Array  # samples with a lower score than dense; of 0/1 scores: answers lost
    won: Array
    p: Array  # of no difference; NaN: too few samples to say


def is_binary(scores: Array) -> bool:
    """Whether all scores are 0 or 1."""
    return bool(np.isin(scores, (0, 1)).all())


def score_interval(scores: Sequence[float], limits: Limits) -> tuple[float, float] | None:
    """The 95 % interval of a task's mean score; None where the samples say nothing about their spread.

    0/1: Wilson. Within limits: t, with one pseudo sample at each limit. Otherwise: t; None for a single
    sample and for samples that are all equal.
    """
    values = np.asarray(scores, dtype=float)
    if limits in (None, (0, 1)) and is_binary(values):
        found = scipy.stats.binomtest(int(values.sum()), len(values)).proportion_ci(LEVEL, "wilson")
        return float(found.low), float(found.high)
    if limits is not None:
        low, high = _t_interval(np.append(values, limits))
        return max(float(low), limits[0]), min(float(high), limits[1])
    if len(values) < 2 or np.ptp(values) == 0:
        return None
    low, high = _t_interval(values)
    return float(low), float(high)


def difference(policy: Array, dense: Array, limits: Limits, higher_is_better: bool) -> Difference:
    """The paired difference policy - dense, `[..., n]` scores each, on the same n samples.

    The interval of 0/1 scores and of those within limits: t with two pseudo samples, at minus and plus the
    width of the limits. Otherwise: t. p of scores without limits is that of the interval. Of the others it is
    that of the test that flips signs, which for 0/1 scores is McNemar's: pseudo samples, which make an
    interval wide enough, would hide a policy that loses all of the little that dense scores. NaN where no
    test could tell: fewer than 6 samples, and fewer than 16 of scores without limits.
    """
    policy, dense = np.asarray(policy, dtype=float), np.asarray(dense, dtype=float)
    binary = limits in (None, (0, 1)) and is_binary(policy) and is_binary(dense)
    width = 1.0 if binary else None if limits is None else limits[1] - limits[0]
    found = policy - dense
    count = found.shape[-1]
    worse, better = (found < 0).sum(-1), (found > 0).sum(-1)
    lost, won = (worse, better) if higher_is_better else (better, worse)
    if width is None:
        low, high = _t_interval(found)
        p = _t_p(found)
    else:
        ends = np.broadcast_to([-width, width], (*found.shape[:-1], 2))
        widened = np.concatenate([found, ends], axis=-1)
        low, high = _t_interval(widened)
        low, high = np.maximum(low, -width), np.minimum(high, width)
        p = _mcnemar(lost, won) if binary else _sign_flip_p(found)
    if count < (16 if width is None else 6):
        p = np.full(found.shape[:-1], math.nan)
    return Difference(found.mean(-1), low, high, lost, won, p)


def chance_p(scores: Sequence[float], chance: float | None, limits: Limits) -> float | None:
    """p of a mean that is `chance`, by the test that flips signs.

    None: chance is not known, or `score_interval` says it: of 0/1 answers, and of scores without limits.
    """
    values = np.asarray(scores, dtype=float)
    if chance is None or limits is None or (limits == (0, 1) and is_binary(values)):
        return None
    return float(_sign_flip_p(values - chance))


def marks(p: Array, mean: Array, higher_is_better: Array, policies: Sequence[str]) -> list[str]:
    """Better, worse, indistinguishable or few for each row of a run; NaN in `p` is `few`.

    `policies` names the policy of each row, compression and parameters included; see significant.
    """
    p, mean = np.asarray(p, dtype=float), np.asarray(mean, dtype=float)
    gain = (mean > 0) == np.asarray(higher_is_better, dtype=bool)
    found = np.where(significant(p, policies), np.where(gain, BETTER, WORSE), ALIKE)
    return [str(mark) for mark in np.where(np.isnan(p), FEW, found)]


def significant(p: Array, policies: Sequence[str]) -> Array:
    """Which rows `[..., rows]` of a run differ from dense, by the procedure of Benjamini and Hochberg, twice.

    Over all rows of the run: of those that differ, at most 5 % are expected to be wrong. And over the rows of
    each policy alone: a policy like dense stays unmarked in 95 % of runs, however bad its neighbours are
    (they would lend it their significance otherwise: up to 12 % of simulated runs marked it). Rows whose p is
    NaN do not count.
    """
    differs = _benjamini_hochberg(p)
    names = np.asarray(policies)
    for policy in dict.fromkeys(policies):
        own = names == policy
        differs[..., own] &= _benjamini_hochberg(p[..., own])
    return differs


def _benjamini_hochberg(p: Array) -> Array:
    """NaN is left out, the same rows in all tables."""
    differs = np.zeros(p.shape, dtype=bool)
    known = ~np.isnan(p).any(axis=tuple(range(p.ndim - 1)))
    if known.any():
        adjusted = scipy.stats.false_discovery_control(p[..., known], axis=-1, method="bh")
        differs[..., known] = adjusted < 1 - LEVEL
    return differs


def _t_interval(values: Array) -> tuple[Array, Array]:
    """NaN for a single value and for values that are all equal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = scipy.stats.ttest_1samp(values, 0, axis=-1).confidence_interval(LEVEL)
    equal = np.ptp(values, axis=-1) == 0
    return np.where(equal, math.nan, found.low), np.where(equal, math.nan, found.high)


def _t_p(values: Array) -> Array:
    """1 where all are 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        p = scipy.stats.ttest_1samp(values, 0, axis=-1).pvalue
    equal = np.ptp(values, axis=-1) == 0
    return np.where(equal, np.where(values[..., 0] == 0, 1.0, 0.0), p)


def _sign_flip_p(values: Array) -> Array:
    """Two-sided: how often the mean is as far from 0 if every value might as well have the other sign.

    Exact where few values are not 0. Otherwise of signs that are drawn, the same in every call, and the given
    ones.
    """
    count = values.shape[-1]
    sizes = -np.sort(-np.abs(values), axis=-1).reshape(-1, count)  # zeros last: their signs change nothing
    least = np.abs(values.sum(-1)).reshape(-1) * (1 - 1e-9)  # sums of the same numbers may differ by rounding
    few = (sizes[:, _EXACT:] == 0).all(-1)
    every = np.array(list(itertools.product([1.0, -1.0], repeat=min(count, _EXACT))))
    p = np.empty(len(sizes))
    p[few] = _as_far(sizes[few, :_EXACT], least[few], every) / len(every)
    if not few.all():
        drawn = np.random.default_rng(0).choice([1.0, -1.0], (_DRAWN, count))
        p[~few] = (1 + _as_far(sizes[~few], least[~few], drawn)) / (1 + _DRAWN)
    return p.reshape(values.shape[:-1])[()]


def _as_far(sizes: Array, least: Array, signs: Array) -> Array:
    """For each of the tables `[tables, n]` how many of the signs `[m, n]` make a sum of at least `least`."""
    tables = 1000  # at a time, which bounds the memory
    found = [
        (np.abs(signs @ sizes[i : i + tables].T) >= least[i : i + tables]).sum(0)
        for i in range(0, len(sizes), tables)
    ]
    return np.concatenate(found) if found else np.zeros(0, int)


def _mcnemar(lost: Array, won: Array) -> Array:
    """Two-sided and exact: of the samples that changed, half would be lost if there were no difference."""
    tail = scipy.stats.binom.cdf(np.minimum(lost, won), lost + won, 0.5)
    return np.minimum(1.0, 2 * tail)
