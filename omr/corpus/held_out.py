"""What training must never see, and the benchmarks made of it.

    tiny_math            200 problems      test split          accuracy of the embedded model
    tiny_math_1000      1000 problems      test split          small differences (quantised against bf16), paired
    tiny_math_wordings   376 problems      unseen split        wordings that no training document has
    dev, dev_wordings    376 problems each dev splits          choosing a seed or a recipe; generated, never published

The three benchmarks are frozen as jsonl in omr/assets/benchmarks (id, problem, expected_answer, family, wording), made
before the first training when every family had ten training wordings; more were added to training later, none here. The
guard reads those files, so a later change of the generator cannot let a frozen problem slip into training.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from omr.corpus.compose import MIX, Example, Guard, Mix, Split, examples, families, training_examples
from omr.errors import InputError

FOLDER = Path(__file__).parents[1] / "assets" / "benchmarks"
SETS: dict[str, tuple[Split, int, int]] = {
    "tiny_math": ("test", 1, 200),
    "tiny_math_1000": ("test", 2, 1000),
    "tiny_math_wordings": ("unseen", 3, 376),
}
"""Name -> split, seed, number of problems."""
DEV_SETS: dict[str, tuple[Split, int, int]] = {
    "dev": ("dev", 4, 376),
    "dev_wordings": ("dev_wordings", 5, 376),
}


def made(name: str) -> list[Example]:
    """A held-out set as the generator makes it now. tiny_math_1000 leaves out what tiny_math holds."""
    split, seed, count = {**SETS, **DEV_SETS}[name]
    if name != "tiny_math_1000":
        return list(examples(split, seed, count))
    taken = {e.problem for e in made("tiny_math")}
    return [e for e in examples(split, seed, count + len(taken)) if e.problem not in taken][:count]


def write_benchmarks(folder: Path) -> None:
    """Write the three benchmarks. Done once, before the first training run."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in SETS:
        lines = [
            json.dumps(
                {
                    "id": e.id,
                    "problem": e.problem,
                    "expected_answer": e.answer,
                    "family": e.family,
                    "wording": e.wording,
                }
            )
            for e in made(name)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def frozen(name: str) -> list[dict[str, str]]:
    """The rows of a frozen benchmark. Raises InputError when its file is missing."""
    path = FOLDER / f"{name}.jsonl"
    if not path.is_file():
        raise InputError(f"{path} is missing: the benchmark {name} belongs to the package; reinstall it")
    return [json.loads(line) for line in path.read_text().splitlines()]


@cache
def guard() -> Guard:
    """Holds back every frozen and every dev problem."""
    kept = [(row["family"], row["problem"]) for name in SETS for row in frozen(name)]
    kept += [(e.family, e.problem) for name in DEV_SETS for e in made(name)]
    return Guard(kept)


PLAIN = Mix(no_code=0.0, noise=0.0)
"""Solutions as the model writes them when it is asked in the ordinary way: for calibration and drafter training."""


def rows(count: int, *, seed: int, mix: Mix = PLAIN) -> Iterator[tuple[str, str]]:
    """`count` rows (problem, solution) of the training split under `seed`, held-out problems left out."""
    given = start = 0
    while given < count:
        for e in training_examples(seed, start, start + len(families()), guard(), mix):
            yield e.problem, e.solution
            given += 1
            if given == count:
                return
        start += len(families())


__all__ = ["DEV_SETS", "FOLDER", "MIX", "PLAIN", "SETS", "frozen", "guard", "made", "rows", "write_benchmarks"]
