"""What the harness itself costs while a server generates.

The harness is omr's own process: HTTP client, event parsing, transcripts, sandbox ends, votes, samples, progress. The
server, the sandboxed code and the grader's algebra are other processes. Its CPU seconds are set against two measures of
generation: the wall time, which counts when the server computes elsewhere, and the CPU time of the server's processes,
which a busy machine does not stretch.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil


@contextmanager
def harness_cost(server_pid: int | None) -> Iterator[dict[str, float]]:
    """Metrics of the `with` block, filled in when it is left. `server_pid` is None for a server elsewhere."""
    metrics: dict[str, float] = {}
    server = _cpu_of(server_pid)
    own, wall = _own_cpu(), time.perf_counter()
    try:
        yield metrics
    finally:
        own, wall = _own_cpu() - own, time.perf_counter() - wall
        metrics |= {"harness/cpu_s": own, "harness/share_of_wall": own / wall}
        after = _cpu_of(server_pid)
        if server is not None and after is not None and after > server:
            metrics |= {"harness/server_cpu_s": after - server, "harness/share_of_server_cpu": own / (after - server)}


def _own_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _cpu_of(pid: int | None) -> float | None:
    """CPU seconds of a process and those it started, so far; None when it is gone."""
    if pid is None:
        return None
    try:
        top = psutil.Process(pid)
        times = [process.cpu_times() for process in (top, *top.children(recursive=True))]
    except psutil.Error:
        return None
    return sum(t.user + t.system for t in times)
