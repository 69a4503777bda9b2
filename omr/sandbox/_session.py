"""The owner's side of one session, on asyncio.

A session is four descriptors: a control socket, two pipes of output, a pidfd. Nothing is registered with an event loop
between blocks, so a client serves any number of loops in turn. Output is drained while a block runs, kept up to the
limit and otherwise thrown away; it is text for the model and is never interpreted.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from omr.errors import ResourceError
from omr.sandbox import Outcome, _frames
from omr.sandbox._memory import guard_memory

if TYPE_CHECKING:
    from omr.sandbox._client import LocalClient

Kind = Literal["notebook", "script", "shell"]
Cage = Literal["python", "shell"]
"""What a session's process may do: a shell starts others."""
CUT = "<output cut>"
"""Follows output that was longer than the limit, as in the reference API."""
GRACE_S = 0.5
"""Between the interrupt at a block's time limit and SIGKILL."""
_CHUNK = 65536
_FIRST_PAUSE_S, _PAUSE_S = 0.02, 0.002
"""Before output is read for the first time, and between two reads."""
_SPILL = 64 << 20
"""Bytes of output read from one block; a block that writes more waits for its time limit."""
_SLACK = 8192
_DEATH_TIMEOUT_S = 5.0
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[@-Z\\-_])")


class Drain:
    """Reads one pipe while a block runs. Keeps the first `keep` bytes and counts the rest."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._parts: list[bytes] = []
        self._kept = self._total = self._keep = self._allowed = 0
        self._ended = False  # every writer closed its end
        self._watched = False

    def start(self, loop: asyncio.AbstractEventLoop, keep: int) -> None:
        self._loop, self._keep = loop, keep
        self._parts, self._kept, self._total, self._allowed = [], 0, 0, _SPILL

    def watch(self) -> None:
        """Read as it comes, from now on."""
        assert self._loop is not None
        self._watched = True
        self._loop.add_reader(self.fd, self._on_readable)

    def _on_readable(self) -> None:
        """Read once, then rest a moment: a printing loop must not wake the owner for every line."""
        assert self._loop is not None
        full = self._read()
        if full and self._total < self._allowed:
            return
        self._loop.remove_reader(self.fd)
        if self._total < self._allowed and not self._ended:
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
        if self._total >= self._allowed:
            self._allowed = self._total + _SPILL
            self.watch()

    def stop(self) -> Output:
        """What the block wrote, up to the limit: the pipe is read until it is empty."""
        if self._loop is not None:
            if self._watched:
                self._loop.remove_reader(self.fd)
            if self._timer is not None:
                self._timer.cancel()
            self._loop, self._timer, self._watched = None, None, False
            for _ in range(64):  # a thread left behind may keep writing
                if not self._read():
                    break
        return Output(b"".join(self._parts), self._total > self._kept)


@dataclass(frozen=True)
class Output:
    """The beginning of what a block wrote to one stream."""

    data: bytes
    more: bool
    """Whether anything followed."""

    def text(self, limit: int, *, tidy: bool) -> str:
        """At most `limit` characters, and the marker if there were more. `tidy`: as the reference API shows a
        notebook's output, without colours and leading blank lines, with one newline at the end."""
        text = self.data.decode("utf-8", "replace")
        if tidy:
            text = _ANSI.sub("", text).lstrip("\n").rstrip()
            text += "\n" if text else ""
        return text if len(text) <= limit and not self.more else text[:limit] + CUT


class LocalSession:
    """One interpreter. See the contract in omr.sandbox."""

    def __init__(self, client: LocalClient, kind: Kind) -> None:
        self._client = client
        self._kind = kind
        self._used_s = 0.0
        self._process: Process | None = None
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
                self._process = await self._client.open("shell" if self._kind == "shell" else "python")
            process = self._process
            started = time.monotonic()
            try:
                message = {"kind": self._kind, "code": code, "verbosity": verbosity, "stdin": stdin}
                status, stdout, stderr = await process.run(
                    message, min(timeout_s, budget), 4 * (output_chars + 1) + _SLACK, soft=self._kind == "notebook"
                )
            except BaseException:
                self._abandon()
                raise
            seconds = time.monotonic() - started
            self._used_s += seconds
            plain = self._kind == "notebook" and verbosity in ("Plain", "Minimal")
            outcome = Outcome(
                status="completed" if status == "completed" else "error",
                stdout=stdout.text(output_chars, tidy=plain),
                stderr=stderr.text(output_chars, tidy=plain),
                seconds=seconds,
            )
            if status in ("interrupted", "killed"):
                outcome.status = "timeout"
                outcome.stderr += f"Execution timed out after {min(timeout_s, budget)} seconds\n"
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
        """Kill the session's process; a block that runs ends as a crash does. Idempotent.

        A process that leaves scratch to remove is waited for; of another nothing runs after SIGKILL.
        """
        self._closed = True
        if self._process is not None:
            if self._lock.locked():
                self._process.kill()
            async with self._lock:  # whoever runs a block owns the process, and lets go of it first
                try:
                    if self._process is not None and self._process.scratch:
                        await self._process.end()
                finally:
                    self._abandon()


