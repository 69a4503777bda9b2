"""Words around the problem and the solution: instructions, openers, noise, leads and ends.

Noise is what teaches a small model to look at several words of a question instead of one fixed phrase: without it, a
wording it never saw is taken for whichever family shares its first words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
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
_SMALL = frozenset(
    [
        "the",
        "a",
        "an",
        "of",
        "is",
        "are",
        "do",
        "does",
        "that",
        "this",
        "there",
        "then",
        "and",
        "you",
        "we",
        "it",
        "in",
        "to",
        "for",
        "by",
        "with",
        "on",
        "at",
        "be",
        "its",
    ]
)
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


_NOUN_FRAMES = (
    "What is {}?",
    "Find {}.",
    "{}: what is it?",
    "I want to know {}.",
    "Which number is {}?",
    "Please find {}.",
    "Can you find {}?",
    "We look for {}.",
    "Let us compute {}.",
    "The task is to get {}.",
    "{} is what?",
    "How much is {}?",
    "Your job: {}.",
    "Do you know {}?",
    "Name {}.",
    "My question is {}.",
    "{} = ?",
    "How large is {}?",
    "Show me {}.",
)
_COUNT_FRAMES = (
    "How many {}?",
    "Find how many {}.",
    "Can you say how many {}?",
    "I wonder how many {}.",
    "The question is how many {}.",
    "Say how many {}.",
    "Do you know how many {}?",
    "Please count how many {}.",
)
_NOUN = re.compile(r"(?:@F|@T|What is|How much is|\[What is\|How much is\]) ([^.?]*)[.?]")
_COUNT = re.compile(r"How many ([^.?]*)\?")


def reframed(template: str, rng: Random) -> str:
    """A one-sentence template in another frame: "@F the sum of .." may become "We look for the sum of ..". Often as it is."""
    if rng.random() < 0.4:
        return template
    for pattern, frames in ((_NOUN, _NOUN_FRAMES), (_COUNT, _COUNT_FRAMES)):
        found = pattern.fullmatch(template)
        if found and not found.group(1).startswith(("how ", "many ")):
            return rng.choice(frames).format(found.group(1))
    return template


@cache
def _stray_words() -> tuple[str, ...]:
    """Words that have nothing to do with a problem: from the text that comes with reasoning_gym."""
    from reasoning_gym.data import read_data_file

    words = re.findall(r"\b[a-z]{2,9}\b", read_data_file("in_the_year_2889.txt"))
    return tuple(sorted(set(words)))


def noisy(problem: str, rng: Random) -> str:
    """The problem with words lost, swapped or put in, sentences in another order, an opener or remark around it.

    Numbers, names and what stands in quotes are never touched, so the answer stays the problem's. One case in three is
    heavy: only then is the family left to be told from the words that happen to remain, whichever they are.
    """
    if rng.random() < 0.35:
        sentences = re.split(r"(?<=[a-z)0-9][.?]) (?=[A-Z])", problem)
        if len(sentences) > 1:
            rng.shuffle(sentences)
        problem = " ".join(sentences)
    heavy = rng.random() < 0.35
    drop, swap = rng.choice((0.0, 0.1, 0.25)), rng.choice((0.0, 0.2, 0.5))
    lose = rng.choice((0.1, 0.2, 0.35)) if heavy else rng.choice((0.0, 0.0, 0.04))
    stray = rng.choice((0.0, 0.05, 0.15)) if heavy else 0.0
    text = " ".join(_disturbed(problem.split(" "), rng, drop, swap, lose, stray))
    dice = rng.random()
    if dice < 0.35:
        text = f"{rng.choice(_OPENERS)} {text}"
    elif dice < 0.55:
        text = f"{text} {rng.choice(_REMARKS)}"
    if rng.random() < 0.1:
        text = text.rstrip(".?")
    if rng.random() < 0.1:
        text = text[:1].lower() + text[1:]
    return text


def _disturbed(words: list[str], rng: Random, drop: float, swap: float, lose: float, stray: float) -> Iterator[str]:
    """`drop`: chance that a small word is lost; `lose`: any word; `swap`: by a synonym; `stray`: one put in, or for it."""
    quoted = False
    for word in words:
        inside = quoted or word.startswith('"')
        if word.count('"') % 2:
            quoted = not quoted
        bare = re.fullmatch(r"([A-Za-z]+)([,.?:]?)", word)
        if bare is None or inside:
            yield word
            continue
        text, tail = bare.group(1), bare.group(2)
        low = text.lower()
        if rng.random() < stray:
            new = rng.choice(_stray_words())
            yield new + tail if rng.random() < 0.5 else f"{new} {word}"
        elif low in _SWAPS and rng.random() < swap:
            new = rng.choice(_SWAPS[low])
            yield (new.capitalize() if text[0].isupper() else new) + tail
        elif (low in _SMALL and rng.random() < drop) or rng.random() < lose:
            if tail:
                yield tail
        else:
            yield word
