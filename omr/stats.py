"""Intervals and comparisons for accuracies measured on a few dozen to a few thousand problems.

A benchmark is a sample of problems, so what is resampled is the problem, never the generation: N generations of one
problem are not N independent facts. What is used where:
  - one generation a problem: the Wilson interval (the normal one is too narrow below a few hundred problems);
  - several: a bootstrap over problems of their mean scores (percentile, 95 %);
  - two runs on the same problems: exact McNemar for right/wrong votes, a paired bootstrap for mean scores;
  - "B is not worse than A": non-inferiority, the lower end of the paired interval above minus a stated margin. A
    p-value above 0.05 is no evidence of equality, and `detectable_difference` says what the set could have shown.

pass@k is the unbiased estimator of Chen et al. 2021. maj@k is the expectation over all k-subsets of the n answers, ties
shared equally among the tied ("shared" rule): exact when the subsets are few, else over seeded draws.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean

from omr.errors import ConfigError

Z95 = NormalDist().inv_cdf(0.975)
MAX_SUBSETS = 1000
"""Up to so many k-subsets are enumerated for maj@k; beyond, as many are drawn."""


@dataclass(frozen=True)
class Interval:
    low: float
    high: float

    def __str__(self) -> str:
        return f"[{100 * self.low:.1f}, {100 * self.high:.1f}]"


def wilson(right: int, total: int) -> Interval:
    """95 % score interval of a proportion (Wilson 1927). `total` must be positive."""
    assert 0 <= right <= total and total > 0, (right, total)
    share, z2 = right / total, Z95 * Z95
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    return Interval(
        0.0 if right == 0 else max(0.0, centre - half),
        1.0 if right == total else min(1.0, centre + half),
    )


def bootstrap_mean(scores: Sequence[float], *, seed: int = 0, draws: int = 4000) -> Interval:
    """95 % percentile interval of the mean of one score a problem, problems resampled."""
    import numpy

    values = numpy.asarray(scores, dtype=numpy.float64)
    assert values.size > 0
    rng = numpy.random.default_rng(seed)
    at_once = max(1, 2_000_000 // values.size)
    means = [
        values[rng.integers(values.size, size=(min(at_once, draws - done), values.size))].mean(axis=1)
        for done in range(0, draws, at_once)
    ]
    low, high = numpy.quantile(numpy.concatenate(means), [0.025, 0.975])
    return Interval(float(low), float(high))


def pass_at_k(n: int, right: int, k: int) -> float:
    """Probability that k of n generations, `right` of them right, drawn without return hold a right one."""
    assert 0 <= right <= n and k >= 1, (n, right, k)
    if n < k:
        raise ValueError(f"pass@{k} needs at least {k} generations of every problem, there are {n}")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority_score(answers: Sequence[Hashable | None], is_right: Sequence[bool]) -> float:
    """1 if the most frequent answer is right, 0 if wrong, the right share of the tied under a tie; None never votes."""
    votes = Counter(a for a in answers if a is not None)
    if not votes:
        return 0.0
    top = max(votes.values())
    right = {a: ok for a, ok in zip(answers, is_right, strict=True) if a is not None}
    tied = [a for a, count in votes.items() if count == top]
    return sum(right[a] for a in tied) / len(tied)


def maj_at_k(answers: Sequence[Hashable | None], is_right: Sequence[bool], k: int, *, seed: int = 0) -> float:
    """Expected majority score of k of the n answers, drawn without return. Raises ValueError when n < k."""
    n = len(answers)
    if n < k:
        raise ValueError(f"maj@{k} needs at least {k} generations of every problem, there are {n}")
    if not any(is_right):
        return 0.0
    if math.comb(n, k) <= MAX_SUBSETS:
        subsets: list[Sequence[int]] = list(itertools.combinations(range(n), k))
    else:
        rng = random.Random(seed)
        subsets = [rng.sample(range(n), k) for _ in range(MAX_SUBSETS)]
    return fmean(majority_score([answers[i] for i in s], [is_right[i] for i in s]) for s in subsets)


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100) by linear interpolation between order statistics."""
    assert values and 0 <= q <= 100, (len(values), q)
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p-value that A and B are equally often right alone, given the discordant counts."""
    n = only_a + only_b
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1))
    return float(min(1.0, 2 * tail / 2**n))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Run B against run A on the problems that both solved. Differences are B - A, as shares (0.02 is 2 points)."""

    problems: int
    mean_a: float
    mean_b: float
    difference: float
    interval: Interval
    """Paired bootstrap over problems, 95 %, at least 3/n to either side: runs that agree on all of 30 problems may
    still differ on one in ten (the rule of three), which a bootstrap of zeros cannot know."""
    only_a: int
    """Problems on which A's vote is right and B's is wrong."""
    only_b: int
    mcnemar_p: float
    margin: float
    not_inferior: bool
    """The interval's lower end is above -margin: B is shown to lose less than the margin."""
    detectable: float
    """Smallest true difference that a set like this one shows with 80 % power."""

    @property
    def verdict(self) -> str:
        points = 100 * self.margin
        if self.not_inferior:
            return f"B is not worse than A by {points:g} points or more"
        if self.interval.high < -self.margin:
            return f"B is worse than A by more than {points:g} points"
        if self.interval.high < 0:
            return "B is worse than A; by how much against the margin stays open"
        return (
            f"too few problems to tell: a margin of {points:g} points was asked for, and {self.problems} problems show "
            f"differences of about {100 * self.detectable:.1f} points and up"
        )


