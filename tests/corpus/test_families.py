"""Every family keeps its promises: wordings, agreeing codes, real slips, answers that an independent run confirms."""

from __future__ import annotations

import subprocess
import sys
from random import Random

import pytest

from omr.corpus import families
from omr.corpus.compose import example
from omr.corpus.family import Family, TwoCalls, Values, nouns, say, write
from omr.corpus.gym import same_answer
from omr.corpus.notebook import Notebook

NAMES = sorted(families())


def drawn(family: Family, number: int) -> tuple[Values, Random]:
    rng = Random(f"test/{family.name}/{number}")
    return {**nouns(rng), **family.draw(rng)}, rng


def printed(code: str | TwoCalls, values: Values, *, slip: bool = False) -> str:
    notebook, out = Notebook(), ""
    for block in [code] if isinstance(code, str) else [code.first, code.second]:
        out, error = notebook.run(write(block, {**values, "out": out.strip()}, slip=slip))
        assert error is None, f"{block!r} raised {error!r} for {values}"
    return out.strip()


def test_there_are_enough() -> None:
    assert len(families()) >= 60
    for family in families().values():
        assert len(family.wordings) >= 8 and len(family.unseen) >= 2 and family.dev


@pytest.mark.parametrize("name", NAMES)
def test_codes_agree_slips_run_and_wordings_fill(name: str) -> None:
    family = families()[name]
    slipped = set()
    for number in range(4):
        values, rng = drawn(family, number)
        answers = {printed(code, values) for code in family.codes}
        assert len(answers) == 1, f"codes disagree for {values}: {answers}"
        answer = answers.pop()
        assert answer and "\n" not in answer
        if "gym_answer" in values:
            assert same_answer(answer, str(values["gym_answer"]))
        slipped |= {printed(code, values, slip=True) == answer for code in family.codes}
        for template in (*family.wordings, *family.dev, *family.unseen, *family.plans):
            said = say(template, {**values, "answer": answer}, rng)
            assert "$" not in said and "@" not in said and "[" not in said, said
    assert False in slipped, "the slip never changes the answer"


def test_wordings_of_different_kinds_never_mix() -> None:
    kinds = [[w for f in families().values() for w in f.of_split(kind)] for kind in ("train", "dev", "unseen")]
    for one in kinds:
        for other in kinds:
            assert one is other or not set(one) & set(other)


def test_answers_stand_when_the_blocks_run_elsewhere() -> None:
    """The code of one example of each family, cut out of the solution and run in an interpreter of its own."""
    script, wanted = [], []
    for index in range(len(families())):
        made = example("test", 77, index)
        blocks = [part.split("\n</tool_call>")[0] for part in made.solution.split("<tool_call>\n")[1:]]
        if blocks:
            script.append(f"names = {{}}\nprint('#')\nfor block in {blocks!r}:\n    exec(block, names)")
            wanted.append(made.answer)
    done = subprocess.run([sys.executable, "-c", "\n".join(script)], capture_output=True, text=True, check=True)
    found = [part.strip().splitlines()[-1] for part in done.stdout.split("#\n")[1:]]
    assert found == wanted and len(wanted) > 60
