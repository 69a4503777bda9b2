"""Children: ready, tailed, and surely dead."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from omr.errors import ChildError, ConfigError, InputError, MissingBackend, ResourceError
from omr.process import check_port, free_port, log_tail, rebuild_error, spawn, wait_ready

FOREST = """
import subprocess, sys, time
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(grandchild.pid, flush=True)
time.sleep(60)
"""
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def wait_for(condition, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_output_goes_to_the_log_and_the_status_comes_back(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "child.log"
    with spawn(python("import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"), log=log) as child:
        assert child.wait(20) == 3
    assert sorted(log.read_text().split()) == ["err", "out"]


def test_leaving_kills_the_whole_group(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(KeyboardInterrupt), spawn(python(FOREST), log=log) as child:
        assert wait_for(lambda: log.read_text().strip() != "")
        grandchild = int(log.read_text())
        assert alive(child.pid) and alive(grandchild)
        raise KeyboardInterrupt
    assert wait_for(lambda: not alive(child.pid) and not alive(grandchild))


def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    with spawn(python(STUBBORN), log=tmp_path / "log") as child:
        assert wait_for(lambda: "up" in (tmp_path / "log").read_text())
        child.kill(grace_s=0.2)
        assert child.poll() == -signal.SIGKILL


def test_a_killed_parent_takes_the_child_with_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = f"""
import time
from pathlib import Path
from omr.process import spawn
with spawn([{sys.executable!r}, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"],
           log=Path({str(log)!r})):
    time.sleep(60)
"""
    parent = subprocess.Popen(python(code))
    assert wait_for(lambda: log.exists() and log.read_text().strip() != "")
    child = int(log.read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert wait_for(lambda: not alive(child))


def test_ready_death_and_timeout(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with spawn(python("import time; time.sleep(0.2); open('ready', 'w'); time.sleep(60)"), log=log, cwd=tmp_path) as c:
        wait_ready(c, (tmp_path / "ready").exists, 20, "the server")
    with (
        spawn(python("print('no such flag: --foo'); raise SystemExit(2)"), log=log) as c,
        pytest.raises(ChildError, match=r"(?s)the server died at start \(exit status 2\).*no such flag: --foo"),
    ):
        wait_ready(c, lambda: False, 20, "the server")
    with (
        spawn(python("import time; time.sleep(60)"), log=log) as c,
        pytest.raises(ChildError, match=r"not ready after 0\.2 s"),
    ):
        wait_ready(c, lambda: False, 0.2, "the server")


def test_a_program_that_does_not_exist(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with spawn(["/no/such/program"], log=log) as child:
        assert child.wait(20) != 0
    assert "No such file" in log.read_text()


def test_ports() -> None:
    port = free_port()
    check_port("127.0.0.1", port)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ResourceError, match=rf"port {taken.getsockname()[1]} .*server\.port"):
            check_port("127.0.0.1", taken.getsockname()[1])


def test_log_tail_shows_a_progress_bar_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("start\n 10%\r 50%\r100%\nlast\n")
    assert log_tail(log, 2) == "100%\nlast"
    assert log_tail(tmp_path / "none") == ""


@pytest.mark.parametrize("error", [ConfigError("a"), InputError("b"), ChildError("c", "tail"), ResourceError("d")])
def test_errors_cross_the_process_border(error: Exception) -> None:
    back = rebuild_error(type(error).__name__, str(error))
    assert type(back) is type(error) and str(back) == str(error)


def test_missing_backend_crosses_too() -> None:
    error = MissingBackend("tensorrt_llm", extra="trtllm")
    back = rebuild_error("MissingBackend", str(error))
    assert isinstance(back, MissingBackend) and "pip install 'omr[trtllm]'" in str(back)


def test_child_gets_its_own_process_group(tmp_path: Path) -> None:
    with spawn(python("import time; time.sleep(60)"), log=tmp_path / "log") as child:
        assert os.getpgid(child.pid) == child.pid != os.getpgid(0)
