"""job=train_model: trains in a child, keeps the result as an artifact, and the result is a model.path."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from omr.artifact import content
from omr.compose import plan
from omr.config import Config
from omr.errors import ConfigError
from omr.run import Run, open_run
from omr.tracker import RecordingTracker

QUICK = ["job=train_model", "tracking_uri=null", "device=cpu", "job.recipe.max_length=200", "job.recipe.lr=1e-3"]


def config(*overrides: str) -> Config:
    made = plan([*QUICK, *overrides], multirun=False)
    assert not made.refused, made.refused
    return made.cells[0].cfg


def do(folder: Path, *overrides: str) -> Run:
    cfg = config(*overrides)
    with open_run(cfg, folder, overrides=list(overrides)) as run:
        cfg.job.run(run)
    return run


@pytest.fixture
def solutions(tmp_path: Path) -> Path:
    rows = [{"problem": f"What is {a} + 1?", "solution": f"One more is \\boxed{{{a + 1}}}."} for a in range(40)]
    path = tmp_path / "solutions.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.mark.slow
def test_a_file_of_solutions_makes_a_model_that_is_reused(
    solutions: Path, make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMR_HOME", str(tmp_path / "home"))
    base = make_model("qwen2")
    overrides = (f"model.path={base}", f"model.text.path={solutions}", "job.rows=40")
    run = do(tmp_path / "one", *overrides)
    assert run.metrics["train/documents"] == 40 and run.metrics["stage/model_reused"] == 0
    assert isinstance(run.tracker, RecordingTracker)
    assert any("train/step_loss" in row for row in run.tracker.curves)
    again = do(tmp_path / "two", *overrides, "job.workers=2", "job.recipe.checkpoint_min=1")
    assert again.metrics["stage/model_reused"] == 1 and again.metrics["train/loss"] == run.metrics["train/loss"]
    [trained] = [a for a in run.store.all() if a.kind == "model"]
    assert config(f"model.path={trained.path}").model.path == str(trained.path)
    from omr import source

    assert source.check_folder(trained.path) is not None


@pytest.mark.slow
def test_the_corpus_trains_a_fresh_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMR_HOME", str(tmp_path))
    run = do(
        tmp_path / "one",
        "job.rows=120",
        "job.fresh=true",
        "job.shape={hidden_size: 32, num_layers: 1, num_heads: 2, num_kv_heads: 1, intermediate_size: 48}",
    )
    kinds = {a.kind: a for a in run.store.all()}
    assert set(kinds) == {"text", "fresh", "model"}
    assert json.loads((kinds["model"].path / "config.json").read_text())["hidden_size"] == 32
    assert 100 < kinds["text"].metrics["rows"] <= 120


def test_the_experiment_is_the_recipe_of_the_embedded_model() -> None:
    made = plan(["+experiment=train_tiny"], multirun=False)
    recipe = content(made.cells[0].cfg.job)
    assert recipe["fresh"] and recipe["rows"] == 640_000 and recipe["recipe"]["lr"] == 3e-3
    assert made.cells[0].cfg.model.text.seed == 0
    assert recipe["shape"]["hidden_size"] == 256 and recipe["shape"]["intermediate_size"] == 640


def test_what_cannot_be_trained_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMR_HOME", str(tmp_path))
    cfg = plan([*QUICK, "model.text.corpus=false"], multirun=False).cells[0].cfg
    with pytest.raises(ConfigError, match="names no text to train on"):
        cfg.job.preflight(cfg)
    made = plan([*QUICK, "job.rows=0"], multirun=False)
    assert made.refused and "job.rows" in made.refused[0]
    made = plan([*QUICK, "job.recipe.lr=0"], multirun=False)
    assert made.refused and "job.recipe.lr must be > 0" in made.refused[0]
    made = plan([*QUICK, "job.fresh=true", "job.recipe.max_length=4096"], multirun=False)
    assert made.refused and "job.shape.context_tokens" in made.refused[0]
