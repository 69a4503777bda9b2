"""Examples: determined by their number, of many kinds, with solutions in the model's format."""

from __future__ import annotations

import re
from collections import Counter
from random import Random

from omr.corpus import Guard, example, examples, families, guard, rows, training_examples
from omr.corpus.phrasing import INSTRUCTIONS, noisy
from omr.dataset import model_spans
from omr.solve.prompt import PROMPTS, tags_named

SOME = [example("train", 3, index) for index in range(1200)]


def test_an_example_depends_on_its_number_alone() -> None:
    assert [example("train", 3, i) for i in (700, 5, 41)] == [SOME[700], SOME[5], SOME[41]]
    assert example("train", 4, 5) != SOME[5]
    assert example("dev", 3, 5).problem != SOME[5].problem


def test_all_kinds_occur() -> None:
    kinds = Counter(e.kind for e in SOME)
    assert set(kinds) == {"tool", "two_calls", "error", "direct", "unexecuted"}
    tool = [e for e in SOME if e.kind in ("tool", "two_calls")]
    assert 0.2 < sum(e.slip for e in tool) / len(tool) < 0.35
    assert {e.family for e in SOME} == set(families())
    assert {e.instruction for e in SOME} == set(INSTRUCTIONS)


def test_solutions_have_the_form_that_the_solver_reads() -> None:
    tags = tags_named("openmath")
    for e in SOME:
        assert e.solution.count("<tool_call>") == e.solution.count("</tool_call>")
        assert re.search(r"\\boxed\{[^{}]+\}", e.pieces[-1].text)
        for piece in e.pieces:
            if not piece.by_model:
                assert piece.text.startswith(tags.output_begin) and piece.text.endswith(f"\n{tags.output_end}")
        by_pieces, at = [], 0
        for piece in e.pieces:
            if piece.by_model:
                start = by_pieces.pop()[0] if by_pieces and by_pieces[-1][1] == at else at
                by_pieces.append((start, at + len(piece.text)))
            at += len(piece.text)
        assert by_pieces == model_spans(e.solution, tags)


def test_without_a_slip_the_boxed_answer_is_right_and_with_one_it_is_what_was_printed() -> None:
    for e in SOME:
        boxed = re.findall(r"\\boxed\{([^{}]*)\}", e.solution)[-1]
        if not e.slip:
            assert boxed == e.answer
        elif e.kind != "direct":
            assert e.pieces[-2].text.split("\n")[-3] == boxed


def test_an_error_is_followed_by_a_corrected_call() -> None:
    errors = [e for e in SOME if e.kind == "error"]
    assert len(errors) > 20
    for e in errors:
        assert "Error" in e.pieces[2].text and not e.pieces[2].by_model
        assert e.solution.count("<tool_call>") >= 2


def test_prompts_shared_with_the_solver_are_the_same_to_the_letter() -> None:
    for name in ("generic/math", "openmath/tir"):
        asked = PROMPTS[name].messages("2+2?", total_code_executions=8)
        assert [{"role": "user", "content": INSTRUCTIONS[name].replace("{problem}", "2+2?")}] == asked


def test_noise_keeps_numbers_and_quotes() -> None:
    problem = 'Ada has 12 apples and writes "the and of 7". How many of the 35 are left, if f(x) = 3 x^2?'
    for number in range(300):
        said = re.sub("(?i)^problem 3. ", "", noisy(problem, Random(number)))
        assert sorted(re.findall(r"\d+", said)) == ["12", "2", "3", "35", "7"]
        assert '"the and of 7"' in said and "x^2" in said


def test_the_guard_knows_texts_and_numbers() -> None:
    held = Guard([("gcd", "Find the gcd of 12 and 18."), ("small_sum", "What is 1 + 2?")])
    assert held.claims("lcm", "find  the gcd of 12 and 18.")
    assert held.claims("gcd", "What divides 18 and 12?")
    assert not held.claims("lcm", "What do 12 and 18 divide?")
    assert not held.claims("small_sum", "Add 1 and 2."), "easy families have too few numbers to hold them back"


def test_training_leaves_out_what_is_held() -> None:
    kept = list(training_examples(3, 0, 1200, guard()))
    assert 1000 < len(kept) < 1200
    assert {e.id for e in SOME} - {e.id for e in kept} == {e.id for e in SOME if guard().claims(e.family, e.problem)}


def test_examples_have_no_problem_twice() -> None:
    many = list(examples("dev", 9, 300))
    assert len({e.problem for e in many}) == 300


def test_rows_for_calibration_are_asked_in_the_ordinary_way() -> None:
    made = list(rows(150, seed=1))
    assert made[:20] == list(rows(20, seed=1)) and len(made) == 150
    assert not any(guard().claims("", problem) for problem, _ in made)
    assert sum("<tool_call>" in solution for _, solution in made) > 100
