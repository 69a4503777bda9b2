"""Votes, stop policies and the contest clock, as properties."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omr.errors import ConfigError
from omr.solve.answer import vote_key
from omr.solve.vote import Ballot, StopPolicy, TimeBank, Weight, is_decided, majority

ANSWERS = st.sampled_from(["7", "07", "7.0", "8", "\\frac{1}{2}", "0.5", "x", None])


@st.composite
def ballots(draw: st.DrawFn, most: int = 9) -> list[Ballot]:
    answers = draw(st.lists(ANSWERS, max_size=most))
    samples = draw(st.permutations(range(len(answers))))
    return [
        Ballot(
            sample=sample,
            answer=answer,
            ended=draw(st.booleans()),
            num_tok=draw(st.integers(0, 20_000)),
            code_runs=4,
            code_errors=draw(st.integers(0, 4)),
        )
        for sample, answer in zip(samples, answers, strict=True)
    ]


def winner(cast: list[Ballot], by: Weight = Weight.equal) -> str | None:
    answer = majority(cast, by).answer
    return None if answer is None else vote_key(answer)


def part_of(cast: list[Ballot], planned: int, data: st.DataObject) -> tuple[list[Ballot], list[int]]:
    """`cast` with samples drawn from range(planned), and the samples that are missing."""
    samples = data.draw(st.permutations(range(planned)))
    kept = [replace(b, sample=s) for b, s in zip(cast, samples, strict=False)]
    return kept, samples[len(kept) :]


@given(ballots(most=6), st.integers(0, 5), st.data())
def test_a_decided_majority_is_never_changed_by_the_remaining_votes(
    cast: list[Ballot], remaining: int, data: st.DataObject
) -> None:
    """Every way to vote, with all weights: nobody else wins, not by a tie either."""
    by = data.draw(st.sampled_from(list(Weight)))
    cast, missing = part_of(cast, len(cast) + remaining, data)
    if not is_decided(cast, len(cast) + remaining, by):
        return
    for answers in itertools.product(["7", "8", "new", None], repeat=min(remaining, 4)):
        late = [Ballot(sample=s, answer=answer) for s, answer in zip(missing, answers, strict=False)]
        assert winner([*cast, *late], by) == winner(cast, by) is not None


@given(ballots(), st.data())
def test_an_undecided_majority_can_still_be_changed(cast: list[Ballot], data: st.DataObject) -> None:
    for remaining in range(1, 10):
        partly, missing = part_of(cast, len(cast) + remaining, data)
        if is_decided(partly, len(cast) + remaining):
            continue
        others = sorted({b.answer or "new" for b in cast if b.answer} | {"new"})
        outcomes = [winner([*partly, *(Ballot(sample=s, answer=other) for s in missing)]) for other in others]
        assert any(outcome != winner(partly) for outcome in outcomes) or winner(partly) is None


@given(st.lists(st.sampled_from(["1", "2", None]), min_size=2, max_size=7), st.data())
def test_decided_is_exactly_that_no_completion_elects_another(answers: list[str | None], data: st.DataObject) -> None:
    planned = len(answers)
    cast, missing = part_of([Ballot(sample=0, answer=a) for a in answers[: planned // 2]], planned, data)
    others = ["1", "2", "3", None]
    elected = {
        winner([*cast, *(Ballot(sample=s, answer=a) for s, a in zip(missing, late, strict=True))])
        for late in itertools.product(others, repeat=len(missing))
    }
    assert is_decided(cast, planned) == (elected == {winner(cast)} and winner(cast) is not None)


def test_half_of_the_votes_decide_if_they_came_first() -> None:
    first = [Ballot(sample=i, answer="7") for i in range(8)]
    assert is_decided(first, 16) and not is_decided(first[:7], 16)
    late = [Ballot(sample=i, answer="7") for i in range(1, 9)]  # sample 0 may open another answer with eight votes
    assert not is_decided(late, 16) and is_decided([*late, Ballot(sample=9, answer="7")], 16)


@given(ballots(), st.randoms(use_true_random=False))
def test_the_order_of_finishing_does_not_matter(cast: list[Ballot], random: object) -> None:
    shuffled = list(cast)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    for by in Weight:
        assert majority(cast, by) == majority(shuffled, by)


@given(ballots())
def test_weights_lie_between_0_and_1_and_none_never_votes(cast: list[Ballot]) -> None:
    assert all(0 <= b.weight(by) <= 1 for b in cast for by in Weight)
    voting = [b for b in cast if b.answer is not None]
    assert majority(cast) == majority(voting) and majority(cast).total == len(voting)


def test_equal_answers_meet_and_ties_go_to_the_lowest_sample() -> None:
    cast = [Ballot(sample=i, answer=a) for i, a in enumerate(["8", "070", "70.0", "8", "\\boxed{70}", None])]
    result = majority(cast)
    assert (result.answer, result.votes, result.runner_up, result.tied) == ("070", 3, 2, False)
    tie = majority([Ballot(sample=2, answer="a"), Ballot(sample=1, answer="b")])
    assert tie.answer == "b" and tie.tied
    assert majority([]).answer is None and majority([]).share == 0


def test_weighted_votes() -> None:
    long, cut = Ballot(sample=0, answer="1", num_tok=40_000), Ballot(sample=1, answer="1", ended=False)
    short = Ballot(sample=2, answer="2", num_tok=10)
    assert majority([long, short], Weight.length).answer == "2"
    assert majority([cut, short], Weight.finish).answer == "2"
    failing = Ballot(sample=3, answer="1", code_runs=2, code_errors=2)
    assert majority([failing, short], Weight.code).answer == "2"


@given(ballots(), st.integers(1, 12))
def test_policies_give_reasons_only_when_their_condition_holds(cast: list[Ballot], planned: int) -> None:
    done = cast[:planned]
    off = StopPolicy(planned=planned)
    assert off.reason(done) is None
    if len(done) < planned:
        first = StopPolicy(planned=planned, stop_after=max(1, planned - 1)).reason(done)
        assert (first is not None) == (len(done) >= max(1, planned - 1))
        decided = StopPolicy(planned=planned, when_decided=True).reason(done)
        assert (decided is not None) == is_decided(done, planned)
        agreed = StopPolicy(planned=planned, agreement=0.75, agreement_after=3).reason(done)
        assert (agreed is not None) == (len(done) >= 3 and majority(done).share >= 0.75)


@given(ballots(), st.integers(1, 14), st.booleans(), st.sampled_from([None, 0.6, 0.9]), st.data())
def test_what_is_needed_is_the_least_that_could_end_it(
    cast: list[Ballot], planned: int, when_decided: bool, agreement: float | None, data: st.DataObject
) -> None:
    policy = StopPolicy(planned=planned, when_decided=when_decided, agreement=agreement)
    done, missing = part_of(cast[:planned], planned, data)
    needed, remaining = policy.needed(done), planned - len(done)
    assert 0 <= needed <= remaining and (needed >= 1 or remaining == 0)
    if policy.reason(done) or not (when_decided or agreement):
        return
    answers = sorted({b.answer for b in done if b.answer} | {"new"})
    for fewer in range(1, needed):  # no votes for any one answer end it sooner
        for answer in answers:
            assert policy.reason([*done, *(Ballot(sample=s, answer=answer) for s in sorted(missing)[:fewer])]) is None


@pytest.mark.parametrize(
    "values",
    [
        {"planned": 0},
        {"planned": 4, "stop_after": 5},
        {"planned": 4, "stop_after": 0},
        {"planned": 4, "agreement": 0.5},
        {"planned": 4, "agreement": 1.1},
        {"planned": 4, "agreement_after": 0},
    ],
)
def test_impossible_policies_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"job\."):
        StopPolicy(**values)  # type: ignore[arg-type]


@given(st.lists(st.floats(0, 1000), max_size=30))
def test_the_contest_clock_never_lends_what_was_not_saved(times: list[float]) -> None:
    bank, now, spent = TimeBank(budget_s=350, buffer_s=210), 0.0, 0.0
    for number, wanted in enumerate(times, 1):
        limit, lent = bank.take(now)
        assert limit is not None and 350 <= limit <= 560 and limit == 350 + lent
        used = min(wanted, limit)
        bank.give_back(used, lent)
        now, spent = now + used, spent + used
        assert spent + bank.saved_s == pytest.approx(350 * number) and bank.saved_s >= 0


def test_the_deadline_bounds_every_problem() -> None:
    bank = TimeBank(budget_s=None, deadline_at=100.0)
    assert bank.take(30.0) == (70.0, 0.0) and bank.take(200.0) == (0.0, 0.0)
    assert TimeBank(budget_s=50, deadline_at=100.0).take(80.0) == (20.0, 0.0)
    assert TimeBank(budget_s=None).take(1e9) == (None, 0.0)
