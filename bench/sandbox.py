"""What a sandbox session costs: time to a first answer, time of a warm block, memory of many.

    python bench/sandbox.py [--tier namespace] [--sessions 300] [--repeat 100]

Prints a table for bench/README.md. CPU times are the kernel's per-process accounting in nanoseconds (schedstat), so
they mean something on a loaded machine; wall times need an idle one, and the load average is printed with them. A bare
fork of a process with the same libraries loaded is measured in the same run: what isolation adds is the difference.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from omr.sandbox._client import LocalClient, SessionLimits, start
from omr.sandbox._memory import _pid_of, tree

REFERENCE_FIRST_SYMPY_MS = 2300.0
"""NeMo-Skills' development server: new session to the first answer that needed sympy."""
FIRST_SYMPY = "import sympy; x = sympy.symbols('x'); print(sympy.solve(x**2 - 5*x + 6))"

BARE_FORK = """
import gc, importlib, json, os, sys, time
from omr.sandbox import _zygote
_zygote._preload([])
gc.collect(); gc.freeze(); gc.disable()
wall, cpu = [], []
for _ in range(int(sys.argv[1])):
    read_end, write_end = os.pipe()
    started, before = time.perf_counter(), time.process_time()
    pid = os.fork()
    if pid == 0:
        os.write(write_end, str(time.process_time()).encode())
        os._exit(0)
    child_cpu = float(os.read(read_end, 100))
    wall.append(time.perf_counter() - started)
    cpu.append(time.process_time() - before + child_cpu)
    os.waitpid(pid, 0); os.close(read_end); os.close(write_end)
print(json.dumps([wall, cpu]))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tier", default="namespace", choices=["namespace", "landlock", "process"])
    parser.add_argument("--sessions", type=int, default=300, help="live at once, for the memory figure")
    parser.add_argument("--repeat", type=int, default=100, help="measurements of each kind")
    parser.add_argument("--pause-ms", type=float, default=20, help="between new sessions, as generations have")
    args = parser.parse_args()

    print(f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores, tier {args.tier}")
    print(f"load average at the start {os.getloadavg()[0]:.2f}\n")
    rows: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        fork_wall, fork_cpu = bare_fork(args.repeat)
        rows.append(("bare fork of the same libraries, to the child's first line", spread(fork_wall)))
        rows.append(("- its CPU time", spread(fork_cpu)))
        for spares, label in ((0, "forked on demand"), (2, "two forked ahead")):
            started = time.perf_counter()
            with start((args.tier,), limits(), Path(folder), spares=spares) as client:
                launched = time.perf_counter() - started
                asyncio.run(one_session(client, "1"))
                ready = time.perf_counter() - started
                if spares == 0:
                    rows.append(("launch: tier known", f"{1e3 * launched:.0f} ms"))
                    rows.append(("launch: libraries loaded, first session", f"{1e3 * ready:.0f} ms"))
                wall, cpu, close = asyncio.run(new_sessions(client, args.repeat, args.pause_ms / 1e3))
                rows.append((f"new session, sympy ready, print(1) answered: {label}", spread(wall)))
                rows.append(("- its CPU time: zygote, session and owner", spread(cpu)))
                if spares == 0:
                    rows.append(("- closing it", spread(close)))
                else:
                    first = asyncio.run(first_sympy(client, args.repeat, args.pause_ms / 1e3))
                    rows.append(("new session, import sympy and solve a quadratic", spread(first)))
                    ratio = REFERENCE_FIRST_SYMPY_MS / (1e3 * statistics.median(first))
                    rows.append(
                        ("- times faster than the reference's 2.3 s (its machine, not this one)", f"{ratio:.0f}")
                    )
                    alone = fresh_interpreter(5)
                    rows.append(("- the same in a fresh interpreter, here and now", spread(alone)))
                    warm = asyncio.run(warm_blocks(client, 10 * args.repeat))
                    rows.append(("print(1) in a warm session", spread(warm)))
        with start((args.tier,), limits(), Path(folder)) as client:
            rows += asyncio.run(many(client, args.sessions))
    width = max(len(name) for name, _ in rows)
    print(f"| {'what':{width}} | figure |\n|{'-' * (width + 2)}|---|")
    for name, figure in rows:
        print(f"| {name:{width}} | {figure} |")
    print(f"\nload average at the end {os.getloadavg()[0]:.2f}")
    return 0


def limits() -> SessionLimits:
    return SessionLimits(
        timeout_s=60, output_chars=1000, session_s=0, memory_bytes=1 << 30, scratch_bytes=32 << 20, seed=0
    )


def spread(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return f"min {1e3 * ordered[0]:.2f}, median {1e3 * statistics.median(ordered):.2f}, p95 {1e3 * p95:.2f} ms"


def cpu_s(pid: int) -> float:
    """CPU time of a process's main thread so far, in seconds."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
    except (OSError, IndexError):
        return 0.0


