"""A command line from its check to its exit code, without running anything."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from omr import pipeline, run, sweep
from omr.compose import plan
from omr.config import Config
from omr.errors import ConfigError, MissingBackend, ResourceError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OMR_HOME", str(tmp_path))
    return tmp_path


def test_a_single_run_is_refused_with_its_own_error() -> None:
    with pytest.raises(ConfigError, match="did you mean fp8"):
        sweep.checked(["quant=fp9"], multirun=False)
    with pytest.raises(MissingBackend, match="trtllm-serve"):
        sweep.checked(["server=trtllm"], multirun=False)


def test_a_sweep_names_every_refused_cell_and_starts_nothing(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"2 cell\(s\) refused, nothing was started"):
        sweep.run_all(["server=native,trtllm", "quant=bf16,fp8"], multirun=True)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in lines] == [
        "cell 2 (server=trtllm quant=bf16)",
        "cell 3 (server=trtllm quant=fp8)",
    ]
    assert not list(home.glob("multirun/*"))


def test_a_full_disk_is_a_failure_and_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(cfg: Config) -> None:
        raise ResourceError("0.1 GB free")

    monkeypatch.setattr(pipeline, "preflight", full)
    with pytest.raises(ResourceError) as refused:
        sweep.checked(["quant=bf16,fp8"], multirun=True)
    assert refused.value.exit_code == 1


def test_commands_of_the_same_second_get_folders_of_their_own() -> None:
    with ThreadPoolExecutor(8) as threads:
        folders = list(threads.map(lambda _: run.new_folder("s"), range(24)))
    assert len(set(folders)) == 24 and all(f.is_dir() for f in folders)


def test_the_fingerprint_names_the_device_that_auto_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = plan([], multirun=False).cells[0].cfg
    keys = set()
    for name in ("cpu", "cuda"):
        monkeypatch.setattr(Config, "device_name", lambda self, name=name: name)
        keys.add(run.fingerprint(cfg))
    assert len(keys) == 2
