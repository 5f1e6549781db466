"""Intervals cover what they promise, and a policy like dense is seldom marked: enumerated or simulated."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from kvsieve.compare import statistics

SIZES = (16, 32, 64)
# Accuracy of dense and of the policy.
CASES = [
    (1.0, 0.95),
    (0.95, 0.90),
    (0.80, 0.60),
    (1.0, 0.12),
    (1.0, 0.85),
    (0.9, 0.9),
    (0.5, 0.5),
    (0.3, 0.6),
]


def every_outcome(size):
    """Counts lost and won `[outcomes]`, and scores of policy and dense `[outcomes, size]` that show them."""
    lost, won = np.array([(b, c) for b in range(size + 1) for c in range(size + 1 - b)]).T
    i = np.arange(size)
    dense = i < lost[:, None]
    policy = (i >= lost[:, None]) & (i < (lost + won)[:, None])
    return lost, won, policy.astype(float), dense.astype(float)


def coverage(size, loses, wins):
    """The exact chance that the interval of a 0/1 difference holds the true one: over all outcomes."""
    lost, won, policy, dense = every_outcome(size)
    found = statistics.difference(policy, dense, (0, 1), higher_is_better=True)
    true, wins = wins - loses, min(wins, 1 - loses)
    chance = scipy.stats.multinomial.pmf(
        np.stack([lost, won, size - lost - won], 1), size, [loses, wins, max(0.0, 1 - loses - wins)]
    )
    assert chance.sum() == pytest.approx(1)
    return chance[(found.low <= true + 1e-12) & (true - 1e-12 <= found.high)].sum()


@pytest.mark.parametrize("size", SIZES)
def test_the_interval_of_lost_and_won_answers_covers(size):
    for dense, policy in CASES:
        # The policy loses only what dense has right, or whatever it loses independently of dense.
        nested = max(dense - policy, 0), max(policy - dense, 0)
        independent = dense * (1 - policy), (1 - dense) * policy
        assert coverage(size, *nested) >= 0.94, (dense, policy)
        assert coverage(size, *independent) >= 0.94, (dense, policy)


def test_the_interval_covers_wherever_the_truth_lies():
    steps = np.linspace(0, 1, 21)
    found = [coverage(32, b, c) for b, c in itertools.product(steps, steps) if b + c <= 1]
    assert min(found) >= 0.93  # a discrete outcome cannot be met everywhere
    assert np.mean(found) >= 0.95


def test_exact_coverage_is_that_of_the_published_table():
    assert coverage(16, 0.05, 0) == pytest.approx(1.0, abs=5e-4)
    assert coverage(16, 0.8 * 0.4, 0.2 * 0.6) == pytest.approx(0.980, abs=5e-4)
    assert coverage(64, 0.05, 0) == pytest.approx(0.961, abs=5e-4)
    wilson = {(16, 0.95): 0.957, (16, 0.9): 0.932, (32, 0.95): 0.980, (64, 0.95): 0.960}
    for (size, true), expected in wilson.items():
        intervals = [
            statistics.score_interval([1.0] * k + [0.0] * (size - k), (0, 1)) for k in range(size + 1)
        ]
        chances = scipy.stats.binom.pmf(range(size + 1), size, true)
        found = sum(p for p, (low, high) in zip(chances, intervals, strict=True) if low <= true <= high)
        assert found == pytest.approx(expected, abs=5e-4)


def lengths(rng, shape, broken):
    """Characters repeated of 64: `broken` of the answers break off anywhere."""
    return np.where(rng.random(shape) < broken, rng.integers(0, 64, shape), 64).astype(float)


def simulated_coverage(policy, dense, limits, true):
    found = statistics.difference(policy, dense, limits, higher_is_better=True)
    return ((found.low <= true) & (true <= found.high)).mean()


def check_simulated_coverage(tables):
    rng = np.random.default_rng(0)
    for size in SIZES:
        whole = np.full((tables, size), 64.0)
        for broken in (0.03, 0.15, 0.5):
            true = -broken * (64 - 31.5)
            found = simulated_coverage(lengths(rng, whole.shape, broken), whole, (0, 64), true)
            assert found >= 0.94, (size, broken, found)
            dense = lengths(rng, whole.shape, 0.15)
            policy = lengths(rng, whole.shape, broken)
            also = simulated_coverage(policy, dense, (0, 64), true + 0.15 * 32.5)
            assert also >= 0.94, (size, broken, also)
        bits = rng.normal(1.2, 0.4, whole.shape)
        found = simulated_coverage(bits + rng.normal(0.026, 0.02, whole.shape), bits, None, 0.026)
        assert found >= 0.94, (size, found)


def test_intervals_of_lengths_and_of_bits_cover():
    check_simulated_coverage(tables=4000)


@pytest.mark.slow
def test_intervals_of_lengths_and_of_bits_cover_in_many_tables():
    check_simulated_coverage(tables=30_000)


def p_values(rng, runs, size, null, bad):
    """p `[runs, rows]` of `null` policies like dense and `bad` ones unlike it, on five tasks; their names."""
    shape = (runs, size)
    tasks = [
        (lambda good, q=q: (rng.random(shape) < (q if good else 0.2)).astype(float), (0, 1))
        for q in (0.95, 0.8, 0.6)
    ]
    tasks.append((lambda good: lengths(rng, shape, 0.3 if good else 0.95), (0, 64)))
    found, names = [], []
    for answers, limits in tasks:
        dense = answers(True)
        for name in [*(f"null {i}" for i in range(null)), *(f"bad {i}" for i in range(bad))]:
            found.append(statistics.difference(answers(name.startswith("null")), dense, limits, True).p)
            names.append(name)
    dense = rng.normal(1.2, 0.4, shape)
    for name in dict.fromkeys(names):
        noise = rng.normal(0, 0.02, shape) if name.startswith("null") else rng.normal(0.2, 0.1, shape)
        found.append(statistics.difference(dense + noise, dense, None, False).p)
        names.append(name)
    return np.stack(found, -1), names


def check_null_policies(runs):
    rng = np.random.default_rng(1)
    for size, (null, bad) in itertools.product(SIZES, [(1, 0), (3, 0), (1, 3)]):
        p, names = p_values(rng, runs, size, null, bad)
        marked = statistics.significant(p, names)
        like_dense = np.array([name.startswith("null") for name in names])
        assert marked[:, like_dense].any(-1).mean() <= 0.05, (size, null, bad)
        wrong = marked[:, like_dense].sum(-1) / np.maximum(1, marked.sum(-1))
        assert wrong.mean() <= 0.05
        if bad:
            assert marked[:, ~like_dense].mean() > (0.7 if size == 16 else 0.9), "what is far worse is marked"


def test_a_policy_like_dense_is_marked_in_few_runs():
    check_null_policies(runs=2000)


@pytest.mark.slow
def test_a_policy_like_dense_is_marked_in_few_of_many_runs():
    check_null_policies(runs=20_000)


def test_the_test_of_answers_is_mcnemars():
    for size in (6, 16):
        lost, won, policy, dense = every_outcome(size)
        found = statistics.difference(policy, dense, None, higher_is_better=True)
        np.testing.assert_array_equal(found.lost, lost)
        np.testing.assert_array_equal(found.won, won)
        expected = [
            scipy.stats.binomtest(int(min(b, c)), int(b + c), 0.5).pvalue if b + c else 1.0
            for b, c in zip(lost, won, strict=True)
        ]
        np.testing.assert_allclose(found.p, expected)


def test_of_answers_that_are_right_or_wrong_flipping_signs_is_mcnemars_test():
    lost, won, policy, dense = every_outcome(11)
    expected = statistics.difference(policy, dense, (0, 1), higher_is_better=True).p
    halves = statistics.difference(policy / 2, dense / 2, (0, 0.5), higher_is_better=True).p
    np.testing.assert_allclose(halves, expected)
    assert lost.max() == won.max() == 11


def test_flipping_signs_is_exact_where_few_scores_differ_and_close_to_it_elsewhere():
    rng = np.random.default_rng(2)
    for size, near in ((12, 1e-9), (16, 0.02)):
        changes = np.zeros(40)
        changes[rng.choice(40, size, replace=False)] = rng.normal(4, 10, size)
        exact = scipy.stats.permutation_test(
            (changes[changes != 0],), lambda x, axis: x.mean(axis), permutation_type="samples",
            n_resamples=2**size, vectorized=True,
        ).pvalue  # fmt: skip
        dense = np.full(40, 32.0)
        found = statistics.difference(dense + changes, dense, (0, 64), True)
        assert found.p == pytest.approx(exact, abs=near)
        assert found.p == statistics.difference(dense + changes, dense, (0, 64), True).p  # no dice


def test_lower_is_better_turns_lost_and_won_round():
    found = statistics.difference([2.0, 1.0, 1.0], [1.0, 1.5, 1.0], None, higher_is_better=False)
    assert (found.lost, found.won) == (1, 1)
    assert found.mean == pytest.approx(0.5 / 3)
    p = [1e-4, 1e-4, 0.5, math.nan]
    assert statistics.marks(p, [1, -1, 1, 1], [False] * 4, ["a", "b", "c", "d"]) == [
        "worse", "better", "indistinguishable", "few",
    ]  # fmt: skip


def test_a_score_alone_has_no_interval_that_is_narrower_than_its_samples():
    low, high = statistics.score_interval([1.0] * 16, (0, 1))
    assert (low, high) == (pytest.approx(0.806, abs=1e-3), 1.0)
    low, high = statistics.score_interval([64.0] * 16, (0, 64))
    assert 50 < low < 60
    assert high == 64
    assert statistics.score_interval([0.5], (0, 64))[1] > 10
    assert statistics.score_interval([1.25], None) is None
    assert statistics.score_interval([1.25] * 9, None) is None
    low, high = statistics.score_interval([1.0, 2.0, 3.0], None)
    assert (low + high) / 2 == pytest.approx(2)
    assert high - low == pytest.approx(2 * 4.3027 / math.sqrt(3), rel=1e-4)
    assert statistics.score_interval([0.0, 1.0], None) == statistics.score_interval([0.0, 1.0], (0, 1))


def test_too_few_samples_are_not_judged():
    ones = np.ones(15)
    assert math.isnan(statistics.difference(ones * 2.5, ones, None, True).p)
    assert math.isnan(statistics.difference(ones[:5] * 0, ones[:5], (0, 1), True).p)
    assert statistics.difference(ones[:6] * 0, ones[:6], (0, 1), True).p == pytest.approx(2 * 0.5**6)


def test_equal_scores_are_no_difference():
    rng = np.random.default_rng(0)
    bits = rng.normal(1, 0.2, 32)
    found = statistics.difference(bits, bits, None, False)
    assert math.isnan(found.low)
    assert (found.mean, found.p) == (0, 1)
    found = statistics.difference(np.ones(16), np.ones(16), (0, 1), True)
    assert (round(float(found.low), 3), round(float(found.high), 3), found.p) == (-0.171, 0.171, 1)
