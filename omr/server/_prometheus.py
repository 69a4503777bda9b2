"""Prometheus text, written and read: the part of the format that inference servers use.

Format: https://prometheus.io/docs/instrumenting/exposition_formats (version 0.0.4). Only gauges, counters and
histograms without created-timestamps are written. Reading keeps samples and drops HELP and TYPE.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from omr.server import SpecCounts

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass
class Histogram:
    """Counts of observations below fixed bounds, and their sum."""

    bounds: Sequence[float]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        assert list(self.bounds) == sorted(self.bounds), self.bounds
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value


def sample(name: str, value: float, labels: Mapping[str, str] | None = None) -> str:
    """One line. Label values are escaped."""
    text = ",".join(f'{k}="{_escaped(v)}"' for k, v in (labels or {}).items())
    number = str(int(value)) if float(value).is_integer() else repr(float(value))
    return f"{name}{{{text}}} {number}" if text else f"{name} {number}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def metric(name: str, kind: str, about: str, samples: Sequence[str]) -> str:
    return "\n".join([f"# HELP {name} {about}", f"# TYPE {name} {kind}", *samples]) + "\n"


def histogram(name: str, about: str, value: Histogram, labels: Mapping[str, str]) -> str:
    lines, below = [], 0
    for bound, count in zip([*map(str, value.bounds), "+Inf"], value.counts, strict=True):
        below += count
        lines.append(sample(f"{name}_bucket", below, {**labels, "le": bound}))
    lines += [sample(f"{name}_count", below, labels), sample(f"{name}_sum", value.total, labels)]
    return metric(name, "histogram", about, lines)


_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?$")
_LABEL = re.compile(r'([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Sample:
    name: str
    labels: Mapping[str, str]
    value: float


def read(text: str) -> Iterator[Sample]:
    """The samples of a metrics page. Lines that are no samples are passed over."""
    for line in text.splitlines():
        match = None if line.startswith("#") else _SAMPLE.match(line.strip())
        if match is None:
            continue
        try:
            value = float(match[3])
        except ValueError:
            continue
        labels = {k: re.sub(r"\\(.)", _unescape, v) for k, v in _LABEL.findall(match[2] or "")}
        yield Sample(match[1], labels, value)


def _unescape(match: re.Match[str]) -> str:
    return "\n" if match[1] == "n" else match[1]


BY_CONTEXT = ("drafts", "draft_tokens", "accepted_tokens")
"""The counters that the native server gives by context length as well, in the order of `SpecCounts.by_context`."""


def spec_counts(text: str, prefix: str) -> SpecCounts | None:
    """vLLM's four speculation counters under `prefix`, summed over engines; None when the page has none of them."""
    totals: dict[str, float] = {}
    contexts: dict[int, list[int]] = {}
    per_pos: dict[str, dict[int, float]] = {"accepted": {}, "draft": {}}
    for one in read(text):
        if not one.name.startswith(prefix):
            continue
        name = one.name.removeprefix(prefix).removesuffix("_total")
        if name.endswith("_tokens_per_pos"):
            row_of = per_pos.setdefault(name.removesuffix("_tokens_per_pos"), {})
            position = int(one.labels.get("position", "0"))
            row_of[position] = row_of.get(position, 0) + one.value
        elif name.endswith("_by_context"):
            row = contexts.setdefault(int(one.labels["context"]), [0, 0, 0])
            row[BY_CONTEXT.index(name.removesuffix("_by_context"))] += int(one.value)
        else:
            totals[name] = totals.get(name, 0) + one.value
    if "drafts" not in totals:
        return None
    return SpecCounts(
        drafts=int(totals["drafts"]),
        draft_tokens=int(totals.get("draft_tokens", 0)),
        accepted_tokens=int(totals.get("accepted_tokens", 0)),
        accepted_per_pos=_in_order(per_pos["accepted"]),
        drafted_per_pos=_in_order(per_pos["draft"]),
        by_context={size: (row[0], row[1], row[2]) for size, row in sorted(contexts.items())},
    )


def _in_order(values: dict[int, float]) -> list[int]:
    return [int(values.get(i, 0)) for i in range(max(values, default=-1) + 1)]
