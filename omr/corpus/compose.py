"""Examples: one problem with its solution, made from (split, seed, index) alone.

    split    wordings used                    phrasing noise   slips
    train    the training wordings            yes              yes
    dev      as train | the dev wordings      no               no     choosing between seeds and recipes
    test     as train                         no               no     benchmarks, frozen as jsonl before training
    unseen   the unseen wordings              no               no     likewise

What a solution looks like, by share of the training examples (`Mix`): most call Python once or twice; some meet an error
in the output block and correct it; some answer at once, either because the question is easy or because the user asked for
no code; a few had their call left unexecuted and answer from what they know.

A held-out problem never occurs in training: neither its text nor (families with room enough) the same numbers in the same
family. `Guard` holds the held-out problems and `training_examples` leaves what they claim out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from random import Random
from string import Template
from typing import Literal

from omr.corpus import phrasing
from omr.corpus.family import Family, TwoCalls, Values, nouns, say, write
from omr.corpus.notebook import Notebook, traceback_text

Split = Literal["train", "dev", "dev_wordings", "test", "unseen"]
REVISION = 2
"""Bump when an example's text changes for the same (split, seed, index). Those of test and unseen never may."""
FROZEN_WORDINGS = 10
"""The first so many training wordings of a family, all there were when the benchmarks were frozen."""


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Shares of the training examples. Of tool solutions unless said otherwise."""

    slip: float = 0.27
    """One typical slip at the code's two-way choice, with its real output and the wrong answer."""
    error: float = 0.05
    """A first call that raises (a forgotten import, a misspelt print), then the corrected one."""
    no_code: float = 0.1
    """Of all: the user asks for no code, and the answer comes at once, right whatever it takes."""
    unexecuted: float = 0.03
    """A call that nobody ran: the answer follows at once."""
    easy_direct: float = 0.8
    """Of the easy families' examples: answered without a tool though one is there."""
    noise: float = 0.6
    """Of all: phrasing noise in the problem (openers, closing remarks, lost small words)."""


