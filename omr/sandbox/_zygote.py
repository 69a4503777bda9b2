"""The zygote: a process that has imported and warmed numpy and sympy once, and forks a session whenever asked.

Requests come over one socket, each with one end of a fresh socket pair; the answer over that pair is the four
descriptors that make up a session (control socket, stdout, stderr, pidfd), or the step that failed. So requests of any
event loop or thread can share the zygote. A few sessions are forked ahead of their use and handed out at once: the
fork and the cage cost milliseconds, and requests come in bursts with pauses between.

One thread only: fork, and unshare of a user namespace, want that.
"""

from __future__ import annotations

import array
import collections
import gc
import importlib
import os
import select
import signal
import socket
import sys
import time
from typing import Any, NoReturn

from omr.sandbox import _frames, _linux, _worker
from omr.sandbox._cage import Bare, Limits
from omr.sandbox._linux import StepError
from omr.sandbox._root import remove_tree

_CONTROL, _STDOUT, _STDERR = 3, 1, 2  # descriptors of a session
_WARM = """
x, y = sympy.symbols("x y")
sympy.simplify(sympy.sin(x) ** 2 + sympy.cos(x) ** 2)
sympy.integrate(x * sympy.exp(x), x), sympy.integrate(1 / (x**2 + 1), (x, 0, 1)), sympy.diff(sympy.sin(x * y), x)
sympy.solve(x**3 - 6 * x**2 + 11 * x - 6, x), sympy.solve([x + y - 3, x - y - 1], [x, y]), sympy.solveset(x**2 - 2, x)
sympy.nsolve(sympy.cos(x) - x, 1), sympy.limit(sympy.sin(x) / x, x, 0), sympy.series(sympy.exp(x), x, 0, 4)
sympy.factor(x**4 - 1), sympy.expand((x + y) ** 3), sympy.apart(1 / (x * (x + 1))), sympy.summation(x, (x, 1, y))
sympy.Matrix([[2, 1], [1, 3]]).eigenvals(), sympy.Matrix([[2, 1], [1, 3]]).inv(), sympy.factorint(360)
sympy.divisors(28), sympy.isprime(97), sympy.binomial(10, 3), sympy.N(sympy.pi, 30), str(sympy.sqrt(8))
sympy.latex(x**2 / y), sympy.sympify("x**2 + 1"), sympy.parse_expr("2*x + 1"), sympy.lambdify(x, x**2)(2)
numpy.linalg.solve(numpy.eye(2), numpy.ones(2)), numpy.linalg.eigvals(numpy.eye(2)), repr(numpy.arange(3.0))
numpy.random.default_rng(0).integers(5), numpy.polynomial.Polynomial([1, 2, 1]).roots(), numpy.fft.fft(numpy.ones(4))
"""
_PRELOAD = """
numpy numpy.linalg numpy.random numpy.fft numpy.polynomial mpmath sympy sympy.abc networkx pandas
math cmath itertools functools collections fractions decimal random statistics string heapq bisect operator
datetime copy pprint textwrap dataclasses enum time typing re json asyncio uuid hashlib
"""
_ABSENT = ("pyarrow", "numexpr", "bottleneck")
"""Not loaded although pandas would: they start threads, and a zygote must have one."""

Ends = tuple[int, int, int, int, int, str]
"""A session as its owner gets it: control, stdout, stderr, pidfd; and its pid and scratch folder."""


