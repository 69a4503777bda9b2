"""The owner's side of the zygote: start it, ask it for sessions, start it again if it dies, end it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omr.errors import ChildError, MissingBackend, ResourceError
from omr.sandbox import _frames, _view
from omr.sandbox._session import Cage, Kind, LocalSession, Process, raise_refusal, readable

_BOOT = """
import sys
sys.path.append({home!r})
from omr.sandbox import _watcher
sys.path.remove({home!r})
_watcher.main({fd})
"""
_REQUESTS: dict[Cage, bytes] = {kind: _frames.pack({"kind": kind}) for kind in ("python", "shell")}
_START_TIMEOUT_S = 30.0
_OPEN_TIMEOUT_S = 120.0
_MAX_OPENING = 32
"""Requests in flight: descriptors in flight are limited too."""
_MAX_RESTARTS = 20
_MIN_OPEN_FILES = 8192
_SPARES = 2
_GONE = (errno.EPIPE, errno.ECONNRESET, errno.EBADF)
"""What a request to a dead zygote meets; the last while another request has it replaced."""


@dataclass(kw_only=True)
class SessionLimits:
    """What every session of a client gets."""

    timeout_s: float
    output_chars: int
    session_s: float
    memory_bytes: int
    scratch_bytes: int
    seed: int | None


class _Zygote:
    """A zygote process as its owner sees it: a socket for requests, a watcher to wait for."""

    def __init__(self, settings: dict[str, Any], environment: dict[str, str], log: Path | None) -> None:
        """Start one and wait until it passed its trial session. Raises MissingBackend, ChildError."""
        self._log = log
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        boot = _BOOT.format(home=str(Path(__file__).resolve().parents[2]), fd=theirs.fileno())
        with theirs, open(log, "ab") if log else contextlib.nullcontext(None) as log_file:
            self._watcher = subprocess.Popen(
                [sys.executable, "-s", "-S", "-P", "-B", "-c", boot],
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                cwd="/",
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        try:
            self.hello = self._greet(settings)
        except BaseException:
            self.end()
            raise
        self.socket.setblocking(False)

    def _greet(self, settings: dict[str, Any]) -> dict[str, Any]:
        self.socket.settimeout(_START_TIMEOUT_S)
        splitter = _frames.Splitter(_frames.FROM_SESSION)
        try:
            self.socket.sendall(_frames.pack(settings))
            while data := self.socket.recv(65536):
                for hello in splitter.feed(data):
                    if hello["tier"] is None:
                        raise MissingBackend("process isolation", why=explain(hello["refusals"]))
                    return hello
        except OSError as error:
            raise self.failure(f"did not start ({error})") from None
        raise self.failure("died at its start")

    def request(self, kind: Cage) -> socket.socket:
        """Ask for a session; the answer comes to this socket. Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            ours.setblocking(False)
            socket.send_fds(self.socket, [_REQUESTS[kind]], [theirs.fileno()])
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return ours

    def failure(self, what: str) -> ChildError:
        """A ChildError with the last lines of the log."""
        if self._log is None:
            return ChildError(f"the sandbox {what}")
        tail = self._log.read_text(errors="replace").splitlines()[-15:]
        return ChildError(f"the sandbox {what}; its log: {self._log}", "\n".join(tail))

    def end(self) -> None:
        """With its socket closed the watcher kills the zygote and ends. If not, kill the watcher."""
        self.socket.close()
        try:
            self._watcher.wait(5.0)
        except subprocess.TimeoutExpired:
            self._watcher.kill()
            self._watcher.wait()