MIX = Mix()


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a solution, and whether the model writes it (an output block is handed to it)."""

    text: str
    by_model: bool


@dataclass(frozen=True, kw_only=True)
class Example:
    id: str
    family: str
    wording: str
    """Family, kind and number of the template, for example gcd/unseen/1."""
    problem: str
    answer: str
    pieces: tuple[Piece, ...] = field(repr=False)
    instruction: str = "generic/math"
    """The user turn that the problem stands in; see omr/corpus/phrasing.py."""
    kind: Literal["tool", "two_calls", "error", "direct", "unexecuted"] = "tool"
    slip: bool = False

    @property
    def solution(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def user(self) -> str:
        """The whole user turn."""
        return phrasing.INSTRUCTIONS[self.instruction].replace("{problem}", self.problem)


@cache
def families() -> dict[str, Family]:
    """All families by name, in a fixed order."""
    from omr.corpus import algebra, arithmetic, counting, easy, geometry, gym, number_theory, stories

    groups = (arithmetic, number_theory, algebra, counting, geometry, stories, easy, gym)
    known = {f.name: f for group in groups for f in group.FAMILIES}
    assert len(known) == sum(len(group.FAMILIES) for group in groups), "two families share a name"
    return known


@cache
def _deal(training: bool) -> tuple[str, ...]:
    """The families in one fixed shuffled order: any run of examples spreads over all groups.

    In training, families that need more practice (facts known by heart, long strings to copy) come more than once.
    """
    names = list(families())
    Random("deal").shuffle(names)
    if training:
        more = [n for n in names if families()[n].easy] * 2 + ["letters_arranged", "letter_count", "from_hex"]
        names += more
        Random("deal more").shuffle(names)
    return tuple(names)


def example(split: Split, seed: int, index: int, mix: Mix = MIX) -> Example:
    """Example number `index`. Families take turns, so every len(families()) examples hold each family once."""
    names = _deal(split == "train")
    chosen = families()[names[index % len(names)]]
    frozen = split in ("test", "unseen")
    rng = Random(f"omr-corpus/{'1/' if frozen else ''}{split}/{seed}/{index}")
    values = {**nouns(rng), **chosen.draw(rng)}
    kind = {"dev_wordings": "dev", "unseen": "unseen"}.get(split, "train")
    templates = chosen.of_split(kind)[: FROZEN_WORDINGS if frozen else None]
    number = rng.randrange(len(templates))
    training = split == "train"
    if training and rng.random() < mix.noise:
        problem = phrasing.noisy(say(phrasing.reframed(templates[number], rng), values, rng), rng)
    else:
        problem = say(templates[number], values, rng)
    instruction = phrasing.draw_instruction(rng, no_code=mix.no_code) if training else "generic/math"
    copied = "" if chosen.easy else _numbers_line(values, problem)
    made = _solve(chosen, values, rng, mix if training else _CLEAN, phrasing.forbids_code(instruction), copied)
    return Example(
        id=f"{split}/{seed}/{index}",
        family=chosen.name,
        wording=f"{chosen.name}/{kind}/{number}",
        problem=problem,
        instruction=instruction,
        answer=made.answer,
        pieces=tuple(made.pieces),
        kind=made.kind,
        slip=made.slip,
    )


def examples(split: Split, seed: int, count: int, *, start: int = 0, mix: Mix = MIX) -> Iterator[Example]:
    """Examples start, start + 1, ... with no problem text twice: a repeated one is passed over, not counted."""
    seen: set[str] = set()
    index = start
    barren = 0
    while len(seen) < count:
        made = example(split, seed, index, mix)
        index += 1
        if made.problem in seen:
            barren += 1
            assert barren < 20 * len(families()) + 10 * count, f"{split}: no new problems after {index} tries"
            continue
        seen.add(made.problem)
        yield made


def training_examples(seed: int, start: int, stop: int, guard: Guard, mix: Mix = MIX) -> Iterator[Example]:
    """Training examples number start .. stop - 1, less those that the guard holds back."""
    for index in range(start, stop):
        made = example("train", seed, index, mix)
        if not guard.claims(made.family, made.problem):
            yield made


class Guard:
    """The problems that training must not contain."""

    def __init__(self, held_out: Iterable[tuple[str, str]]) -> None:
        """`held_out`: (family, problem)."""
        self._texts: set[str] = set()
        self._numbers: set[tuple[str, tuple[str, ...]]] = set()
        for name, problem in held_out:
            self._texts.add(_plain(problem))
            if name in families() and not families()[name].easy:
                self._numbers.add((name, _numbers(problem)))

    def claims(self, name: str, problem: str) -> bool:
        return _plain(problem) in self._texts or (name, _numbers(problem)) in self._numbers


def _plain(problem: str) -> str:
    return " ".join(problem.lower().split())


def _numbers(problem: str) -> tuple[str, ...]:
    """What a wording cannot change: the numbers, else (a word puzzle) what stands in quotes, else all of it."""
    found = sorted(re.findall(r"[0-9a-zA-Z]*\d[0-9a-zA-Z]*", problem)) or re.findall(r'"(.*?)"', problem)
    return tuple(found) or (_plain(problem),)


_CLEAN = Mix(slip=0.0, error=0.0, no_code=0.0, unexecuted=0.0, easy_direct=1.0, noise=0.0)


@dataclass
class _Solution:
    answer: str
    pieces: list[Piece] = field(default_factory=list)
    kind: Literal["tool", "two_calls", "error", "direct", "unexecuted"] = "tool"
    slip: bool = False


def _numbers_line(values: Values, problem: str) -> str:
    """The problem's numbers in their order, said before any is used: copying is then one skill, the same in all families.

    Empty for problems whose values are no plain numbers (lists, texts).
    """
    if any(not isinstance(v, int) for k, v in values.items() if k not in _WORDS):
        return ""
    return f" The numbers are {', '.join(re.findall('[0-9]+', problem))}."


_WORDS = frozenset({"name", "name2", "item", "item2", "place", "gym_answer"})


def _solve(chosen: Family, values: Values, rng: Random, mix: Mix, forbidden: bool, copied: str) -> _Solution:
    code = rng.choice(chosen.codes)
    raw = _right_output(code, values)
    right = raw.strip()
    plan = say(rng.choice(chosen.plans), values, rng)
    if forbidden or (chosen.easy and rng.random() < mix.easy_direct):
        lead = rng.choice(chosen.direct) if chosen.direct else plan + " " + rng.choice(phrasing.DIRECT_ENDS)
        text = say(lead, {**values, "answer": right}, rng)
        return _Solution(answer=right, pieces=[Piece(text=text, by_model=True)], kind="direct")
    lead = f"{plan}{copied} {rng.choice(phrasing.LEADS)}\n"
    if rng.random() < mix.unexecuted and isinstance(code, str):
        text = f"{lead}{_call(write(code, values, slip=False))}\n{rng.choice(phrasing.UNEXECUTED)} \\boxed{{{right}}}."
        return _Solution(answer=right, pieces=[Piece(text=text, by_model=True)], kind="unexecuted")
    slip = rng.random() < mix.slip
    made = _Solution(answer=right, slip=slip, pieces=[Piece(text=lead, by_model=True)])
    notebook = Notebook()
    if chosen.stumble is not None and mix.slip > 0 and rng.random() < chosen.stumble.rate:
        _stumble(made, write(chosen.stumble.code, values, slip=False), chosen.stumble.remark, notebook, rng)
    elif rng.random() < mix.error:
        first = write(code if isinstance(code, str) else code.first, values, slip=slip)
        _stumble(made, *_typo(first, rng), notebook, rng)
    if isinstance(code, str):
        shown = _run(made, write(code, values, slip=slip), notebook, None if slip else raw)
    else:
        out = _run(made, write(code.first, values, slip=slip), notebook)
        known = {**values, "out": out}
        made.pieces.append(Piece(text=say(code.between, known, rng) + "\n", by_model=True))
        shown = _run(made, write(code.second, known, slip=slip), notebook)
        made.kind = "two_calls" if made.kind == "tool" else made.kind
    end = Template(rng.choice(phrasing.ENDS)).substitute(answer=shown)
    made.pieces.append(Piece(text=end, by_model=True))
    return made


def _right_output(code: str | TwoCalls, values: Values) -> str:
    """What the code prints in the end when it makes no slip."""
    notebook = Notebook()
    blocks = [code] if isinstance(code, str) else [code.first, code.second]
    printed = ""
    for block in blocks:
        printed, error = notebook.run(write(block, {**values, "out": printed.strip()}, slip=False))
        assert error is None, f"{block!r} raised {error!r} for {values}"
    return printed


def _call(code: str) -> str:
    return f"<tool_call>\n{code}\n</tool_call>"


def _run(made: _Solution, code: str, notebook: Notebook, known: str | None = None) -> str:
    """Append a call and its output block; returns what it printed. `known`: what it printed when it ran before."""
    if known is None:
        known, error = notebook.run(code)
        assert error is None, f"{code!r} raised {error!r}"
    printed = known
    made.pieces.append(Piece(text=_call(code), by_model=True))
    made.pieces.append(Piece(text=f"\n```output\n{printed}```\n", by_model=False))
    return printed.strip()


def _stumble(made: _Solution, code: str, remark: str, notebook: Notebook, rng: Random) -> None:
    """Append a call that raises, its traceback, and what the model says to that."""
    printed, error = notebook.run(code)
    assert error is not None, f"{code!r} should have raised"
    shown = printed + traceback_text(error, code, rng)
    made.pieces.append(Piece(text=_call(code), by_model=True))
    made.pieces.append(Piece(text=f"\n```output\n{shown}```\n", by_model=False))
    made.pieces.append(Piece(text=remark + "\n", by_model=True))
    made.kind = "error"


def _typo(code: str, rng: Random) -> tuple[str, str]:
    """The code with a mistake that raises NameError, and a remark on it."""
    first, _, rest = code.partition("\n")
    if first.startswith(("import ", "from ")):
        return rest, "The import is missing. Let me add it."
    return code.replace("print(", "prnt(", 1), rng.choice(
        ("I misspelt print. Let me fix it.", "That was a typo. Again:")
    )
