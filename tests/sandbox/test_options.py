"""The sandbox options, their refusals, and what the kernel says about a running session."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path

import pytest

from omr.errors import ConfigError, MissingBackend
from omr.option import discover
from omr.sandbox import Outcome, SandboxClient, _client, _landlock, _view
from omr.sandbox._client import LocalClient, start
from omr.sandbox._memory import _pid_of
from omr.sandbox._root import View
from omr.sandbox.local import Isolation, Local
from omr.sandbox.none import NoSandbox

from .host import limits

NAMESPACES = ("user", "mnt", "pid", "net", "ipc", "uts")


def test_three_options_are_registered() -> None:
    assert {name for group, name in discover() if group == "sandbox"} >= {"local", "http", "none"}


@pytest.mark.parametrize("field", ["timeout_s", "memory_mb", "output_chars", "scratch_mb"])
@pytest.mark.parametrize("value", [0, -1])
def test_limits_must_be_positive(field: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"sandbox\.{field} must be > 0, got {value}"):
        Local(**{field: value})
    with pytest.raises(ConfigError, match=r"session_s"):
        Local(session_s=-1)


def test_no_sandbox_runs_nothing(tmp_path: Path) -> None:
    async def body(client: SandboxClient) -> Outcome:
        session = client.session()
        outcome = await session.execute("open('x', 'w')")
        await session.close()
        return outcome

    with NoSandbox().launch(tmp_path) as client:
        assert client.tier == "none"
        outcome = asyncio.run(body(client))
    assert outcome.status == "error" and "off" in outcome.stderr
    assert not list(tmp_path.iterdir())


def test_preflight_passes_here_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    Local().preflight()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(MissingBackend, match="Linux"):
        Local().preflight()


def test_preflight_names_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingBackend, match="numpy"):
        Local().preflight()


@pytest.mark.slow
def test_launch_keeps_the_contract(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def body(client: SandboxClient) -> list[Outcome]:
        session = client.session()
        try:
            return [await session.execute(code) for code in ("x = 2", "x ** 10", "while True: pass")]
        finally:
            await session.close()

    with caplog.at_level(logging.INFO), Local(timeout_s=0.5).launch(tmp_path / "logs") as client:
        assert client.tier in ("namespace", "landlock")
        outcomes = asyncio.run(body(client))
    assert [o.status for o in outcomes] == ["completed", "completed", "timeout"]
    assert outcomes[1].stdout == "1024\n"
    assert f"isolation: {client.tier}" in caplog.text
    assert "preloaded" in (tmp_path / "logs" / "sandbox.log").read_text()


@pytest.mark.slow
def test_the_process_tier_is_only_taken_by_name_and_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Local(isolation=Isolation.process).launch(tmp_path) as client:
        assert client.tier == "process"
    assert "isolation=process" in caplog.text
    assert Isolation.process.value not in Local()._tiers()


def test_what_the_kernel_says_of_a_session(client: LocalClient) -> None:
    """From outside: own namespaces, no capability, a filter, no privileges to gain, the right descriptors."""

    async def body() -> None:
        sessions = [client.session(), client.session()]
        try:
            for session in sessions:
                await session.execute("1")
            pids = [_pid_of(s._process._pidfd) for s in sessions if s._process is not None]
            for pid in pids:
                text = Path(f"/proc/{pid}/status").read_text()
                status = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
                assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
                assert (status["NoNewPrivs"], status["Seccomp"], status["Threads"]) == ("1", "2", "1")
                assert status["NSpid"].split()[-1] == "1"
                assert int(Path(f"/proc/{pid}/oom_score_adj").read_text()) == 1000
                if os.geteuid() == 0:
                    assert "0" not in status["Uid"].split()
                    assert sorted(os.listdir(f"/proc/{pid}/fd")) == ["0", "1", "2", "3", "4", "5"]
            if client.tier == "namespace" and os.geteuid() == 0:
                for name in NAMESPACES:
                    seen = {os.readlink(f"/proc/{pid}/ns/{name}") for pid in ("self", *pids)}
                    assert len(seen) == 3, name
        finally:
            for session in sessions:
                await session.close()

    asyncio.run(body())


@pytest.mark.slow
@pytest.mark.parametrize("tier", ["namespace", "landlock"])
def test_hidden_folders_stay_hidden(tier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product's own package holds benchmark answers; installed, it lies among the packages that sessions see."""
    found = _view.find()
    package = Path(found["packages"][0]) / "networkx"
    found["view"]["hidden"].append(str(package))
    monkeypatch.setattr(_view, "find", lambda: found)
    code = (
        f"import os\nfor path in ({str(package / '__init__.py')!r}, {str(package.parent / 'sympy/__init__.py')!r}):\n"
        "    try: print(len(open(path).read()) > 0)\n    except OSError: print('hidden')"
    )

    async def body(client: LocalClient) -> Outcome:
        session = client.session()
        try:
            return await session.execute(code)
        finally:
            await session.close()

    with start((tier,), limits(), tmp_path) as client:
        assert asyncio.run(body(client)).stdout == "hidden\nTrue\n"


def test_grants_leave_out_what_is_hidden(tmp_path: Path) -> None:
    for name in ("a/x", "a/y", "b", "a/x/deep"):
        (tmp_path / name).mkdir(parents=True)
    view = View([str(tmp_path)], [], [str(tmp_path / "a" / "x"), str(tmp_path / "missing"), "/elsewhere"])
    granted = {Path(p) for p, _ in view.grants("python", "/scratch", whole=False) if p.startswith(str(tmp_path))}
    assert granted == {tmp_path / "a" / "y", tmp_path / "b"}
    shell = dict(view.grants("shell", "/scratch", whole=False))
    assert shell["/scratch"] & _landlock.EXECUTE == 0
    assert shell[str(tmp_path / "b")] & _landlock.EXECUTE
    assert shell["/dev/null"] & _landlock.EXECUTE == 0


def test_the_scratch_folder_covers_nothing(tmp_path: Path) -> None:
    assert View([str(tmp_path)], [], []).scratch == "/sandbox"
    view = View([], [], [])
    view_below = View(["/usr/lib"], [], [])
    assert view.scratch == view_below.scratch == "/sandbox"


def test_a_probe_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    Local().preflight()

    def never(*args: object, **options: object) -> None:
        raise AssertionError("probed again")

    monkeypatch.setattr(_client, "start", never)
    Local().preflight()
