"""Benchmarks: problems, and the answers they should have.

One dataclass, many YAMLs. The problems come from a file shipped with omr (`packaged`), one of the user's (`path`) or a
dataset on the hub (`hub`). Formats, by the file's name: .jsonl and .jsonl.gz (one object a line), .parquet, and .csv as
the AIMO contests write it (`id,problem,answer`). Columns are named by `id_key`, `problem_key` and `answer_key`; where a
file lacks the first choice, the other usual name is taken (`question` for `problem`, `answer` for `expected_answer`).

A benchmark without answers is a contest's test set: problems are solved and voted on, and no accuracy is reported.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omr.errors import ConfigError, InputError
from omr.records import SUFFIXES, read_records, sound

ASSETS = Path(__file__).parent / "assets" / "benchmarks"
OTHER_NAMES = {
    "problem": ("problem", "question"),
    "expected_answer": ("expected_answer", "answer"),
    "id": ("id", "unique_id", "problem_idx"),
}
"""Names under which a column is also looked for while its key has the default value."""


@dataclass(kw_only=True)
class Problem:
    id: str
    text: str
    expected_answer: str | None
    """None when the benchmark does not say."""
    row: dict[str, Any] = field(default_factory=dict)
    """The record as it was read; every field of it is repeated in samples.jsonl."""

    def __post_init__(self) -> None:
        self.text = sound(self.text)


@dataclass(kw_only=True)
class Benchmark:
    """Problems to solve. The first of path, packaged, hub that is set wins."""

    name: str = "tiny_math"
    """Short name, used in tables and in made-up problem ids."""
    path: str | None = None
    """A .jsonl, .jsonl.gz, .parquet or .csv file."""
    packaged: str | None = None
    """A file shipped inside omr (in omr/assets/benchmarks)."""
    hub: str | None = None
    """A Hugging Face dataset id."""
    hub_split: str = "test"
    """The split of that dataset: its files are found by name."""
    revision: str | None = None
    """Full commit hash of the dataset; null takes main."""
    limit: int | None = None
    """Only the first so many problems; null takes all."""
    problem_key: str = "problem"
    answer_key: str = "expected_answer"
    id_key: str = "id"

    def __post_init__(self) -> None:
        if not (self.path or self.packaged or self.hub):
            raise ConfigError("benchmark has no source: set one of benchmark.path, benchmark.packaged, benchmark.hub")
        if self.path and self.packaged and self.name == Path(self.packaged).name.split(".")[0]:
            self.name = Path(self.path).name.split(".")[0]  # a path put over a shipped file does not keep its name
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"benchmark.limit must be >= 1 or null for all, got {self.limit}")

    def preflight(self) -> None:
        """Refuse a file that is not there or of an unknown kind, without reading it. Raises InputError."""
        self.local_file()

    def load(self) -> list[Problem]:
        """All problems, in the order of the file. Raises InputError naming the line that cannot be used."""
        local = self.local_file()
        files = [local] if local else self._hub_files()
        problems: list[Problem] = []
        seen: dict[str, str] = {}
        for where, row in ((f"{file} {where}", row) for file in files for where, row in read_records(file)):
            if self.limit is not None and len(problems) == self.limit:
                break
            problem = self._problem(row, where, len(problems))
            if problem.id in seen:
                raise InputError(f"{where}: id {problem.id!r} was used at {seen[problem.id]}; ids must differ")
            seen[problem.id] = where
            problems.append(problem)
        if not problems:
            raise InputError(f"{files[0]} holds no problem")
        return problems

    def local_file(self) -> Path | None:
        """The file of a benchmark that is on disk, None for one on the hub. Raises InputError if it is not there."""
        if not (self.path or self.packaged):
            return None
        if self.path:
            file, fix = Path(self.path).expanduser(), "check benchmark.path"
        else:
            assert self.packaged is not None
            file = ASSETS / self.packaged
            fix = f"benchmark.packaged takes one of {', '.join(sorted(p.name for p in ASSETS.glob('*.jsonl')))}"
        if not file.is_file():
            raise InputError(f"benchmark file {file} does not exist; {fix}")
        if not file.name.endswith(SUFFIXES):
            raise InputError(f"benchmark file {file} is of an unknown kind; it must end in {', '.join(SUFFIXES)}")
        return file

    def _hub_files(self) -> list[Path]:
        from omr import hub

        assert self.hub is not None
        commit = hub.resolve_revision(self.hub, self.revision, "dataset")
        of_split = re.compile(rf"(^|/){re.escape(self.hub_split)}([-_./]|$)")
        names = [n for n in hub.list_files(self.hub, commit, "dataset") if n.endswith(SUFFIXES)]
        chosen = [n for n in names if of_split.search(n)]
        if not chosen:
            raise InputError(
                f"dataset {self.hub}@{commit[:8]} has no file of split {self.hub_split!r} (it has "
                f"{', '.join(names[:8]) or 'no table'}); set benchmark.hub_split"
            )
        return [hub.file(self.hub, commit, name, "dataset") for name in chosen]

    def _problem(self, row: dict[str, Any], where: str, index: int) -> Problem:
        text = _value(row, self.problem_key)
        if not isinstance(text, str) or not text.strip():
            there = ", ".join(list(row)[:12])
            raise InputError(
                f"{where}: no problem under {self.problem_key!r} (it has {there}); set benchmark.problem_key"
            )
        answer = _value(row, self.answer_key)
        made_up = f"{self.name}-{index}"
        return Problem(
            id=_written(_value(row, self.id_key), where, self.id_key) or made_up,
            text=text,
            expected_answer=_written(answer, where, self.answer_key),
            row=row,
        )


def _value(row: dict[str, Any], key: str) -> Any:
    return next((row[name] for name in OTHER_NAMES.get(key, (key,)) if row.get(name) is not None), None)


def _written(value: Any, where: str, key: str) -> str | None:
    """An answer or id as text: whole floats lose their point (tables store 142 as 142.0)."""
    if value is None or isinstance(value, str):
        return (value or "").strip() or None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{where}: {key} must be text or a number, got {type(value).__name__}")
    return str(int(value)) if float(value).is_integer() else repr(value)
