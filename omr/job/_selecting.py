"""GenSelect over the generations of a problem: which comparisons there are, what came of them, selections.jsonl.

A problem's comparisons are asked after its generations have ended, all at once, each in one of `max_concurrent` slots.
Each is recorded with the solutions it saw and the set that these came from: if that set is another one now (a failed
generation was made again), it is asked anew.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from omr.benchmark import Problem
from omr.errors import ConfigError
from omr.interrupt import together
from omr.job._ledger import Ledger
from omr.solve.ask import Asker
from omr.solve.completer import round_seed
from omr.solve.prompt import select_prompt_named
from omr.solve.select import Solution, chosen, comparison, disagree, excerpt, listing

Row = dict[str, Any]
SELECTIONS = "selections.jsonl"
MIN_SOLUTION_TOKENS = 64
"""A solution of which less can be shown is left out, while two remain."""


class Method(Enum):
    vote = "vote"
    """The majority, weighted by job.vote."""
    genselect = "genselect"
    """The model compares its own solutions where they disagree."""


@dataclass(kw_only=True)
class Select:
    """How a problem's answer is taken from its generations."""

    method: Method = Method.vote
    comparisons: int = 4
    """Asked of a problem whose generations disagree; their choices are counted."""
    candidates: int = 8
    """Solutions shown in one comparison, at most."""
    max_tokens: int = 512
    """Of one comparison's reply; the rest of the context is shared by the solutions shown."""
    temperature: float = 0.7
    timeout_s: float | None = None
    """For all comparisons of a problem; those that have ended by then count."""
    max_concurrent: int = 16
    """Comparisons in flight, over all problems."""
    prompt: str = "genselect"
    """By name; see omr/solve/prompt.py."""

    def __post_init__(self) -> None:
        select_prompt_named(self.prompt)
        for name, least in (("comparisons", 1), ("candidates", 2), ("max_tokens", 1), ("max_concurrent", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"job.select.{name} must be >= {least}, got {getattr(self, name)}")
        if self.temperature < 0:
            raise ConfigError(f"job.select.temperature must be >= 0, got {self.temperature}; 0 is greedy")
        if self.timeout_s is not None and self.timeout_s <= 0:
            raise ConfigError(f"job.select.timeout_s must be > 0 or null, got {self.timeout_s}")

    @property
    def on(self) -> bool:
        return self.method is Method.genselect


class Selections:
    """The comparisons of all problems, those on disk included."""

    def __init__(self, select: Select, folder: Path, *, seed: int) -> None:
        self._select, self._seed = select, seed
        self._ledger = Ledger(folder / SELECTIONS, ("id", "round"))
        self._slots = asyncio.Semaphore(select.max_concurrent)

    def kept(self, problem_id: str, rows: Sequence[Row]) -> list[Row]:
        """The comparisons that have been made among exactly these samples."""
        solutions = _solutions(rows)
        if not disagree(solutions):
            return []
        of = [s.sample for s in solutions]
        found = (self._ledger.get(problem_id, r) for r in range(self._select.comparisons))
        return [row for row in found if row is not None and row["of"] == of]

    def missing(self, problem_id: str, rows: Sequence[Row]) -> list[int]:
        """Rounds that are still to be asked; none where the samples agree."""
        if not disagree(_solutions(rows)):
            return []
        made = {row["round"] for row in self.kept(problem_id, rows)}
        return [r for r in range(self._select.comparisons) if r not in made]

    async def ask(
        self,
        problem: Problem,
        rows: Sequence[Row],
        asker: Asker,
        *,
        count: Callable[[str], int],
        context_tokens: int,
        deadline_at: float | None = None,
    ) -> None:
        """Make the missing comparisons. `deadline_at` is on the monotonic clock. Raises Failure for a dead server."""
        left = None if deadline_at is None else deadline_at - time.monotonic()
        limits = [limit for limit in (left, self._select.timeout_s) if limit is not None]
        solutions = _solutions(rows)
        missing = self.missing(problem.id, rows)
        if not missing:
            return
        try:
            async with asyncio.timeout(min(limits) if limits else None) as clock:
                await together(
                    self._compare(problem, solutions, number, asker, count, context_tokens) for number in missing
                )
        except TimeoutError:
            if not clock.expired():
                raise

    async def _compare(
        self,
        problem: Problem,
        solutions: Sequence[Solution],
        number: int,
        asker: Asker,
        count: Callable[[str], int],
        context_tokens: int,
    ) -> None:
        prompt = select_prompt_named(self._select.prompt)
        places = {"problem": problem.text, "num_solutions": 0, "last": 0, "solutions": ""}
        overhead = count(prompt.fill(places)[-1]["content"]) + 64  # what a chat template adds
        room = context_tokens - self._select.max_tokens - overhead
        most = max(2, min(self._select.candidates, room // MIN_SOLUTION_TOKENS))
        shown = comparison(solutions, most=most, seed=f"{self._seed}/{problem.id}/{number}")
        each = room // len(shown) - 8  # a heading and a blank line
        texts = [excerpt(s.text, each, count) for s in shown]
        places |= {"num_solutions": len(shown), "last": len(shown) - 1, "solutions": listing(texts)}
        async with self._slots:
            reply = await asker.ask(prompt.fill(places), seed=round_seed(self._seed, number + 1))
            index = chosen(reply.text, len(shown))
            picked = None if index is None else shown[index]
            self._ledger.append(
                {
                    "id": problem.id,
                    "round": number,
                    "of": [s.sample for s in solutions],
                    "shown": [s.sample for s in shown],
                    "chosen": None if picked is None else picked.sample,
                    "answer": None if picked is None else picked.answer,
                    "judgment": reply.text,
                    **reply.row(),
                }
            )


def _solutions(rows: Sequence[Row]) -> list[Solution]:
    """The samples that have an answer, in order of their index."""
    return [
        Solution(sample=row["sample"], answer=row["predicted_answer"], text=row["generation"])
        for row in sorted(rows, key=lambda row: row["sample"])
        if row.get("predicted_answer") is not None
    ]