class Process:
    """The process of a session, as seen from outside."""

    def __init__(self, fds: list[int], *, group: int, scratch: str, memory_bytes: int | None) -> None:
        control, stdout, stderr, self._pidfd = fds
        self._control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, control)
        self._control.setblocking(False)
        os.set_blocking(stdout, False)
        os.set_blocking(stderr, False)
        self._splitter = _frames.Splitter(_frames.FROM_SESSION)
        self._stdout, self._stderr = Drain(stdout), Drain(stderr)
        self._group = group
        """Process group to kill along; 0 where the session has its own process space."""
        self.scratch = scratch
        """Folder to remove afterwards; empty where it vanishes with the session."""
        self._memory_bytes = memory_bytes
        """What the process and its descendants may hold together; None where they are one process with a limit."""
        self._open = True
        self._rests = False

    async def await_ready(self) -> None:
        """Until the process is confined and waits for code. Raises ResourceError naming the failed step; EOFError."""
        message = await self._message()
        if "ready" not in message:
            raise_refusal(message)

    async def run(
        self, message: dict[str, Any], timeout_s: float, keep: int, *, soft: bool
    ) -> tuple[str, Output, Output]:
        """Status and output of one block: completed, error, interrupted (in time to keep its state), killed, died."""
        loop = asyncio.get_running_loop()
        self._stdout.start(loop, keep)
        self._stderr.start(loop, keep)
        # Most blocks are over sooner, and what they wrote is in the pipes: `stop` reads it.
        timer = loop.call_later(_FIRST_PAUSE_S, self._watch)
        guard = None
        try:
            if self._memory_bytes is not None:
                guard = loop.create_task(guard_memory(self._pidfd, self._memory_bytes))
            if self._rests:
                self._signal(signal.SIGCONT)
            status = await self._answer(message, timeout_s, soft)
            self._rests = self._signal(signal.SIGSTOP)  # threads left behind, until the next block
        finally:
            timer.cancel()
            if guard is not None:
                guard.cancel()
            stdout, stderr = self._stdout.stop(), self._stderr.stop()
        return status, stdout, stderr

    def _watch(self) -> None:
        self._stdout.watch()
        self._stderr.watch()

    async def _answer(self, message: dict[str, Any], timeout_s: float, soft: bool) -> str:
        loop = asyncio.get_running_loop()
        late = False
        try:
            try:
                async with asyncio.timeout(timeout_s):
                    await loop.sock_sendall(self._control, _frames.pack(message))
                    return str((await self._message()).get("status"))
            except TimeoutError:
                late = True
            if soft and self._signal(signal.SIGINT):
                self._stdout.unblock()
                self._stderr.unblock()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(GRACE_S):
                        await self._message()
                        return "interrupted"
        except (EOFError, OSError, _frames.BadFrame):
            await self.end()
            return "killed" if late else "died"
        await self.end()
        return "killed"

    async def _message(self) -> dict[str, Any]:
        """The next message. Raises EOFError, BadFrame."""
        loop = asyncio.get_running_loop()
        while True:
            data = await loop.sock_recv(self._control, 65536)
            if not data:
                raise EOFError
            for message in self._splitter.feed(data):
                return message

    def _signal(self, number: int) -> bool:
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            return False
        return True

    async def end(self) -> None:
        """SIGKILL, and wait until the process is gone."""
        if self._open and self.kill():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_DEATH_TIMEOUT_S):
                    await readable(self._pidfd)

    def kill(self) -> bool:
        """SIGKILL; False if it was dead already."""
        if self._group:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._group, signal.SIGKILL)
        return self._signal(signal.SIGKILL)

    def release(self) -> None:
        """Kill, and close every descriptor. Idempotent."""
        if self._open:
            self.kill()
            self._open = False
            self._control.close()
            for fd in (self._stdout.fd, self._stderr.fd, self._pidfd):
                os.close(fd)


def raise_refusal(message: dict[str, Any]) -> NoReturn:
    """The zygote or a session said which step failed."""
    reason = os.strerror(int(message.get("errno") or 0))
    raise ResourceError(f"the sandbox cannot start a session: {message.get('failed')}: {reason}")


async def readable(fd: int) -> None:
    """Until `fd` is readable."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    loop.add_reader(fd, _wake, future)
    try:
        await future
    finally:
        loop.remove_reader(fd)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
