"""Child processes: started in their own group, watched until ready, and surely dead afterwards.

Everything heavy (a server, a quantisation, a training) runs in a child, so that an out-of-memory in one cell of a sweep
cannot poison the next. Three things keep a child from outliving its owner:
  - `spawn` is a context manager: leaving it, by whatever exception, terminates the child's whole process group;
  - on Linux the child asks the kernel to be killed when its parent dies (PR_SET_PDEATHSIG), which covers kill -9;
  - a child gets its own process group, so a Ctrl-C in the terminal reaches only the parent, which unwinds in order.
`spawn` must be called from a thread that lives as long as the child: the kernel ties the death signal to that thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

import omr.errors
from omr.errors import ChildError, OmrError, ResourceError
from omr.option import fields_of

GRACE_S = 5.0
"""Seconds between SIGTERM and SIGKILL."""

# Runs between fork and the real program: ask for the death signal, check that the parent did not die before that.
_LAUNCH = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        os._exit(1)
os.execvpe(sys.argv[2], sys.argv[2:], os.environ)
"""


@dataclass
class Child:
    """A running child process and its log."""

    argv: list[str]
    log: Path
    _popen: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        return self._popen.pid

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        return self._popen.poll()

    def wait(self, timeout_s: float | None = None) -> int:
        return self._popen.wait(timeout_s)

    def log_tail(self, n: int = 15) -> str:
        """The last `n` lines that it wrote."""
        return log_tail(self.log, n)

    def kill(self, grace_s: float = GRACE_S) -> None:
        """End the whole process group: SIGTERM, at most `grace_s` seconds, SIGKILL. Idempotent."""
        if self.poll() is None:
            _signal_group(self.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(grace_s)
        _signal_group(self.pid, signal.SIGKILL)  # what is left of the group, also after the leader's death
        self._popen.wait()


def log_tail(log: Path, n: int = 15) -> str:
    """The last `n` lines of a log, carriage-return progress bars reduced to their last state."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 64 * 1024))
        lines = file.read().decode(errors="replace").split("\n")
        return "\n".join([line.rsplit("\r", 1)[-1].rstrip() for line in lines if line.strip()][-n:])
    return ""


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has died and was not waited for does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _signal_group(pgid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pgid, number)


@contextlib.contextmanager
def spawn(
    argv: list[str],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    echo: bool = False,
) -> Iterator[Child]:
    """Run `argv` with stdout and stderr appended to `log`; with `echo`, stderr also appears on ours as it comes.

    Raises ChildError when the program cannot be started. On exit the whole process group is dead.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    launcher = [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), *argv]
    with log.open("ab") as sink:
        try:
            popen = subprocess.Popen(
                launcher,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.PIPE if echo else sink,
                env=dict(env) if env is not None else None,
                cwd=cwd,
                start_new_session=True,
            )
        except OSError as error:
            raise ChildError(f"cannot start {argv[0]}: {error.strerror}") from None
    child = Child(argv=argv, log=log, _popen=popen)
    pump = threading.Thread(target=_tee, args=(popen, log), daemon=True) if echo else None
    try:
        if pump:
            pump.start()
        yield child
    finally:
        child.kill()
        if pump:
            pump.join(timeout=5)
        if popen.stderr:
            popen.stderr.close()


def _tee(popen: subprocess.Popen[bytes], log: Path) -> None:
    assert popen.stderr is not None
    with log.open("ab", buffering=0) as sink:
        while chunk := os.read(popen.stderr.fileno(), 65536):
            with contextlib.suppress(OSError):  # a full disk: the child's own writes tell
                sink.write(chunk)
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(chunk.decode(errors="replace"))
                sys.stderr.flush()


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nothing listens on right now."""
    with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        port = probe.getsockname()[1]
        assert isinstance(port, int)
        return port


def check_port(host: str, port: int) -> None:
    """Raise ResourceError when `port` cannot be listened on."""
    with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ResourceError(
                f"port {port} on {host} cannot be used ({error.strerror}); choose another with server.port, "
                "or 0 for any free one"
            ) from None


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def wait_ready(child: Child, probe: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Return once `probe()` is true. Raises ChildError, with the last log lines, when the child dies or time is up."""
    deadline = time.monotonic() + timeout_s
    pause_s = 0.02
    while True:
        if probe():
            return
        status = child.poll()
        if status is not None:
            raise ChildError(f"{what} died at start (exit status {status}); log: {child.log}", child.log_tail())
        if time.monotonic() > deadline:
            raise ChildError(f"{what} was not ready after {timeout_s:g} s; log: {child.log}", child.log_tail())
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.3, 0.5)


def run_verb(option: Any, verb: str, kwargs: Mapping[str, Any], *, log: Path) -> Any:
    """Call `option.verb(**kwargs)` in a child process and return what it returns.

    Arguments and result are JSON values, paths allowed in the arguments. Its stderr (progress bars) is shown live and
    kept in `log`. An OmrError raised there is raised here; any other death is a ChildError with the last log lines.
    """
    with tempfile.TemporaryDirectory(prefix="omr-verb-") as scratch:
        call, result = Path(scratch) / "call.json", Path(scratch) / "result.json"
        call.write_text(
            json.dumps(
                {
                    "group": option.option_group,
                    "name": option.option_name,
                    "fields": fields_of(option),
                    "verb": verb,
                    "kwargs": {k: {"path": str(v)} if isinstance(v, Path) else v for k, v in kwargs.items()},
                }
            )
        )
        what = f"{option.option_group}={option.option_name} {verb}"
        with spawn([sys.executable, "-m", "omr.worker", str(call), str(result)], log=log, echo=True) as child:
            status = child.wait()
        if not result.exists():
            raise ChildError(f"{what} {manner_of_death(status)}; log: {log}", log_tail(log))
        answer = json.loads(result.read_text())
    if "error" in answer:
        where = f"; log: {log}" if answer["error"] == "ChildError" else ""
        raise rebuild_error(answer["error"], answer["message"] + where)
    return answer["value"]


def manner_of_death(status: int) -> str:
    """How a child with this exit status ended, as the predicate of a sentence."""
    if status >= 0:
        return f"exited with status {status}"
    return f"was killed by signal {-status}" + (" (out of memory?)" if status == -signal.SIGKILL else "")


def rebuild_error(kind: str, message: str) -> OmrError:
    """The OmrError of class `kind` with `message`, whatever its constructor takes."""
    cls = getattr(omr.errors, kind, ChildError)
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    assert isinstance(error, OmrError)
    return error
