"""The owner's side of one session, on asyncio.

A session is four descriptors: a control socket, two pipes of output, a pidfd. Nothing is registered with an event loop
between blocks, so a client serves any number of loops in turn. Output is drained while a block runs, kept up to the
limit and otherwise thrown away; it is text for the model and is never interpreted.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from typing import TYPE_CHECKING, Any, Literal

from omr.errors import ResourceError
from omr.sandbox import Outcome, _frames

if TYPE_CHECKING:
    from omr.sandbox._client import LocalClient

Kind = Literal["notebook", "script", "shell"]
CUT = "<output cut>"
"""Follows output that was longer than the limit, as in the reference API."""
GRACE_S = 0.5
"""Between the interrupt at a block's time limit and SIGKILL."""
_CHUNK = 65536
_PAUSE_S = 0.002
_SPILL = 16 << 20
"""Bytes of output read from one block; a block that writes more waits for its time limit."""
_SLACK = 8192


class Drain:
    """Reads one pipe while a block runs. Keeps the first `keep` bytes and counts the rest."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._parts: list[bytes] = []
        self._kept = self._total = self._keep = 0
        self._ended = False  # every writer closed its end

    def start(self, loop: asyncio.AbstractEventLoop, keep: int) -> None:
        self._loop, self._keep = loop, keep
        self._parts, self._kept, self._total = [], 0, 0
        loop.add_reader(self.fd, self._on_readable)

    def _on_readable(self) -> None:
        """Read once, then rest a moment: a printing loop must not wake the owner for every line."""
        assert self._loop is not None
        full = self._read()
        if full and self._total < _SPILL:
            return
        self._loop.remove_reader(self.fd)
        if self._total < _SPILL and not self._ended:
            self._timer = self._loop.call_later(_PAUSE_S, self._loop.add_reader, self.fd, self._on_readable)

    def _read(self) -> bool:
        """One read; True if it came back full."""
        try:
            data = os.read(self.fd, _CHUNK)
        except BlockingIOError:
            return False
        self._ended = not data
        self._total += len(data)
        if data and self._kept < self._keep:
            self._parts.append(data[: self._keep - self._kept])
            self._kept += len(self._parts[-1])
        return len(data) == _CHUNK

    def unblock(self) -> None:
        """Go on reading, whatever the amount: the block was told to stop and may be stuck in a write."""
        assert self._loop is not None
        if self._total >= _SPILL:
            self._total = 0
            self._loop.add_reader(self.fd, self._on_readable)

    def stop(self) -> bytes:
        """What the block wrote, up to the limit: the pipe is read until it is empty."""
        if self._loop is not None:
            self._loop.remove_reader(self.fd)
            if self._timer is not None:
                self._timer.cancel()
            self._loop = self._timer = None
            for _ in range(64):  # a thread left behind may keep writing
                if not self._read():
                    break
        return b"".join(self._parts)


def cut(data: bytes, limit: int) -> str:
    """As text, at most `limit` characters and the marker."""
    text = data.decode("utf-8", "replace")
    return text if len(text) <= limit else text[:limit] + CUT


class LocalSession:
    """One interpreter. See the contract in omr.sandbox."""

    def __init__(self, client: LocalClient, kind: Kind) -> None:
        self._client = client
        self._kind = kind
        self._used_s = 0.0
        self._process: _Process | None = None
        self._lock = asyncio.Lock()
        self._closed = False

    @property
    def alive(self) -> bool:
        """Whether a process holds state now."""
        return self._process is not None

    async def execute(
        self,
        code: str,
        timeout_s: float | None = None,
        *,
        output_chars: int | None = None,
        verbosity: str = "Plain",
        stdin: str = "",
    ) -> Outcome:
        """Run one block. Blocks of one session run one after another. Cancelling kills the session's process.

        Raises ResourceError when no process can be had, ChildError when the sandbox itself is dead.
        """
        limits = self._client.limits
        timeout_s = limits.timeout_s if timeout_s is None else timeout_s
        output_chars = limits.output_chars if output_chars is None else output_chars
        async with self._lock:
            budget = limits.session_s - self._used_s if limits.session_s else timeout_s
            if budget <= 0:
                return Outcome(
                    status="timeout", stderr=f"The session's {limits.session_s:g} seconds of execution are used up\n"
                )
            if self._process is None:
                if self._closed:
                    raise ResourceError("this sandbox session is closed")
                self._process = await self._client.open(self._kind)
            process = self._process
            started = time.monotonic()
            try:
                message = {"code": code, "verbosity": verbosity, "stdin": stdin}
                status, stdout, stderr = await process.run(
                    message, min(timeout_s, budget), 4 * (output_chars + 1) + _SLACK, soft=self._kind == "notebook"
                )
            except BaseException:
                self._abandon()
                raise
            seconds = time.monotonic() - started
            self._used_s += seconds
            outcome = Outcome(
                status="completed" if status == "completed" else "error",
                stdout=cut(stdout, output_chars),
                stderr=cut(stderr, output_chars),
                seconds=seconds,
            )
            if status in ("interrupted", "killed"):
                outcome.status = "timeout"
                outcome.stderr += f"Execution timed out after {min(timeout_s, budget):g} seconds\n"
            if status == "died":
                outcome.stderr += "connection closed\n"
            if status in ("killed", "died"):
                outcome.state_lost = True
                self._abandon()
            return outcome

    def _abandon(self) -> None:
        if self._process is not None:
            self._client.discard(self._process)
            self._process = None

    async def close(self) -> None:
        """Kill the session's process and wait until it is gone. Idempotent."""
        self._closed = True
        process, self._process = self._process, None
        if process is not None:
            await process.end()
            self._client.discard(process)


