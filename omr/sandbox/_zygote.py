"""The zygote: a process that has imported and warmed numpy and sympy once, and forks a session whenever asked.

    owner (asyncio)  --exec, empty environment-->  watcher  --fork-->  keeper  --fork-->  zygote  --fork-->  session
                                                   |                   |                  pid 1 of its namespaces
                                                   |                   dies with the watcher, and the zygote with it
                                                   watches the owner; cleans up after it

The watcher stays outside all namespaces. It tries the tiers in order, each in a fresh keeper, until a trial session
went through all its steps; then it only waits for the owner's or the keeper's end. When the owner goes, even by
SIGKILL, the watcher kills the keeper; with the zygote, pid 1 of the process namespace, the kernel kills every session.
In the tiers without namespaces the watcher, adoptive parent of every orphan, kills what is left, and removes the
scratch folder.

Requests come over one socket: a JSON message and three descriptors (control, stdout, stderr) for one session. The
answer, a pidfd, goes to the owner over that session's own control socket: so the owner's end of it is all that a
client needs, whichever event loop it runs in.
"""

from __future__ import annotations

import array
import contextlib
import functools
import gc
import importlib
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from omr.sandbox import _frames, _linux, _worker
from omr.sandbox._cage import TIERS, Bare, Limits
from omr.sandbox._linux import StepError
from omr.sandbox._root import View

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


def main(control: int) -> NoReturn:
    """The watcher, from its first line to its last."""
    settings = _frames.read(control)
    assert settings is not None, "the owner sends its settings first"
    owner = os.pidfd_open(settings["owner"])
    if os.getppid() != settings["owner"]:
        os._exit(1)
    _linux.adopt_orphans()
    scratch_root, refusals = "", []
    for tier in (t for t in TIERS if t.tier in settings["tiers"]):
        if not tier.own_space:
            scratch_root = scratch_root or tempfile.mkdtemp(prefix="omr-sandbox-")
            os.chmod(scratch_root, 0o711)
        cage = tier(View(**settings["view"]), scratch_root)
        keeper, refusal = _start(functools.partial(_keep, cage, settings, control))
        if refusal is None:
            os.close(control)
            _wait(owner, keeper)
            break
        refusals.append({"tier": tier.tier, **refusal})
        os.waitpid(keeper, 0)
    else:
        _frames.write(control, {"refusals": refusals})
    _bury(scratch_root)
    os._exit(0)


def _start(body: Callable[[int], object]) -> tuple[int, dict[str, Any] | None]:
    """Fork a child that runs `body(report)`; its pid, and what it wrote before it closed `report` (None: all well)."""
    read_end, write_end = os.pipe()
    watcher, child = os.getpid(), os.fork()
    if child == 0:
        try:
            os.close(read_end)
            _linux.die_with_parent(watcher)
            body(write_end)
        except StepError as error:
            _frames.write(write_end, {"step": error.step, "errno": error.errno})
        except BaseException:
            traceback.print_exc()
            last = traceback.format_exc().strip().splitlines()[-1]
            _frames.write(write_end, {"step": last, "errno": 0})
        os._exit(1)
    os.close(write_end)
    try:
        return child, _frames.read(read_end)
    finally:
        os.close(read_end)


def _keep(cage: Bare, settings: dict[str, Any], control: int, report: int) -> None:
    """The keeper: enters the namespaces, forks the zygote into them, and ends when it does."""
    watcher, keeper = os.getppid(), os.getpid()
    cage.enter_zygote()
    _linux.die_with_parent(watcher)  # once more: the kernel forgets it when the uid changes
    zygote = os.fork()
    if zygote == 0:
        try:
            _linux.die_with_parent(0 if cage.own_space else keeper)
            _try_session(cage)
            _frames.write(control, {"tier": cage.tier, "landlock_abi": getattr(cage, "landlock_abi", 0)})
            os.close(report)
            report = -1
            _Zygote(cage, settings, control).run()
        except StepError as error:
            _frames.write(report, {"step": error.step, "errno": error.errno})
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    os.close(report)
    os.close(control)
    os.waitpid(zygote, 0)
    os._exit(0)


def _try_session(cage: Bare) -> None:
    """One session through every step of its tier, without imports: a refusal shows now. Raises StepError."""
    read_end, write_end = os.pipe()
    cage.settle()
    limits = Limits(memory_bytes=1 << 30, scratch_bytes=1 << 20, cpu_s=10)
    child = cage.fork_session()
    if child == 0:
        try:
            cage.enter_session("python", 0, limits)
        except StepError as error:
            _frames.write(write_end, {"step": error.step, "errno": error.errno})
        except BaseException as error:
            _frames.write(write_end, {"step": repr(error), "errno": getattr(error, "errno", 0)})
        os._exit(0)
    os.close(write_end)
    refusal = _frames.read(read_end)
    os.close(read_end)
    os.waitpid(child, 0)
    if refusal is not None:
        raise StepError(refusal["step"], refusal["errno"])


