"""GenSelect: the model reads several of its own solutions and says which is best (OpenMathReasoning, 2025).

A problem whose generations agree needs none of it. Where they do not, `comparison` decides which solutions are shown
and in which order, the model's reply is read by `chosen`, and `settle` counts the choices of all comparisons. Which
solutions meet in a comparison depends on the seed, the problem and the set of solutions alone, so a resumed run asks
exactly what is missing.

Every answer that was given is shown as long as there is room, the most voted first: a comparison among solutions that
agree would decide nothing. Their order is drawn, because models prefer some places in a list to others.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from omr.solve.answer import vote_key
from omr.solve.vote import Ballot, Weight, majority

THOUGHT_END = "</think>"
CUT, MIN_CHARS = "[...] ", 40
_JUDGMENT = re.compile(r"judge?ment\W{0,6}(?:boxed\{)?(\d{1,4})\b", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A finished generation with an answer."""

    sample: int
    answer: str
    text: str


def disagree(solutions: Iterable[Solution]) -> bool:
    """Whether there is anything to select between."""
    return len({vote_key(s.answer) for s in solutions}) > 1


def comparison(solutions: Sequence[Solution], *, most: int, seed: str) -> list[Solution]:
    """The solutions that one comparison shows, in order: at most `most`, of as many different answers as fit."""
    assert most >= 2, most
    rng = random.Random(seed)
    groups: dict[str, list[Solution]] = {}
    for solution in sorted(solutions, key=lambda s: s.sample):
        groups.setdefault(vote_key(solution.answer), []).append(solution)
    by_size = sorted(groups.values(), key=lambda group: -len(group))  # stable: ties by lowest sample
    shown = [rng.choice(group) for group in by_size[:most]]
    rest = [s for group in by_size for s in group if s not in shown]
    shown += rng.sample(rest, min(len(rest), most - len(shown)))
    rng.shuffle(shown)
    return shown


def without_thought(text: str) -> str:
    """The part of a reasoning model's text behind its last `</think>`; all of it where there is none."""
    after = text.rpartition(THOUGHT_END)[2].strip()
    return after or text.strip()


def excerpt(text: str, tokens: int, count: Callable[[str], int]) -> str:
    """`text` without its thinking, cut at the front to about `tokens`: a solution's end holds what it rests on."""
    shown = without_thought(text)
    size, kept = count(shown), len(shown)
    if size <= tokens:
        return shown
    while size > tokens and kept > MIN_CHARS:
        kept = max(MIN_CHARS, int(kept * min(0.95, tokens / size)))
        size = count(CUT + shown[-kept:])
    return CUT + shown[-kept:]


def listing(shown: Sequence[str]) -> str:
    """Numbered solutions as the prompt shows them."""
    return "".join(f"Attempt {i}:\n{text}\n\n" for i, text in enumerate(shown))


def chosen(reply: str, num_shown: int) -> int | None:
    """The index that a reply names in its last `Judgment: N`; None if there is none, or no such solution.

    A box alone is no choice: a model that solves the problem again instead of choosing boxes its answer.
    """
    named = _JUDGMENT.findall(without_thought(reply))
    return int(named[-1]) if named and int(named[-1]) < num_shown else None


@dataclass(frozen=True, kw_only=True)
class Selected:
    """A problem's answer after selection."""

    answer: str | None
    how: Literal["selected", "unanimous", "vote"]
    """selected by comparisons; unanimous: nothing to select; vote: no comparison gave a usable choice."""
    picks: int = 0
    """Comparisons that chose this answer."""
    comparisons: int = 0
    """Comparisons with a usable choice."""


def settle(ballots: Sequence[Ballot], picks: Sequence[int], by: Weight = Weight.equal) -> Selected:
    """The answer chosen most often; ties go to the answer with the heavier vote, then to the lowest sample.

    `picks` are the samples that the comparisons chose. Without any, the vote stands.
    """
    groups = _groups(ballots)
    vote = majority(ballots, by)
    counts = Counter(key for pick in picks if (key := _key_of(pick, groups)) is not None)
    if not counts:
        return Selected(answer=vote.answer, how="vote" if len(groups) > 1 else "unanimous")
    weight = {key: sum(b.weight(by) for b in group) for key, group in groups.items()}
    winner = max(counts, key=lambda key: (counts[key], weight[key], -groups[key][0].sample))
    return Selected(answer=groups[winner][0].answer, how="selected", picks=counts[winner], comparisons=counts.total())


def _groups(ballots: Sequence[Ballot]) -> Mapping[str, list[Ballot]]:
    groups: dict[str, list[Ballot]] = {}
    for ballot in sorted(ballots, key=lambda b: b.sample):
        if ballot.answer is not None:
            groups.setdefault(vote_key(ballot.answer), []).append(ballot)
    return groups


def _key_of(sample: int, groups: Mapping[str, list[Ballot]]) -> str | None:
    return next((key for key, group in groups.items() if any(b.sample == sample for b in group)), None)