class Zygote:
    """The serving loop."""

    def __init__(self, cage: Bare, settings: dict[str, Any], control: int) -> None:
        self._cage = cage
        self._control = socket.socket(fileno=control)
        self._settings = settings
        self._count = 0
        self._spares: collections.deque[Ends] = collections.deque()

    def run(self) -> NoReturn:
        """Until the owner closes its end."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # dead sessions vanish; their owner holds a pidfd each
        started = time.monotonic()
        loaded = _preload(self._settings["packages"])
        _worker.seed_numpy(self._settings["seed"])
        print(f"preloaded in {time.monotonic() - started:.2f} s: {' '.join(loaded)}", file=sys.stderr, flush=True)
        self._cage.settle(Limits(**self._settings["limits"]))
        gc.collect()
        gc.freeze()
        gc.disable()
        requests = _frames.Splitter(_frames.FROM_SESSION)
        answers: list[int] = []
        while True:
            while len(self._spares) < self._settings["spares"] and not _readable(self._control.fileno()):
                try:
                    self._spares.append(self._fork("python"))
                except OSError as error:
                    print(f"no spare session: {error}", file=sys.stderr, flush=True)
                    break
            data, fds, _, _ = socket.recv_fds(self._control, 65536, 16)
            if not data:
                os._exit(0)
            answers += fds
            for request in requests.feed(data):
                if "bury" in request:
                    self._bury(request["bury"])
                else:
                    self._answer(answers.pop(0), request["kind"])

    def _answer(self, channel: int, kind: str) -> None:
        try:
            ends = self._take_spare() if kind == "python" else None
            try:
                *fds, pid, scratch = ends or self._fork(kind)
            except OSError as error:
                step = error.step if isinstance(error, StepError) else "fork"
                _frames.write(channel, {"failed": step, "errno": error.errno})
                return
            _send_fds(channel, {"pid": pid, "scratch": scratch}, fds)
            for fd in fds:
                os.close(fd)
        except (BrokenPipeError, ConnectionResetError):  # the owner gave up waiting; the session ends with its socket
            print("a session was not collected", file=sys.stderr, flush=True)
        finally:
            os.close(channel)

    def _take_spare(self) -> Ends | None:
        while self._spares:
            ends = self._spares.popleft()
            if not _readable(ends[3]):  # a readable pidfd is a dead process
                return ends
            for fd in ends[:4]:
                os.close(fd)
        return None

    def _fork(self, kind: str) -> Ends:
        """One session, on its way to readiness. Raises OSError."""
        self._count += 1
        index = self._count
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        out_read, out_write = os.pipe()
        err_read, err_write = os.pipe()
        try:
            pid = self._cage.fork_session()
            if pid == 0:
                self._become_session(kind, index, theirs.fileno(), out_write, err_write)
            pidfd = os.pidfd_open(pid)
        except OSError:
            ours.close()
            os.close(out_read)
            os.close(err_read)
            raise
        finally:
            theirs.close()
            os.close(out_write)
            os.close(err_write)
        return ours.detach(), out_read, err_read, pidfd, pid, self._cage.scratch_of(index)

    def _become_session(self, kind: str, index: int, control: int, stdout: int, stderr: int) -> NoReturn:
        try:
            os.setsid()
            scratch = self._cage.enter_session(kind, index)
            _arrange_fds(control, stdout, stderr)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            gc.enable()
            _worker.serve(
                kind, _CONTROL, scratch=scratch, seed=self._settings["seed"], packages=self._settings["packages"]
            )
        except OSError as error:
            step = error.step if isinstance(error, StepError) else repr(error)
            _frames.write(control, {"failed": step, "errno": error.errno})
        finally:
            os._exit(1)

    def _bury(self, scratch: str) -> None:
        """Remove a dead session's scratch folder, in a child: it may be large."""
        if os.fork() == 0:
            try:
                remove_tree(scratch)
            finally:
                os._exit(0)


def _readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def _arrange_fds(control: int, stdout: int, stderr: int) -> None:
    """0 is /dev/null, 1 and 2 the pipes, 3 the control socket; nothing else stays open."""
    null = os.open("/dev/null", os.O_RDONLY)
    high = [os.dup(fd) for fd in (null, stdout, stderr, control)]
    while min(high) < 4:  # none of the targets may be a source
        high = [os.dup(fd) for fd in high]
    for target, fd in enumerate(high):
        os.dup2(fd, target, inheritable=target < 3)
    _linux.close_from(4)


def _send_fds(channel: int, message: dict[str, Any], fds: list[int]) -> None:
    with socket.socket(fileno=os.dup(channel)) as sock:
        sock.sendmsg([_frames.pack(message)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def _preload(packages: list[str]) -> list[str]:
    """Import and warm what sessions are likely to use. numpy and sympy must be there; the rest is optional."""
    sys.path[:] = [*sys.path, *packages]
    for name in _ABSENT:
        sys.modules[name] = None  # type: ignore[assignment]
    loaded = []
    for name in _PRELOAD.split():
        try:
            importlib.import_module(name)
            loaded.append(name)
        except ImportError:
            if name in ("numpy", "sympy"):
                raise
    for name in _ABSENT:
        del sys.modules[name]
    exec(compile(f"import numpy, sympy\n{_WARM}", "<warm>", "exec"), {})
    _worker.warm()
    return loaded