class _Process:
    """The process of a session, as seen from outside."""

    def __init__(self, control: socket.socket, stdout: int, stderr: int) -> None:
        self._control = control
        self._splitter = _frames.Splitter(_frames.FROM_SESSION)
        self._stdout, self._stderr = Drain(stdout), Drain(stderr)
        self._pidfd = -1
        self.pid = 0
        self.open = True

    async def await_ready(self) -> None:
        """Until the process is confined and waits for code. Raises ResourceError naming the failed step; EOFError."""
        loop = asyncio.get_running_loop()
        ready = False
        while not (ready and self._pidfd >= 0):
            try:
                data, fds, _, _ = socket.recv_fds(self._control, 4096, 1)
            except BlockingIOError:
                await _readable(loop, self._control.fileno())
                continue
            for fd in fds:
                os.set_inheritable(fd, False)
                self._pidfd = fd
            if not data:
                raise EOFError
            for message in self._splitter.feed(data):
                if "failed" in message:
                    errno = int(message.get("errno") or 0)
                    raise ResourceError(
                        f"the sandbox cannot start a session: {message['failed']}: {os.strerror(errno)}"
                    )
                self.pid = message.get("pid", self.pid)
                ready = ready or "ready" in message

    async def run(
        self, message: dict[str, Any], timeout_s: float, keep: int, *, soft: bool
    ) -> tuple[str, bytes, bytes]:
        """Status and output of one block: completed, error, interrupted (in time to keep its state), killed, died."""
        loop = asyncio.get_running_loop()
        self._stdout.start(loop, keep)
        self._stderr.start(loop, keep)
        try:
            status = await self._answer(message, timeout_s, soft)
        finally:
            stdout, stderr = self._stdout.stop(), self._stderr.stop()
        return status, stdout, stderr

    async def _answer(self, message: dict[str, Any], timeout_s: float, soft: bool) -> str:
        loop = asyncio.get_running_loop()
        late = False
        try:
            try:
                async with asyncio.timeout(timeout_s):
                    await loop.sock_sendall(self._control, _frames.pack(message))
                    return await self._status()
            except TimeoutError:
                late = True
            if soft and self._signal(signal.SIGINT):
                self._stdout.unblock()
                self._stderr.unblock()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(GRACE_S):
                        await self._status()
                        return "interrupted"
        except (EOFError, OSError, _frames.BadFrame):
            await self.end()
            return "killed" if late else "died"
        await self.end()
        return "killed"

    async def _status(self) -> str:
        loop = asyncio.get_running_loop()
        while True:
            data = await loop.sock_recv(self._control, 65536)
            if not data:
                raise EOFError
            for message in self._splitter.feed(data):
                return str(message.get("status"))

    def _signal(self, number: int) -> bool:
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            return False
        return True

    async def end(self) -> None:
        """SIGKILL, and wait until the process is gone."""
        if self.kill():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5.0):
                    await _readable(asyncio.get_running_loop(), self._pidfd)

    def kill(self) -> bool:
        return self.open and self._pidfd >= 0 and self._signal(signal.SIGKILL)

    def release(self) -> None:
        """Kill, and close every descriptor. Idempotent."""
        if self.open:
            self.kill()
            self.open = False
            self._control.close()
            for fd in (self._stdout.fd, self._stderr.fd, self._pidfd):
                if fd >= 0:
                    os.close(fd)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _readable(loop: asyncio.AbstractEventLoop, fd: int) -> None:
    future: asyncio.Future[None] = loop.create_future()
    loop.add_reader(fd, _wake, future)
    try:
        await future
    finally:
        loop.remove_reader(fd)