def bare_fork(repeat: int) -> tuple[list[float], list[float]]:
    environment = {**os.environ, **{f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}}
    argv = [sys.executable, "-c", BARE_FORK, str(repeat)]
    wall, cpu = json.loads(subprocess.run(argv, capture_output=True, check=True, env=environment).stdout)
    return wall, cpu


def fresh_interpreter(repeat: int) -> list[float]:
    seconds = []
    for _ in range(repeat):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", FIRST_SYMPY], capture_output=True, check=True)
        seconds.append(time.perf_counter() - started)
    return seconds


async def one_session(client: LocalClient, code: str) -> None:
    session = client.session()
    await session.execute(code)
    await session.close()


async def new_sessions(
    client: LocalClient, repeat: int, pause_s: float
) -> tuple[list[float], list[float], list[float]]:
    """Wall time, CPU time and closing time of sessions opened one after another."""
    zygote = tree(client._zygote._watcher.pid)[2]
    wall, cpu, close = [], [], []
    for _ in range(repeat):
        await asyncio.sleep(pause_s)
        session = client.session()
        before = cpu_s(zygote) + time.process_time()
        started = time.perf_counter()
        outcome = await session.execute("import sympy; print(1)")
        wall.append(time.perf_counter() - started)
        assert outcome.stdout == "1\n", outcome
        assert session._process is not None
        await asyncio.sleep(pause_s)  # a spare's replacement belongs to this session's cost
        spent = cpu_s(zygote) + time.process_time() - before
        cpu.append(spent + cpu_s(_pid_of(session._process._pidfd)))
        started = time.perf_counter()
        await session.close()
        close.append(time.perf_counter() - started)
    return wall, cpu, close


async def first_sympy(client: LocalClient, repeat: int, pause_s: float) -> list[float]:
    return await timed(client, repeat, pause_s, FIRST_SYMPY)


async def timed(client: LocalClient, repeat: int, pause_s: float, code: str) -> list[float]:
    seconds = []
    for _ in range(repeat):
        await asyncio.sleep(pause_s)
        session = client.session()
        started = time.perf_counter()
        outcome = await session.execute(code)
        seconds.append(time.perf_counter() - started)
        assert outcome.status == "completed", outcome
        await session.close()
    return seconds


async def warm_blocks(client: LocalClient, repeat: int) -> list[float]:
    session = client.session()
    await session.execute("print(1)")
    seconds = []
    for _ in range(repeat):
        started = time.perf_counter()
        await session.execute("print(1)")
        seconds.append(time.perf_counter() - started)
    await session.close()
    return seconds


async def many(client: LocalClient, count: int) -> list[tuple[str, str]]:
    """Memory of `count` live sessions, and the time to open and close them."""
    await one_session(client, "1")
    sessions = [client.session() for _ in range(count)]

    async def everywhere(code: str) -> float:
        started = time.perf_counter()
        outcomes = await asyncio.gather(*(session.execute(code) for session in sessions))
        assert all(outcome.status == "completed" for outcome in outcomes)
        return time.perf_counter() - started

    before = available_mib()
    opening = await everywhere("print(1)")
    idle = before - available_mib()
    shared = proportional_mib(tree(client._zygote._watcher.pid))
    solving = await everywhere(FIRST_SYMPY)
    used = before - available_mib()
    started = time.perf_counter()
    await asyncio.gather(*(session.close() for session in sessions))
    closing = time.perf_counter() - started
    return [
        (f"{count} live sessions, print(1) run in each: memory taken", f"{idle:.0f} MiB"),
        ("- the same by proportional set size, zygote included", f"{shared:.0f} MiB"),
        ("- after each solved a quadratic with sympy", f"{used:.0f} MiB"),
        ("- opening all, each with print(1)", f"{opening:.1f} s"),
        ("- one sympy block in each", f"{solving:.1f} s"),
        ("- closing all", f"{closing:.1f} s"),
    ]


def available_mib() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/meminfo has no MemAvailable")


def proportional_mib(pids: list[int]) -> float:
    total = 0
    for pid in pids:
        try:
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
        except OSError:
            continue
    return total / 1024


if __name__ == "__main__":
    sys.exit(main())