def compare(
    scores_a: Sequence[float],
    scores_b: Sequence[float],
    votes_a: Sequence[bool],
    votes_b: Sequence[bool],
    *,
    margin: float = 0.02,
    seed: int = 0,
) -> Comparison:
    """Compare two runs problem by problem. `scores` are mean correctness, `votes` whether the voted answer is right.

    All four are in one order of problems. Raises ConfigError for no problems.
    """
    assert len(scores_a) == len(scores_b) == len(votes_a) == len(votes_b)
    if not scores_a:
        raise ConfigError("the runs cannot be compared: they have no graded problem in common")
    differences = [b - a for a, b in zip(scores_a, scores_b, strict=True)]
    n, mean = len(differences), fmean(differences)
    drawn = bootstrap_mean(differences, seed=seed)
    interval = Interval(max(-1.0, min(drawn.low, mean - 3 / n)), min(1.0, max(drawn.high, mean + 3 / n)))
    only_a = sum(a and not b for a, b in zip(votes_a, votes_b, strict=True))
    only_b = sum(b and not a for a, b in zip(votes_a, votes_b, strict=True))
    return Comparison(
        problems=n,
        mean_a=fmean(scores_a),
        mean_b=fmean(scores_b),
        difference=mean,
        interval=interval,
        only_a=only_a,
        only_b=only_b,
        mcnemar_p=mcnemar(only_a, only_b),
        margin=margin,
        not_inferior=interval.low > -margin,
        detectable=detectable_difference(differences),
    )


def detectable_difference(differences: Sequence[float], *, power: float = 0.8) -> float:
    """Smallest mean paired difference found at the 5 % level with `power`, given how the differences scatter.

    The scatter is taken as at least that of one problem in the set changing sides: a set on which the runs agree
    everywhere does not prove that it could tell them apart.
    """
    n = len(differences)
    mean = fmean(differences)
    variance = sum((d - mean) ** 2 for d in differences) / max(n - 1, 1)
    variance = max(variance, 1 / n)
    return (Z95 + NormalDist().inv_cdf(power)) * math.sqrt(variance / n)


def paired(
    a: Mapping[str, tuple[float, bool]], b: Mapping[str, tuple[float, bool]], *, margin: float = 0.02, seed: int = 0
) -> Comparison:
    """`compare` for two tables problem id -> (mean score, vote is right), over the ids that both have."""
    ids = [i for i in a if i in b]
    return compare(
        [a[i][0] for i in ids],
        [b[i][0] for i in ids],
        [a[i][1] for i in ids],
        [b[i][1] for i in ids],
        margin=margin,
        seed=seed,
    )
