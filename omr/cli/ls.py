"""omr ls [STUDY]: studies, or the runs of one."""

from __future__ import annotations

import argparse
import time

from omr.cli._tracking import add_uri, uri_of
from omr.config import home
from omr.tracker import studies, study_runs


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="omr ls", description=__doc__)
    parser.add_argument("study", nargs="?")
    add_uri(parser)
    args = parser.parse_args(argv)
    if args.study is None:
        for name, count in studies(uri_of(args), home()).items():
            print(f"{count:5d} runs  {name}")
        return 0
    for run in study_runs(uri_of(args), args.study, home()):
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(run["start_time"] / 1000))
        accuracy = run["metrics"].get("accuracy/pass_at_1")
        shown = f"pass@1 {100 * accuracy:5.1f} %" if accuracy is not None else " " * 14
        print(f"{run['id'][:8]}  {started}  {run['status']:8}  {shown}  {run['name']}")
    return 0
