"""Voting over generations, and when to stop asking for more.

Generations finish one by one. After each, `StopPolicy.reason` says whether the problem is done: enough have finished,
no remaining vote can change the winner, or the leaders agree strongly enough. Only the second keeps the full vote's
winner for certain; the others trade a little certainty for time, so a vote that ended early carries its reason and is
labelled (`first 10 of 12`): the first to finish are the short ones, and their vote is not the vote of all.

Answers meet under `answer.vote_key` (070, 70 and 70.0 are one answer). A generation without an answer takes no part.
Ties go by a named rule: the answer whose first vote has the lowest sample index wins (`first_sample`). It depends on
the samples alone, never on which finished first, so a resumed or re-graded run votes as the first one did.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from omr.errors import ConfigError
from omr.solve.answer import vote_key

TIE_RULE = "first_sample"


class Weight(Enum):
    """What a vote counts, always between 0 and 1."""

    equal = "equal"
    """Every answer 1."""
    finish = "finish"
    """1 if the model ended its turn itself, 0 if it was cut off."""
    length = "length"
    """Shorter is heavier: half the weight for each `HALF_LENGTH_TOK` tokens written."""
    code = "code"
    """Share of its code blocks that ran without error; half without any code."""


HALF_LENGTH_TOK = 4000


@dataclass(frozen=True, kw_only=True)
class Ballot:
    """One finished generation as the vote sees it."""

    sample: int
    """Index of the generation within its problem: the seed it was drawn with, not the order of finishing."""
    answer: str | None
    ended: bool = True
    num_tok: int = 0
    code_runs: int = 0
    code_errors: int = 0

    def weight(self, by: Weight) -> float:
        if by is Weight.finish:
            return float(self.ended)
        if by is Weight.length:
            return float(0.5 ** (self.num_tok / HALF_LENGTH_TOK))
        if by is Weight.code:
            return 1 - self.code_errors / self.code_runs if self.code_runs else 0.5
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Result:
    """The outcome of a vote."""

    answer: str | None
    """The winner, as the lowest sample of its group wrote it; None when nobody had an answer."""
    votes: float
    """Weight of the winner."""
    runner_up: float
    """Weight of the strongest other answer."""
    total: float
    """Weight of all answers."""
    tied: bool

    @property
    def share(self) -> float:
        return self.votes / self.total if self.total else 0.0


def majority(ballots: Sequence[Ballot], by: Weight = Weight.equal) -> Result:
    """The winner by weight; ties by `first_sample`. The order of `ballots` does not matter."""
    return _winner(_groups(ballots), by)


def _winner(groups: dict[str, list[Ballot]], by: Weight) -> Result:
    if not groups:
        return Result(answer=None, votes=0.0, runner_up=0.0, total=0.0, tied=False)
    weights = {key: sum(b.weight(by) for b in group) for key, group in groups.items()}
    winner = max(weights, key=lambda key: weights[key])  # max keeps the first of equals: the lowest sample
    others = [w for key, w in weights.items() if key != winner]
    runner_up = max(others, default=0.0)
    return Result(
        answer=groups[winner][0].answer,
        votes=weights[winner],
        runner_up=runner_up,
        total=sum(weights.values()),
        tied=bool(others) and runner_up == weights[winner],
    )


def _groups(ballots: Sequence[Ballot]) -> dict[str, list[Ballot]]:
    """Ballots by their answer's key, lowest samples first; those without an answer left out."""
    groups: dict[str, list[Ballot]] = {}
    for ballot in sorted(ballots, key=lambda b: b.sample):
        if ballot.answer is not None:
            groups.setdefault(vote_key(ballot.answer), []).append(ballot)
    return groups


def is_decided(ballots: Sequence[Ballot], planned: int, by: Weight = Weight.equal) -> bool:
    """Whether the samples of range(planned) that are missing, each of weight at most 1, cannot change the winner.

    The best that they can do for another answer is to vote for it all together. That may make a tie, which
    `first_sample` settles for the winner if its first vote is from a lower sample than any of the others could be: with
    16 planned, 8 equal votes of the samples 0 to 7 decide.
    """
    missing = sorted(set(range(planned)) - {ballot.sample for ballot in ballots})
    groups = _groups(ballots)
    result = _winner(groups, by)
    if result.answer is None:
        return False
    lead = result.votes - result.runner_up - len(missing)
    if lead > 1e-9 or not missing:
        return True
    if lead < -1e-9 or by in (Weight.length, Weight.code):  # sums of fractions: an exact tie is rounding
        return False
    leader = groups.pop(vote_key(result.answer))
    rivals = [g[0].sample for g in groups.values() if sum(b.weight(by) for b in g) >= result.runner_up]
    return leader[0].sample < min([missing[0], *rivals])


