"""A problem family: values drawn from a seed, many wordings of one question, and code that answers it.

Templates (wordings, plans, codes) share a small notation:
    $a          the value drawn under that name; a list reads `3, 5, 7` in words and `[3, 5, 7]` in code
    [x|y|z]     one of these at random, in wordings and plans
    @F @f @T    "Find", "find", "Tell me" and their synonyms
    {{x||y}}    in code only, exactly once: x is right, y is the typical slip. One place with two ways, so that the
                slip keeps its share when sampling sharpens the odds (spread over many places, it would vanish)
    $out        in the second call of a two-call solution: what the first call printed

Wordings stand in wordings/GROUP.txt, a line each. They come in three kinds that never mix: plain ones are for training,
`dev:` for choosing between models, `unseen:` for the published figure on wordings that training never showed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from string import Template

Value = int | str | list[int] | list[str]
Values = dict[str, Value]
Draw = Callable[[Random], Mapping[str, Value]]

SYNONYMS = {
    "@F": ("Find", "Compute", "Calculate", "Determine", "Work out", "Find out"),
    "@f": ("find", "compute", "calculate", "determine", "work out", "find out"),
    "@T": ("Tell me", "Give", "State", "Write down", "Give me", "Report"),
}
NAMES = tuple(
    [
        "Ada",
        "Ben",
        "Cleo",
        "Dan",
        "Eva",
        "Finn",
        "Gina",
        "Hugo",
        "Iris",
        "Jack",
        "Kim",
        "Leo",
        "Mia",
        "Nora",
        "Omar",
        "Pia",
        "Quinn",
        "Rosa",
        "Sam",
        "Tina",
        "Uma",
        "Vera",
        "Will",
        "Zoe",
    ]
)
ITEMS = tuple(
    [
        "apples",
        "pens",
        "books",
        "stamps",
        "marbles",
        "cards",
        "coins",
        "stickers",
        "cookies",
        "shells",
        "beads",
        "oranges",
    ]
)
PLACES = tuple(["shop", "school", "farm", "library", "market", "museum", "garden", "factory", "club", "park"])
_CHOICE = re.compile(r"\[([^\[\]|]*(?:\|[^\[\]|]*)+)\]")
_SLIP = re.compile(r"\{\{(.*?)\|\|(.*?)\}\}", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class TwoCalls:
    """A solution in two calls: the second may use `$out`, what the first printed, or its variables."""

    first: str
    between: str
    second: str


@dataclass(frozen=True, kw_only=True)
class Stumble:
    """A first call that raises for a reason natural to the problem, and what is said before the corrected call."""

    code: str
    remark: str
    rate: float = 0.6
    """Share of the family's tool solutions that go this way; above one half, greedy decoding shows it."""


@dataclass(frozen=True, kw_only=True)
class Family:
    name: str
    draw: Draw
    wordings: tuple[str, ...]
    dev: tuple[str, ...]
    unseen: tuple[str, ...]
    plans: tuple[str, ...]
    """What is asked, in other words than the problem's: the model settles here which family it is in."""
    codes: tuple[str | TwoCalls, ...]
    direct: tuple[str, ...] = ()
    """Answers without a tool (`$answer`), for questions that need none. A family with these is called easy."""
    stumble: Stumble | None = None

    @property
    def easy(self) -> bool:
        return bool(self.direct)

    def of_split(self, split: str) -> tuple[str, ...]:
        """Wordings by kind: train, dev or unseen."""
        return {"train": self.wordings, "dev": self.dev, "unseen": self.unseen}[split]


def lines(text: str) -> tuple[str, ...]:
    """One template per non-empty line."""
    return tuple(line.strip() for line in text.strip().splitlines() if line.strip())


def family(
    name: str,
    draw: Draw,
    *,
    plans: str,
    codes: Sequence[str | TwoCalls],
    direct: str = "",
    stumble: Stumble | None = None,
) -> Family:
    """A family with the wordings that the files have for `name`. Asserts the promises made at the top of this module."""
    wordings, dev, unseen = (_wordings()[name][kind] for kind in ("train", "dev", "unseen"))
    made = Family(
        name=name,
        draw=draw,
        wordings=wordings,
        dev=dev,
        unseen=unseen,
        plans=lines(plans),
        codes=tuple(code.strip("\n") if isinstance(code, str) else code for code in codes),
        direct=lines(direct),
        stumble=stumble,
    )
    assert len(made.wordings) >= 8 and len(made.dev) >= 1 and len(made.unseen) >= 2, f"{name}: too few wordings"
    everything = made.wordings + made.dev + made.unseen
    assert len(set(everything)) == len(everything), f"{name}: a wording stands there twice"
    for code in made.codes:
        text = code if isinstance(code, str) else code.first + code.second
        assert len(_SLIP.findall(text)) == 1, f"{name}: a code needs exactly one slip: {text!r}"
    return made


@cache
def _wordings() -> dict[str, dict[str, tuple[str, ...]]]:
    """Family -> kind -> templates, from wordings/*.txt: `[family]`, then a wording a line, marked `dev:` or `unseen:`."""
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    name = ""
    for path in sorted((Path(__file__).parent / "wordings").glob("*.txt")):
        for line in lines(path.read_text(encoding="utf-8")):
            if heading := re.fullmatch(r"\[(\w+)\]", line):
                name = heading.group(1)
                assert name not in found, f"{path.name}: {name} stands there twice"
                found[name] = {"train": (), "dev": (), "unseen": ()}
                continue
            kind, mark, rest = line.partition(": ")
            if mark and kind in ("dev", "unseen"):
                found[name][kind] += (rest,)
            else:
                found[name]["train"] += (line,)
    return found


def say(template: str, values: Values, rng: Random) -> str:
    """A wording or plan in words."""
    for mark, words in SYNONYMS.items():
        while mark in template:
            template = template.replace(mark, rng.choice(words), 1)
    template = _CHOICE.sub(lambda m: rng.choice(m.group(1).split("|")), template)
    return Template(template).substitute({k: _in_words(v, rng) for k, v in values.items()})


def write(code: str, values: Values, *, slip: bool) -> str:
    """A code template with its values, its slip taken or not."""
    chosen = _SLIP.sub(lambda m: m.group(2 if slip else 1), code)
    return Template(chosen).substitute({k: repr(v) if isinstance(v, list) else str(v) for k, v in values.items()})


def _in_words(value: Value, rng: Random) -> str:
    if not isinstance(value, list):
        return str(value)
    words = [str(v) for v in value]
    if rng.random() < 0.25:
        return ", ".join(words[:-1]) + " and " + words[-1]
    return ", ".join(words)


def nouns(rng: Random) -> Values:
    """Names and things that any wording may use: $name, $name2, $item, $item2, $place."""
    name, name2 = rng.sample(NAMES, 2)
    item, item2 = rng.sample(ITEMS, 2)
    return {"name": name, "name2": name2, "item": item, "item2": item2, "place": rng.choice(PLACES)}


def ints(**ranges: tuple[int, int]) -> Draw:
    """Independent whole numbers, each uniform over its inclusive range."""
    return lambda rng: {name: rng.randint(low, high) for name, (low, high) in ranges.items()}
