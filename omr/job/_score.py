"""From samples to numbers: grades, votes, metrics.

Everything here is a function of the rows in samples.jsonl and of how each problem ended, so a run can be graded again,
with another grader or another vote, without generating anything. Metric names and denominators are those of the table
in tracker.py. What is refused rather than guessed:
  - pass@k and maj@k where some problem has fewer than k generations;
  - both where problems were stopped early: how many generations a problem has then depends on what they said.
    `accuracy/maj` is the vote that was really cast, and carries the label of the policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from omr import stats
from omr.job._acceptance import acceptance, by_generation
from omr.job._opinions import second_opinions
from omr.server import SpecCounts
from omr.solve.answer import vote_key
from omr.solve.select import Selected
from omr.solve.select import settle as settle_selection
from omr.solve.vote import Ballot, Result, Weight, majority

Row = dict[str, Any]
TRUNCATED = ("length", "time", "code_limit", "repetition")


@dataclass(kw_only=True)
class Record:
    """A problem with all its generations and the way it ended."""

    id: str
    expected_answer: str | None
    rows: list[Row] = field(default_factory=list)
    picks: list[Row] | None = None
    """Rows of selections.jsonl; None when the vote alone answers."""
    judgements: list[Row] = field(default_factory=list)
    """Rows of judgements.jsonl."""
    vote: Result = field(default_factory=lambda: majority([]))
    vote_right: bool | None = None
    """None when the benchmark has no answer."""
    selected: Selected | None = None
    selected_right: bool | None = None
    stopped: str | None = None
    cancelled: int = 0
    not_started: int = 0
    spent_tok: int = 0
    saved_tok: float = 0.0
    start_time: float = 0.0
    """Epoch seconds, as `end_time`: when this process worked on the problem; 0 when it never did."""
    end_time: float = 0.0

    @property
    def right(self) -> int:
        return sum(is_right(row) for row in self.rows)

    @property
    def score(self) -> float:
        """Mean correctness; a problem without a generation is wrong."""
        return self.right / len(self.rows) if self.rows else 0.0

    @property
    def answer(self) -> str | None:
        """The problem's final answer: selected where there was a selection, else voted."""
        return self.selected.answer if self.selected else self.vote.answer

    @property
    def answer_right(self) -> bool | None:
        return self.selected_right if self.selected else self.vote_right

    def cast_vote(self, by: Weight) -> None:
        """Vote over the rows, and count what comparisons chose; a winner is right if generations that gave it are."""
        ballots = [ballot_of(row) for row in self.rows]
        self.vote = majority(ballots, by)
        self.vote_right = self._is_right(self.vote.answer)
        if self.picks is not None:
            chosen = [row["chosen"] for row in self.picks if row.get("chosen") is not None]
            self.selected = settle_selection(ballots, chosen, by)
            self.selected_right = self._is_right(self.selected.answer)

    def _is_right(self, answer: str | None) -> bool | None:
        if self.expected_answer is None:
            return None
        key = None if answer is None else vote_key(answer)
        return any(is_right(row) for row in self.rows if _key(ballot_of(row)) == key)


def is_right(row: Mapping[str, Any]) -> bool:
    """Whether a graded generation counts as right: by the judge where it has spoken, else by the symbolic grader."""
    judged = row.get("judge_correct")
    return bool(row.get("symbolic_correct") if judged is None else judged)


def ballot_of(row: Mapping[str, Any]) -> Ballot:
    """The ballot of a row of samples.jsonl."""
    return Ballot(
        sample=int(row["sample"]),
        answer=row.get("predicted_answer"),
        ended=row.get("finish_reason") in ("stop", "boxed"),
        num_tok=int(row.get("num_generated_tokens") or 0),
        code_runs=int(row.get("code_rounds_executed") or 0),
        code_errors=int(row.get("num_code_errors") or 0),
    )


def _key(ballot: Ballot) -> str | None:
    return None if ballot.answer is None else vote_key(ballot.answer)


def score(records: Sequence[Record], counts: SpecCounts | None = None, *, num_gpus: int = 0) -> dict[str, float]:
    """All metrics of an evaluation whose rows are graded and whose votes are cast. `num_gpus` served; 0 is unknown."""
    rows = [row for record in records for row in record.rows]
    wall = busy_seconds(records)
    metrics: dict[str, float] = {}
    graded = [record for record in records if record.expected_answer is not None]
    if graded:
        metrics |= accuracy(graded)
        if (whole := busy_seconds(records, selecting=True)) > 0:
            metrics["throughput/solved_per_hour"] = 3600 * sum(bool(r.answer_right) for r in graded) / whole
            if num_gpus:
                metrics["throughput/solved_per_gpu_hour"] = metrics["throughput/solved_per_hour"] / num_gpus
    if rows:
        metrics |= by_generation(rows)
        metrics |= conduct(rows) | speed(rows, sum(r.spent_tok for r in records), wall)
    metrics["early_stop/cancelled"] = sum(r.cancelled for r in records)
    metrics["early_stop/not_started"] = sum(r.not_started for r in records)
    metrics["early_stop/saved_tok"] = sum(r.saved_tok for r in records)
    if counts is not None:
        metrics |= acceptance(counts)
    return metrics | second_opinions(records)


