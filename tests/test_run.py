"""A run always ends with the status that fits how it ended, on a full disk too."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from omr import worker
from omr.compose import plan
from omr.errors import ConfigError, ResourceError, Terminated, is_disk_full
from omr.option import fields_of
from omr.quant.int8_wo import Int8Wo
from omr.run import SUMMARY, TRACEBACK, Run, open_run


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OMR_HOME", str(tmp_path))
    return tmp_path


def full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


def end(folder: Path, error: BaseException | None) -> dict[str, str]:
    """The summary of a run whose body raised `error`."""
    cfg = plan(["tracking_uri=null", "device=cpu"], multirun=False).cells[0].cfg
    try:
        with open_run(cfg, folder, overrides=[]):
            if error:
                raise error
    except BaseException as raised:
        assert raised is error or isinstance(raised, ResourceError)
    summary: dict[str, str] = json.loads((folder / SUMMARY).read_text())
    return summary


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (None, "FINISHED", ""),
        (ConfigError("quant=x"), "FAILED", "quant=x"),
        (KeyboardInterrupt(), "KILLED", "interrupted"),
        (Terminated(), "KILLED", "interrupted"),
        (ZeroDivisionError("a bug"), "FAILED", "ZeroDivisionError: a bug"),
        (full(), "FAILED", "no disk space left in "),
    ],
    ids=lambda v: type(v).__name__,
)
def test_statuses(tmp_path: Path, error: BaseException | None, status: str, reason: str) -> None:
    summary = end(tmp_path / "run", error)
    assert summary["status"] == status and summary["reason"].startswith(reason)
    assert (tmp_path / "run" / TRACEBACK).exists() == isinstance(error, ZeroDivisionError)


def test_a_disk_too_full_to_write_the_end_keeps_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = plan(["tracking_uri=null", "device=cpu"], multirun=False).cells[0].cfg

    def fail(self: Run, *_: object) -> None:
        raise full()

    with pytest.raises(ResourceError, match="set OMR_HOME"), open_run(cfg, tmp_path / "a", overrides=[]) as run:
        monkeypatch.setattr(type(run.tracker), "end", fail)
        raise full()
    assert "no disk space left to record that this run is FAILED" in capsys.readouterr().err
    with pytest.raises(ResourceError, match="set OMR_HOME"), open_run(cfg, tmp_path / "b", overrides=[]):
        pass


def test_a_full_disk_is_known_by_number_word_or_cause() -> None:
    assert is_disk_full(full()) and is_disk_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied"))
    outer = ValueError("could not save")
    outer.__cause__ = full()
    assert is_disk_full(outer)


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (full(), "ResourceError", "no space left for quant=int8_wo quantise"),
        (RuntimeError("one\ntwo"), "ChildError", "quant=int8_wo quantise failed: RuntimeError: one"),
        (ConfigError("as it is"), "ConfigError", "as it is"),
    ],
)
def test_what_a_verb_raises_in_its_child_comes_back_as_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    kind: str,
    says: str,
) -> None:
    def quantise(self: Int8Wo) -> None:
        raise error

    monkeypatch.setattr(Int8Wo, "quantise", quantise)
    call = {"group": "quant", "name": "int8_wo", "fields": fields_of(Int8Wo()), "verb": "quantise"}
    (tmp_path / "call.json").write_text(json.dumps({**call, "kwargs": {}}))
    assert worker.main(tmp_path / "call.json", tmp_path / "result.json") == 0
    answer = json.loads((tmp_path / "result.json").read_text())
    assert answer["error"] == kind and answer["message"].startswith(says) and "\n" not in answer["message"]
    assert capsys.readouterr().err == "", "a traceback belongs in the log"
