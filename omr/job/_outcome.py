"""The end of an evaluation: grades, votes, metrics and files, from samples that are all there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omr.job._acceptance import prediction
from omr.job._judging import When
from omr.job._report import METRICS, PROBLEMS, REPORT, write_metrics, write_problems, write_report
from omr.job._score import Record, Row, score
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
    trained: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Grade every row of `records`, cast the votes, write all files of the evaluation into `folder`.

    Rows gain `predicted_answer` (taken anew from the text), `symbolic_correct` and `graded_by`, and `judge_correct` and
    `judgement` where the judge's word counts; without an expected answer only the first. `trained` is what training
    reported of the drafter. Returns the metrics.
    """
    for record in records:
        judged = {judgement["answer"]: judgement for judgement in record.judgements}
        for row in record.rows:
            row["predicted_answer"] = last_boxed(row["generation"])
            if record.expected_answer is not None:
                verdict = grader.grade_now(row["predicted_answer"], record.expected_answer)
                row["symbolic_correct"], row["graded_by"] = verdict.equal, verdict.how
                _take_judgement(row, judged.get(row["predicted_answer"]))
        record.cast_vote(by)
    metrics = score(records, counts, num_gpus=int(about.get("GPUs") or 0))
    metrics |= prediction(trained or {}, metrics)
    write_rows(folder / SAMPLES, [row for record in records for row in record.rows])
    write_problems(records, folder / PROBLEMS)
    write_metrics(metrics, about, records, folder / METRICS)
    write_report(metrics, about, records, folder / REPORT)
    return metrics


def _take_judgement(row: Row, judgement: Row | None) -> None:
    """Put a readable judgement into the row it counts for; as a fallback it cannot undo what the grader accepts."""
    row.pop("judge_correct", None)
    row.pop("judgement", None)
    if judgement is None or judgement["verdict"] is None:
        return
    if judgement["when"] == When.always.name or not row["symbolic_correct"]:
        row["judge_correct"], row["judgement"] = judgement["verdict"], judgement["judgement"]