def accuracy(graded: Sequence[Record]) -> dict[str, float]:
    """pass@1 with its interval, pass@k, maj@k and the vote, over problems that have an expected answer."""
    scores = [record.score for record in graded]
    if set(scores) <= {0.0, 1.0}:  # one generation each, or all in agreement: a bootstrap of 30 ones would say [1, 1]
        interval = stats.wilson(round(sum(scores)), len(graded))
    else:
        interval = stats.bootstrap_mean(scores)
    votes = sum(bool(record.vote_right) for record in graded)
    vote_interval = stats.wilson(votes, len(graded))
    metrics = {
        "accuracy/pass_at_1": fmean(scores),
        "accuracy/pass_at_1_low": min(interval.low, fmean(scores)),  # resampled sums round differently
        "accuracy/pass_at_1_high": max(interval.high, fmean(scores)),
        "accuracy/maj": votes / len(graded),
        "accuracy/maj_low": vote_interval.low,
        "accuracy/maj_high": vote_interval.high,
        "accuracy/problems": len(graded),
        "accuracy/generations": sum(len(record.rows) for record in graded),
    }
    if any(record.stopped for record in graded):
        return metrics
    for k in sizes(min(len(record.rows) for record in graded)):
        metrics[f"accuracy/pass_at_{k}"] = fmean(stats.pass_at_k(len(r.rows), r.right, k) for r in graded)
        metrics[f"accuracy/maj_at_{k}"] = fmean(
            stats.maj_at_k([_key(ballot_of(row)) for row in r.rows], [is_right(row) for row in r.rows], k)
            for r in graded
        )
    return metrics


def sizes(n: int) -> list[int]:
    """The k of pass@k and maj@k: 2, 4, 8 ... and n itself."""
    powers = [2**i for i in range(1, n.bit_length()) if 2**i <= n]
    return powers if n < 2 or n in powers else [*powers, n]


def conduct(rows: Sequence[Row]) -> dict[str, float]:
    """How generations ended and what they did with tools and faults."""
    runs = sum(row["code_rounds_executed"] for row in rows)
    errors = sum(row["num_code_errors"] for row in rows)
    return {
        "accuracy/no_answer": fmean(row["predicted_answer"] is None for row in rows),
        "accuracy/truncated": fmean(row["finish_reason"] in TRUNCATED for row in rows),
        "tool/executions_per_generation": runs / len(rows),
        "tool/errors_per_execution": errors / runs if runs else 0.0,
        "tool/time_s": sum(row["code_execution_time"] for row in rows),
        "fault/stream_drops": sum(row["stream_drops"] for row in rows),
        "fault/sandbox_failures": sum(row["sandbox_failures"] for row in rows),
        "fault/generations": sum("error" in row for row in rows),
    }


def speed(rows: Sequence[Row], cancelled_tok: int, wall: float) -> dict[str, float]:
    """Latency percentiles over generations, and throughput of model-written tokens over `wall` seconds."""
    metrics: dict[str, float] = {}
    tpot = [second for row in rows for second in row["tpot_s"]]
    for name, values, scale in (
        ("latency/ttft_p{}_ms", [row["ttft_s"] for row in rows if row["ttft_s"] is not None], 1000),
        ("latency/tpot_p{}_ms", tpot, 1000),
        ("latency/e2e_p{}_s", [row["generation_time"] for row in rows], 1),
    ):
        for q in (50, 95) if values else ():
            metrics[name.format(q)] = scale * stats.percentile(values, q)
    tokens = sum(row["num_generated_tokens"] for row in rows) + cancelled_tok
    metrics["throughput/output_tok"] = tokens
    if wall > 0:
        metrics["throughput/output_tok_s"] = tokens / wall
        metrics["throughput/generations_per_s"] = len(rows) / wall
    return metrics


def busy_seconds(records: Sequence[Record], *, selecting: bool = False) -> float:
    """Seconds during which at least one problem was worked on: wall time without the gap before a resume.

    A problem's own span counts beside those of its rows: generations that were cut off leave no row, only time spent.
    `selecting` counts the comparisons of solutions too.
    """
    spans = [(record.start_time, record.end_time) for record in records]
    spans += [(row["generation_start_time"], row["generation_end_time"]) for r in records for row in r.rows]
    if selecting:
        picks = [row for record in records for row in record.picks or ()]
        spans += [(row["generation_start_time"], row["generation_end_time"]) for row in picks]
    busy, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy
