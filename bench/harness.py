"""What the harness costs: CPU seconds of omr's own process while a server generates.

    python bench/harness.py [--repeats 3] [--profile] [OVERRIDES...]

Runs whole evaluations of tiny_math with the embedded model, `python -m omr` as anyone would, and reads their
`harness/` metrics (defined in omr/job/_cost.py): what HTTP, event parsing, transcripts, sandbox ends, votes, samples
and progress take, against the wall time of generation and against the CPU time of the server's process. The embedded
model is the worst case there is: a token of it takes a millisecond of one core. Without OVERRIDES, three cases are
run in turn, `--repeats` times; with them, that one. --profile adds a run under cProfile and its costliest functions.
"""

from __future__ import annotations

import argparse
import json
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CASES = {
    "16 at once": [],
    "16 at once, several tokens a step": ["drafter=ngram"],
    "N=16 until decided, 4 at once": [
        "job.num_generations=16",
        "job.stop_when_decided=true",
        "job.max_concurrent_generations=4",
    ],
}
SHARES = ("harness/share_of_wall", "harness/share_of_server_cpu")


PROFILED = """
import cProfile, contextlib, sys, time
from omr.job import _cost

target, cost, profile = sys.argv.pop(1), _cost.harness_cost, cProfile.Profile(time.thread_time)

@contextlib.contextmanager
def profiled(pid):
    with cost(pid) as metrics, profile:
        yield metrics
    profile.dump_stats(target)

_cost.harness_cost = profiled
from omr.__main__ import main
sys.exit(main())
"""
"""`python -m omr` with generation, and nothing else, under a profile of CPU time."""


def evaluate(overrides: list[str], home: Path, number: int, profile: Path | None = None) -> dict[str, float]:
    """Metrics of one run."""
    study = f"harness{number}"
    tool = ["-c", PROFILED, str(profile)] if profile else ["-m", "omr"]
    argv = [sys.executable, *tool, "device=cpu", "tracking_uri=null", f"study={study}", *overrides]
    done = subprocess.run(argv, env={**os.environ, "OMR_HOME": str(home)}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    (summary,) = (home / "multirun" / study).glob("*/0/summary.json")
    metrics: dict[str, float] = json.loads(summary.read_text())["metrics"]
    return metrics


def row(name: str, runs: list[dict[str, float]]) -> dict[str, Any]:
    def middle(metric: str) -> float:
        return statistics.median(run[metric] for run in runs)

    generations, tokens = middle("accuracy/generations"), middle("throughput/output_tok")
    return {
        "case": name,
        "runs": len(runs),
        "generations": int(generations),
        "tokens": int(tokens),
        "output_tok_s": round(middle("throughput/output_tok_s"), 1),
        "generate_s": round(middle("stage/generate_s"), 2),
        "harness_cpu_s": round(middle("harness/cpu_s"), 3),
        "server_cpu_s": round(middle("harness/server_cpu_s"), 2),
        **{f"{share.split('/')[1]}_percent": [round(100 * run[share], 2) for run in runs] for share in SHARES},
        "harness_cpu_ms_per_generation": round(1000 * middle("harness/cpu_s") / generations, 2),
        "harness_cpu_us_per_token": round(1e6 * middle("harness/cpu_s") / tokens, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("overrides", nargs="*", help="of one run, in place of the three cases")
    args = parser.parse_args()
    cases = {" ".join(args.overrides): args.overrides} if args.overrides else CASES
    with tempfile.TemporaryDirectory() as folder:
        home, number = Path(folder), 0
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
        for _ in range(args.repeats):
            for name, overrides in cases.items():
                number += 1
                runs[name].append(evaluate(overrides, home, number))
                print(f"load {os.getloadavg()[0]:.1f}, {name}: done", file=sys.stderr)
        for name, measured in runs.items() if args.repeats else ():
            print(json.dumps(row(name, measured)), flush=True)
        if args.profile:
            profile = home / "profile"
            evaluate(next(iter(cases.values())), home, number + 1, profile)
            pstats.Stats(str(profile)).sort_stats("tottime").print_stats(60)


if __name__ == "__main__":
    main()
