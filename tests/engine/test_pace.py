"""When to speculate, on a clock that the test winds."""

from __future__ import annotations

import random

import pytest

from omr.engine.pace import Pace


class Bench:
    """A machine where a plain step takes 1 and a speculative one `ratio`, with noise, and gives `gain` tokens."""

    def __init__(self, seed: int = 0) -> None:
        self.now, self.rng = 0.0, random.Random(seed)
        self.pace = Pace(lambda: self.now)

    def run(self, tokens: float, ratio: float, gain: float, batch: int = 1, noise: float = 0.1) -> tuple[float, float]:
        """(time per token, share of speculative steps) over `tokens` tokens."""
        start, made, steps, drafted = self.now, 0.0, 0, 0
        while made < tokens:
            speculates = self.pace.speculates(batch)
            self.now += (ratio if speculates else 1.0) * self.rng.uniform(1 - noise, 1 + noise)
            new = self.rng.choice([1, 2 * gain - 1]) if speculates else 1
            self.pace.done(new)
            made += new
            steps += 1
            drafted += speculates
        return (self.now - start) / made, drafted / steps


@pytest.mark.parametrize("ratio", [1.2, 1.6, 2.2, 4.0])
@pytest.mark.parametrize("seed", range(3))
def test_text_that_cannot_be_predicted_costs_three_percent_at_most(ratio: float, seed: int) -> None:
    cost, share = Bench(seed).run(3000, ratio, 1.0)
    assert cost < 1.03 and share < 0.1


@pytest.mark.parametrize(("ratio", "gain"), [(1.3, 2.5), (2.0, 2.5), (1.2, 1.5)])
@pytest.mark.parametrize("seed", range(3))
def test_where_it_pays_nearly_all_of_the_gain_is_kept(ratio: float, gain: float, seed: int) -> None:
    cost, share = Bench(seed).run(3000, ratio, gain)
    assert cost < 1.03 * ratio / gain and share > 0.85


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
    bench.pace.speculates(1)
    bench.now += 500.0
    bench.pace.done(2.0)
    assert bench.run(500, 1.3, 2.5)[1] > 0.8
