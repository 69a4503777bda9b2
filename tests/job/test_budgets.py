"""Seconds of a problem, of what it saved for others, and of the whole benchmark, in real evaluations."""

from __future__ import annotations

import csv
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omr.job._score import Record, busy_seconds, score
from omr.run import Run

from .conftest import write_sums
from .fake_server import serving

Evaluate = Callable[..., tuple[Run, float | None]]


def slow(seconds: dict[int, float]) -> Callable[[dict[str, Any]], str]:
    """A model that thinks for so long over problem i before it answers."""

    def model(body: dict[str, Any]) -> str:
        number = int(re.findall(r"What is (\d+)\+", body["prompt"])[-1])
        time.sleep(seconds.get(number, 0.0))
        return f"\\boxed{{{8 * number}}}"

    return model


def table(run: Run) -> list[dict[str, str]]:
    with (run.folder / "problems.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def lasted(row: dict[str, str]) -> float:
    return float(row["end_time"]) - float(row["start_time"])


def test_what_a_problem_saves_a_later_one_may_use(evaluate: Evaluate, tmp_path: Path) -> None:
    """2 s a problem and at most 2 s more: 2.5 s fit after a quick problem, 30 s never do, 2.5 s not without savings."""
    with serving(slow({1: 2.5, 2: 30.0, 3: 2.5})) as server:
        run, _ = evaluate(
            server,
            f"benchmark.path={write_sums(tmp_path, 4)}",
            "job.num_generations=2",
            "job.max_concurrent_problems=1",
            "job.time_budget_s=2",
            "job.time_buffer_s=2",
        )
    rows = table(run)
    assert [r["voted_answer"] for r in rows] == ["0", "8", "", ""]
    assert [r["stopped"] for r in rows] == ["", "", "time after 0 of 2", "time after 0 of 2"]
    assert lasted(rows[1]) >= 2.5 and lasted(rows[2]) > lasted(rows[3]) >= 1.9
    assert rows[2]["cancelled"] == "2" and run.metrics["accuracy/maj"] == 0.5
    # A problem without a row has cost time all the same.
    assert run.metrics["throughput/solved_per_hour"] == pytest.approx(2 * 3600 / sum(map(lasted, rows)), rel=0.05)
    label = json.loads((run.folder / "metrics.json").read_text())["vote"]["label"]
    assert label == "maj@0..2, stopped early on 2 of 4 problems (time)"


def test_the_whole_benchmark_has_a_deadline(evaluate: Evaluate, tmp_path: Path) -> None:
    with serving(slow(dict.fromkeys(range(2, 8), 30.0))) as server:
        run, result = evaluate(
            server,
            f"benchmark.path={write_sums(tmp_path, 8)}",
            "job.num_generations=2",
            "job.max_concurrent_generations=2",
            "job.max_concurrent_problems=1",
            "job.deadline_s=4",
        )
        asked = {re.findall(r"What is (\d+)\+", body["prompt"])[-1] for body in server.requests}
    rows = table(run)
    assert [r["voted_answer"] for r in rows] == ["0", "8", *[""] * 6]
    assert asked == {"0", "1", "2"}, "what is past the deadline is not asked"
    assert all(r["stopped"].startswith("time after") for r in rows if not r["voted_answer"])
    assert run.metrics["accuracy/problems"] == 8  # unanswered is wrong, not left out
    assert result == pytest.approx(2 / 8) == run.metrics["accuracy/maj"]
    assert run.metrics["throughput/solved_per_hour"] <= 3600 * 2 / 3.9
    report = (run.folder / "report.md").read_text()
    assert "4 s in all" in report and "(time)" in report


def record(right: bool, start: float, end: float, *, rows: int = 1) -> Record:
    row = {
        "sample": 0,
        "generation_start_time": start,
        "generation_end_time": end,
        "generation_time": end - start,
        "finish_reason": "stop",
        "predicted_answer": "1",
        "symbolic_correct": right,
        "num_generated_tokens": 10,
        "code_rounds_executed": 0,
        "num_code_errors": 0,
        "code_execution_time": 0.0,
        "stream_drops": 0,
        "sandbox_failures": 0,
        "ttft_s": 0.1,
        "tpot_s": [0.01],
    }
    made = Record(id=str(start), expected_answer="1", rows=[row] * rows, start_time=start, end_time=end)
    made.vote_right = right and bool(rows)
    return made


def test_solved_per_hour_and_per_gpu_hour() -> None:
    """Three problems side by side and after a gap: 30 busy seconds, two solved, on two GPUs."""
    records = [record(True, 100, 110), record(True, 105, 120), record(False, 500, 510, rows=0)]
    assert busy_seconds(records) == 30
    metrics = score(records, num_gpus=2)
    assert metrics["throughput/solved_per_hour"] == 240 and metrics["throughput/solved_per_gpu_hour"] == 120
    assert "throughput/solved_per_gpu_hour" not in score(records)
