"""No process, port or file outlives its owner, however that ends; a zygote that dies is replaced."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from omr.sandbox import Outcome
from omr.sandbox._client import LocalClient, start
from omr.sandbox._memory import tree

from .host import limits

ROOT = Path(__file__).parents[2]

OWNER = """
import asyncio, sys, time
from pathlib import Path
from omr.sandbox.local import Isolation, Local

async def body(client):
    sessions = [client.session() for _ in range(3)]
    for session in sessions:
        await session.execute("open('left', 'w').write('x')")
    shell = asyncio.create_task(client.session("shell").execute("(sleep 500 &); sleep 501"))
    busy = asyncio.create_task(sessions[0].execute("while True: pass", 100.0))
    await asyncio.sleep(0.5)
    print("ready", flush=True)
    {end}

with Local(isolation=Isolation[sys.argv[1]]).launch(Path(sys.argv[2])) as client:
    asyncio.run(body(client))
"""


def living(pids: dict[int, str]) -> list[int]:
    """Those of `pids` (with their start times) that still run."""
    return [pid for pid, start_time in pids.items() if start_time and _start_time(pid) == start_time]


def _start_time(pid: int) -> str:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def gone(pids: dict[int, str], within_s: float = 5.0) -> bool:
    deadline = time.monotonic() + within_s
    while living(pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not living(pids)


@pytest.mark.slow
@pytest.mark.parametrize("tier", ["namespace", "landlock", "process"])
@pytest.mark.parametrize("end", ["kill", "kill_group", "leave", "fail", "interrupt"])
def test_nothing_outlives_the_owner(tier: str, end: str, tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    temporary.chmod(0o777)
    for parent in tmp_path.parents[:-2]:
        parent.chmod(parent.stat().st_mode | 0o011)
    ends = {"leave": "", "fail": "raise ValueError('on purpose')"}
    code = OWNER.replace("{end}", ends.get(end, "await asyncio.sleep(100)"))
    owner = subprocess.Popen(
        [sys.executable, "-c", code, tier, str(tmp_path / "log")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(temporary)},
        start_new_session=True,
    )
    assert owner.stdout is not None
    with owner.stdout as output:
        assert output.readline() == b"ready\n"
        pids = {pid: _start_time(pid) for pid in tree(owner.pid) if pid != owner.pid}
        if end in ("kill", "kill_group", "interrupt"):
            assert len(living(pids)) >= 8  # watcher, keeper, zygote, three sessions, a shell and its sleep
        if end == "kill":
            owner.kill()
        if end == "kill_group":
            os.killpg(owner.pid, signal.SIGKILL)
        if end == "interrupt":
            owner.send_signal(signal.SIGINT)
        owner.wait(20)
    assert gone(pids)
    assert not list(temporary.iterdir())


def test_a_dead_zygote_is_replaced(tmp_path: Path) -> None:
    async def body(client: LocalClient) -> list[Outcome]:
        session, other = client.session(), client.session()
        try:
            outcomes = [await session.execute("x = 1"), await other.execute("y = 1")]
            watcher = client._zygote._watcher
            pids = {pid: _start_time(pid) for pid in tree(watcher.pid)}
            os.kill(list(pids)[1], signal.SIGKILL)  # the keeper, and the zygote with it
            assert gone(pids)
            outcomes.append(await session.execute("x"))
            outcomes.append(await session.execute("x = 2; x"))
            outcomes.append(await other.execute("1"))
            return outcomes
        finally:
            await session.close()
            await other.close()

    with start(("namespace", "landlock"), limits(), tmp_path) as client:
        outcomes = asyncio.run(body(client))
        assert client.restarts == 1
    assert [o.status for o in outcomes] == ["completed", "completed", "error", "completed", "error"]
    assert outcomes[2].state_lost and outcomes[4].state_lost
    assert outcomes[3].stdout == "2\n"


@pytest.mark.slow
def test_leaving_early_does_not_wait_for_imports(tmp_path: Path) -> None:
    started = time.monotonic()
    with start(("namespace", "landlock"), limits(), tmp_path) as client:
        pids = {pid: _start_time(pid) for pid in tree(client._zygote._watcher.pid)}
    assert gone(pids)
    assert time.monotonic() - started < 4.0


@pytest.mark.slow
def test_scratch_folders_go_with_their_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = (
        "import os\nfor _ in range(3000):\n    os.mkdir('d'); os.chdir('d')\nopen('f', 'w').close()\n"
        "os.symlink('/', 'root')\nos.chmod('.', 0) if False else None"
    )

    async def body(client: LocalClient) -> Outcome:
        session = client.session()
        try:
            return await session.execute(deep)
        finally:
            await session.close()

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with start(("landlock",), limits(), tmp_path / "log") as client:
        outcome = asyncio.run(body(client))
    assert outcome.status == "completed", outcome
    assert Path("/etc").is_dir()