class _Zygote:
    """The serving loop."""

    def __init__(self, cage: Bare, settings: dict[str, Any], control: int) -> None:
        self._cage = cage
        self._control = socket.socket(fileno=control)
        self._settings = settings
        self._count = 0

    def run(self) -> NoReturn:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # dead sessions vanish; their owner holds a pidfd each
        started = time.monotonic()
        loaded = _preload(self._settings["packages"])
        print(f"preloaded in {time.monotonic() - started:.2f} s: {' '.join(loaded)}", file=sys.stderr, flush=True)
        self._cage.settle()
        gc.collect()
        gc.freeze()
        gc.disable()
        requests = _frames.Splitter(_frames.FROM_SESSION)
        fds: list[int] = []
        while True:
            data, new_fds, _, _ = socket.recv_fds(self._control, 65536, 16)
            if not data:
                os._exit(0)
            fds += new_fds
            for request in requests.feed(data):
                control, stdout, stderr = fds[:3]
                del fds[:3]
                self._open(request, control, stdout, stderr)

    def _open(self, request: dict[str, Any], control: int, stdout: int, stderr: int) -> None:
        """Fork one session; tell its owner the pidfd, or why there is none."""
        self._count += 1
        try:
            pid = self._cage.fork_session()
            if pid == 0:
                self._become_session(request, control, stdout, stderr)
            pidfd = os.pidfd_open(pid)
            _send_fd(control, {"pid": pid}, pidfd)
            os.close(pidfd)
        except OSError as error:
            step = error.step if isinstance(error, StepError) else "fork"
            _frames.write(control, {"failed": step, "errno": error.errno})
        finally:
            for fd in (control, stdout, stderr):
                os.close(fd)

    def _become_session(self, request: dict[str, Any], control: int, stdout: int, stderr: int) -> NoReturn:
        try:
            os.setsid()
            index, kind = self._count, request["kind"]
            limits = Limits(
                memory_bytes=request["memory_bytes"], scratch_bytes=request["scratch_bytes"], cpu_s=request["cpu_s"]
            )
            scratch = self._cage.enter_session("shell" if kind == "shell" else "python", index, limits)
        except OSError as error:
            step = error.step if isinstance(error, StepError) else repr(error)
            _frames.write(control, {"failed": step, "errno": error.errno})
            os._exit(1)
        try:
            _arrange_fds(control, stdout, stderr)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            gc.enable()
            _worker.serve(kind, _CONTROL, scratch=scratch, seed=request["seed"])
        finally:
            os._exit(1)


def _arrange_fds(control: int, stdout: int, stderr: int) -> None:
    """0 is /dev/null, 1 and 2 the pipes, 3 the control socket; nothing else stays open."""
    null = os.open("/dev/null", os.O_RDONLY)
    high = [os.dup(fd) for fd in (null, stdout, stderr, control)]  # none of the targets may be a source
    while min(high) < 4:
        high = [os.dup(fd) for fd in high]
    for target, fd in enumerate(high):
        os.dup2(fd, target, inheritable=target < 3)
    _linux.close_from(4)


def _send_fd(control: int, message: dict[str, Any], fd: int) -> None:
    with socket.socket(fileno=os.dup(control)) as channel:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        channel.sendmsg([_frames.pack(message)], rights)


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


def _wait(owner: int, keeper: int) -> None:
    """Until the owner or the keeper ends; then the keeper is dead."""
    kept = os.pidfd_open(keeper)
    poll = select.poll()
    poll.register(owner, select.POLLIN)
    poll.register(kept, select.POLLIN)
    poll.poll()
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(kept, signal.SIGKILL)
    os.waitpid(keeper, 0)


def _bury(scratch_root: str) -> None:
    """Kill whatever became this process's child, until nothing is left; then remove the scratch folder."""
    while True:
        for pid in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            break
    if scratch_root:
        shutil.rmtree(scratch_root, ignore_errors=True)


def _children() -> list[int]:
    """Pids whose parent is this process."""
    own, found = os.getpid(), []
    for name in os.listdir("/proc"):
        try:
            with open(f"/proc/{name}/stat") as stat:
                parent = int(stat.read().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        if parent == own:
            found.append(int(name))
    return found
