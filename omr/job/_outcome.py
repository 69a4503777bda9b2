"""The end of an evaluation: grades, votes, metrics and files, from samples that are all there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omr.job._report import METRICS, PROBLEMS, REPORT, write_metrics, write_problems, write_report
from omr.job._score import Record, score
from omr.samples import SAMPLES, write_rows
from omr.server import SpecCounts
from omr.solve.answer import last_boxed
from omr.solve.grade import Grader
from omr.solve.vote import Weight


def conclude(
    folder: Path,
    about: Mapping[str, Any],
    records: Sequence[Record],
    grader: Grader,
    by: Weight,
    counts: SpecCounts | None = None,
) -> dict[str, float]:
    """Grade every row of `records`, cast the votes, write all files of the evaluation into `folder`.

    Rows gain `predicted_answer` (taken anew from the text), `symbolic_correct` and `graded_by`; without an expected
    answer only the first. Returns the metrics.
    """
    for record in records:
        for row in record.rows:
            row["predicted_answer"] = last_boxed(row["generation"])
            if record.expected_answer is not None:
                verdict = grader.grade_now(row["predicted_answer"], record.expected_answer)
                row["symbolic_correct"], row["graded_by"] = verdict.equal, verdict.how
        record.cast_vote(by)
    metrics = score(records, counts, num_gpus=int(about.get("GPUs") or 0))
    write_rows(folder / SAMPLES, [row for record in records for row in record.rows])
    write_problems(records, folder / PROBLEMS)
    write_metrics(metrics, about, records, folder / METRICS)
    write_report(metrics, about, records, folder / REPORT)
    return metrics
