"""Second opinions in numbers: what selection and the judge changed, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from omr import stats

if TYPE_CHECKING:
    from omr.job._score import Record

Row = Mapping[str, Any]


def second_opinions(records: Sequence[Record]) -> dict[str, float]:
    """Metrics of selections and judgements; empty where a run had neither."""
    return _selection([r for r in records if r.selected is not None]) | _judging(records)


def _selection(records: Sequence[Record]) -> dict[str, float]:
    if not records:
        return {}
    picks = [row for record in records for row in record.picks or ()]
    metrics: dict[str, float] = {
        "select/problems": sum(bool(record.picks) for record in records),
        "select/comparisons": len(picks),
        "select/unreadable": sum(row["chosen"] is None for row in picks),
        "select/changed": sum(_differs(record) for record in records),
    } | _cost("select", picks)
    graded = [record for record in records if record.expected_answer is not None]
    if graded:
        right = sum(bool(record.selected_right) for record in graded)
        interval = stats.wilson(right, len(graded))
        metrics["accuracy/select"] = right / len(graded)
        metrics["accuracy/select_low"], metrics["accuracy/select_high"] = interval.low, interval.high
    return metrics


def _differs(record: Record) -> bool:
    """Whether selection gave another answer than the vote; both write an answer as its lowest sample does."""
    return record.selected is not None and record.selected.answer != record.vote.answer


def _judging(records: Sequence[Record]) -> dict[str, float]:
    judgements = [row for record in records for row in record.judgements]
    if not judgements:
        return {}
    rows = [row for record in records for row in record.rows]
    judged = [row for row in rows if row.get("judge_correct") is not None]
    graded = [record for record in records if record.expected_answer is not None]
    metrics = {
        "judge/questions": float(len(judgements)),
        "judge/unreadable": sum(row["verdict"] is None for row in judgements),
        "judge/made_right": sum(row["judge_correct"] and not row["symbolic_correct"] for row in judged),
        "judge/made_wrong": sum(row["symbolic_correct"] and not row["judge_correct"] for row in judged),
        "accuracy/symbolic_pass_at_1": fmean(
            fmean(bool(row.get("symbolic_correct")) for row in r.rows) if r.rows else 0.0 for r in graded
        ),
    }
    return metrics | _cost("judge", judgements)


def _cost(name: str, rows: Sequence[Row]) -> dict[str, float]:
    return {
        f"{name}/prompt_tok": sum(row["num_prompt_tokens"] for row in rows),
        f"{name}/output_tok": sum(row["num_generated_tokens"] for row in rows),
        f"{name}/time_s": sum(row["generation_time"] for row in rows),
        f"{name}/failed": sum("error" in row for row in rows),
    }


def opinion_lines(metrics: Mapping[str, float]) -> list[str]:
    """What report.md says of them."""
    lines = []
    if "select/comparisons" in metrics:
        lines.append(
            f"GenSelect: {metrics['select/comparisons']:.0f} comparisons on {metrics['select/problems']:.0f} problems "
            f"whose generations disagreed ({metrics['select/unreadable']:.0f} without a usable choice), the answer of "
            f"{metrics['select/changed']:.0f} changed; {_spent('select', metrics)}."
        )
    if "judge/questions" in metrics:
        lines.append(
            f"Judge: {metrics['judge/questions']:.0f} answers judged ({metrics['judge/unreadable']:.0f} without a "
            f"readable verdict); {metrics['judge/made_right']:.0f} generations counted right and "
            f"{metrics['judge/made_wrong']:.0f} wrong against the symbolic grader, whose own pass@1 is "
            f"{100 * metrics['accuracy/symbolic_pass_at_1']:.1f} %; {_spent('judge', metrics)}."
        )
    return [line for text in lines for line in ("", text)]


def _spent(name: str, metrics: Mapping[str, float]) -> str:
    read, written = metrics[f"{name}/prompt_tok"], metrics[f"{name}/output_tok"]
    return f"{read:,.0f} tokens read, {written:,.0f} written, {metrics[f'{name}/time_s']:,.1f} request-seconds"
