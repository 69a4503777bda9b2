"""report.md, problems.csv and metrics.json: an evaluation as people and programs read it."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omr.errors import InputError
from omr.job._acceptance import tables
from omr.job._opinions import opinion_lines
from omr.job._score import Record
from omr.solve.vote import TIE_RULE
from omr.stats import Z95

REPORT, PROBLEMS, METRICS = "report.md", "problems.csv", "metrics.json"
COLUMNS = (
    "id",
    "expected_answer",
    "voted_answer",
    "vote_right",
    "right",
    "generations",
    "votes",
    "runner_up",
    "tied",
    "stopped",
    "cancelled",
    "not_started",
    "spent_tok",
    "saved_tok",
    "tokens",
    "seconds",
    "start_time",
    "end_time",
    "selected_answer",
    "selected_right",
    "picks",
)


def write_problems(records: Sequence[Record], file: Path) -> None:
    """One row a problem: its vote, how many generations were right, how it ended, what it cost."""
    with file.open("w", encoding="utf-8", errors="replace", newline="") as out:
        table = csv.writer(out)
        table.writerow(COLUMNS)
        for r in records:
            table.writerow(
                [
                    r.id,
                    r.expected_answer,
                    r.vote.answer,
                    "" if r.vote_right is None else int(r.vote_right),
                    r.right if r.expected_answer is not None else "",
                    len(r.rows),
                    f"{r.vote.votes:g}",
                    f"{r.vote.runner_up:g}",
                    int(r.vote.tied),
                    r.stopped or "",
                    r.cancelled,
                    r.not_started,
                    r.spent_tok,
                    round(r.saved_tok, 1),
                    sum(row["num_generated_tokens"] for row in r.rows),
                    round(sum(row["generation_time"] for row in r.rows), 3),
                    r.start_time,
                    r.end_time,
                    r.selected.answer if r.selected else "",
                    "" if r.selected_right is None else int(r.selected_right),
                    f"{r.selected.picks}/{r.selected.comparisons}" if r.selected else "",
                ]
            )


def read_problems(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's problems.csv. Raises InputError when the folder has none."""
    file = folder / PROBLEMS
    if not file.is_file():
        raise InputError(f"{folder} holds no {PROBLEMS}: it is not the folder of a finished evaluation")
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def problem_scores(folder: Path) -> dict[str, tuple[float, bool]]:
    """Problem id -> (mean correctness, final answer is right) of a finished evaluation, for `stats.paired`.

    Problems without an expected answer are left out. Raises InputError.
    """
    return {
        row["id"]: (
            int(row["right"]) / max(1, int(row["generations"])),
            (row.get("selected_right") or row["vote_right"]) == "1",
        )
        for row in read_problems(folder)
        if row["right"]
    }


def vote_label(records: Sequence[Record]) -> str:
    """`maj@4` for full votes; what cut them short otherwise, with how many problems it touched."""
    if not records:
        return "maj"
    sizes = sorted({len(r.rows) for r in records})
    full = f"maj@{sizes[0]}" if len(sizes) == 1 else f"maj@{sizes[0]}..{sizes[-1]}"
    stopped = [r.stopped for r in records if r.stopped]
    if not stopped:
        return full
    kinds = sorted({reason.split(" after ")[0] for reason in stopped})
    return f"{full}, stopped early on {len(stopped)} of {len(records)} problems ({', '.join(kinds)})"


def write_metrics(
    metrics: Mapping[str, float], about: Mapping[str, Any], records: Sequence[Record], file: Path
) -> None:
    """All metrics with what is needed to read them: what was run, the vote's label and its tie rule."""
    data = {**about, "vote": {"label": vote_label(records), "ties": TIE_RULE}, "metrics": dict(sorted(metrics.items()))}
    file.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_report(metrics: Mapping[str, float], about: Mapping[str, Any], records: Sequence[Record], file: Path) -> None:
    """A page for a person: accuracy with intervals, speed, how problems ended, faults, what went wrong."""
    lines = [f"# {about.get('title', 'Evaluation')}", ""]
    lines += [f"- {key}: {value}" for key, value in about.items() if key != "title"]
    lines += ["", "## Accuracy", "", *_accuracy(metrics, records)]
    lines += ["", "## Speed", "", "| metric | value |", "| --- | ---: |"]
    lines += [
        f"| {name} | {value:,.4g} |"
        for name, value in sorted(metrics.items())
        if name.split("/")[0] in ("latency", "throughput", "tool")
    ]
    lines += tables(metrics)
    lines += ["", "## How problems ended", "", *_endings(metrics, records)]
    lines += opinion_lines(metrics)
    wrong = [r for r in records if r.answer_right is False]
    if wrong:
        lines += ["", f"## Wrong answers ({len(wrong)})", "", "| problem | expected | answer | right | votes |"]
        lines += ["| --- | --- | --- | ---: | ---: |"]
        lines += [
            f"| {r.id} | {_cell(r.expected_answer)} | {_cell(r.answer)} | {r.right}/{len(r.rows)} "
            f"| {r.vote.votes:g}:{r.vote.runner_up:g} |"
            for r in wrong[:50]
        ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="replace")


