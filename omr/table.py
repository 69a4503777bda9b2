"""The comparison of several runs: a Markdown table and one plot, from the summaries they left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
"""A run's summary: run_id, status, reason, name, choices, metrics."""


def write(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write table.md, and comparison.png when there is something to draw; return what was written."""
    markdown = folder / "table.md"
    markdown.write_text(table(rows))
    drawn = [row for row in rows if "accuracy/pass_at_1" in row["metrics"]]
    if not drawn:
        return [markdown]
    picture = folder / "comparison.png"
    plot(drawn, picture)
    return [markdown, picture]


def table(rows: Sequence[Row]) -> str:
    """One line a run: the choices that differ, accuracy with its interval, speed, acceptance, where it comes from."""
    varying = differing(rows)
    maj = sorted(
        {m for row in rows for m in row["metrics"] if m.startswith("accuracy/maj_at_")},
        key=lambda name: int(name.rsplit("_", 1)[1]),
    )[-1:]
    columns = [
        *varying,
        "pass@1 % [95 % CI]",
        *[f"maj@{m.rsplit('_', 1)[1]} %" for m in maj],
        "output tok/s",
        "accept. length",
        "TTFT p50 ms",
        "TPOT p50 ms",
        "E2E p50 / p95 s",
        "run",
    ]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        got = row["metrics"]
        cells = [
            *[str(row["choices"].get(group, "")) for group in varying],
            _accuracy(got),
            *[_number(got, m, 1, 100) for m in maj],
            _number(got, "throughput/output_tok_s", 0),
            _number(got, "accept/len_mean_tok", 2),
            _number(got, "latency/ttft_p50_ms", 0),
            _number(got, "latency/tpot_p50_ms", 2),
            f"{_number(got, 'latency/e2e_p50_s', 2)} / {_number(got, 'latency/e2e_p95_s', 2)}",
            _origin(row),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def differing(rows: Sequence[Row]) -> list[str]:
    """The groups whose choice is not the same in every run; `quant` and `drafter` if none differs."""
    groups = dict.fromkeys(group for row in rows for group in row["choices"])
    found = [g for g in groups if len({row["choices"].get(g) for row in rows}) > 1]
    return found or ["quant", "drafter"]


def _number(metrics: Mapping[str, float], name: str, digits: int, scale: float = 1) -> str:
    return f"{metrics[name] * scale:.{digits}f}" if name in metrics else "-"


def _accuracy(metrics: Mapping[str, float]) -> str:
    if "accuracy/pass_at_1" not in metrics:
        return "-"
    low, high = (_number(metrics, f"accuracy/pass_at_1_{end}", 1, 100) for end in ("low", "high"))
    return f"{_number(metrics, 'accuracy/pass_at_1', 1, 100)} [{low}, {high}]"


def _origin(row: Row) -> str:
    run = str(row["run_id"])
    run = run if run == "untracked" else run[:8]
    return {"FINISHED": run, "SKIPPED": f"{run} (finished before)"}.get(row["status"], f"{run} {row['status']}")


def plot(rows: Sequence[Row], path: Path) -> None:
    """Accuracy with its interval, output tokens per second and acceptance length, a bar for each run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    varying = differing(rows)
    names = ["\n".join(str(row["choices"].get(g, "")) for g in varying) for row in rows]
    figure, axes = plt.subplots(1, 3, figsize=(4 + 2.2 * len(rows), 3.6), layout="constrained")
    at = range(len(rows))
    values = [100 * row["metrics"]["accuracy/pass_at_1"] for row in rows]
    low = [v - 100 * r["metrics"].get("accuracy/pass_at_1_low", v / 100) for v, r in zip(values, rows, strict=True)]
    high = [100 * r["metrics"].get("accuracy/pass_at_1_high", v / 100) - v for v, r in zip(values, rows, strict=True)]
    axes[0].bar(at, values, yerr=[low, high], capsize=4, color="#4878a8")
    axes[0].set_title("pass@1, % (95 % interval)")
    axes[0].set_ylim(0, 100)
    for axis, metric, title in (
        (axes[1], "throughput/output_tok_s", "output tokens per second"),
        (axes[2], "accept/len_mean_tok", "mean acceptance length, tokens"),
    ):
        bars = axis.bar(at, [row["metrics"].get(metric, 0.0) for row in rows], color="#4878a8")
        axis.bar_label(bars, fmt="%.3g")
        axis.set_title(title)
    for axis in axes:
        axis.set_xticks(list(at), names, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
