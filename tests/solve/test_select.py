"""GenSelect: which solutions meet, how a reply is read, what the choices add up to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omr.errors import ConfigError
from omr.solve.answer import vote_key
from omr.solve.prompt import SELECT_PROMPTS, select_prompt_named
from omr.solve.select import CUT, Solution, chosen, comparison, disagree, excerpt, listing, settle
from omr.solve.vote import Ballot, Weight, majority

ANSWERS = st.lists(st.sampled_from(["7", "07", "8", "9", "\\frac{1}{2}", "0.5"]), min_size=2, max_size=14)


def solutions(answers: list[str]) -> list[Solution]:
    return [Solution(sample=i, answer=a, text=f"solution {i}") for i, a in enumerate(answers)]


@given(ANSWERS, st.integers(2, 9), st.text(max_size=6))
def test_a_comparison_shows_as_many_answers_as_fit_and_repeats_itself(answers: list[str], most: int, seed: str) -> None:
    among = solutions(answers)
    shown = comparison(among, most=most, seed=seed)
    assert len(shown) == min(most, len(among)) and len({s.sample for s in shown}) == len(shown)
    different = {vote_key(a) for a in answers}
    assert len({vote_key(s.answer) for s in shown}) == min(most, len(different))
    assert disagree(among) == (len(different) > 1)
    assert comparison(list(reversed(among)), most=most, seed=seed) == shown  # the order of finishing does not matter


def test_the_most_voted_answers_are_shown_first_and_no_place_is_theirs() -> None:
    among = solutions(["1", "2", "2", "3", "3", "3"])
    first_places = set()
    for seed in range(40):
        shown = comparison(among, most=2, seed=str(seed))
        assert {s.answer for s in shown} == {"2", "3"}
        first_places.add(shown[0].answer)
    assert first_places == {"2", "3"}


@pytest.mark.parametrize(
    ("reply", "index"),
    [
        ("Attempt 0 is wrong.\nJudgment: 2", 2),
        ("Judgment: 0\n... no.\n**Judgment:** 1", 1),
        ("judgement: **3**", 3),
        ("The answer is \\boxed{2}.", None),
        ("Judgment: \\boxed{1}", 1),
        ("<think>Judgment: 0</think>The second. Judgment: 1", 1),
        ("Judgment: 4", None),
        ("Judgment: first", None),
        ("\\boxed{x}", None),
        ("Judgment: -1", 1),  # a dash is taken for punctuation
        ("", None),
    ],
)
def test_a_reply_is_read_by_its_last_judgment(reply: str, index: int | None) -> None:
    assert chosen(reply, 4) == index


@given(st.text(alphabet="Judgment: 0123\\boxed{}<think>/", max_size=60), st.integers(1, 5))
def test_a_reply_of_any_shape_names_a_solution_or_none(reply: str, shown: int) -> None:
    found = chosen(reply, shown)
    assert found is None or 0 <= found < shown


@given(st.text(max_size=400), st.integers(0, 60))
def test_an_excerpt_fits_and_keeps_the_end(text: str, tokens: int) -> None:
    cut = excerpt(text, tokens, len)
    assert len(cut) <= max(tokens, 40 + len(CUT))
    whole = text.rpartition("</think>")[2].strip() or text.strip()
    assert whole.endswith(cut.removeprefix(CUT))


def test_thinking_is_not_shown() -> None:
    assert excerpt("<think>long</think>\nThe answer is 7.", 100, len) == "The answer is 7."


@st.composite
def ballots(draw: st.DrawFn) -> list[Ballot]:
    return [Ballot(sample=i, answer=a, num_tok=draw(st.integers(0, 9000))) for i, a in enumerate(draw(ANSWERS))]


@given(ballots(), st.data())
def test_what_most_comparisons_chose_wins(cast: list[Ballot], data: st.DataObject) -> None:
    picks = data.draw(st.lists(st.integers(0, len(cast) - 1), max_size=7))
    result = settle(cast, picks)
    groups = {vote_key(b.answer or "") for b in cast}
    if not picks:
        assert result.answer == majority(cast).answer and result.picks == 0
        assert result.how == ("unanimous" if len(groups) == 1 else "vote")
        return
    counts = {g: sum(vote_key(cast[p].answer or "") == g for p in picks) for g in groups}
    assert result.answer is not None and counts[vote_key(result.answer)] == max(counts.values()) == result.picks
    assert result.comparisons == len(picks) and settle(cast, picks[::-1]) == result


def test_ties_go_to_the_heavier_vote_then_to_the_lowest_sample() -> None:
    cast = [Ballot(sample=0, answer="1"), Ballot(sample=1, answer="2"), Ballot(sample=2, answer="2")]
    assert settle(cast, [0, 1]).answer == "2"
    even = [Ballot(sample=3, answer="5"), Ballot(sample=4, answer="6")]
    assert settle(even, [4, 3]).answer == "5"
    by_length = [Ballot(sample=0, answer="1", num_tok=40_000), Ballot(sample=1, answer="2", num_tok=10)]
    assert settle(by_length, [0, 1], Weight.length).answer == "2"
    assert settle([Ballot(sample=0, answer=None)], []).how == "unanimous"
    assert settle(even, [99]).how == "vote"  # a sample that is not there any more


def test_the_prompt_is_filled_and_takes_braces() -> None:
    prompt = select_prompt_named("genselect")
    shown = listing(["\\frac{1}{2} is \\boxed{7}", "no: \\boxed{8}"])
    places = {"problem": "What is {x}?", "num_solutions": 2, "last": 1, "solutions": shown}
    (turn,) = prompt.fill(places)
    assert "What is {x}?" in turn["content"] and "Attempt 1:\nno: \\boxed{8}\n" in turn["content"]
    assert turn["content"].endswith("Judgment: N") and "numbered from 0 to 1" in turn["content"]
    assert chosen(turn["content"], 2) is None  # the instruction itself is no choice
    with pytest.raises(ConfigError, match=r"job\.select\.prompt has no choice"):
        select_prompt_named("best")
    assert list(SELECT_PROMPTS) == ["genselect"]
