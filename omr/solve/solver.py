"""One problem in, attempts and a voted answer out.

The generations of a problem run as tasks, each in one of the `slots` shared by all problems. As they finish they are
handed to `keep` (which writes them to disk before the slot is free again) and put to the stop policy; when it says that
the problem is done, or its time is up, what still runs is cancelled: that closes the HTTP stream, so the server frees
the sequence, and the sandbox session. A generation that was cancelled is counted with the tokens it had cost, and what
it would still have cost is estimated from the finished generations of its problem.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from omr.errors import Failure
from omr.sampling import Sampling
from omr.sandbox import SandboxClient
from omr.solve.completer import Completer
from omr.solve.limits import Limits
from omr.solve.prompt import CodeTags, Message
from omr.solve.tool_chat import ToolChat
from omr.solve.transcript import Transcript
from omr.solve.vote import Ballot, Result, StopPolicy, TimeBank, majority


@dataclass(frozen=True, kw_only=True)
class Task:
    """A problem as the solver needs it: laid out as a prompt, or as messages for a server's chat API, and what an
    earlier run has finished of it."""

    id: str
    prompt: str = ""
    messages: Sequence[Message] = ()
    prompt_tokens: int = 0
    done: Sequence[Ballot] = ()


@dataclass(kw_only=True)
class Solved:
    """How a problem ended."""

    id: str
    vote: Result
    ballots: list[Ballot] = field(default_factory=list)
    """Of every kept generation, in the order in which they finished."""
    stopped: str | None = None
    """Why it ended before all planned generations had: the label of its vote."""
    cancelled: int = 0
    """Generations that had begun and were cut off."""
    not_started: int = 0
    spent_tok: int = 0
    """Written by the cancelled ones."""
    saved_tok: float = 0.0
    """Estimate of what the cancelled and the unstarted ones would still have written."""
    start_time: float = 0.0
    """Epoch seconds, as `end_time`."""
    end_time: float = 0.0


MAX_LOST = 32
"""Generations in a row that lose every session they have before the sandbox is held to be broken."""


class Solver:
    """Solves problems against one server and one sandbox; `solve` may run for many problems at once."""

    def __init__(
        self,
        *,
        client: Completer,
        sandbox: SandboxClient | None,
        sampling: Sampling,
        limits: Limits,
        tags: CodeTags | None,
        policy: StopPolicy,
        bank: TimeBank,
        count_tokens: Callable[[str], int],
        max_concurrent: int,
        keep: Callable[[str, int, Transcript], None],
        max_failures: int = 8,
        watch: Callable[[str], None] | None = None,
    ) -> None:
        """`keep(problem id, sample, transcript)` records a finished generation; once it returns it is safe on disk.

        `watch` hears the text of generation 0 as it grows.

        After `max_failures` generations in a row that the server failed, `solve` raises Failure.
        """
        assert max_concurrent >= 1, max_concurrent
        self._client, self._sandbox = client, sandbox
        self._sampling, self._limits, self._tags = sampling, limits, tags
        self._policy, self._bank, self._count = policy, bank, count_tokens
        self._slots = asyncio.Semaphore(max_concurrent)
        self._keep = keep
        self._failures, self._max_failures = 0, max_failures
        self._lost = 0
        self._watch = watch

    async def solve(self, task: Task) -> Solved:
        """Run the generations that are missing, until the policy is content or the time is up."""
        ballots = list(task.done)
        stopped = self._policy.reason(ballots)
        missing = sorted(set(range(self._policy.planned)) - {b.sample for b in ballots})
        live: dict[int, Transcript] = {}
        begun, start_time = time.monotonic(), time.time()
        if stopped is None and missing:
            limit_s, lent_s = self._bank.take(begun)
            try:
                async with asyncio.timeout(limit_s) as clock:
                    stopped = await self._race(task, missing, ballots, live)
            except TimeoutError:
                if not clock.expired():
                    raise
                stopped = f"time after {len(ballots)} of {self._policy.planned}"
            finally:
                self._bank.give_back(time.monotonic() - begun, lent_s)
        return self._account(task, ballots, live, stopped, start_time)

    async def _race(
        self, task: Task, missing: Sequence[int], ballots: list[Ballot], live: dict[int, Transcript]
    ) -> str | None:
        waiting = list(reversed(missing))
        pending: set[asyncio.Task[Ballot]] = set()
        try:
            while not (reason := self._policy.reason(ballots)):
                while waiting and len(pending) < self._policy.needed(ballots):
                    pending.add(asyncio.create_task(self._attempt(task, waiting.pop(), live)))
                if not pending:
                    return None
                finished, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                if errors := [error for t in finished if (error := t.exception())]:
                    raise errors[0]  # all were looked at: asyncio prints the traceback of one that was not
                ballots.extend(sorted((t.result() for t in finished), key=lambda b: b.sample))
            return reason
        finally:
            for other in pending:
                other.cancel()
            for late in await asyncio.gather(*pending, return_exceptions=True):
                if isinstance(late, Ballot):  # it finished while others were being cancelled
                    ballots.append(late)

    async def _attempt(self, task: Task, sample: int, live: dict[int, Transcript]) -> Ballot:
        async with self._slots:
            transcript = self._begin(task, sample)
            live[sample] = transcript
            await transcript.run(self._client, self._sandbox)
            self._keep(task.id, sample, transcript)
            self._failures = self._failures + 1 if transcript.finish_reason == "error" else 0
            if self._failures >= self._max_failures:
                raise Failure(
                    f"the server failed {self._failures} generations in a row; the last with: {transcript.error}"
                )
            self._watch_sandbox(transcript)
            return ballot_of(sample, transcript)

    def _begin(self, task: Task, sample: int) -> Transcript:
        common: dict[str, Any] = {
            "prompt_tokens": task.prompt_tokens,
            "seed": self._sampling.seed + sample,
            "sampling": self._sampling,
            "limits": self._limits,
            "tags": self._tags,
            "count_tokens": self._count,
            "watch": self._watch if sample == 0 else None,
        }
        if task.messages:
            return ToolChat(messages=task.messages, **common)
        return Transcript(prompt=task.prompt, **common)

    def _watch_sandbox(self, transcript: Transcript) -> None:
        """A crash is what the code did; sessions that all die are a broken sandbox, and the answers worth nothing."""
        if transcript.code_runs:
            self._lost = self._lost + 1 if transcript.code_lost == transcript.code_runs else 0
        if self._lost >= MAX_LOST:
            raise Failure(
                f"every session of {self._lost} generations in a row died in the sandbox: see logs/sandbox.log, then "
                "`omr artifacts prune` and run again"
            )

    def _account(
        self, task: Task, ballots: list[Ballot], live: dict[int, Transcript], stopped: str | None, start_time: float
    ) -> Solved:
        kept = {b.sample for b in ballots}
        cut = [t for sample, t in live.items() if sample not in kept]
        not_started = self._policy.planned - len(kept) - len(cut)
        usual = fmean(b.num_tok for b in ballots) if ballots else 0.0
        return Solved(
            id=task.id,
            vote=majority(ballots, self._policy.weight),
            ballots=ballots,
            stopped=stopped,
            cancelled=len(cut),
            not_started=not_started,
            spent_tok=sum(t.num_tokens for t in cut),
            saved_tok=not_started * usual + sum(max(0.0, usual - t.num_tokens) for t in cut),
            start_time=start_time,
            end_time=time.time(),
        )


def ballot_of(sample: int, transcript: Transcript) -> Ballot:
    return Ballot(
        sample=sample,
        answer=transcript.answer,
        ended=transcript.finish_reason in ("stop", "boxed"),
        num_tok=transcript.num_tokens,
        code_runs=transcript.code_runs,
        code_errors=transcript.code_errors,
    )
