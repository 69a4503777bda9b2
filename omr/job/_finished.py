"""A finished evaluation read back from its folder: to be graded, voted on or judged again, without generating."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omr.errors import InputError
from omr.job._judging import JUDGEMENTS
from omr.job._report import METRICS, PROBLEMS, read_problems
from omr.job._score import Record, Row
from omr.job._selecting import SELECTIONS
from omr.samples import SAMPLES, intact_rows
from omr.solve.vote import Weight

NEEDED = ("id", "sample", "generation", "finish_reason", "num_generated_tokens", "generation_time")


@dataclass(kw_only=True)
class Finished:
    """What a run left."""

    rows: list[Row]
    """Of samples.jsonl, in its order."""
    records: list[Record]
    """Problems in the order of problems.csv (those without a generation too), holding the rows."""
    about: dict[str, Any]
    """What the run said of itself."""

    @property
    def weight(self) -> Weight:
        """What a generation's vote counted."""
        name = str(self.about.get("vote weight"))
        return Weight[name] if name in Weight.__members__ else Weight.equal


def read_finished(folder: Path) -> Finished:
    """Read `folder`. Raises InputError when it holds no samples, a damaged file or rows that are no samples."""
    rows = intact_rows(folder / SAMPLES, strict=True)
    if not rows:
        raise InputError(f"{folder} holds no {SAMPLES}, or an empty one")
    for number, row in enumerate(rows, 1):
        missing = [name for name in NEEDED if name not in row]
        if missing:
            raise InputError(f"{folder / SAMPLES} row {number} has no {missing[0]!r}: it was not written by job=eval")
    about = _about(folder)
    records = _records(folder, rows)
    _attach(records, folder, selected="selection" in about)
    return Finished(rows=rows, records=records, about=about)


def _records(folder: Path, rows: Sequence[Row]) -> list[Record]:
    records: dict[str, Record] = {}
    if (folder / PROBLEMS).is_file():
        for line in read_problems(folder):
            records[line["id"]] = Record(
                id=line["id"],
                expected_answer=line["expected_answer"] or None,
                stopped=line["stopped"] or None,
                cancelled=int(line["cancelled"]),
                not_started=int(line["not_started"]),
                spent_tok=int(line["spent_tok"]),
                saved_tok=float(line["saved_tok"]),
                start_time=float(line.get("start_time") or 0),
                end_time=float(line.get("end_time") or 0),
            )
    for row in rows:
        key = str(row["id"])
        record = records.setdefault(key, Record(id=key, expected_answer=row.get("expected_answer")))
        record.rows.append(row)
    return list(records.values())


def _attach(records: Sequence[Record], folder: Path, *, selected: bool) -> None:
    """Give each problem its comparisons and judgements."""
    picks, judgements = (_by_id(intact_rows(folder / name, strict=True)) for name in (SELECTIONS, JUDGEMENTS))
    for record in records:
        record.judgements = [j for j in judgements[record.id] if j["expected_answer"] == record.expected_answer]
        if selected:
            record.picks = picks[record.id]


def _by_id(rows: Sequence[Row]) -> defaultdict[str, list[Row]]:
    found: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[str(row.get("id"))].append(row)
    return found


def _about(folder: Path) -> dict[str, Any]:
    file = folder / METRICS
    told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"title": folder.name}
    return {key: value for key, value in told.items() if key not in ("metrics", "vote")}
