"""How many tokens the next decode step drafts: as many as is fastest, none if plain decoding is.

A step that is to draft k tokens costs c_k plain steps and yields y_k tokens per sequence; the best k has the greatest
y_k / c_k. A drafter may find nothing, for a part of the batch or for all of it; a step in which nothing was found is a
plain one whatever k was. So, with q the chance that a sequence has a draft and p = 1 - (1 - q)^batch that any has,

    y_k = 1 + q (a_1 + ... + a_k)       a_i   chance that the first i drafts all hold, where there is a draft
    c_k = p d_k + (1 - p) (1 + s)       d_k   time of a step that verified drafts over that of one that did not
                                        s     SEARCH

The rest is measured while serving: times per batch bucket (drafting and verification weigh more in a large batch),
chances over the last steps of all sequences (they are a matter of the text). Only a few lengths are in the running, so
that each is measured often. Tokens do not depend on the choice, so it can follow the clock.

Lengths that are not running must be tried now and then, or a change of text would never be noticed. A trial is one
step, and trials are spaced so that what they lose is at most LOSS of the time; on text that cannot be predicted
decoding is that much slower than without a drafter, plus a few steps at the start. What was never measured is presumed
to be as in the nearest bucket, or as with the longest drafts, and waits for its trial like the rest.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LOSS = 0.012
"""Share of the time that trials of slower lengths may cost."""
KEPT_STEPS = 9
"""Steps of each length whose median time counts, per batch bucket."""
FIRST_STEPS = 2
"""Steps by which a time is known, after one that is not counted (it may compile or capture)."""
FIRST_ASKED = 8
"""Steps at the start that may ask for the longest drafts to learn what they cost."""
MARGIN = 1.02
"""What drafting must gain, as some of the measurements flatter it."""
SEARCH = 0.06
"""What looking for drafts without finding any is presumed to take, in plain steps."""
PRESUMED = 2.0
"""Cost of a step that drafts while there is no measurement at all."""
RATE_STEPS = 48
"""Steps over which a chance is averaged, with weights that fall off."""
HELD_STEPS = 8
"""Steps for which a choice stands, so that choosing costs little."""
RARELY = 400
"""Steps after which another length is tried however little that would cost."""


def lengths(num_draft_tok: int) -> list[int]:
    """The numbers of drafts that are considered: all, half, one, none."""
    return sorted({num_draft_tok, max(1, num_draft_tok // 2), 1, 0}, reverse=True)


@dataclass
class Chance:
    """A mean that forgets."""

    mean: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.count += 1
        self.mean += (value - self.mean) / min(self.count, RATE_STEPS)


class Pace:
    """`drafts` before a decode step, `done` after it."""

    def __init__(self, num_draft_tok: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.lengths = lengths(num_draft_tok)
        self._times: dict[tuple[int, int], deque[float]] = {}
        """By bucket and number of drafts."""
        self._took: dict[tuple[int, int], float] = {}
        """Median of each, once there are enough to decide by."""
        self._seen: dict[tuple[int, int], int] = {}
        self._tried: dict[tuple[int, int], int] = {}
        """Number of the step that last asked for so many drafts."""
        self._found = Chance()
        """q of the module text."""
        self._held = [Chance() for _ in range(num_draft_tok)]
        """a_1, a_2, ..."""
        self._steps = 0
        self._last_trial = 0
        """Number of the last step that tried another length than the best."""
        self._standing: dict[int, tuple[int, int]] = {}
        """By bucket: the chosen length, and for how many steps more."""
        self._started = 0.0
        self._step: tuple[int, int] | None = None
        """Bucket and length of the step that runs, when it is measured."""

    def drafts(self, batch: int) -> int:
        """How many tokens the step for `batch` sequences, about to start, shall draft."""
        bucket = batch.bit_length()
        self._steps += 1
        best, steps = self._standing.get(bucket, (0, 0))
        if steps:
            self._standing[bucket] = best, steps - 1
            if not best:  # nothing to learn but the time, which the first such step tells
                self._step = None
                return 0
        choice = best if steps else self._choose(bucket, batch)
        self._step = (bucket, choice)
        self._tried[self._step] = self._steps
        self._started = self._clock()
        return choice

    def done(self, results: Sequence[tuple[int, int]]) -> None:
        """The step is over; `results` has for each sequence how many drafts it had and how many were accepted."""
        if self._step is None:
            return
        elapsed = self._clock() - self._started
        bucket, choice = self._step
        accepted = [count for drafted, count in results if drafted] if choice else []
        ran = bucket, choice if accepted else 0
        seen = self._seen[ran] = self._seen.get(ran, 0) + 1
        if seen > 1:
            times = self._times.setdefault(ran, deque(maxlen=KEPT_STEPS))
            times.append(elapsed)
            if len(times) >= FIRST_STEPS:
                self._took[ran] = sorted(times)[len(times) // 2]
        if choice:
            self._found.add(len(accepted) / len(results))
        if accepted:
            for i, held in enumerate(self._held[:choice]):
                held.add(sum(count > i for count in accepted) / len(accepted))

    def _choose(self, bucket: int, batch: int) -> int:
        if (bucket, 0) not in self._took:
            return 0
        if self._found.count < FIRST_ASKED and self._cost(bucket, self.lengths[0]) is None:
            return self.lengths[0]
        gives, costs = self._gives(), self._costs(bucket, batch)
        best = max(self.lengths, key=lambda length: gives[length] / costs[length])
        others = (length for length in self.lengths if length != best)
        other = min(others, key=lambda length: self._tried.get((bucket, length), 0))
        # A trial loses its time less what the best length would need for the same tokens; in steps of that length.
        lost = costs[other] / costs[best] - gives[other] / gives[best]
        due = min(RARELY, max(1.0, lost / LOSS))
        since = self._steps - self._last_trial
        if since >= due:
            self._last_trial = self._steps
            return other
        self._standing[bucket] = best, min(HELD_STEPS - 1, max(0, int(due) - since - 1))
        return best

    def _gives(self) -> dict[int, float]:
        """y_k of the module text."""
        held = [chance.mean * self._found.mean for chance in self._held]
        return {length: 1 + sum(held[:length]) for length in self.lengths}

    def _costs(self, bucket: int, batch: int) -> dict[int, float]:
        """c_k of the module text, with the margin."""
        drafted = 1 - (1 - self._found.mean) ** batch
        full = self._cost(bucket, self.lengths[0]) or PRESUMED
        costs = {k: drafted * (self._cost(bucket, k) or full) + (1 - drafted) * (1 + SEARCH) for k in self.lengths}
        return {k: MARGIN * cost if k else 1.0 for k, cost in costs.items()}

    def _cost(self, bucket: int, drafts: int) -> float | None:
        """d_k of the module text, of the nearest bucket where it is known; None while it is nowhere."""
        took = self._took
        if (bucket, drafts) not in took:
            known = [b for b, ran in took if ran == drafts and (b, 0) in took]
            if not known:
                return None
            bucket = min(known, key=lambda b: abs(b - bucket))
        return took[bucket, drafts] / took[bucket, 0]
