"""MLflow as omr uses it: names it accepts, statuses that are true, sweeps under one parent."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from omr.errors import ConfigError
from omr.tracker import METRICS, MlflowTracker, get_run, study_runs

ALLOWED = re.compile(r"[A-Za-z0-9_\-./ :]+")
"""What MLflow accepts in a metric name."""


def test_every_metric_name_is_one_mlflow_accepts() -> None:
    for name, meaning in METRICS.items():
        assert ALLOWED.fullmatch(re.sub(r"\{\w+\}", "1", name)), name
        assert meaning


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def uri(home: Path) -> str:
    return f"sqlite:///{home / 'mlflow.db'}"


def test_a_sweep_is_one_parent_with_children(uri: str, home: Path, tmp_path: Path) -> None:
    parent = MlflowTracker(uri, "demo", "sweep", home=home)
    for at in range(2):
        child = MlflowTracker(uri, "demo", f"cell {at}", home=home, parent_id=parent.run_id)
        child.params({f"p{i}": i for i in range(250)})
        child.tags({"omr.fingerprint": f"f{at}"})
        child.metrics({"accuracy/pass_at_1": 0.5 + at, "latency/ttft_p50_ms": 12.0})
        child.curve([{"step": s, "train/loss": 1.0 / s} for s in range(1, 1200)])
        note = tmp_path / "note.txt"
        note.write_text("kept")
        child.artifact(note)
        child.end("FINISHED")
    parent.end("FINISHED")
    reopened = MlflowTracker(uri, "demo", "", home=home, run_id=parent.run_id)
    cells = reopened.children()
    assert [c["name"] for c in cells] == ["cell 0", "cell 1"]
    assert cells[1]["metrics"]["accuracy/pass_at_1"] == 1.5
    assert math.isclose(cells[0]["metrics"]["train/loss"], 1 / 1199)
    assert len(cells[0]["params"]) == 250
    assert list(home.rglob("note.txt")), "artifacts are kept beside the database"
    assert [r["id"] for r in reopened.finished_runs("demo", "f1")] == [cells[1]["id"]]
    assert reopened.finished_runs("demo", "f2") == []
    assert len(study_runs(uri, "demo", home)) == 3
    assert get_run(uri, cells[0]["id"][:10], home)["name"] == "cell 0"


def test_statuses_and_reasons(uri: str, home: Path) -> None:
    failed = MlflowTracker(uri, "ends", "a", home=home)
    failed.end("FAILED", "no disk space")
    killed = MlflowTracker(uri, "ends", "b", home=home)
    killed.end("KILLED")
    found = {run["name"]: run for run in study_runs(uri, "ends", home)}
    assert found["a"]["status"] == "FAILED" and found["a"]["tags"]["omr.reason"] == "no disk space"
    assert found["b"]["status"] == "KILLED"


def test_a_run_whose_process_is_gone_is_marked_killed(uri: str, home: Path) -> None:
    dead = MlflowTracker(uri, "reap", "dead", home=home)
    dead.tags({"omr.process": "999999999:1.00"})  # no such process
    reused = MlflowTracker(uri, "reap", "reused pid", home=home)
    reused.tags({"omr.process": "1:1.00"})  # pid 1 lives, but was not born then
    elsewhere = MlflowTracker(uri, "reap", "other host", home=home)
    elsewhere.tags({"omr.host": "another", "omr.process": "999999999:1.00"})
    MlflowTracker(uri, "reap", "new", home=home)
    found = {run["name"]: run["status"] for run in study_runs(uri, "reap", home)}
    assert found == {"dead": "KILLED", "reused pid": "KILLED", "other host": "RUNNING", "new": "RUNNING"}


def test_unknown_study_and_run(uri: str, home: Path) -> None:
    MlflowTracker(uri, "known", "x", home=home).end("FINISHED")
    with pytest.raises(ConfigError, match=r"no study .nope.*known"):
        study_runs(uri, "nope", home)
    with pytest.raises(ConfigError, match="no run 'zzz'"):
        get_run(uri, "zzz", home)
    MlflowTracker(uri, "known", "y", home=home).end("FINISHED")
    with pytest.raises(ConfigError, match=r"\d+ runs begin with ''.*give more"):
        get_run(uri, "", home)
