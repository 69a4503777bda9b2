"""TensorBoard and W&B beside the first tracker, their packages recorded rather than installed."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from omr import pipeline
from omr.compose import plan
from omr.config import Config
from omr.errors import ConfigError, MissingBackend
from omr.extra_trackers import Extra, TensorBoardTracker, require, with_extras
from omr.run import open_run
from omr.tracker import RecordingTracker


class Recorder:
    """Takes any call and remembers it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        if name in ("config", "summary"):
            child = self.__dict__[name] = Recorder()
            return child
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs)) or self

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [args for called, args, _ in self.calls if called == name]


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorder]:
    """Stand-ins for both packages; what their writer and run were told."""
    told = {"tensorboard": Recorder(), "wandb": Recorder()}
    board, own, wandb = ModuleType("torch.utils.tensorboard"), ModuleType("tensorboard"), ModuleType("wandb")
    board.SummaryWriter = told["tensorboard"].opened  # type: ignore[attr-defined]
    wandb.init = told["wandb"].init  # type: ignore[attr-defined]
    for module in (board, own, wandb):
        module.__spec__ = ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return told


def config(*overrides: str) -> Config:
    made = plan(["tracking_uri=null", "device=cpu", *overrides], multirun=False)
    assert not made.refused, made.refused
    return made.cells[0].cfg


def test_both_hear_what_the_first_hears(
    packages: dict[str, Recorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMR_HOME", str(tmp_path))
    cfg = config("also_track=[tensorboard,wandb]", "study=both")
    pipeline.preflight(cfg)
    with open_run(cfg, tmp_path / "multirun" / "both" / "now" / "0", overrides=[]) as run:
        run.log({"accept/rate": 0.5})
        run.tracker.curve([{"step": 20.0, "drafter/loss": 3.0}, {"step": 40.0, "drafter/loss": 2.0}])
    board, wandb = packages["tensorboard"], packages["wandb"]
    assert board.named("opened") == [(str(tmp_path / "tensorboard" / "both" / "now-0"),)]
    assert board.named("add_scalar") == [
        ("accept/rate", 0.5, 0),
        ("drafter/loss", 3.0, 20),
        ("drafter/loss", 2.0, 40),
    ]
    assert "| quant.name" not in board.named("add_text")[0][1] and "| drafter | none |" in board.named("add_text")[0][1]
    assert board.named("close") == [()] and "FINISHED" in board.named("add_text")[-1][1]
    assert wandb.calls[0][2]["project"] == "both" and wandb.named("define_metric") == [("*",)]
    assert wandb.named("log") == [({"step": 20.0, "drafter/loss": 3.0},), ({"step": 40.0, "drafter/loss": 2.0},)]
    assert ({"accept/rate": 0.5},) in wandb.summary.named("update")
    assert wandb.config.named("update")[0][0]["drafter"] == "none"
    assert wandb.calls[-1] == ("finish", (), {"exit_code": 0})
    first = run.tracker.trackers[0]  # type: ignore[attr-defined]
    assert isinstance(first, RecordingTracker) and first.status == "FINISHED"
    assert first.logged_metrics == {"accept/rate": 0.5} and len(first.curves) == 2


def test_a_run_that_fails_says_so(packages: dict[str, Recorder], tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError),
        open_run(config("also_track=[wandb]"), tmp_path / "x" / "0", overrides=[]),
    ):
        raise ConfigError("no")
    assert packages["wandb"].calls[-1] == ("finish", (), {"exit_code": 1})
    assert packages["wandb"].summary.named("update")[-1] == ({"omr.status": "FAILED", "omr.reason": "no"},)


@pytest.mark.parametrize("extra", list(Extra))
def test_a_package_that_is_missing_is_one_line(extra: Extra, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingBackend, match=rf"{extra.value} is not available here.*omr\[{extra.value}\]") as caught:
        require([extra])
    assert "\n" not in str(caught.value)
    with pytest.raises(MissingBackend):
        pipeline.preflight(config(f"also_track=[{extra.value}]"))


def test_an_unknown_one_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match="tensorboard"):
        plan(["also_track=[tensorbord]"], multirun=False)


def test_nobody_asked_nothing_changes(tmp_path: Path) -> None:
    first = RecordingTracker()
    assert with_extras(first, [], study="s", name="n", folder=tmp_path, home=tmp_path) is first


@pytest.mark.backend
def test_torchs_writer_takes_what_it_is_given(tmp_path: Path) -> None:
    """With the real package: event files that read back as they were written."""
    pytest.importorskip("tensorboard", reason="needs tensorboard (pip install 'omr[tensorboard]')")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TensorBoardTracker(tmp_path / "run")
    tracker.params({"drafter": "none"})
    tracker.metrics({"accept/rate": 0.5})
    tracker.curve([{"step": 20.0, "drafter/loss": 3.0}])
    tracker.end("FINISHED")
    read = EventAccumulator(str(tmp_path / "run"))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("drafter/loss")] == [(20, 3.0)]
    assert [e.value for e in read.Scalars("accept/rate")] == [0.5]
