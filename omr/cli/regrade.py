"""omr regrade FOLDER [--vote WEIGHT]: grade and vote again over a finished run's samples; nothing is generated."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omr.errors import InputError
from omr.job._outcome import conclude
from omr.job._report import METRICS, PROBLEMS, read_problems
from omr.job._score import Record, Row
from omr.samples import SAMPLES, intact_rows
from omr.solve.grade import Grader
from omr.solve.vote import Weight


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="omr regrade", description=__doc__)
    parser.add_argument("folder", type=Path, help=f"a run's folder, or any folder with a {SAMPLES}")
    parser.add_argument("--vote", choices=[w.name for w in Weight], default=Weight.equal.name)
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds for one answer that takes algebra")
    parser.add_argument("--out", type=Path, help="where to write (default: FOLDER/regraded)")
    args = parser.parse_args(argv)
    rows = intact_rows(args.folder / SAMPLES, strict=True)
    if not rows:
        raise InputError(f"{args.folder} holds no {SAMPLES}, or an empty one")
    before = {(str(r["id"]), r["sample"]): r.get("symbolic_correct") for r in _checked(rows, args.folder / SAMPLES)}
    records = _records(args.folder, rows)
    out = args.out or args.folder / "regraded"
    out.mkdir(parents=True, exist_ok=True)
    with Grader(timeout_s=args.timeout, num_workers=2) as grader:
        metrics = conclude(out, _about(args.folder), records, grader, Weight[args.vote])
    changed = [r for r in rows if before[str(r["id"]), r["sample"]] != r.get("symbolic_correct")]
    print(f"{len(rows)} samples of {len(records)} problems graded again; {len(changed)} verdicts changed")
    for row in changed[:20]:
        now = "right" if row["symbolic_correct"] else "wrong"
        print(
            f"  {row['id']} sample {row['sample']}: {row['predicted_answer']!r} is {now} for {row['expected_answer']!r}"
        )
    if "accuracy/pass_at_1" in metrics:
        print(f"pass@1 {100 * metrics['accuracy/pass_at_1']:.1f} %, vote {100 * metrics['accuracy/maj']:.1f} %")
    print(out)
    return 0


NEEDED = ("id", "sample", "generation", "finish_reason", "num_generated_tokens", "generation_time")


def _checked(rows: Sequence[Row], file: Path) -> Sequence[Row]:
    for number, row in enumerate(rows, 1):
        missing = [name for name in NEEDED if name not in row]
        if missing:
            raise InputError(f"{file} row {number} has no {missing[0]!r}: it was not written by job=eval")
    return rows


def _records(folder: Path, rows: Sequence[Row]) -> list[Record]:
    """Problems in the order of problems.csv (those without a generation too), with how each ended."""
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


def _about(folder: Path) -> dict[str, Any]:
    """What the run said of itself, marked as regraded."""
    file = folder / METRICS
    told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"title": folder.name}
    about = {key: value for key, value in told.items() if key not in ("metrics", "vote")}
    return about | {"regraded from": str(folder)}
