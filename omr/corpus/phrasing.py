"""Words around the problem and the solution: instructions, openers, noise, leads and ends.

Noise is what teaches a small model to look at several words of a question instead of one fixed phrase: without it, a
wording it never saw is taken for whichever family shares its first words.
"""

from __future__ import annotations

import re
from random import Random

INSTRUCTIONS = {
    "generic/math": (
        "Solve the following math problem. Make sure to put the answer (and only answer) inside \\boxed{}.\n\n{problem}"
    ),
    "openmath/tir": (
        "Solve the following math problem, integrating natural language reasoning with Python code executions.\n"
        "You may perform up to 8 Python code calls to assist your reasoning.\n"
        "Make sure to put the answer (and only answer) inside \\boxed{}.\n\n{problem}"
    ),
    "plain": "{problem}",
    "suffix": "{problem}\n\nPut the answer inside \\boxed{}.",
    "prefix": "Answer this question and put the result inside \\boxed{}.\n{problem}",
    "tiny/direct": (
        "Solve the following math problem without writing code. Make sure to put the answer (and only answer) inside "
        "\\boxed{}.\n\n{problem}"
    ),
    "no_code": "{problem}\n\nAnswer directly, with no code. Put the answer inside \\boxed{}.",
}
"""User turns. The first two are the prompts of that name in omr/solve/prompt.py."""
_CODE = {"generic/math": 0.74, "openmath/tir": 0.1, "plain": 0.06, "suffix": 0.05, "prefix": 0.05}
_NO_CODE = {"tiny/direct": 0.7, "no_code": 0.3}

LEADS = (
    "Let me compute it with Python.",
    "I run this in Python.",
    "Python can do this.",
    "We let the code do the work.",
)
ENDS = (
    "The output is $answer, so the answer is \\boxed{$answer}.",
    "The answer is \\boxed{$answer}.",
    "The code prints $answer. The final answer is \\boxed{$answer}.",
    "So we get \\boxed{$answer}.",
)
DIRECT_ENDS = ("The answer is \\boxed{$answer}.", "This gives \\boxed{$answer}.")
UNEXECUTED = ("There is no output. My answer is", "Without the output, I answer")

_OPENERS = (
    "Here is a question.",
    "Please help me with this.",
    "A small task:",
    "Question:",
    "Hello!",
    "I need help.",
    "This is from my homework.",
    "Consider this problem.",
    "Can you solve this?",
    "Problem 3.",
    "A riddle for you:",
    "My teacher asks:",
    "Think carefully.",
    "One more:",
    "It is raining today.",
    "Now then:",
)
_REMARKS = (
    "Thank you.",
    "Please explain.",
    "Give a short answer.",
    "Be careful.",
    "Take your time.",
    "I could not solve it.",
    "Please show how.",
    "What is the answer?",
    "Only the result counts.",
    "Use what you know.",
)
_SMALL = frozenset("the a an of is are do does that this there then and you we it in to for by with on at be its".split())
_SWAPS = {
    "number": ("integer", "value", "whole number"),
    "numbers": ("integers", "values", "whole numbers"),
    "find": ("compute", "get", "determine", "look for"),
    "compute": ("find", "get", "calculate"),
    "determine": ("find", "work out"),
    "calculate": ("find", "compute"),
    "what": ("which number",),
    "sum": ("total",),
    "total": ("sum",),
    "larger": ("bigger", "greater"),
    "largest": ("biggest", "greatest"),
    "bigger": ("larger", "greater"),
    "greatest": ("largest", "biggest"),
    "smallest": ("least", "lowest"),
    "together": ("in all", "in total", "altogether"),
    "result": ("outcome", "value"),
    "everyone": ("everybody",),
    "different": ("distinct",),
    "distinct": ("different",),
    "has": ("owns", "got"),
    "costs": ("is sold for",),
    "times": ("times exactly",),
    "positive": ("natural",),
    "buys": ("gets", "takes"),
    "left": ("remaining",),
    "made": ("built", "formed"),
    "chosen": ("picked", "selected"),
    "choose": ("pick", "select"),
    "ways": ("possibilities",),
    "begins": ("starts",),
    "starts": ("begins",),
    "each": ("every",),
    "every": ("each",),
}


def draw_instruction(rng: Random, *, no_code: float) -> str:
    table = _NO_CODE if rng.random() < no_code else _CODE
    return rng.choices(list(table), weights=list(table.values()))[0]


def forbids_code(instruction: str) -> bool:
    return instruction in _NO_CODE


def noisy(problem: str, rng: Random) -> str:
    """The problem with an opener or remark around it, words swapped for others, and now and then a small word lost.

    Numbers, names and what stands in quotes are never touched.
    """
    words = problem.split(" ")
    drop, swap = rng.choice((0.0, 0.1, 0.25)), rng.choice((0.0, 0.2, 0.5))
    lose = rng.choice((0.0, 0.0, 0.04))
    kept = []
    quoted = False
    for word in words:
        quoted_here = quoted or word.startswith('"')
        if word.count('"') % 2:
            quoted = not quoted
        bare = re.fullmatch(r"([A-Za-z]+)([,.?:]?)", word)
        if bare is None or quoted_here:
            kept.append(word)
            continue
        text, tail = bare.group(1), bare.group(2)
        low = text.lower()
        if low in _SWAPS and rng.random() < swap:
            new = rng.choice(_SWAPS[low])
            kept.append((new.capitalize() if text[0].isupper() else new) + tail)
        elif not tail and ((low in _SMALL and rng.random() < drop) or (text == low and rng.random() < lose)):
            continue
        else:
            kept.append(word)
    text = " ".join(kept)
    dice = rng.random()
    if dice < 0.35:
        text = f"{rng.choice(_OPENERS)} {text}"
    elif dice < 0.55:
        text = f"{text} {rng.choice(_REMARKS)}"
    if rng.random() < 0.1:
        text = text.rstrip(".?")
    if rng.random() < 0.1:
        text = text[0].lower() + text[1:]
    return text