def _accuracy(metrics: Mapping[str, float], records: Sequence[Record]) -> list[str]:
    if "accuracy/pass_at_1" not in metrics:
        answered = sum(r.vote.answer is not None for r in records)
        return [
            f"The benchmark has no expected answers: {answered} of {len(records)} problems have a voted answer in "
            f"{PROBLEMS}, and there is no accuracy."
        ]

    def points(name: str) -> str:
        return f"{100 * metrics[name]:.1f}"

    lines = ["| metric | % | 95 % interval |", "| --- | ---: | --- |"]
    lines.append(
        f"| pass@1 | {points('accuracy/pass_at_1')} | [{points('accuracy/pass_at_1_low')}, "
        f"{points('accuracy/pass_at_1_high')}] |"
    )
    lines.append(
        f"| vote ({vote_label(records)}) | {points('accuracy/maj')} | [{points('accuracy/maj_low')}, "
        f"{points('accuracy/maj_high')}] |"
    )
    if "accuracy/select" in metrics:
        lines.append(
            f"| selected (GenSelect) | {points('accuracy/select')} | [{points('accuracy/select_low')}, "
            f"{points('accuracy/select_high')}] |"
        )
    for kind in ("pass", "maj"):
        prefix = f"accuracy/{kind}_at_"
        ks = sorted(int(name.removeprefix(prefix)) for name in metrics if name.removeprefix(prefix).isdigit())
        note = " (expected, ties shared)" if kind == "maj" else ""
        lines += [f"| {kind}@{k}{note} | {points(f'{prefix}{k}')} | |" for k in ks if k > 1]
    lines += [f"| no answer | {points('accuracy/no_answer')} | |", f"| truncated | {points('accuracy/truncated')} | |"]
    if any(r.stopped for r in records):
        lines += [
            "",
            "Problems were stopped early: pass@1 is over the generations kept, and pass@k and maj@k are left out.",
        ]
    n = int(metrics["accuracy/problems"])
    lines += ["", f"A set of {n} problems: {power_note(n)}"]
    return lines


def power_note(n: int, discordant: float = 0.1) -> str:
    """What a paired comparison on `n` problems can show, when the runs disagree on a share `discordant` of them."""
    least = (Z95 + 0.8416) * math.sqrt(discordant / n)
    return (
        f"if two runs disagree on {100 * discordant:.0f} % of them, differences below about {100 * least:.0f} points "
        "are inside the noise."
    )


def _endings(metrics: Mapping[str, float], records: Sequence[Record]) -> list[str]:
    finishes: dict[str, int] = {}
    for row in (row for r in records for row in r.rows):
        finishes[row["finish_reason"]] = finishes.get(row["finish_reason"], 0) + 1
    lines = ["| generations ended by | number |", "| --- | ---: |"]
    lines += [f"| {name} | {count} |" for name, count in sorted(finishes.items(), key=lambda item: -item[1])]
    stopped = [r for r in records if r.stopped]
    if stopped:
        lines += [
            "",
            f"{len(stopped)} problems were stopped early: {metrics['early_stop/cancelled']:.0f} generations cut off "
            f"({sum(r.spent_tok for r in records):,} tokens spent on them), {metrics['early_stop/not_started']:.0f} "
            f"never begun, about {metrics['early_stop/saved_tok']:,.0f} tokens saved.",
        ]
    faults = [(n, v) for n, v in metrics.items() if n.startswith("fault/") and v]
    if faults:
        lines += ["", "Faults: " + ", ".join(f"{n.removeprefix('fault/')} {v:.0f}" for n, v in faults) + "."]
    return lines


def _cell(text: str | None) -> str:
    """Model-written text inside a Markdown table."""
    if text is None:
        return "-"
    clean = text.replace("\n", " ").replace("|", "\\|")
    return f"`{clean[:60]}`" if clean else "-"