@dataclass(frozen=True, kw_only=True)
class StopPolicy:
    """When a problem with `planned` generations needs no more. Conditions are joined by "or"; all may be off."""

    planned: int
    stop_after: int | None = None
    """First K finished."""
    when_decided: bool = False
    """What remains cannot change the winner, ties settled as in the vote."""
    agreement: float | None = None
    """The leader's share of the votes reaches this ..."""
    agreement_after: int = 3
    """... once so many generations have finished."""
    weight: Weight = Weight.equal

    def __post_init__(self) -> None:
        if self.planned < 1:
            raise ConfigError(f"job.num_generations must be >= 1, got {self.planned}")
        if self.stop_after is not None and not 1 <= self.stop_after <= self.planned:
            raise ConfigError(
                f"job.stop_after must be between 1 and job.num_generations={self.planned}, got {self.stop_after}"
            )
        if self.agreement is not None and not 0.5 < self.agreement <= 1:
            raise ConfigError(f"job.stop_at_agreement must be in (0.5, 1] or null, got {self.agreement}")
        if self.agreement_after < 1:
            raise ConfigError(f"job.agreement_after must be >= 1, got {self.agreement_after}")

    def reason(self, ballots: Sequence[Ballot]) -> str | None:
        """Why the problem is done after `ballots`, or None when it goes on. All planned done is not a reason."""
        done = len(ballots)
        if done >= self.planned:
            return None
        if self.stop_after is not None and done >= self.stop_after:
            return f"first {done} of {self.planned}"
        if self.when_decided and is_decided(ballots, self.planned, self.weight):
            return f"decided after {done} of {self.planned}"
        if self.agreement is not None and done >= self.agreement_after:
            result = majority(ballots, self.weight)
            if result.share >= self.agreement and not result.tied:
                return f"agreement after {done} of {self.planned}"
        return None

    def needed(self, ballots: Sequence[Ballot]) -> int:
        """How many further generations are worth having in flight: the fewest that could end the problem.

        If the vote may end early by agreeing, more than that would be begun only to be cancelled in the likely case.
        First-K alone is a race on purpose: all that are planned start at once.
        """
        remaining = self.planned - len(ballots)
        if remaining <= 0 or not (self.when_decided or self.agreement is not None):
            return remaining
        leader = majority(ballots, self.weight).answer or "the first answer"
        missing = sorted(set(range(self.planned)) - {ballot.sample for ballot in ballots})
        hoped = [*ballots, *(Ballot(sample=sample, answer=leader) for sample in missing)]

        def ends(more: int) -> bool:  # and then with still more of the leader's votes, too
            return self.reason(hoped[: len(ballots) + more]) is not None

        return bisect_left(range(1, remaining), True, key=ends) + 1


class TimeBank:
    """The contest's clock: every problem has a budget, and what it leaves unused the next ones may draw on.

    A problem may take `budget_s` plus what is in the bank, at most `buffer_s` of it; with 350 s + 210 s a problem never
    takes more than 560 s, and all together never more than problems x 350 s. `deadline_s` bounds the whole benchmark.
    The caller says what time it is (monotonic seconds), so the arithmetic can be tested without a clock.
    """

    def __init__(self, *, budget_s: float | None, buffer_s: float = 0.0, deadline_at: float | None = None) -> None:
        self.budget_s, self.buffer_s, self.deadline_at = budget_s, buffer_s, deadline_at
        self.saved_s = 0.0

    def take(self, now: float) -> tuple[float | None, float]:
        """(seconds that a problem starting now may take, seconds of it lent by the bank); None is no limit."""
        left = None if self.deadline_at is None else max(0.0, self.deadline_at - now)
        if self.budget_s is None:
            return left, 0.0
        lent = min(self.saved_s, self.buffer_s)
        self.saved_s -= lent
        limit = self.budget_s + lent
        return (limit if left is None else min(limit, left)), lent

    def give_back(self, used_s: float, lent_s: float) -> None:
        """A problem that was lent `lent_s` ended after `used_s`: what it did not use goes into the bank."""
        if self.budget_s is not None:
            self.saved_s += max(0.0, self.budget_s + lent_s - used_s)
