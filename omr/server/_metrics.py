"""The native server's own figures, as Prometheus text. Names follow vLLM's with the prefix `omr:`.

Latencies are the server's: from the request's arrival to its tokens leaving the engine. What a user feels also holds
the network and the client, so experiments measure on the client's clock and use these for diagnosis.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

from omr.server import SpecCounts
from omr.server._prometheus import BY_CONTEXT, Histogram, histogram, metric, sample

_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_TPOT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_E2E_S = (0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 240.0, 480.0, 960.0)


@dataclass
class Metrics:
    """Counters since the server started. Touched in the event loop's thread only."""

    model: str
    prompt_tokens: int = 0
    generation_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    ttft: Histogram = field(default_factory=lambda: Histogram(_TTFT_S))
    tpot: Histogram = field(default_factory=lambda: Histogram(_TPOT_S))
    e2e: Histogram = field(default_factory=lambda: Histogram(_E2E_S))

    def render(self, *, running: int, waiting: int, kv_usage: float, spec: SpecCounts | None) -> str:
        """The whole page. `kv_usage` is the share of KV blocks in use, 0 to 1."""
        who = {"model_name": self.model}
        parts = [
            _one("num_requests_running", "gauge", "Sequences in the running batch.", running, who),
            _one("num_requests_waiting", "gauge", "Sequences waiting for a place in it.", waiting, who),
            _one("kv_cache_usage_perc", "gauge", "Share of KV blocks in use, 1 is all.", kv_usage, who),
            _one("prompt_tokens_total", "counter", "Prompt tokens of accepted requests.", self.prompt_tokens, who),
            _one("generation_tokens_total", "counter", "Tokens given out.", self.generation_tokens, who),
            metric(
                "omr:request_success_total",
                "counter",
                "Finished sequences by reason.",
                [
                    sample("omr:request_success_total", self.finished[reason], {**who, "finished_reason": reason})
                    for reason in ("stop", "length", "abort")
                ],
            ),
            histogram("omr:time_to_first_token_seconds", "Arrival to first token.", self.ttft, who),
            histogram(
                "omr:request_time_per_output_token_seconds", "(end - first token) / (tokens - 1).", self.tpot, who
            ),
            histogram("omr:e2e_request_latency_seconds", "Arrival to last token.", self.e2e, who),
        ]
        if spec is not None:
            parts += [
                _one("spec_decode_num_drafts_total", "counter", "Steps with a draft, per sequence.", spec.drafts, who),
                _one("spec_decode_num_draft_tokens_total", "counter", "Tokens drafted.", spec.draft_tokens, who),
                _one("spec_decode_num_accepted_tokens_total", "counter", "And accepted.", spec.accepted_tokens, who),
                _per_pos("accepted", "Drafted tokens accepted at each position.", spec.accepted_per_pos, who),
                _per_pos("draft", "Tokens drafted at each position.", spec.drafted_per_pos, who),
                *(_by_context(place, kind, spec, who) for place, kind in enumerate(BY_CONTEXT)),
            ]
        return "".join(parts)


def _per_pos(kind: str, about: str, values: list[int], who: dict[str, str]) -> str:
    name = f"omr:spec_decode_num_{kind}_tokens_per_pos_total"
    return metric(name, "counter", about, [sample(name, n, {**who, "position": str(i)}) for i, n in enumerate(values)])


def _by_context(place: int, kind: str, spec: SpecCounts, who: dict[str, str]) -> str:
    """One counter of `SpecCounts.by_context`; the label is the longest context of its bucket, and not cumulative."""
    name = f"omr:spec_decode_num_{kind}_by_context_total"
    rows = sorted(spec.by_context.items())
    about = f"Of the {kind.replace('_', ' ')}, those of sequences up to `context` tokens long and over half as long."
    return metric(name, "counter", about, [sample(name, n[place], {**who, "context": str(size)}) for size, n in rows])


def _one(name: str, kind: str, about: str, value: float, labels: dict[str, str]) -> str:
    return metric(f"omr:{name}", kind, about, [sample(f"omr:{name}", value, labels)])


class Clock:
    """Times one sequence and reports it to the metrics once."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._arrived_s = time.perf_counter()
        self._first_s: float | None = None

    def tokens(self, count: int) -> None:
        """`count` tokens have come."""
        self._metrics.generation_tokens += count
        if self._first_s is None and count:
            self._first_s = time.perf_counter()
            self._metrics.ttft.observe(self._first_s - self._arrived_s)

    def finish(self, reason: str, num_tokens: int) -> None:
        now_s = time.perf_counter()
        self._metrics.finished[reason] += 1
        if reason == "abort":
            return
        self._metrics.e2e.observe(now_s - self._arrived_s)
        if self._first_s is not None and num_tokens > 1:
            self._metrics.tpot.observe((now_s - self._first_s) / (num_tokens - 1))
