"""The process between a sandbox's owner and its zygote: it picks the tier, and cleans up whatever happens.

    owner (asyncio)  --exec, empty environment-->  watcher  --fork-->  keeper  --fork-->  zygote  --fork-->  session
                                                   |                   |                  pid 1 of its namespaces
                                                   |                   dies with the watcher, and the zygote with it
                                                   watches the owner; cleans up after it

The watcher stays outside all namespaces. It tries the tiers in order, each in a fresh keeper, until a trial session
went through all its steps; then it only waits for an end: of the owner, its socket or the keeper. When the owner
goes, even by SIGKILL, the watcher kills the keeper; with the zygote, pid 1 of the process namespace, the kernel kills
every session. In the tiers without namespaces the watcher, adoptive parent of every orphan, kills what is left, and
removes the scratch folder.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import signal
import tempfile
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from omr.sandbox import _frames, _linux, _zygote
from omr.sandbox._cage import TIERS, Bare, Limits
from omr.sandbox._linux import StepError
from omr.sandbox._root import View, remove_tree

_REMOVAL_S = 2.0


def main(control: int) -> NoReturn:
    """The watcher, from its first line to its last."""
    settings = _frames.read(control)
    if settings is None:  # the owner died first
        os._exit(1)
    owner = os.pidfd_open(settings["owner"])
    if os.getppid() != settings["owner"]:
        os._exit(1)
    _linux.adopt_orphans()
    scratch_root = ""
    refusals: list[dict[str, Any]] = []
    for tier in (t for t in TIERS if t.tier in settings["tiers"]):
        if not tier.own_space:
            scratch_root = scratch_root or tempfile.mkdtemp(prefix="omr-sandbox-")
            os.chmod(scratch_root, 0o711)
        cage = tier(View(**settings["view"]), scratch_root)
        keeper, refusal = _start(functools.partial(_keep, cage, {**settings, "refusals": refusals}, control))
        if refusal is None:
            _wait(owner, keeper, control)
            break
        refusals.append({"tier": tier.tier, **refusal})
        os.waitpid(keeper, 0)
    else:
        _frames.write(control, {"tier": None, "refusals": refusals})
    _bury(scratch_root)
    os._exit(0)


def _start(body: Callable[[int], object]) -> tuple[int, dict[str, Any] | None]:
    """Fork a child that runs `body(report)`; its pid, and what it wrote before it closed `report` (None: all well)."""
    read_end, write_end = os.pipe()
    watcher, child = os.getpid(), os.fork()
    if child == 0:
        os.close(read_end)
        with _reporting(write_end):
            _linux.die_with_parent(watcher)
            body(write_end)
        os._exit(1)
    os.close(write_end)
    try:
        return child, _frames.read(read_end)
    finally:
        os.close(read_end)


@contextlib.contextmanager
def _reporting(report: int) -> Any:
    """Write the step that fails to `report`; a surprise goes to the log too."""
    try:
        yield
    except StepError as error:
        _frames.write(report, {"step": error.step, "errno": error.errno})
    except BaseException as error:
        traceback.print_exc()
        _frames.write(report, {"step": f"{type(error).__name__}: {error}", "errno": 0})


def _keep(cage: Bare, settings: dict[str, Any], control: int, report: int) -> NoReturn:
    """The keeper: enters the namespaces, forks the zygote into them, and ends when it does."""
    watcher, keeper = os.getppid(), os.getpid()
    cage.enter_zygote()
    _linux.die_with_parent(watcher)  # once more: the kernel forgets it when the uid changes
    zygote = os.fork()
    if zygote == 0:
        passed = False
        with _reporting(report):
            _linux.die_with_parent(0 if cage.own_space else keeper)
            _try_session(cage)
            _frames.write(
                control,
                {"tier": cage.tier, "landlock_abi": cage.landlock_abi, "refusals": settings["refusals"]},
            )
            passed = True
        os.close(report)
        if not passed:
            os._exit(1)
        try:
            _zygote.Zygote(cage, settings, control).run()
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    os.close(report)
    os.close(control)
    os.waitpid(zygote, 0)
    os._exit(0)


def _try_session(cage: Bare) -> None:
    """One session through every step of its tier, before the imports: a refusal shows now. Raises StepError."""
    read_end, write_end = os.pipe()
    cage.settle(Limits(memory_bytes=1 << 30, scratch_bytes=1 << 20, cpu_s=10))
    child = cage.fork_session()
    if child == 0:
        with _reporting(write_end):
            cage.enter_session("python", 0)
        os._exit(0)
    os.close(write_end)
    refusal = _frames.read(read_end)
    os.close(read_end)
    os.waitpid(child, 0)
    if refusal is not None:
        raise StepError(refusal["step"], refusal["errno"])


def _wait(owner: int, keeper: int, control: int) -> None:
    """Until the owner ends or closes its end of the control socket, or the keeper ends; then the keeper is dead."""
    kept = os.pidfd_open(keeper)
    poll = select.poll()
    poll.register(owner, select.POLLIN)
    poll.register(kept, select.POLLIN)
    poll.register(control, select.POLLRDHUP)
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
    if scratch_root and not remove_tree(scratch_root, _REMOVAL_S) and os.fork() == 0:
        os.setsid()  # the owner waits for this process: a child goes on with a large folder
        remove_tree(scratch_root)


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
