"""Few-shot examples: solved problems shown before the one that is asked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from omr.errors import ConfigError, InputError

ASSETS = Path(__file__).parents[1] / "assets" / "examples"


@dataclass(kw_only=True)
class FewShot:
    """Examples for a prompt that has a place for them. An example is not shown to the problem that it solves."""

    source: str | None = None
    """A .jsonl with `problem` and `solution`, or the name of a file shipped with omr: word_problems."""
    count: int = 4
    """The first so many of it."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"job.few_shot.count must be >= 1, got {self.count}; job.few_shot.source=null shows none")

    def file(self) -> Path | None:
        """None without examples. Raises InputError when the file is not there."""
        if self.source is None:
            return None
        shipped = ASSETS / f"{self.source}.jsonl"
        if shipped.is_file():
            return shipped
        own = Path(self.source).expanduser()
        if not own.is_file():
            names = ", ".join(sorted(p.stem for p in ASSETS.glob("*.jsonl")))
            raise InputError(f"job.few_shot.source={self.source}: no such file, nor one of those shipped: {names}")
        return own

    def load(self) -> list[tuple[str, str]]:
        """(problem, solution) pairs. Raises InputError for a line that is none, and for fewer than `count`."""
        file = self.file()
        if file is None:
            return []
        pairs: list[tuple[str, str]] = []
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file} cannot be read: {error}") from None
        for number, line in enumerate(lines, 1):
            if len(pairs) == self.count:
                break
            if line.strip():
                pairs.append(_pair(line, f"{file} line {number}"))
        if len(pairs) < self.count:
            raise InputError(f"{file} has {len(pairs)} examples, job.few_shot.count={self.count}; lower it")
        return pairs


def _pair(line: str, where: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error}); one object a line is expected") from None
    found = [row.get(name) if isinstance(row, dict) else None for name in ("problem", "solution")]
    if not all(isinstance(text, str) and text.strip() for text in found):
        raise InputError(f"{where}: an example needs 'problem' and 'solution', both text")
    return str(found[0]), str(found[1])
