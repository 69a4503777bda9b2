"""Statistics against brute force and scipy."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from omr import stats
from omr.errors import ConfigError


@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n: int, data: st.DataObject) -> None:
    right, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    flags = [i < right for i in range(n)]
    subsets = [any(s) for s in itertools.combinations(flags, k)]
    assert stats.pass_at_k(n, right, k) == pytest.approx(sum(subsets) / len(subsets))


def test_pass_and_maj_are_refused_with_too_few_generations() -> None:
    with pytest.raises(ValueError, match="pass@4 needs at least 4"):
        stats.pass_at_k(3, 3, 4)
    with pytest.raises(ValueError, match="maj@4 needs at least 4"):
        stats.maj_at_k(["1"], [True], 4)


@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=7), st.data())
def test_maj_at_k_is_the_expected_majority_with_shared_ties(answers: list[str | None], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(answers)))
    expected = []
    for subset in itertools.combinations(answers, k):
        votes = Counter(a for a in subset if a is not None)
        top = [a for a, c in votes.items() if c == max(votes.values())]
        expected.append(Fraction(top.count("a"), len(top)) if top else Fraction(0))
    got = stats.maj_at_k(answers, [a == "a" for a in answers], k)
    assert got == pytest.approx(float(sum(expected) / len(expected)))


def test_maj_at_k_by_draws_is_near_its_expectation() -> None:
    answers = ["a"] * 12 + ["b"] * 8 + [None] * 4
    exact = stats.maj_at_k(answers, [a == "a" for a in answers], 1)
    assert exact == pytest.approx(0.5)
    drawn = [stats.maj_at_k(answers, [a == "a" for a in answers], 9, seed=s) for s in range(3)]
    assert max(drawn) - min(drawn) < 0.06 and all(0.6 < d < 0.9 for d in drawn)


@given(st.integers(1, 400), st.data())
def test_wilson_is_scipys(total: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, total))
    theirs = binomtest(right, total).proportion_ci(0.95, method="wilson")
    ours = stats.wilson(right, total)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_exact_binomial_test(only_a: int, only_b: int) -> None:
    expected = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert stats.mcnemar(only_a, only_b) == pytest.approx(expected)


def test_the_bootstrap_covers_the_true_mean_about_19_times_in_20() -> None:
    rng = random.Random(0)
    covered = 0
    for trial in range(200):
        scores = [rng.betavariate(2, 1) for _ in range(80)]
        interval = stats.bootstrap_mean(scores, seed=trial, draws=1000)
        covered += interval.low <= 2 / 3 <= interval.high
    assert 180 <= covered <= 198
    assert stats.bootstrap_mean([1.0] * 30) == stats.Interval(1.0, 1.0)
    assert stats.bootstrap_mean([0, 1, 1], seed=3) == stats.bootstrap_mean([0, 1, 1], seed=3)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentile_is_numpys(values: list[float], q: float) -> None:
    numpy = pytest.importorskip("numpy")
    assert stats.percentile(values, q) == pytest.approx(float(numpy.percentile(values, q)), rel=1e-9, abs=1e-6)


def run_of(right: list[bool]) -> dict[str, tuple[float, bool]]:
    return {f"p{i}": (float(r), r) for i, r in enumerate(right)}


def test_a_run_is_not_inferior_to_itself_but_a_small_set_says_so_little() -> None:
    rng = random.Random(1)
    a = [rng.random() < 0.8 for _ in range(2000)]
    same = stats.paired(run_of(a), run_of(a))
    assert same.not_inferior and same.mcnemar_p == 1 and same.difference == 0
    agreeing = stats.paired(run_of(a[:60]), run_of(a[:60]))
    assert not agreeing.not_inferior and str(agreeing.interval) == "[-5.0, 5.0]"
    few = stats.paired(run_of([True, False] * 15), run_of([True, True, False, False] * 7 + [True, False]))
    assert not few.not_inferior and "too few problems to tell" in few.verdict and few.detectable > 0.1


def test_a_real_loss_is_found() -> None:
    rng = random.Random(2)
    a = [rng.random() < 0.8 for _ in range(1500)]
    b = [r and rng.random() < 0.9 for r in a]
    found = stats.paired(run_of(a), run_of(b), margin=0.02)
    assert found.difference < -0.05 and found.interval.high < -0.02 and found.mcnemar_p < 1e-6
    assert "worse than A by more than 2 points" in found.verdict
    assert found.only_b == 0 and found.only_a == sum(a) - sum(b)


def test_comparisons_are_over_shared_problems_and_swap_signs() -> None:
    a, b = run_of([True, False, True, True]), run_of([False, False, True, False])
    del a["p3"]
    one, other = stats.paired(a, b), stats.paired(b, a)
    assert one.problems == other.problems == 3
    assert one.difference == pytest.approx(-other.difference)
    assert (one.only_a, one.only_b) == (other.only_b, other.only_a)
    with pytest.raises(ConfigError, match="no graded problem in common"):
        stats.paired({}, b)


def test_the_detectable_difference_has_its_power() -> None:
    """Simulated: a true loss of that size is found about 80 times in 100."""
    rng, n, discordant = random.Random(3), 400, 0.2
    spread = [1.0] * int(n * discordant / 2) + [-1.0] * int(n * discordant / 2) + [0.0] * int(n * (1 - discordant))
    least = stats.detectable_difference(spread)
    assert least == pytest.approx(2.8016 * math.sqrt(discordant / n), rel=0.01)
    found = 0
    for trial in range(100):
        differences = [
            rng.choices([-1, 1, 0], [(discordant + least) / 2, (discordant - least) / 2, 1 - discordant])[0]
            for _ in range(n)
        ]
        found += stats.bootstrap_mean([float(d) for d in differences], seed=trial, draws=800).high < 0
    assert 68 <= found <= 92
