"""What a machine or a job cannot do is refused before anything is allocated."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from omr import pipeline
from omr.compose import plan
from omr.config import Config
from omr.errors import ConfigError, Failure, InputError, MissingBackend, OmrError, ResourceError
from omr.sandbox.local import Local


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OMR_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def one(*overrides: str) -> Config:
    made = plan(["device=cpu", *overrides], multirun=False)
    assert not made.refused, made.refused
    return made.cells[0].cfg


@pytest.mark.parametrize(
    ("overrides", "kind", "says"),
    [
        (["job=train"], ConfigError, "drafter=none is not trained"),
        (["job=train_model", "model.text.corpus=false"], ConfigError, "names no text to train on"),
        (["job=build", "server=trtllm"], MissingBackend, "trtllm-serve"),
        (["server=trtllm"], MissingBackend, "trtllm-serve"),
        (["drafter=draft_model"], ConfigError, "needs drafter.model"),
        (["drafter=draft_model", "drafter.model=/nowhere"], InputError, "/nowhere is no folder here"),
        (["model.text.path=/no.jsonl"], InputError, "model.text.path /no.jsonl does not"),
        (["model.context_tokens=4096"], ConfigError, "max_position_embeddings=2048"),
        (["model.path=/nowhere"], InputError, "model.path /nowhere is not a folder"),
        (["benchmark.path=/no.jsonl"], InputError, "benchmark file /no.jsonl does not exist"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_it_is_refused_in_one_line(overrides: list[str], kind: type[OmrError], says: str) -> None:
    with pytest.raises(kind) as refused:
        pipeline.preflight(one(*overrides))
    assert says in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("job", ["train", "eval"])
def test_a_run_under_torchrun_is_refused_instead_of_hanging(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"drafter\.num_processes=N trains on N GPUs\), not under torchrun"):
        pipeline.preflight(one(f"job={job}", "drafter=redrafter"))
    monkeypatch.setenv("WORLD_SIZE", "1")
    pipeline.preflight(one(f"job={job}", "drafter=redrafter"))


def test_a_port_in_use_is_refused_before_anything_is_built() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=f"port {port} .*server.port"):
            pipeline.preflight(one("job=serve", f"server.port={port}"))
        pipeline.preflight(one("job=build", f"server.port={port}"))


def test_a_tracking_server_that_is_not_there_is_one_line() -> None:
    with pytest.raises(Failure, match=r"MLflow at http://127.0.0.1:1 does not answer .*tracking_uri=null"):
        pipeline.preflight(one("tracking_uri=http://127.0.0.1:1"))


@pytest.mark.parametrize(
    ("job", "quant", "drafter", "says"),
    [
        ("build", "fp8", "none", "quant=fp8 calibrates on the whole model"),
        ("train", "bf16", "redrafter", "drafter=redrafter is trained on the whole model"),
        ("eval", "int8_wo", "redrafter", "drafter=redrafter is trained"),
        ("build", "int8_wo", "redrafter", ""),
    ],
)
def test_a_model_too_large_to_be_calibrated_or_trained_on(
    job: str, quant: str, drafter: str, says: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "host_bytes", lambda: 8 << 30)
    cfg = one(f"job={job}", f"quant={quant}", f"drafter={drafter}", "model.params_b=7")
    if not says:
        return pipeline.preflight(cfg)
    with pytest.raises(ResourceError, match=f"{says}.* 14 GB in bfloat16, and this machine's cpu memory is 9 GB"):
        pipeline.preflight(cfg)
    kind = "checkpoint" if "quant" in says else "drafter"
    folder = home / "artifacts" / kind / "0123"
    folder.mkdir(parents=True)
    for size, enough in ((6_000_000, False), (7_000_000_000, True)):
        (folder / "manifest.json").write_text(
            json.dumps({"files": {"a": {"bytes": size}}, "recipe": {}, "created": ""})
        )
        if enough:
            pipeline.preflight(cfg)
        else:
            with pytest.raises(ResourceError, match=says):
                pipeline.preflight(cfg)


def test_a_home_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OMR_HOME", str(tmp_path / "file"))
    with pytest.raises(ResourceError, match=r"cannot write in .*set OMR_HOME"):
        pipeline.preflight(one("job=build"))


def test_the_sandbox_is_asked_only_by_a_job_that_runs_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Local) -> None:
        raise MissingBackend("Linux")

    monkeypatch.setattr(Local, "preflight", refuse)
    for overrides in (["job=serve"], ["job=build"], ["job.tools=false"], ["job.max_code_executions=0"]):
        pipeline.preflight(one(*overrides))
    with pytest.raises(MissingBackend):
        pipeline.preflight(one())
