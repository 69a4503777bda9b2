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
from omr.sandbox._root import remove_tree

from .host import ROOT, gone, limits, living, running

OWNER = """
import asyncio, signal, sys, time
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

signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run where it is ignored, as under nohup
with Local(isolation=Isolation[sys.argv[1]]).launch(Path(sys.argv[2])) as client:
    asyncio.run(body(client))
"""


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
        pids = running(owner.pid)
        pids.pop(owner.pid)
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


@pytest.mark.slow
def test_a_dead_zygote_is_replaced(tmp_path: Path) -> None:
    async def body(client: LocalClient) -> list[Outcome]:
        session, other = client.session(), client.session()
        try:
            outcomes = [await session.execute("x = 1"), await other.execute("y = 1")]
            watcher = client._zygote._watcher
            pids = running(watcher.pid)
            os.kill(list(pids)[1], signal.SIGKILL)  # the keeper, and the zygote with it
            assert gone(pids)
            many = [client.session() for _ in range(8)]  # one request has the zygote replaced, the others meet it gone
            together = await asyncio.gather(*(one.execute("1") for one in many))
            await asyncio.gather(*(one.close() for one in many))
            assert [outcome.status for outcome in together] == ["completed"] * 8
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
        pids = running(client._zygote._watcher.pid)
    assert gone(pids)
    assert time.monotonic() - started < 4.0


@pytest.mark.slow
def test_scratch_folders_go_with_their_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = (
        "import os\nfor _ in range(3000):\n    os.mkdir('d'); os.chdir('d')\nopen('f', 'w').close()\n"
        "os.symlink('/', 'root')"
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
    assert [p.name for p in tmp_path.iterdir()] == ["log"]
    assert Path("/etc").is_dir()  # the link was removed, not followed


def test_removing_a_hostile_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("x")
    folder = tmp_path / "folder"
    folder.mkdir()
    start_folder = os.getcwd()
    os.chdir(folder)
    try:
        for number in range(300):  # longer than any path may be
            os.mkdir("deep" * 5)
            os.chdir("deep" * 5)
            if number % 50 == 0:
                Path("file").touch()
                os.symlink(outside, "link")
        os.chmod(".", 0)
    finally:
        os.chdir(start_folder)
    assert remove_tree(str(folder), 0.0) is False
    assert remove_tree(str(folder)) is True
    assert not folder.exists()
    assert (outside / "kept").read_text() == "x"
    assert remove_tree(str(folder)) is True
