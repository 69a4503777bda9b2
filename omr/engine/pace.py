"""Whether the next decode step speculates: only while that is faster than plain decoding.

A speculative step costs r times a plain one and yields y tokens per sequence; it pays while y > r. Both are measured
while serving: r per batch bucket (drafting and verification weigh more in a large batch), y over the last steps of all
sequences (it is a matter of the text). Tokens do not depend on the choice, so it can follow the clock.

The side that is not running must be tried now and then, or a change of text would never be noticed. A trial is one
step, and trials are spaced so that what they lose is at most LOSS of the time; on text that cannot be predicted
decoding is that much slower than without a drafter, plus a few steps at the start.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable

LOSS = 0.015
"""Share of the time that trials of the slower side may cost."""
KEPT_STEPS = 9
"""Steps of each kind whose median time counts, per batch bucket."""
FIRST_STEPS = 2
"""Steps of each kind before anything is decided, after one that is not counted (it may compile or capture)."""
YIELD_STEPS = 64
"""Speculative steps over which the yield is averaged."""
RARELY = 400
"""Steps after which the other side is tried however little that would cost."""


class Pace:
    """`speculates` before a decode step, `done` after it."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._times: dict[tuple[int, bool], deque[float]] = {}
        self._seen: dict[tuple[int, bool], int] = {}
        self._yields: deque[float] = deque(maxlen=YIELD_STEPS)
        self._since_trial = 0
        self._started = 0.0
        self._step = (0, False)

    def speculates(self, batch: int) -> bool:
        """Whether the step for `batch` sequences, about to start, drafts."""
        bucket = batch.bit_length()
        choice = self._choose(bucket)
        self._step = (bucket, choice)
        self._started = self._clock()
        return choice

    def done(self, tokens_per_sequence: float) -> None:
        """The step is over and gave each sequence that many tokens on average."""
        elapsed = self._clock() - self._started
        seen = self._seen[self._step] = self._seen.get(self._step, 0) + 1
        if seen > 1:
            self._times.setdefault(self._step, deque(maxlen=KEPT_STEPS)).append(elapsed)
        if self._step[1]:
            self._yields.append(tokens_per_sequence)

    def _choose(self, bucket: int) -> bool:
        for kind in (True, False):
            if len(self._times.get((bucket, kind), ())) < FIRST_STEPS:
                return kind
        ratio = self._median(bucket, True) / self._median(bucket, False)
        gain = statistics.fmean(self._yields) / ratio  # speed of speculation over plain decoding
        better = gain > 1
        self._since_trial += 1
        # A trial loses the time that the better side would have needed for the tokens it gives, in steps of that side.
        lost = ratio - gain * ratio if not better else gain - 1
        if self._since_trial >= min(RARELY, max(1.0, lost / LOSS)):
            self._since_trial = 0
            return not better
        return better

    def _median(self, bucket: int, kind: bool) -> float:
        return statistics.median(self._times[bucket, kind])
