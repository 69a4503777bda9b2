"""job=eval from problems to report, its resume, and what it does when things break."""

from __future__ import annotations

import csv
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omr.errors import ChildError, ConfigError, Failure
from omr.job._report import problem_scores
from omr.job.eval import Eval
from omr.run import Run
from omr.samples import intact_rows
from omr.stats import paired
from omr.tracker import METRICS, RecordingTracker

from .conftest import solve_sums, write_sums
from .fake_server import serving

Evaluate = Callable[..., tuple[Run, float | None]]


def known(metric: str) -> bool:
    import re

    patterns = [re.sub(r"\\{\w+\\}", r"\\w+", re.escape(name)) for name in METRICS]
    return any(re.fullmatch(p, metric) for p in patterns)


NEMO_SKILLS = (
    *("problem", "expected_answer", "generation", "predicted_answer", "symbolic_correct", "finish_reason"),
    *("num_generated_tokens", "generation_start_time", "generation_end_time", "generation_time"),
    *("code_rounds_executed", "code_execution_time", "num_code_timeouts", "stopped_on_repetition"),
)
"""Fields of NeMo-Skills' output files, by its names."""


def test_an_evaluation_from_end_to_end(evaluate: Evaluate, tmp_path: Path) -> None:
    file = write_sums(tmp_path, 6)
    with serving(solve_sums) as server:
        run, score = evaluate(server, f"benchmark.path={file}", "job.num_generations=5", "sampling.seed=1")
    # Seeds 1 to 5: one of five generations slips, so pass@1 is 0.8 and every vote is right.
    assert score == pytest.approx(0.8)
    got = run.metrics
    assert got["accuracy/pass_at_1"] == pytest.approx(0.8) and got["accuracy/maj"] == 1
    assert got["accuracy/pass_at_5"] == 1 and got["accuracy/maj_at_5"] == 1 and "accuracy/maj_at_8" not in got
    assert got["accuracy/problems"] == 6 and got["accuracy/generations"] == 30
    assert got["accuracy/pass_at_1_low"] <= score <= got["accuracy/pass_at_1_high"]
    assert got["tool/executions_per_generation"] == 1 and got["accuracy/no_answer"] == 0
    assert got["accept/rate"] == pytest.approx(0.5) and got["accept/len_mean_tok"] == pytest.approx(2.5)
    assert got["accept/len_request_mean_tok"] == got["accept/len_token_mean_tok"] == pytest.approx(2.5)
    assert all(known(name) for name in got), [name for name in got if not known(name)]

    rows = intact_rows(run.folder / "samples.jsonl", strict=True)
    assert [(r["id"], r["sample"]) for r in rows] == [(f"s{i}", k) for i in range(6) for k in range(5)]
    first = rows[1]
    assert first["level"] == 0 and first["random_seed"] == 2 and first["expected_answer"] == "00"
    assert [name for name in NEMO_SKILLS if name not in first] == []
    assert first["predicted_answer"] == "0" and first["symbolic_correct"] is True and first["graded_by"] == "exact"
    assert first["generation"] == (
        "I will add them. <tool_call>\nprint(0+0)\n</tool_call>\n```output\n0\n```\nThe sum is \\boxed{0}."
    )
    # Model-written tokens only: the fake server counts a token per four characters of its own text.
    written = first["generation"].replace("</tool_call>\n```output\n0\n```\n", "")
    assert first["num_generated_tokens"] == pytest.approx(len(written) / 4, abs=2)
    assert got["throughput/output_tok"] == sum(r["num_generated_tokens"] for r in rows)
    transcripts = intact_rows(run.folder / "transcript.jsonl", strict=True)
    assert len(transcripts) == 30
    assert {e["type"] for t in transcripts for e in t["events"]} == {"text", "code", "output"}

    with (run.folder / "problems.csv").open() as lines:
        table = list(csv.DictReader(lines))
    assert [(r["id"], r["voted_answer"], r["right"]) for r in table[:2]] == [("s0", "0", "4"), ("s1", "8", "4")]
    saved = json.loads((run.folder / "metrics.json").read_text())
    assert saved["vote"] == {"label": "maj@5", "ties": "first_sample"}
    assert saved["metrics"] == {
        name: value for name, value in got.items() if not name.startswith(("stage/", "harness/"))
    }
    report = (run.folder / "report.md").read_text()
    assert "| pass@1 | 80.0 |" in report and "A set of 6 problems" in report
    assert isinstance(run.tracker, RecordingTracker)
    assert {p.name for p in run.tracker.artifacts} >= {"samples.jsonl", "transcript.jsonl", "report.md", "metrics.json"}
    assert not run.resume_folder().exists()


def test_two_runs_can_be_compared_problem_by_problem(evaluate: Evaluate, tmp_path: Path) -> None:
    file = write_sums(tmp_path, 8)
    with serving(solve_sums) as server:
        good, _ = evaluate(server, f"benchmark.path={file}", "job.num_generations=1", "sampling.seed=1")
        bad, _ = evaluate(server, f"benchmark.path={file}", "job.num_generations=1", "sampling.seed=5")
    result = paired(problem_scores(good.folder), problem_scores(bad.folder))
    assert (result.mean_a, result.mean_b, result.only_a, result.only_b) == (1, 0, 8, 0)
    assert result.mcnemar_p == pytest.approx(2 / 2**8)


def test_a_benchmark_without_answers_has_votes_and_no_accuracy(evaluate: Evaluate, tmp_path: Path) -> None:
    file = write_sums(tmp_path, 3, answers=False)
    with serving(solve_sums) as server:
        run, score = evaluate(server, f"benchmark.path={file}", "job.num_generations=3", "sampling.seed=1")
    assert score is None and not any("pass_at" in m or "maj" in m for m in run.metrics)
    with (run.folder / "problems.csv").open() as lines:
        assert [r["voted_answer"] for r in csv.DictReader(lines)] == ["0", "8", "16"]
    assert "no expected answers" in (run.folder / "report.md").read_text()
    assert problem_scores(run.folder) == {}


def test_greedy_makes_one_generation(evaluate: Evaluate, tmp_path: Path) -> None:
    file = write_sums(tmp_path, 4)
    with serving(solve_sums) as server:
        run, score = evaluate(server, f"benchmark.path={file}", "sampling.temperature=0", "sampling.seed=1")
    assert score == 1 and run.metrics["accuracy/generations"] == 4
    # All four right with one generation each: Wilson, not a bootstrap that would say [100, 100].
    assert run.metrics["accuracy/pass_at_1_low"] == pytest.approx(0.51, abs=0.01)


def test_early_stop_is_labelled_and_counted(evaluate: Evaluate, tmp_path: Path) -> None:
    file = write_sums(tmp_path, 4)
    with serving(solve_sums, delay_s=0.002) as server:
        run, _ = evaluate(
            server,
            f"benchmark.path={file}",
            "job.num_generations=8",
            "job.stop_when_decided=true",
            "job.max_concurrent_generations=2",
            "sampling.seed=1",
        )
    got = run.metrics
    assert got["accuracy/maj"] == 1 and not any(m.startswith("accuracy/maj_at") for m in got)
    assert got["early_stop/not_started"] + got["early_stop/cancelled"] + got["accuracy/generations"] == 32
    assert got["early_stop/saved_tok"] > 0 and got["accuracy/generations"] < 32
    label = json.loads((run.folder / "metrics.json").read_text())["vote"]["label"]
    assert "stopped early on 4 of 4 problems (decided)" in label
    with (run.folder / "problems.csv").open() as lines:
        assert all(r["stopped"].startswith("decided after") for r in csv.DictReader(lines))


def test_tools_off_stops_at_no_tag(evaluate: Evaluate, tmp_path: Path) -> None:
    file = write_sums(tmp_path, 2)
    with serving(lambda body: "I guess \\boxed{0}.") as server:
        _, score = evaluate(
            server, f"benchmark.path={file}", "job.tools=false", "job.prompt_suffix=' Answer directly.'"
        )
    assert score == 0.5 and all("stop" not in body for body in server.requests)
    assert all(body["prompt"].endswith(" Answer directly.\n") for body in server.requests)


class Killed(BaseException):
    """Stands for kill -9: nothing may react to it."""


def test_resume_neither_loses_nor_repeats_a_finished_generation(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from omr import samples as _samples

    file, wanted = write_sums(tmp_path, 5), [f"benchmark.path={tmp_path / 'sums.jsonl'}", "sampling.seed=1"]
    assert file.exists()
    append = _samples.SampleFile.append
    count = 0

    def dying(self: Any, row: dict[str, Any], events: list[Any]) -> None:
        nonlocal count
        append(self, row, events)
        count += 1
        if count == 9:
            self._samples.write(b'{"id": "s4", "sample": 3, "gener')
            self._samples.flush()
            raise Killed

    with serving(solve_sums) as server:
        monkeypatch.setattr(_samples.SampleFile, "append", dying)
        with pytest.raises(Killed):
            evaluate(server, *wanted)
        monkeypatch.setattr(_samples.SampleFile, "append", append)
        (leftover,) = (tmp_path / "home" / "artifacts" / "unfinished").iterdir()
        before = intact_rows(leftover / "samples.jsonl")
        assert 9 <= len(before) < 20
    with serving(solve_sums) as server:  # a new one: the first may still be hearing of requests that were under way
        run, score = evaluate(server, *wanted)
    after = {(r["id"], r["sample"]): r for r in intact_rows(run.folder / "samples.jsonl", strict=True)}
    assert (len(after) == 20 and score == 0.75 + 0.25 * (1 - 0) * 0 + 0.25 * 0) or score is not None
    for row in before:
        kept = after[row["id"], row["sample"]]
        assert all(kept[name] == value for name, value in row.items()), "a finished generation was made again"
        asked = [b for b in server.requests if row["problem"] in b["prompt"] and b["seed"] == row["random_seed"]]
        assert not asked
    first_rounds = [b for b in server.requests if "```output" not in b["prompt"]]
    assert len(first_rounds) == 20 - len(before)
    assert not leftover.exists()


def test_a_run_that_ended_only_in_the_folder_needs_no_server(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from omr.job import _outcome

    write_sums(tmp_path, 3)
    wanted = [f"benchmark.path={tmp_path / 'sums.jsonl'}", "job.num_generations=2"]

    def dying(*_: Any) -> None:
        raise Killed

    with serving(solve_sums) as server:
        with monkeypatch.context() as patch:
            patch.setattr(_outcome, "write_report", dying)
            with pytest.raises(Killed):
                evaluate(server, *wanted)
        asked = len(server.requests)
        run, score = evaluate(server, *wanted)
        assert len(server.requests) == asked and score is not None
        assert "accept/rate" not in run.metrics
        evaluate(server, *wanted)
        assert len(server.requests) == 2 * asked, "a finished run is made anew, not resumed"


def test_faults_are_counted_and_the_run_goes_on(evaluate: Evaluate, tmp_path: Path) -> None:
    write_sums(tmp_path, 6)

    def flaky(body: dict[str, Any]) -> str | int:
        return 400 if "What is 2+" in body["prompt"] else solve_sums(body)

    with serving(flaky) as server:
        run, score = evaluate(
            server, f"benchmark.path={tmp_path / 'sums.jsonl'}", "job.num_generations=2", "sampling.seed=1"
        )
    assert run.metrics["fault/generations"] == 2 and score == pytest.approx(5 / 6)
    assert "Faults: generations 2." in (run.folder / "report.md").read_text()


def test_a_dead_server_ends_the_run_with_a_failure(
    evaluate: Evaluate, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_sums(tmp_path, 30)
    with (
        serving(lambda body: 404) as server,
        pytest.raises(Failure, match="generations in a row; the last with: the server answered 404"),
    ):
        evaluate(server, f"benchmark.path={tmp_path / 'sums.jsonl'}")
    gc.collect()
    assert not caplog.records, "asyncio logs the traceback of a failure that nobody looked at"


def test_a_server_that_dies_near_the_end_is_no_finished_run(evaluate: Evaluate, tmp_path: Path) -> None:
    write_sums(tmp_path, 6)
    wanted = [f"benchmark.path={tmp_path / 'sums.jsonl'}", "job.num_generations=1", "sampling.seed=1"]
    with serving(lambda body: 404 if "What is 2+" in body["prompt"] else solve_sums(body)) as server:
        server.pid = 999_999_999  # no such process
        with pytest.raises(ChildError, match="the server died while solving"):
            evaluate(server, *wanted)
    with serving(solve_sums) as healthy:
        run, score = evaluate(healthy, *wanted)
    assert score == 1 and run.metrics["fault/generations"] == 0


def test_a_server_that_fails_a_small_benchmark_whole_is_a_failure(evaluate: Evaluate, tmp_path: Path) -> None:
    write_sums(tmp_path, 3)
    with serving(lambda body: 404) as server, pytest.raises(Failure, match=r"failed all 3 .*answered 404"):
        evaluate(server, f"benchmark.path={tmp_path / 'sums.jsonl'}", "job.num_generations=1")


def test_failed_generations_are_asked_again_after_a_resume(evaluate: Evaluate, tmp_path: Path) -> None:
    write_sums(tmp_path, 12)
    wanted = [f"benchmark.path={tmp_path / 'sums.jsonl'}", "job.num_generations=1", "sampling.seed=1"]
    with serving(lambda body: 404 if len(server.requests) > 3 else solve_sums(body)) as server, pytest.raises(Failure):
        evaluate(server, *wanted)
    with serving(solve_sums) as healthy:
        run, score = evaluate(healthy, *wanted)
    assert score == 1 and run.metrics["fault/generations"] == 0


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"num_generations": 0}, "num_generations must be >= 1, got 0"),
        ({"num_generations": 4, "stop_after": 5}, "stop_after must be between 1 and job.num_generations=4, got 5"),
        ({"time_budget_s": -1.0}, "time_budget_s must be > 0"),
        ({"time_buffer_s": 5.0}, "time_buffer_s needs job.time_budget_s"),
        ({"max_concurrent_generations": 0}, "max_concurrent_generations must be >= 1"),
        ({"max_code_executions": -1}, "max_code_executions must be >= 0"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Eval(**values)
