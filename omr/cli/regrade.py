"""omr regrade FOLDER [--vote WEIGHT]: grade and vote again over a finished run's samples; nothing is generated."""

from __future__ import annotations

import argparse
from pathlib import Path

from omr.job._finished import read_finished
from omr.job._outcome import conclude
from omr.samples import SAMPLES
from omr.solve.grade import Grader
from omr.solve.vote import Weight

SHOWN_CHARS = 60


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="omr regrade", description=__doc__)
    parser.add_argument("folder", type=Path, help=f"a run's folder, or any folder with a {SAMPLES}")
    parser.add_argument("--vote", choices=[w.name for w in Weight], default=Weight.equal.name)
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds for one answer that takes algebra")
    parser.add_argument("--out", type=Path, help="where to write (default: FOLDER/regraded)")
    args = parser.parse_args(argv)
    finished = read_finished(args.folder)
    rows, records = finished.rows, finished.records
    before = {(str(r["id"]), r["sample"]): r.get("symbolic_correct") for r in rows}
    out = args.out or args.folder / "regraded"
    out.mkdir(parents=True, exist_ok=True)
    with Grader(timeout_s=args.timeout, num_workers=2) as grader:
        metrics = conclude(
            out, finished.about | {"regraded from": str(args.folder)}, records, grader, Weight[args.vote]
        )
    changed = [r for r in rows if before[str(r["id"]), r["sample"]] != r.get("symbolic_correct")]
    print(f"{len(rows)} samples of {len(records)} problems graded again; {len(changed)} verdicts changed")
    for row in changed[:20]:
        now = "right" if row["symbolic_correct"] else "wrong"
        answer, expected = (_shown(row[side]) for side in ("predicted_answer", "expected_answer"))
        print(f"  {row['id']} sample {row['sample']}: {answer} is {now} for {expected}")
    if "accuracy/pass_at_1" in metrics:
        print(f"pass@1 {100 * metrics['accuracy/pass_at_1']:.1f} %, vote {100 * metrics['accuracy/maj']:.1f} %")
    print(out)
    return 0


def _shown(answer: str | None) -> str:
    """At most a line: what a model boxed may be anything."""
    text = ascii(answer)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}... ({len(text)} characters)"
