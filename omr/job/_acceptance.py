"""Acceptance of drafts: the server's raw counts, each generation's own, and what training had predicted.

One number hides how it was weighted, so three stand side by side:
  - `len_mean_tok` is over verification steps (1 + accepted / drafts): what speed depends on;
  - `len_request_mean_tok` is the mean of every generation's own: what a user sees of a request;
  - `len_token_mean_tok` is that mean weighted by the tokens a generation wrote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omr.server import SpecCounts


def acceptance(counts: SpecCounts) -> dict[str, float]:
    """Rates from raw counts: marginal is over all drafts that reach the position, conditional is marginal over the one
    before: the share of the drafts accepted so far.
    """
    metrics: dict[str, float] = {
        "accept/drafts": counts.drafts,
        "accept/draft_tok": counts.draft_tokens,
        "accept/accepted_tok": counts.accepted_tokens,
    }
    if not counts.drafts:
        return metrics
    metrics["accept/len_mean_tok"] = 1 + counts.accepted_tokens / counts.drafts
    if counts.draft_tokens:
        metrics["accept/rate"] = counts.accepted_tokens / counts.draft_tokens
    before = 1.0
    for position, (accepted, drafted) in enumerate(zip(counts.accepted_per_pos, counts.drafted, strict=True), 1):
        marginal = accepted / drafted if drafted else 0.0
        metrics[f"accept/pos{position}_marginal"] = marginal
        metrics[f"accept/pos{position}_drafted"] = drafted / counts.drafts
        if before and drafted:
            metrics[f"accept/pos{position}_conditional"] = marginal / before
        before = marginal
    for size, (drafts, drafted, accepted) in sorted(counts.by_context.items()):
        metrics[f"accept/context{size}_drafts"] = drafts
        metrics[f"accept/context{size}_len_mean_tok"] = 1 + accepted / drafts
        if drafted:
            metrics[f"accept/context{size}_rate"] = accepted / drafted
    return metrics


def by_generation(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the generations whose server told what it drafted for them; empty when none did."""
    told = [row for row in rows if row.get("num_drafts")]
    if not told:
        return {}
    lengths = [1 + row["num_accepted_tokens"] / row["num_drafts"] for row in told]
    tokens = [row["num_generated_tokens"] for row in told]
    metrics = {
        "accept/generations": float(len(told)),
        "accept/len_request_mean_tok": sum(lengths) / len(told),
        "accept/rate_request_mean": sum(
            row["num_accepted_tokens"] / row["num_draft_tokens"] if row["num_draft_tokens"] else 0.0 for row in told
        )
        / len(told),
    }
    if sum(tokens):
        weighted = sum(length * count for length, count in zip(lengths, tokens, strict=True))
        metrics["accept/len_token_mean_tok"] = weighted / sum(tokens)
    return metrics


def prediction(trained: Mapping[str, float], served: Mapping[str, float]) -> dict[str, float]:
    """What training predicted for drafts as long as those served, and served minus predicted; empty when unknown.

    `trained` holds the drafter's `redrafter{i}_prefix` and `_replay`, `served` the metrics of `acceptance`.
    """
    positions = sum(name.startswith("accept/pos") and name.endswith("_marginal") for name in served)
    prefixes = [trained.get(f"redrafter{i}_prefix") for i in range(positions)]
    known = [share for share in prefixes if share is not None]
    if not known or len(known) < positions or "accept/len_mean_tok" not in served:
        return {}
    reached = [served.get(f"accept/pos{i}_drafted", 1.0) for i in range(1, positions + 1)]  # drafts may be shorter
    predicted, length = 1 + _weighted(known, reached), served["accept/len_mean_tok"]
    metrics = {f"accept/pos{i}_predicted": share for i, share in enumerate(known, 1)}
    metrics |= {"accept/len_predicted_tok": predicted, "accept/len_gap_tok": length - predicted}
    replays = [trained[name] for i in range(positions) if (name := f"redrafter{i}_replay") in trained]
    if len(replays) == positions:
        metrics |= {f"accept/pos{i}_replayed": share for i, share in enumerate(replays, 1)}
        replayed = 1 + _weighted(replays, reached)
        metrics |= {"accept/len_replayed_tok": replayed, "accept/len_replay_gap_tok": length - replayed}
    return metrics


def _weighted(shares: Sequence[float], reached: Sequence[float]) -> float:
    return sum(share * weight for share, weight in zip(shares, reached, strict=True))


RAW = (("drafts", "drafts"), ("draft_tok", "tokens drafted"), ("accepted_tok", "accepted"))


def tables(metrics: Mapping[str, float]) -> list[str]:
    """The section of a report on acceptance; empty without drafts."""
    if "accept/len_mean_tok" not in metrics:
        return []
    raw = (f"{metrics[f'accept/{name}']:,.0f} {what}" for name, what in RAW)
    lines = [
        "",
        "## Acceptance",
        "",
        f"{', '.join(raw)}.",
        "",
        "| acceptance length, tokens a step | value |",
        "| --- | ---: |",
    ]
    for name, what in (
        ("len_mean_tok", "over verification steps"),
        ("len_request_mean_tok", "mean over generations"),
        ("len_token_mean_tok", "mean over generations, weighted by their tokens"),
        ("len_predicted_tok", "predicted on held-out text when the drafter was trained"),
        ("len_gap_tok", "served minus predicted"),
        ("len_replayed_tok", "replayed on the same text, step by step"),
        ("len_replay_gap_tok", "served minus replayed"),
    ):
        if f"accept/{name}" in metrics:
            lines.append(f"| {what} | {metrics[f'accept/{name}']:.3f} |")

    def cell(name: str) -> str:
        return f"{metrics[name]:.3f}" if name in metrics else "-"

    positions = sum(name.startswith("accept/pos") and name.endswith("_marginal") for name in metrics)
    if positions:
        lines += [
            "",
            "| draft position | accepted of drafts that long | predicted | replayed | accepted if the one before was |",
        ]
        lines += ["| --- | ---: | ---: | ---: | ---: |"]
        for i in range(1, positions + 1):
            shares = (cell(f"accept/pos{i}_{kind}") for kind in ("marginal", "predicted", "replayed", "conditional"))
            lines.append(f"| {i} | {' | '.join(shares)} |")
    sizes = sorted(
        int(name.removeprefix("accept/context").removesuffix("_drafts"))
        for name in metrics
        if name.startswith("accept/context") and name.endswith("_drafts")
    )
    if sizes:
        lines += [
            "",
            "| context, tokens | drafts | acceptance length | accepted of drafted |",
            "| --- | ---: | ---: | ---: |",
        ]
        for size in sizes:
            length, rate = (cell(f"accept/context{size}_{kind}") for kind in ("len_mean_tok", "rate"))
            low = 1 if size == sizes[0] else size // 2 + 1
            lines.append(f"| {low} to {size} | {metrics[f'accept/context{size}_drafts']:.0f} | {length} | {rate} |")
    return lines
