"""The benchmarks are frozen, reproducible, evenly spread, and nothing of them is in the training split."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest

from omr.corpus import example, families, guard
from omr.corpus.held_out import FOLDER, SETS, frozen, made

FROZEN = {
    "tiny_math": "236b6808788b79f0f2f48b4f2e57539e2e34a326e782d88f6e6af58dcde464a3",
    "tiny_math_1000": "4de5923b8986579eeda428a38ffe473fa71601211274175ef1c41bebb0e15241",
    "tiny_math_wordings": "bc75fd63293e11e6ea36b1ff3c23fac6cfb0307136819c7509e1542a92e66c21",
}


@pytest.mark.parametrize("name", SETS)
def test_a_benchmark_never_changes(name: str) -> None:
    assert hashlib.sha256((FOLDER / f"{name}.jsonl").read_bytes()).hexdigest() == FROZEN[name]


def test_the_generator_still_makes_the_frozen_problems() -> None:
    rows = frozen("tiny_math")
    assert [(e.id, e.problem, e.answer, e.family, e.wording) for e in made("tiny_math")] == [
        (r["id"], r["problem"], r["expected_answer"], r["family"], r["wording"]) for r in rows
    ]


def test_problems_are_spread_evenly_and_do_not_repeat() -> None:
    seen: set[str] = set()
    for name, (_, _, count) in SETS.items():
        rows = frozen(name)
        assert len(rows) == count
        per_family = Counter(r["family"] for r in rows)
        assert set(per_family) == set(families())
        assert max(per_family.values()) - min(per_family.values()) <= 2
        problems = {r["problem"] for r in rows}
        assert len(problems) == count
        if name != "tiny_math_wordings":
            assert not problems & seen
        seen |= problems


def test_unseen_wordings_are_unseen() -> None:
    assert {r["wording"].split("/")[1] for r in frozen("tiny_math_wordings")} == {"unseen"}
    assert {r["wording"].split("/")[1] for r in frozen("tiny_math")} == {"train"}
    assert all(example("train", 0, i).wording.split("/")[1] == "train" for i in range(200))


def test_the_guard_claims_every_held_out_problem() -> None:
    for name in SETS:
        assert all(guard().claims(r["family"], r["problem"]) for r in frozen(name))
