"""An LLM judge beside the symbolic grader: which answers it is asked about, what it said, judgements.jsonl.

`fallback` asks only about answers that the symbolic grader did not accept and that are no plain numbers: the judge can
then make an answer right, never wrong. `always` asks about every answer, and a readable judgement replaces the grader's
verdict. The same answer to the same problem is judged once, however many generations gave it.

The judge is the run's own server, or any OpenAI-style endpoint (`url`), one of omr's included. job=judge puts the same
question about a finished run to any server that omr can compose.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omr.benchmark import Problem
from omr.errors import ConfigError
from omr.interrupt import together
from omr.job._ledger import Ledger
from omr.sampling import Sampling
from omr.solve.ask import Asker
from omr.solve.judge import is_open, question, verdict
from omr.solve.prompt import judge_prompt_named

if TYPE_CHECKING:
    from omr.server import Endpoint
    from omr.server.openai import OpenAi
    from omr.solve.grade import Grader

Row = dict[str, Any]
JUDGEMENTS = "judgements.jsonl"


class When(Enum):
    never = "never"
    fallback = "fallback"
    """About what the symbolic grader did not accept."""
    always = "always"
    """About every answer; its verdict counts."""


@dataclass(kw_only=True)
class Judge:
    """A model that says whether two answers are the same."""

    when: When = When.never
    url: str | None = None
    """An OpenAI-style endpoint, with or without /v1; null is the server of the run."""
    model: str | None = None
    """Its model's name there; null takes the only one that it lists."""
    api_key_env: str | None = None
    """Environment variable that holds its key; null for a server without keys."""
    max_tokens: int = 512
    """Of one judgement."""
    temperature: float = 0.0
    max_concurrent: int = 8
    """Judgements in flight."""
    prompt: str = "judge/math"
    """By name; see omr/solve/prompt.py."""

    def __post_init__(self) -> None:
        judge_prompt_named(self.prompt)
        for name in ("max_tokens", "max_concurrent"):
            if getattr(self, name) < 1:
                raise ConfigError(f"job.judge.{name} must be >= 1, got {getattr(self, name)}")
        if self.temperature < 0:
            raise ConfigError(f"job.judge.temperature must be >= 0, got {self.temperature}; 0 is greedy")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"job.judge.url must be http(s)://HOST[:PORT][/v1] or null, got {self.url!r}")
        if self.url is None and (self.model or self.api_key_env):
            raise ConfigError(
                "job.judge.model and job.judge.api_key_env need job.judge.url: without it the run's judges"
            )

    @property
    def on(self) -> bool:
        return self.when is not When.never

    @property
    def sampling(self) -> Sampling:
        return Sampling(temperature=self.temperature, top_p=1.0, max_tokens=self.max_tokens)

    def preflight(self) -> None:
        """Refuse a key that is not set. Raises ConfigError."""
        if self.on and self.url is not None:
            self._server().api_key()

    def endpoint(self) -> Endpoint | None:
        """The judge's own endpoint, asked once for its models; None when the run's server judges.

        Raises RequestError when it does not answer, has not the model, or has several and none is named.
        """
        return self._server().reach(self.model, "job.judge.model") if self.on and self.url is not None else None

    def _server(self) -> OpenAi:
        from omr.server.openai import OpenAi

        return OpenAi(url=self.url, api_key_env=self.api_key_env)


class Judgements:
    """The judgements on all answers, those on disk included."""

    def __init__(self, judge: Judge, folder: Path) -> None:
        self._judge = judge
        self._ledger = Ledger(folder / JUDGEMENTS, ("id", "expected_answer", "answer"))
        self._slots = asyncio.Semaphore(judge.max_concurrent)

    def kept(self, problem: Problem) -> list[Row]:
        """The judgements on this problem's answers."""
        return [
            r for r in self._ledger.rows if r["id"] == problem.id and r["expected_answer"] == problem.expected_answer
        ]

    def open(self, problem: Problem, rows: Sequence[Row], grader: Grader) -> list[str]:
        """Answers still to be judged, in order of their samples. May wait for the symbolic grader."""
        expected = problem.expected_answer
        if expected is None:
            return []
        answers = dict.fromkeys(row["predicted_answer"] for row in rows if row.get("predicted_answer") is not None)
        return [
            a for a in answers if self._ledger.get(problem.id, expected, a) is None and self._asks(a, expected, grader)
        ]

    def _asks(self, answer: str, expected: str, grader: Grader) -> bool:
        if self._judge.when is When.always:
            return True
        return is_open(answer, expected) and not grader.grade_now(answer, expected).equal

    async def ask(self, problem: Problem, rows: Sequence[Row], grader: Grader, asker: Asker, model: str) -> None:
        """Judge the open answers. Raises Failure for a dead judge."""
        answers = await asyncio.to_thread(self.open, problem, rows, grader)
        await together(self._one(problem, answer, asker, model) for answer in answers)

    async def _one(self, problem: Problem, answer: str, asker: Asker, model: str) -> None:
        assert problem.expected_answer is not None
        prompt = judge_prompt_named(self._judge.prompt)
        messages = question(prompt, problem=problem.text, expected=problem.expected_answer, predicted=answer)
        async with self._slots:
            reply = await asker.ask(messages, seed=0)
            self._ledger.append(
                {
                    "id": problem.id,
                    "expected_answer": problem.expected_answer,
                    "answer": answer,
                    "when": self._judge.when.name,
                    "verdict": verdict(reply.text),
                    "judgement": reply.text,
                    "model": model,
                    **reply.row(),
                }
            )
