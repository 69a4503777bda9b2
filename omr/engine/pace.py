"""How many tokens the next decode step drafts: as many as is fastest, none if plain decoding is.

A step with k drafts costs t_k and yields y_k tokens per sequence; the best k has the greatest y_k / t_k. Both are
measured while serving: t_k per batch bucket (drafting and verification weigh more in a large batch), the chance that
the first i drafts all hold over the last steps of all sequences (it is a matter of the text); y_k is 1 plus its sum up
to k. Only a few lengths are in the running, so that each is measured often. Tokens do not depend on the choice, so it
can follow the clock.

Lengths that are not running must be tried now and then, or a change of text would never be noticed. A trial is one
step, and trials are spaced so that what they lose is at most LOSS of the time; on text that cannot be predicted
decoding is that much slower than without a drafter, plus a few steps at the start.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

LOSS = 0.012
"""Share of the time that trials of slower lengths may cost."""
KEPT_STEPS = 9
"""Steps of each length whose median time counts, per batch bucket."""
FIRST_STEPS = 2
"""Steps of each length before anything is decided, after one that is not counted (it may compile or capture)."""
RATE_STEPS = 48
"""Steps over which an acceptance rate is averaged, with weights that fall off."""
HELD_STEPS = 4
"""Steps for which a choice stands, so that choosing costs little."""
RARELY = 400
"""Steps after which another length is tried however little that would cost."""


def lengths(num_draft_tok: int) -> list[int]:
    """The numbers of drafts that are considered: all, half, one, none."""
    return sorted({num_draft_tok, max(1, num_draft_tok // 2), 1, 0}, reverse=True)


class Pace:
    """`drafts` before a decode step, `done` after it."""

    def __init__(self, num_draft_tok: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.lengths = lengths(num_draft_tok)
        self._times: dict[tuple[int, int], deque[float]] = {}
        self._took: dict[tuple[int, int], float] = {}
        """Median of each, once there are enough to decide by."""
        self._seen: dict[tuple[int, int], int] = {}
        self._tried: dict[tuple[int, int], int] = {}
        """Number of the step at which a length was last run."""
        self._rates = [0.0] * num_draft_tok
        """Share of drafts whose first i + 1 tokens were all accepted."""
        self._rated = [0] * num_draft_tok
        self._gives = dict.fromkeys(self.lengths, 1.0)
        """Tokens of a step with so many drafts."""
        self._steps = 0
        self._since_trial = 0
        self._held: dict[int, tuple[int, int]] = {}
        """By bucket: the chosen length, and for how many steps more."""
        self._started = 0.0
        self._step = (0, 0)

    def drafts(self, batch: int) -> int:
        """How many tokens the step for `batch` sequences, about to start, shall draft."""
        bucket = batch.bit_length()
        choice = self._choose(bucket)
        self._step = (bucket, choice)
        self._steps += 1
        self._tried[self._step] = self._steps
        self._started = self._clock()
        return choice

    def done(self, accepted: Sequence[int]) -> None:
        """The step is over; `accepted` drafts of each sequence that had any."""
        elapsed = self._clock() - self._started
        seen = self._seen[self._step] = self._seen.get(self._step, 0) + 1
        if seen > 1:
            times = self._times.setdefault(self._step, deque(maxlen=KEPT_STEPS))
            times.append(elapsed)
            if len(times) >= FIRST_STEPS:
                self._took[self._step] = sorted(times)[len(times) // 2]
        if not accepted:
            return
        for i in range(self._step[1]):
            share = sum(count > i for count in accepted) / len(accepted)
            self._rated[i] += 1
            self._rates[i] += (share - self._rates[i]) / min(self._rated[i], RATE_STEPS)
        self._gives = {length: 1 + sum(self._rates[:length]) for length in self.lengths}

    def _choose(self, bucket: int) -> int:
        self._since_trial += 1
        best, steps = self._held.get(bucket, (0, 0))
        if steps:
            self._held[bucket] = best, steps - 1
            return best
        took, gives = self._took, self._gives
        for length in (self.lengths[0], 0, *self.lengths[1:-1]):
            if (bucket, length) not in took:
                return length
        best = max(self.lengths, key=lambda length: gives[length] / took[bucket, length])
        other = min((length for length in self.lengths if length != best), key=lambda o: self._tried[bucket, o])
        # A trial loses its time less what the best length would need for the same tokens; in steps of that length.
        lost = took[bucket, other] / took[bucket, best] - gives[other] / gives[best]
        due = min(RARELY, max(1.0, lost / LOSS))
        if self._since_trial >= due:
            self._since_trial = 0
            return other
        self._held[bucket] = best, min(HELD_STEPS - 1, max(0, int(due) - self._since_trial - 1))
        return best
