"""omr report STUDY: write experiments/STUDY/report.md from the study's finished runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from omr import table
from omr.cli._tracking import add_uri, summary_of, uri_of
from omr.config import home
from omr.tracker import METRICS, study_runs

SHOWN_TAGS = ("version.torch", "version.transformers", "omr.version", "python", "machine", "git.commit", "git.dirty")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="omr report", description=__doc__)
    parser.add_argument("study")
    parser.add_argument("--out", type=Path, help="folder of the report; default: experiments/STUDY")
    add_uri(parser)
    args = parser.parse_args(argv)
    runs = [run for run in study_runs(uri_of(args), args.study, home()) if run["tags"].get("omr.kind") != "sweep"]
    rows = [summary_of(run) for run in reversed(_newest(runs))]
    folder = args.out or Path("experiments") / args.study
    folder.mkdir(parents=True, exist_ok=True)
    if any("accuracy/pass_at_1" in row["metrics"] for row in rows):
        table.plot([r for r in rows if "accuracy/pass_at_1" in r["metrics"]], folder / "comparison.png")
    (folder / "report.md").write_text(_markdown(args.study, runs, rows, (folder / "comparison.png").exists()))
    print(f"{folder / 'report.md'}: {len(rows)} finished runs of {len(runs)}")
    return 0


def _newest(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest FINISHED run of each fingerprint, newest first."""
    seen: dict[str, dict[str, Any]] = {}
    for run in runs:
        if run["status"] == "FINISHED":
            seen.setdefault(run["tags"].get("omr.fingerprint", run["id"]), run)
    return list(seen.values())


def _markdown(study: str, runs: list[dict[str, Any]], rows: list[dict[str, Any]], picture: bool) -> str:
    lines = [f"# {study}", "", table.table(rows)]
    if picture:
        lines += ["![comparison](comparison.png)", ""]
    lines += ["## Commands", ""]
    lines += [f"- `{row['run_id'][:8]}`: `python -m omr {row['tags'].get('omr.overrides', '')}`" for row in rows]
    lines += ["", "## Environment", ""]
    for tag in SHOWN_TAGS:
        values = sorted({row["tags"][tag] for row in rows if tag in row["tags"]})
        if values:
            lines.append(f"- {tag.removeprefix('version.')}: {', '.join(values)}")
    unfinished = [run for run in runs if run["status"] != "FINISHED"]
    if unfinished:
        lines += ["", "## Not finished", ""]
        lines += [f"- `{r['id'][:8]}` {r['name']}: {r['status']} {r['tags'].get('omr.reason', '')}" for r in unfinished]
    used = [n for n in METRICS if "{" not in n and any(n in row["metrics"] for row in rows)]
    lines += ["", "## What the numbers mean", "", *[f"- `{name}`: {METRICS[name]}" for name in used], ""]
    return "\n".join(lines)
