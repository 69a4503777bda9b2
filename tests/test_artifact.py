"""The store: keys that mean content, nothing half-made visible, nothing changed trusted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import pytest

from omr.artifact import MANIFEST, Store, content, key_of, resume_folder
from omr.cli import artifacts
from omr.errors import InputError, ResourceError


class Shade(Enum):
    light = "l"
    dark = "d"


@dataclass(kw_only=True)
class Inner:
    lr: float = 1e-3
    threads: int = field(default=2, metadata={"content": False})


@dataclass(kw_only=True)
class Recipe:
    rows: int = 3
    shade: Shade = Shade.light
    verbose: bool = field(default=False, metadata={"content": False})
    train: Inner = field(default_factory=Inner)


def write(text: str):
    def make(out: Path) -> dict[str, float]:
        (out / "data.txt").write_text(text)
        return {"chars": len(text)}

    return make


def refuse(out: Path) -> None:
    raise AssertionError("must not be made again")


def test_key_is_stable_and_depends_on_all_it_names() -> None:
    base = key_of("checkpoint", {"a": 1, "b": 2}, {"weights": "w"}, 1)
    assert base == "55fb7496b4abedf944a9" == key_of("checkpoint", {"b": 2, "a": 1}, {"weights": "w"}, 1)
    others = {
        key_of("drafter", {"a": 1, "b": 2}, {"weights": "w"}, 1),
        key_of("checkpoint", {"a": 1, "b": 3}, {"weights": "w"}, 1),
        key_of("checkpoint", {"a": 1, "b": 2}, {"weights": "v"}, 1),
        key_of("checkpoint", {"a": 1, "b": 2}, {"weights": "w"}, 2),
    }
    assert len(others | {base}) == 5


def test_content_leaves_out_what_cannot_change_the_bytes() -> None:
    assert content(Recipe(verbose=True, train=Inner(threads=8))) == content(Recipe())
    assert content(Recipe(shade=Shade.dark)) != content(Recipe())
    assert content(Recipe(train=Inner(lr=2e-3))) != content(Recipe())
    assert content(Recipe())["shade"] == "light"


def test_made_once_then_reused(tmp_path: Path) -> None:
    lines: list[str] = []
    store = Store(tmp_path, lines.append)
    first = store.get("text", {"rows": 3}, {}, write("abc"))
    again = store.get("text", {"rows": 3}, {}, refuse)
    assert first.built and not again.built
    assert again.path == first.path and (again.path / "data.txt").read_text() == "abc"
    assert again.metrics == {"chars": 3} and "reused" in lines[-1]
    assert [a.key for a in store.all()] == [first.key]


def test_a_failure_leaves_nothing_but_the_resume_folder(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def fails(out: Path) -> None:
        (out / "half.bin").write_bytes(b"x" * 100)
        resume_folder(out).mkdir()
        (resume_folder(out) / "state").write_text("step 7")
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        store.get("text", {"rows": 1}, {}, fails)
    assert not list(store.all()) and not list(tmp_path.rglob("half.bin"))

    def resumes(out: Path) -> None:
        assert (resume_folder(out) / "state").read_text() == "step 7"
        (out / "whole").write_text("done")

    made = store.get("text", {"rows": 1}, {}, resumes)
    assert (made.path / "whole").exists() and not list(tmp_path.rglob("state"))


def test_disk_full_is_one_line(tmp_path: Path) -> None:
    def fills(out: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ResourceError, match="no space left for text"):
        Store(tmp_path).get("text", {}, {}, fills)


@pytest.mark.parametrize("damage", ["truncate", "edit", "delete", "manifest"])
def test_damage_is_refused_with_the_fix(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path)
    made = store.get("text", {"rows": 3}, {}, write("abcdef"))
    file = made.path / "data.txt"
    if damage == "truncate":
        file.write_text("abc")
    elif damage == "edit":
        file.write_text("abcdeX")
        os.utime(file, ns=(1, 1))
    elif damage == "delete":
        file.unlink()
    else:
        (made.path / MANIFEST).write_text("{")
    with pytest.raises(InputError, match=f"delete {made.path} to rebuild it"):
        store.get("text", {"rows": 3}, {}, refuse)


@pytest.mark.parametrize("manifest", ["{", "[]", "{}", "\udcff"])
def test_a_damaged_manifest_hides_its_artifact_alone(tmp_path: Path, manifest: str) -> None:
    notices: list[str] = []
    store = Store(tmp_path, notices.append)
    whole = store.get("text", {"rows": 3}, {}, write("abc"))
    other = store.get("text", {"rows": 4}, {}, write("abcd"))
    (other.path / MANIFEST).write_bytes(manifest.encode(errors="surrogateescape"))
    notices.clear()
    assert [made.key for made in store.all()] == [whole.key]
    assert len(notices) == 1 and f"delete {other.path} to rebuild it" in notices[0] and "\n" not in notices[0]
    with pytest.raises(InputError, match=f"delete {other.path}"):
        store.get("text", {"rows": 4}, {}, refuse)


def test_a_touched_but_unchanged_file_is_fine(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = store.get("text", {}, {}, write("abc"))
    os.utime(made.path / "data.txt", ns=(5, 5))
    assert not store.get("text", {}, {}, refuse).built


def test_two_threads_build_it_once(tmp_path: Path) -> None:
    count = []

    def slow(out: Path) -> None:
        count.append(1)
        time.sleep(0.2)
        (out / "data").write_text("x")

    def want() -> None:
        Store(tmp_path).get("text", {}, {}, slow)

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(count) == 1


def test_a_killed_build_is_never_trusted(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from omr.artifact import Store
def make(out):
    (out / "data.txt").write_text("half")
    print("started", flush=True)
    time.sleep(60)
Store(Path({str(tmp_path)!r})).get("text", {{}}, {{}}, make)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline().strip() == "started"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    store = Store(tmp_path)
    assert not list(store.all())
    made = store.get("text", {}, {}, write("whole"))
    assert made.built and (made.path / "data.txt").read_text() == "whole"
    assert not list(tmp_path.rglob("*.building"))


def test_the_verb_reports_what_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMR_HOME", str(tmp_path))
    store = Store(tmp_path / "artifacts")
    made = [store.get("text", {"rows": rows}, {}, write("abc")) for rows in range(3)]
    assert artifacts.main(["verify"]) == 0
    (made[0].path / MANIFEST).write_text("{")
    (made[1].path / "data.txt").write_text("abd")
    assert artifacts.main([]) == 0 and artifacts.main(["verify"]) == 1
    out = capsys.readouterr().out
    assert out.count(f"DAMAGED: {made[0].path / MANIFEST} cannot be read") == 2
    assert f"CHANGED: data.txt; delete {made[1].path} to rebuild it" in out and f"text/{made[2].key}" in out
