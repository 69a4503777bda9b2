"""Reading an LLM judge: whether it says that two answers are the same.

The judge sees model-written text, which may try to speak to it; only the judge's own last `Judgement:` line counts, and
the answer is cut to what an answer can be.
"""

from __future__ import annotations

import re

from omr.solve.answer import MAX_CHARS, number, undress
from omr.solve.prompt import Message, Prompt
from omr.solve.select import without_thought

_JUDGEMENT = re.compile(r"judge?ment\W{0,6}(yes|no)\b", re.IGNORECASE)


def question(prompt: Prompt, *, problem: str, expected: str, predicted: str) -> list[Message]:
    """The messages that ask for a judgement."""
    places = {"problem": problem, "expected_answer": expected, "predicted_answer": predicted[:MAX_CHARS]}
    return prompt.fill(places)


def verdict(reply: str) -> bool | None:
    """True for yes, False for no, by the last `Judgement:` line; None when there is none."""
    said = _JUDGEMENT.findall(without_thought(reply))
    return None if not said else said[-1].lower() == "yes"


def is_open(predicted: str, expected: str) -> bool:
    """Whether a judge could see more than arithmetic does: not if both are plain numbers."""
    return number(undress(predicted)) is None or number(undress(expected)) is None
