"""Runs the corpus's own code while examples are made: one namespace per solution, a time limit per block.

This is no sandbox. It executes templates of this package with drawn numbers in them, never a model's code. The time limit
catches a slip that loops for ever; it uses SIGALRM and so needs the main thread (elsewhere blocks run without a limit).
"""

from __future__ import annotations

import contextlib
import io
import signal
import threading
from collections.abc import Iterator
from random import Random
from typing import Any

LIMIT_S = 10.0


class BlockTimeout(Exception):
    """A block ran past its limit: the template is wrong."""


class Notebook:
    """Variables survive from block to block."""

    def __init__(self) -> None:
        self._names: dict[str, Any] = {"__name__": "__main__"}

    def run(self, code: str) -> tuple[str, Exception | None]:
        """What the block printed, and what it raised. A block over the limit raises BlockTimeout here."""
        out = io.StringIO()
        try:
            with contextlib.redirect_stdout(out), _limit(LIMIT_S):
                exec(compile(code, "<cell>", "exec"), self._names)
        except BlockTimeout:
            raise
        except Exception as error:
            return out.getvalue(), error
        return out.getvalue(), None


def traceback_text(error: Exception, code: str, rng: Random) -> str:
    """An error as an interpreter shows it. Interpreters differ in the lines before the last, so several forms occur."""
    name, last = (
        rng.choice(("<cell>", "<stdin>", "<string>", "<block 1>", "cell.py")),
        f"{type(error).__name__}: {error}\n",
    )
    trace, line_no = error.__traceback__, 1
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<cell>":
            line_no = trace.tb_lineno
        trace = trace.tb_next
    form = rng.randrange(4)
    if form == 0:
        return last
    text = f'Traceback (most recent call last):\n  File "{name}", line {line_no}, in <module>\n'
    if form == 1:
        text += f"    {code.splitlines()[line_no - 1].strip()}\n"
    return text + last


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(_signum: int, _frame: Any) -> None:
        raise BlockTimeout(f"a block ran for more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
