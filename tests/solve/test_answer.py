"""Answers: extraction, exact comparison, and grading that cannot hang."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omr.solve.answer import MAX_CHARS, last_boxed, number, settle, undress, vote_key
from omr.solve.grade import Grader, Verdict

PAIRS = [json.loads(line) for line in (Path(__file__).parents[1] / "data/grader_pairs.jsonl").read_text().splitlines()]


JUNK = "{}[]()\\$%^_=<>,./:;!? \t\n\0~'+-*0123456789eEixfracboxedtextsincirc é中\u202e\udc80٣½∞−°\ufeff"


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(timeout_s=20) as live:
        yield live


def test_every_golden_pair_gets_the_right_verdict(grader: Grader) -> None:
    wrong = [p["id"] for p in PAIRS if grader.grade_now(p["prediction"], p["reference"]).equal != p["equal"]]
    assert len(PAIRS) == 80 and wrong == []


def test_text_and_exact_arithmetic_agree_with_the_golden_pairs_where_they_settle() -> None:
    settled = [(p["equal"], settle(p["prediction"], p["reference"])) for p in PAIRS]
    assert all(verdict in (None, equal) for equal, verdict in settled)
    assert sum(verdict is not None for _, verdict in settled) >= 40


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
        ("\\fbox {7}", "7"),
        ("\\boxed{1} and \\boxed{2", None),
        ("\\boxed 5", None),
        ("\\boxed{ }", None),
        ("\\boxed{7\\", None),
        ("no answer", None),
        ("", None),
    ],
)
def test_the_last_box_is_taken_by_matching_braces(text: str, answer: str | None) -> None:
    assert last_boxed(text) == answer


@given(st.text(alphabet="{}\\boxed 7a", max_size=60))
def test_extraction_takes_any_junk(text: str) -> None:
    found = last_boxed(text)
    assert found is None or found in text


@given(
    st.integers(-(10**30), 10**30),
    st.integers(0, 5),
    st.sampled_from(["{}", "${}$", "({})", "\\textbf{{({})}}", "${}$.", "\\({}\\)", "\\boxed{{{}}}", "{}.", "x = {}"]),
)
def test_integers_are_equal_to_themselves_in_any_dress(value: int, zeros: int, dress: str) -> None:
    written = ("-" if value < 0 else "") + "0" * zeros + str(abs(value))
    assert settle(dress.format(written), str(value)) is True
    assert settle(dress.format(written), str(value + 1)) is False
    assert vote_key(dress.format(written)) == vote_key(str(value))


@given(st.integers(-(10**9), 10**9))
def test_thousands_groups(value: int) -> None:
    for separator in (",", "\\,", " ", "{,}"):
        assert settle(f"{value:,}".replace(",", separator), str(value)) is True


@given(st.fractions(max_denominator=10**6))
def test_fractions_are_compared_exactly(value: Fraction) -> None:
    n, d = value.numerator, value.denominator
    assert number(f"{n}/{d}") == value == number(f"\\frac{{{n}}}{{{d}}}")
    nearly = value + Fraction(1, 10**12)
    assert settle(f"{nearly.numerator}/{nearly.denominator}", f"{n}/{d}") is False


@pytest.mark.parametrize(
    "text", ["1e9999999", "1/0", "", "--5", "٣", "1,23", "12,3456", "9" * 2000, "0x10", "1_000", "inf", "nan"]
)
def test_what_is_no_number(text: str) -> None:
    assert number(text) is None


@given(st.text(JUNK, max_size=200), st.text(JUNK, max_size=40))
def test_comparison_takes_any_junk(prediction: str, reference: str) -> None:
    assert settle(prediction, reference) in (True, False, None)
    assert isinstance(vote_key(prediction), str) and isinstance(undress(prediction), str)


def test_none_and_blank_are_wrong_without_asking_anyone() -> None:
    assert settle(None, "5") is False and settle("  ", "5") is False


def test_answers_that_hang_or_crash_the_algebra_are_contained(grader: Grader, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not grader.grade_now("a\x00b\udc80", "4").equal
    assert not grader.grade_now("\\frac{" * 200, "3").equal
    monkeypatch.setattr(grader, "timeout_s", 0.5)
    started = time.monotonic()
    hung = grader.grade_now("9^{9^{9^{9}}}", "5")
    assert (hung.equal, hung.how) == (False, "timeout") and time.monotonic() - started < 30
    assert grader.grade_now("9^{9^{9^{9}}}", "5") == hung  # remembered, not tried again
    monkeypatch.setattr(grader, "timeout_s", 20)
    assert grader.grade_now("x+1", "1+x").equal  # a new worker took over


JUNK = [
    "~",
    "\\,",
    "\\quad",
    " ",
    "{",
    "}",
    "$",
    "\\",
    "\\text{",
    "\\text{a}",
    "1",
    "1,",
    "=",
    "x=",
    "^",
    "°",
    "(",
    "A ",
    "\udcff",
]


@pytest.mark.parametrize("piece", JUNK)
@pytest.mark.parametrize("around", ["{}", "\\boxed{{{}}}", "{}x"])
def test_no_length_of_junk_holds_up_the_harness(piece: str, around: str) -> None:
    """Votes are counted between events: what a model wrote must not take time that grows with its square."""
    started = time.process_time()
    vote_key(around.format(piece * (1_000_000 // len(piece))))
    undress(around.format(piece * (MAX_CHARS // len(piece))))
    settle(around.format(piece * (1_000_000 // len(piece))), "5")
    assert time.process_time() - started < 2.0


def test_grading_leaves_the_event_loop_free(grader: Grader, monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> int:
        ticks = 0
        pending = asyncio.create_task(grader.grade("8^{8^{8^{8}}}", "5"))
        while not pending.done():
            await asyncio.sleep(0.01)
            ticks += 1
        assert pending.result().how == "timeout"
        assert (await grader.grade("070", "70")).how == "exact"
        return ticks

    monkeypatch.setattr(grader, "timeout_s", 0.3)
    assert asyncio.run(go()) > 5


def test_closing_a_grader_ends_a_question_in_progress() -> None:
    me = psutil.Process(os.getpid())
    others = set(me.children())  # of graders that other tests hold
    verdicts: list[Verdict] = []
    with Grader(timeout_s=60) as grader:
        asking = threading.Thread(target=lambda: verdicts.append(grader.grade_now("7^{7^{7^{7^{7}}}}", "5")))
        asking.start()
        while not (workers := set(me.children()) - others):
            time.sleep(0.01)
    asking.join(timeout=20)
    assert not asking.is_alive() and not verdicts[0].equal
    assert not any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in workers)


def test_a_grader_closed_before_its_worker_starts_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    me = psutil.Process(os.getpid())
    others = set(me.children())
    grader = Grader(timeout_s=60)
    start = subprocess.Popen

    def closed_meanwhile(*args: Any, **kwargs: Any) -> Any:
        for worker in grader._workers:
            worker.close()  # as another thread would, before the child is known
        return start(*args, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", closed_meanwhile)
    begun = time.monotonic()
    assert grader.grade_now("x+1", "1+x") == Verdict(False, "error")
    assert set(me.children()) == others and time.monotonic() - begun < 30
