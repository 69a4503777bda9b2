"""omr compare RUN_A RUN_B: the two runs side by side, and a paired verdict on their accuracy."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from omr import stats, table
from omr.cli._tracking import add_uri, summary_of, uri_of
from omr.config import home
from omr.errors import ConfigError
from omr.job._report import problem_scores
from omr.tracker import get_run

SPEED = "throughput/output_tok_s"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="omr compare", description=__doc__)
    parser.add_argument("run_a", help="run id or a unique prefix; `omr ls STUDY` lists them")
    parser.add_argument("run_b")
    parser.add_argument("--margin", type=float, default=2.0, help="points of accuracy that B may lose (default 2)")
    add_uri(parser)
    args = parser.parse_args(argv)
    if not 0 < args.margin < 100:
        raise ConfigError(f"--margin is in points of accuracy, above 0 and below 100; got {args.margin:g}")
    a, b = (get_run(uri_of(args), run, home()) for run in (args.run_a, args.run_b))
    print(table.table([summary_of(a), summary_of(b)]))
    differing = sorted(k for k in {*a["params"], *b["params"]} if a["params"].get(k) != b["params"].get(k))
    for key in differing:
        print(f"  {key}: {a['params'].get(key, '-')} | {b['params'].get(key, '-')}")
    found = stats.paired(_scores(a), _scores(b), margin=args.margin / 100)
    low, high = 100 * found.interval.low, 100 * found.interval.high
    print(
        f"\npaired on {found.problems} problems, B - A: {100 * found.difference:+.1f} points of pass@1 "
        f"[{low:+.1f}, {high:+.1f}] (bootstrap over problems)"
    )
    print(f"votes right only in A: {found.only_a}, only in B: {found.only_b}; exact McNemar p = {found.mcnemar_p:.3g}")
    print(f"verdict: {found.verdict}")
    if SPEED in a["metrics"] and SPEED in b["metrics"]:
        print(f"output tokens per second, B / A: {b['metrics'][SPEED] / a['metrics'][SPEED]:.2f}")
    return 0


def _scores(run: dict[str, Any]) -> dict[str, tuple[float, bool]]:
    folder = Path(run["tags"].get("omr.folder", "/nonexistent"))
    if not folder.is_dir():
        raise ConfigError(f"the folder of run {run['id'][:8]} is not here ({folder}); its problems cannot be paired")
    scores = problem_scores(folder)
    if not scores:
        raise ConfigError(f"run {run['id'][:8]} graded no problem; only graded evaluations can be compared")
    return scores