class LocalClient:
    """A running zygote. `tier` is the isolation that its trial session got through.

    A zygote that dies (say, of the machine's memory running out) takes its sessions along, which they report as any
    other death; the next block that needs a process gets a new zygote.
    """

    def __init__(self, tiers: tuple[str, ...], limits: SessionLimits, log: Path | None, spares: int) -> None:
        found = _view.find()
        self._settings = {
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
        self.limits = limits
        self._environment = _environment(found)
        self._log = log
        self._zygote = _Zygote(self._settings, self._environment, log)
        self.tier: str = self._zygote.hello["tier"]
        self.landlock_abi: int = self._zygote.hello["landlock_abi"]
        self.refused: str = explain(self._zygote.hello["refusals"])
        """Why the tiers before this one do not work here; empty for the first."""
        self.restarts = 0
        self._restart_lock = threading.Lock()
        self._processes: set[Process] = set()
        self._ahead: list[socket.socket] = []
        self._opening = 0
        self._closed = False

    def session(self, kind: Kind = "notebook") -> LocalSession:
        """A new, empty session. `script` and `shell` sessions run one block as `python -c` or bash would."""
        return LocalSession(self, kind)

    @property
    def live_sessions(self) -> int:
        return len(self._processes)

    async def open(self, kind: Cage) -> Process:
        """Have the zygote fork a session. Raises ResourceError or ChildError."""
        if self._closed:
            raise ResourceError("this sandbox is closed")
        while self._opening >= _MAX_OPENING:
            await asyncio.sleep(0.002)
        self._opening += 1
        try:
            for _ in range(2):
                zygote = self._zygote
                try:
                    return await self._open(zygote, kind)
                except (EOFError, OSError, _frames.BadFrame) as error:
                    if isinstance(error, OSError) and error.errno not in _GONE:
                        raise
                    await asyncio.to_thread(self._restart, zygote)
            raise self._zygote.failure("opens no session")
        finally:
            self._opening -= 1

    async def _open(self, zygote: _Zygote, kind: Cage) -> Process:
        process = None
        try:
            async with asyncio.timeout(_OPEN_TIMEOUT_S):
                process = await self._ask(zygote, kind)
                self._processes.add(process)
                await process.await_ready()
            return process
        except BaseException as error:
            if process is not None:
                self.discard(process)
            if isinstance(error, TimeoutError):
                raise zygote.failure(f"opened no session within {_OPEN_TIMEOUT_S:g} s") from None
            raise

    async def _ask(self, zygote: _Zygote, kind: Cage) -> Process:
        """The zygote's answer to a request. Raises EOFError, OSError, ResourceError.

        With spare sessions one is always asked for ahead: its answer is here when it is wanted.
        """
        ahead = kind == "python" and self._settings["spares"]
        with self._ahead.pop() if ahead and self._ahead else zygote.request(kind) as answer:
            if ahead and not self._ahead:
                self._ahead.append(zygote.request(kind))
            while True:
                try:
                    data, fds, _, _ = socket.recv_fds(answer, 4096, 4, socket.MSG_CMSG_CLOEXEC)
                    break
                except BlockingIOError:
                    await readable(answer.fileno())
        if not data:
            raise EOFError
        (message,) = _frames.Splitter(_frames.FROM_SESSION).feed(data)
        if len(fds) != 4:
            for fd in fds:
                os.close(fd)
            raise_refusal(message)
        group = 0 if self.tier == "namespace" else message["pid"]
        memory_bytes = self.limits.memory_bytes if kind == "shell" else None
        return Process(fds, group=group, scratch=message["scratch"], memory_bytes=memory_bytes)

    def _restart(self, dead: _Zygote) -> None:
        """A new zygote in place of `dead`, unless another thread was faster. Raises ChildError after too many."""
        with self._restart_lock:
            if self._zygote is not dead:
                return
            dead.end()
            self._forget_ahead()
            self.restarts += 1
            if self.restarts > _MAX_RESTARTS:
                raise dead.failure(f"died {self.restarts} times")
            self._zygote = _Zygote({**self._settings, "tiers": (self.tier,)}, self._environment, self._log)

    def discard(self, process: Process) -> None:
        """Kill a session's process and forget it."""
        if process in self._processes:
            self._processes.remove(process)
            process.release()
            if process.scratch:
                with contextlib.suppress(OSError):
                    self._zygote.socket.send(_frames.pack({"bury": process.scratch}))

    def close(self) -> None:
        """Kill every session, then the zygote."""
        self._closed = True
        for process in list(self._processes):
            self.discard(process)
        self._forget_ahead()
        self._zygote.end()

    def _forget_ahead(self) -> None:
        while self._ahead:
            self._ahead.pop().close()


@contextlib.contextmanager
def start(
    tiers: tuple[str, ...], limits: SessionLimits, log_dir: Path | None, *, spares: int = _SPARES
) -> Iterator[LocalClient]:
    """A running zygote in the first of `tiers` that works here, `spares` sessions forked ahead of their use. Everything
    it started is dead on exit. It logs to `log_dir`, or to this process's stderr.

    Returns as soon as a trial session passed: imports go on while the caller does. Raises MissingBackend naming the
    steps that failed, ChildError if the child dies.
    """
    _raise_file_limit()
    if log_dir is not None:
        log_dir.mkdir(parents=True, exist_ok=True)
    client = LocalClient(tiers, limits, log_dir and log_dir / "sandbox.log", spares)
    try:
        yield client
    finally:
        client.close()


@functools.cache
def probe(tiers: tuple[str, ...]) -> str:
    """The first of `tiers` that a trial session gets through here. Raises MissingBackend, as `start` would."""
    limits = SessionLimits(
        timeout_s=1, output_chars=1, session_s=0, memory_bytes=1 << 28, scratch_bytes=1 << 20, seed=None
    )
    with start(tiers, limits, None, spares=0) as client:
        return client.tier


def explain(refusals: list[dict[str, Any]]) -> str:
    """The tiers that did not work, each with its failing step and errno, on one line."""
    return "; ".join(
        f"{r['tier']}: {r['step']}" + (f": {errno.errorcode.get(r['errno'], r['errno'])}" if r["errno"] else "")
        for r in refusals
    )


def _environment(found: dict[str, Any]) -> dict[str, str]:
    """All that sessions see of an environment. One thread per library: a zygote that forks must have no other."""
    return {
        "PATH": ":".join([*found["view"]["programs"], "/usr/bin", "/bin"]),
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "LANG": "C.UTF-8",
        "LC_ALL": "C.UTF-8",
        "MALLOC_ARENA_MAX": "2",  # each arena reserves 64 MiB of the limited address space, one per thread by default
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
