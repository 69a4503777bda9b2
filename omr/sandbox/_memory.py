"""Memory of a whole process tree, watched from outside.

Resource limits count one process at a time. A shell session may start several, so its owner adds them up while it runs,
a few times a second, and kills it when the sum passes the limit. Anonymous memory is what counts, swapped or not: pages
of programs and libraries are shared, files of the scratch folder have their own limit, shared maps are refused.
"""

from __future__ import annotations

import asyncio
import os
import signal

_PERIOD_S = 0.1
_ANONYMOUS = ("RssAnon:", "VmSwap:", "HugetlbPages:")


async def guard_memory(pidfd: int, limit_bytes: int) -> None:
    """Until cancelled, or until the tree under `pidfd` holds more than the limit: then SIGKILL to its root."""
    root = _pid_of(pidfd)
    while root > 0:
        await asyncio.sleep(_PERIOD_S)
        held = sum(_anonymous_bytes(pid) for pid in tree(root))
        if held > limit_bytes:
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            except ProcessLookupError:
                return


def tree(root: int) -> list[int]:
    """`root` and its descendants, as /proc shows them now."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as stat:
                    parent = int(stat.read().rpartition(")")[2].split()[1])
            except (OSError, ValueError, IndexError):
                continue  # it ended meanwhile
            children.setdefault(parent, []).append(int(name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def _pid_of(pidfd: int) -> int:
    """The process behind a pidfd, in this process's numbering; -1 once it is dead."""
    with open(f"/proc/self/fdinfo/{pidfd}", encoding="ascii") as info:
        for line in info:
            if line.startswith("Pid:"):
                return int(line.split()[1])
    return -1


def _anonymous_bytes(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as status:
            return sum(int(line.split()[1]) * 1024 for line in status if line.startswith(_ANONYMOUS))
    except (OSError, ValueError, IndexError):
        return 0  # it ended meanwhile
