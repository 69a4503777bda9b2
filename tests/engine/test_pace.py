"""When to speculate, on a clock that the test winds."""

from __future__ import annotations

import random
from statistics import fmean

import pytest

from omr.engine.pace import Pace, lengths

DRAFTS = 3


class Bench:
    """A machine where a plain step takes 1 and one of 3 drafts `ratio`, with noise; shorter drafts take less.

    Of 3 drafts `gain` - 1 are accepted on average: all of them or none, or, with `first_only`, at most the first. Each
    sequence has a draft with chance `found`; looking for them takes `search`.
    """

    def __init__(self, seed: int = 0, found: float = 1.0, search: float = 0.0) -> None:
        self.now, self.rng, self.found, self.search = 0.0, random.Random(seed), found, search
        self.pace = Pace(DRAFTS, lambda: self.now)
        self.used = [0] * (DRAFTS + 1)

    def run(
        self, tokens: float, ratio: float, gain: float, batch: int = 1, noise: float = 0.1, first_only: bool = False
    ) -> tuple[float, float]:
        """(time per token, share of speculative steps) over `tokens` tokens."""
        start, made, steps, drafted = self.now, 0.0, 0, 0
        self.used = [0] * (DRAFTS + 1)
        reach = 1 if first_only else DRAFTS
        while made < tokens:
            drafts = self.pace.drafts(batch)
            had = [drafts if self.rng.random() < self.found else 0 for _ in range(batch)]
            cost = 1 + (ratio - 1) * (0.3 + 0.7 * drafts / DRAFTS) if any(had) else 1.0
            self.now += (cost + self.search * (drafts > 0)) * self.rng.uniform(1 - noise, 1 + noise)
            accepted = [min(n, reach) if self.rng.random() < (gain - 1) / reach else 0 for n in had]
            self.pace.done(list(zip(had, accepted, strict=True)))
            made += 1 + sum(accepted) / batch
            steps += 1
            drafted += any(had)
            self.used[drafts] += 1
        return (self.now - start) / made, drafted / steps


@pytest.mark.parametrize("ratio", [1.2, 1.6, 2.2, 4.0])
@pytest.mark.parametrize("seed", range(3))
def test_text_that_cannot_be_predicted_costs_three_percent_at_most(ratio: float, seed: int) -> None:
    cost, share = Bench(seed).run(3000, ratio, 1.0)
    assert cost < 1.03 and share < 0.12


@pytest.mark.parametrize(("ratio", "gain"), [(1.3, 2.5), (2.0, 2.5), (1.2, 1.5)])
def test_where_it_pays_nearly_all_of_the_gain_is_kept(ratio: float, gain: float) -> None:
    runs = [Bench(seed).run(3000, ratio, gain) for seed in range(24)]  # which drafts hold is chance: take the mean
    assert fmean(cost for cost, _ in runs) < 1.03 * ratio / gain and fmean(share for _, share in runs) > 0.85


def test_a_change_of_text_is_noticed_both_ways() -> None:
    bench = Bench()
    bench.run(2000, 1.5, 2.5)
    cost, share = bench.run(2000, 1.5, 1.0)
    assert cost < 1.05 and share < 0.15
    cost, share = bench.run(6000, 1.5, 2.5)
    assert cost < 0.75 and share > 0.7


def test_each_batch_size_is_judged_by_itself() -> None:
    bench = Bench()
    for _ in range(10):
        alone, crowded = bench.run(300, 1.3, 2.0, batch=1), bench.run(300, 2.6, 2.0, batch=16)
    assert alone[1] > 0.8 and crowded[1] < 0.2


def test_a_slow_first_step_does_not_count() -> None:
    bench = Bench()
    bench.pace.drafts(1)
    bench.now += 500.0
    bench.pace.done([(DRAFTS, 1)])
    assert bench.run(500, 1.3, 2.5)[1] > 0.8


def test_the_length_follows_what_is_accepted() -> None:
    """Where no second draft ever holds one is drafted, where all hold or fall together three are."""
    bench = Bench()
    bench.run(3000, 1.5, 1.8, first_only=True)
    assert bench.used[1] > 0.9 * sum(bench.used)
    bench.run(500, 1.5, 2.8)
    bench.run(3000, 1.5, 2.8)
    assert bench.used[3] > 0.8 * sum(bench.used)


def test_few_lengths_are_in_the_running() -> None:
    assert [lengths(n) for n in (1, 2, 3, 5, 24)] == [[1, 0], [2, 1, 0], [3, 1, 0], [5, 2, 1, 0], [24, 12, 1, 0]]


def test_a_drafter_that_finds_nothing_costs_next_to_nothing() -> None:
    """Asked always it would cost the search, a twentieth of a step."""
    cost, share = Bench(found=0.0, search=0.05).run(3000, 2.0, 2.5)
    assert cost < 1.02 and share == 0
    cost, share = Bench(found=0.03, search=0.05).run(3000, 2.0, 2.5)
    assert cost < 1.03


@pytest.mark.parametrize("batch", [1, 8])
def test_a_draft_now_and_then_is_taken_where_it_pays_in_those_steps(batch: int) -> None:
    """A step with drafts costs 1.5; a sequence that has them gets 2.5 tokens, but most of a batch then has none."""
    runs = [Bench(seed, found=0.2).run(4000, 1.5, 2.5, batch) for seed in range(12)]
    cost, share = fmean(cost for cost, _ in runs), fmean(share for _, share in runs)
    if batch == 1:
        assert cost < 0.89 and share > 0.15  # at best 1.1 / 1.3
    else:
        assert cost < 1.02 and share < 0.1


def test_another_batch_size_begins_with_what_is_known() -> None:
    """Drafts that do not pay are not measured anew at the start, but tried when a trial is due."""
    bench = Bench()
    bench.run(2000, 2.0, 1.2)
    for batch in (4, 8, 16, 32):
        bench.run(20, 2.0, 1.2, batch)
        assert sum(bench.used[1:]) <= 1


def test_only_drafts_teach_how_long_they_hold() -> None:
    """Steps and sequences without a draft say how often there is one, and what a plain step takes."""
    pace = Pace(2, clock=iter(range(10_000)).__next__)
    for _ in range(3):
        assert pace.drafts(2) == 0  # what a plain step takes comes first
        pace.done([(0, 0), (0, 0)])
    for _ in range(4):
        drafts = pace.drafts(2)
        pace.done([(drafts, drafts), (0, 0)])
    assert pace._found.mean == 0.5 and [held.mean for held in pace._held] == [1.0, 1.0]
    assert pace._gives() == {2: 2.0, 1: 1.5, 0: 1.0}
    before = len(pace._times[2, 0])
    pace.drafts(2)
    pace.done([(0, 0), (0, 0)])
    assert [held.mean for held in pace._held] == [1.0, 1.0]
    assert len(pace._times[2, 0]) == before + 1
