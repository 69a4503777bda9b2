"""Grading in processes that can be killed.

`Grader.grade` gives a verdict on any pair of answers within its time limit, whatever a model wrote. Text and exact
arithmetic settle most pairs at once in the caller (see `answer.settle`); the rest goes to a worker process that runs
math-verify. A worker that hangs is killed and replaced, and the pair counts as not equal with `how="timeout"`; one that
dies (memory limit, crash in a C extension) gives `how="error"`. So grading never raises and never hangs.

Workers start at the first pair that needs one (about a second for sympy), keep running, and die with the Grader or,
on Linux, with the process that made it. Why not signals: they reach the main thread only, and sympy catches what they
raise. Why not multiprocessing: its spawn would import the caller's `__main__` again.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from omr.solve.answer import settle

WORKER_MEMORY_BYTES = 4 << 30
START_TIMEOUT_S = 120.0
"""Importing sympy on a busy machine."""
_ROOT = str(Path(__file__).parents[2])  # omr may be a checkout that is not installed, and the folder any other


@dataclass(frozen=True)
class Verdict:
    equal: bool
    how: Literal["exact", "algebra", "timeout", "error"]
    """`exact` is text or exact arithmetic; `timeout` and `error` are counted as not equal."""


class _Worker:
    """One child that answers pairs, one at a time; started anew after a timeout or a crash."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._closed = False

    def _line(self, timeout_s: float) -> bytes | None:
        """The child's next line; b"" when it died, None when the time is up."""
        assert self._child is not None and self._child.stdout is not None
        deadline, line = time.monotonic() + timeout_s, b""
        fd = self._child.stdout.fileno()
        while not line.endswith(b"\n"):
            if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            piece = os.read(fd, 4096)
            if not piece:
                return b""
            line += piece
        return line

    def ask(self, prediction: str, reference: str, timeout_s: float) -> Verdict:
        if self._closed:
            return Verdict(False, "error")
        if self._child is None:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "omr.solve.grade", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join([_ROOT, os.environ.get("PYTHONPATH", "")])},
                start_new_session=True,
            )
            if self._closed or not self._line(START_TIMEOUT_S):  # closed meanwhile: `close` may not have seen the child
                self.kill()
                return Verdict(False, "error")
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps([prediction, reference]).encode() + b"\n")
            self._child.stdin.flush()
            line = self._line(timeout_s)
        except (BrokenPipeError, OSError):
            line = b""
        if not line:
            self.kill()
            return Verdict(False, "timeout" if line is None else "error")
        equal = json.loads(line)
        return Verdict(bool(equal), "error" if equal is None else "algebra")

    def kill(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    try:
                        pipe.close()
                    except BrokenPipeError:
                        continue  # a request was still in the buffer of a dead child
            child.wait()

    def close(self) -> None:
        self._closed = True
        child = self._child
        if child is not None:
            child.kill()  # a thread waiting in `_line` sees the end of the stream and cleans up


class Grader:
    """`with Grader() as grader`: verdicts on answer pairs, remembered for the life of the grader."""

    def __init__(self, *, timeout_s: float = 10.0, num_workers: int = 1) -> None:
        assert timeout_s > 0 and num_workers >= 1, (timeout_s, num_workers)
        self.timeout_s = timeout_s
        self._workers = [_Worker() for _ in range(num_workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._known: dict[tuple[str, str], Verdict] = {}

    def __enter__(self) -> Grader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.close()
        for _ in self._workers:  # each comes back once its last question is answered or cut short
            self._idle.get().kill()

    def grade_now(self, prediction: str | None, reference: str) -> Verdict:
        """The verdict on one pair; blocks for at most the time limit (and a worker's start)."""
        settled = settle(prediction, reference)
        if settled is not None:
            return Verdict(settled, "exact")
        assert prediction is not None
        pair = (prediction, reference)
        if pair not in self._known:
            worker = self._idle.get()
            try:
                self._known[pair] = worker.ask(prediction, reference, self.timeout_s)
            finally:
                self._idle.put(worker)
        return self._known[pair]

    async def grade(self, prediction: str | None, reference: str) -> Verdict:
        """`grade_now` without blocking the event loop. Pairs that need no algebra do not leave it."""
        settled = settle(prediction, reference)
        if settled is not None:
            return Verdict(settled, "exact")
        return await asyncio.to_thread(self.grade_now, prediction, reference)


def _serve(parent: int) -> None:
    """The worker: a JSON pair a line in, `true`, `false` or `null` (it failed) a line out."""
    import ctypes
    import resource

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        return
    resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY_BYTES, WORKER_MEMORY_BYTES))
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is not a reply

    from omr.solve.answer import equal_by_algebra

    equal_by_algebra("x+1", "1+x")
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        prediction, reference = json.loads(line)
        equal: bool | None
        try:
            equal = bool(equal_by_algebra(prediction, reference))
        except (Exception, RecursionError, MemoryError):  # anything sympy does on junk is a verdict, not a crash
            equal = None
        print(json.dumps(equal), file=replies, flush=True)


if __name__ == "__main__":
    threading.stack_size(256 << 20)  # sympy recurses deeply on long expressions
    _thread = threading.Thread(target=_serve, args=(int(sys.argv[1]),), daemon=True)
    _thread.start()
    _thread.join()
