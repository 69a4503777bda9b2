"""The owner's side of the zygote: start it, ask it for sessions, end it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omr.errors import ChildError, MissingBackend
from omr.sandbox import _frames, _view
from omr.sandbox._session import Kind, LocalSession, Process, raise_refusal, readable

_BOOT = """
import sys
sys.path.append({home!r})
from omr.sandbox import _watcher
sys.path.remove({home!r})
_watcher.main({fd})
"""
_START_TIMEOUT_S = 30.0
_OPEN_TIMEOUT_S = 120.0
_MAX_OPENING = 32
"""Requests in flight: descriptors in flight are limited too."""
_MIN_OPEN_FILES = 8192
SPARES = 2
"""Sessions forked ahead of their use."""


@dataclass(kw_only=True)
class SessionLimits:
    """What every session of a client gets."""

    timeout_s: float
    output_chars: int
    session_s: float
    memory_bytes: int
    scratch_bytes: int
    seed: int | None


class LocalClient:
    """A running zygote. `tier` is the isolation that its trial session got through."""

    def __init__(self, control: socket.socket, hello: dict[str, Any], limits: SessionLimits, log: Path) -> None:
        self.tier: str = hello["tier"]
        self.landlock_abi: int = hello["landlock_abi"]
        self.refused: str = explain(hello["refusals"])
        """Why the tiers before this one do not work here; empty for the first."""
        self.limits = limits
        self._control = control
        self._log = log
        self._processes: set[Process] = set()
        self._opening = 0

    def session(self, kind: Kind = "notebook") -> LocalSession:
        """A new, empty session. `script` and `shell` sessions run one block as `python -c` or bash would."""
        return LocalSession(self, kind)

    @property
    def live_sessions(self) -> int:
        return len(self._processes)

    async def open(self, kind: Kind) -> Process:
        """Have the zygote fork a session. Raises ResourceError or ChildError."""
        while self._opening >= _MAX_OPENING:
            await asyncio.sleep(0.002)
        self._opening += 1
        process = None
        try:
            async with asyncio.timeout(_OPEN_TIMEOUT_S):
                process = await self._ask(kind)
                self._processes.add(process)
                await process.await_ready()
            return process
        except BaseException as error:
            if process is not None:
                self.discard(process)
            if isinstance(error, EOFError | TimeoutError | BrokenPipeError | ConnectionResetError | _frames.BadFrame):
                what = f"the sandbox cannot open a session ({type(error).__name__})"
                raise ChildError(f"{what}; its log: {self._log}", _tail(self._log)) from None
            raise
        finally:
            self._opening -= 1

    async def _ask(self, kind: Kind) -> Process:
        """The zygote's answer to a request. Raises EOFError, OSError, ResourceError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with ours:
            ours.setblocking(False)
            with theirs:
                socket.send_fds(self._control, [_frames.pack({"kind": kind})], [theirs.fileno()])
            await readable(ours.fileno())
            data, fds, _, _ = socket.recv_fds(ours, 4096, 4)
        if not data:
            raise EOFError
        (message,) = _frames.Splitter(_frames.FROM_SESSION).feed(data)
        if len(fds) != 4:
            for fd in fds:
                os.close(fd)
            raise_refusal(message)
        group = 0 if self.tier == "namespace" else message["pid"]
        return Process(fds, group=group, scratch=message["scratch"])

    def discard(self, process: Process) -> None:
        """Kill a session's process and forget it."""
        if process in self._processes:
            self._processes.remove(process)
            process.release()
            if process.scratch:
                with contextlib.suppress(OSError):
                    self._control.send(_frames.pack({"bury": process.scratch}))

    def kill_sessions(self) -> None:
        for process in list(self._processes):
            self.discard(process)


@contextlib.contextmanager
def start(
    tiers: tuple[str, ...], limits: SessionLimits, log_dir: Path, *, spares: int = SPARES
) -> Iterator[LocalClient]:
    """A running zygote in the first of `tiers` that works here. Everything it started is dead on exit.

    Returns as soon as a trial session passed: imports go on while the caller does. Raises MissingBackend naming the
    steps that failed, ChildError if the child dies.
    """
    _raise_file_limit()
    log_dir.mkdir(parents=True, exist_ok=True)
    log = log_dir / "sandbox.log"
    control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    found = _view.find()
    boot = _BOOT.format(home=str(Path(__file__).resolve().parents[2]), fd=theirs.fileno())
    settings = {
        "owner": os.getpid(),
        "tiers": tiers,
        "spares": spares,
        "seed": limits.seed,
        "limits": {
            "memory_bytes": limits.memory_bytes,
            "scratch_bytes": limits.scratch_bytes,
            "cpu_s": int(2 * limits.session_s) + 10 if limits.session_s else 1 << 30,
        },
        **found,
    }
    with contextlib.ExitStack() as stack:
        stack.callback(control.close)
        with theirs, log.open("ab") as log_file:
            child = subprocess.Popen(
                [sys.executable, "-s", "-S", "-P", "-B", "-c", boot],
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                cwd="/",
                env=_environment(found),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        stack.callback(_end, child)
        stack.callback(control.close)
        control.settimeout(_START_TIMEOUT_S)
        try:
            control.sendall(_frames.pack(settings))
            hello = _receive(control)
        except OSError as error:
            raise ChildError(f"the sandbox did not start ({error}); its log: {log}", _tail(log)) from None
        if hello is None:
            raise ChildError(f"the sandbox died at its start; its log: {log}", _tail(log))
        if hello["tier"] is None:
            raise MissingBackend("process isolation", why=explain(hello["refusals"]))
        control.setblocking(False)
        client = LocalClient(control, hello, limits, log)
        stack.callback(client.kill_sessions)
        yield client


def explain(refusals: list[dict[str, Any]]) -> str:
    """The tiers that did not work, each with its failing step and errno, on one line."""
    return "; ".join(
        f"{r['tier']}: {r['step']}" + (f": {errno.errorcode.get(r['errno'], r['errno'])}" if r["errno"] else "")
        for r in refusals
    )


def _receive(control: socket.socket) -> dict[str, Any] | None:
    """The first message, read with the socket's timeout; None if the peer is gone."""
    splitter = _frames.Splitter(_frames.FROM_SESSION)
    while data := control.recv(65536):
        for message in splitter.feed(data):
            return message
    return None


def _end(child: subprocess.Popen[bytes]) -> None:
    """The control socket is closed: the zygote ends by itself, and the watcher after it. If not, kill the watcher."""
    try:
        child.wait(5.0)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def _environment(found: dict[str, Any]) -> dict[str, str]:
    """All that sessions see of an environment. One thread per library: a zygote that forks must have no other."""
    return {
        "PATH": ":".join([*found["view"]["programs"], "/usr/bin", "/bin"]),
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "LANG": "C.UTF-8",
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "USER": "sandbox",
        "MPLBACKEND": "Agg",
        **{f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR", "VECLIB")},
    }


def _raise_file_limit() -> None:
    """Four descriptors per session: the customary soft limit of 1024 is 250 sessions."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MIN_OPEN_FILES if hard == resource.RLIM_INFINITY else min(_MIN_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
