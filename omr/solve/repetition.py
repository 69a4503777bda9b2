"""Noticing that a model repeats itself: a text that has become a loop, the same code run again and again.

Small models at low temperature, and large ones near their context's end, fall into periods that never end by
themselves; each costs its full token budget. Both tests are strict, so that an honest generation never meets them.
"""

from __future__ import annotations

REPEATS, REPEAT_CHARS = 20, 2000
"""A tail of so many characters made of at least so many equal periods is a loop."""
CHECK_CHARS = 512
"""New text between two looks at the tail."""
REPEATED_CODE = 3
"""The same block with the same output so many times in a row is a loop."""


def is_loop(text: str) -> bool:
    """Whether `text` ends in at least REPEATS equal periods that fill REPEAT_CHARS characters."""
    if len(text) < REPEAT_CHARS:
        return False
    tail = text[-REPEAT_CHARS:]
    probe = tail[-16:]
    before = tail.rfind(probe, 0, len(tail) - 1)
    period = len(tail) - len(probe) - before
    return before >= 0 and period * REPEATS <= REPEAT_CHARS and tail[period:] == tail[:-period]


class CodeRuns:
    """Counts how often in a row one block gave one output."""

    def __init__(self) -> None:
        self._last: tuple[str, str] | None = None
        self._times = 0

    def is_loop(self, code: str, output: str) -> bool:
        """Record a block; True when it is one repetition too many."""
        ran = (code.strip(), output)
        self._times = self._times + 1 if ran == self._last else 1
        self._last = ran
        return self._times >= REPEATED_CODE
