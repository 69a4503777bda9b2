"""One question to a model, one reply: what selecting a solution and judging an answer have in common.

A reply is a value, also when the server failed: the caller counts it and goes on. A server that fails every question
ends the run.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omr.errors import ContextOverflow, Failure, RequestError
from omr.sampling import Sampling
from omr.solve.completer import Completer
from omr.solve.prompt import Message

if TYPE_CHECKING:
    from omr.chunks import Chunk
    from omr.client import Stream

ATTEMPTS = 3
"""Times that a question is asked whose stream broke off."""
MAX_FAILURES = 8
"""Questions in a row that the server may fail before it is held to be dead."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back, and what it cost."""

    text: str = ""
    finish_reason: str | None = None
    num_prompt_tokens: int = 0
    """As the server counts them; 0 when it does not say."""
    num_tokens: int = 0
    """Written by the model, broken attempts included."""
    seconds: float = 0.0
    started: float = 0.0
    """Wall clock, epoch seconds."""
    error: str | None = None
    """Why there is no reply."""

    def row(self) -> dict[str, Any]:
        """The cost under the names of samples.jsonl."""
        told = {
            "finish_reason": self.finish_reason,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_generated_tokens": self.num_tokens,
            "generation_start_time": self.started,
            "generation_end_time": self.started + self.seconds,
            "generation_time": self.seconds,
        }
        return told | ({"error": self.error} if self.error else {})


class Asker:
    """Puts single questions to a server. `lay_out` turns messages into a prompt; None uses the server's chat API."""

    def __init__(
        self,
        client: Completer,
        sampling: Sampling,
        *,
        lay_out: Callable[[Sequence[Message]], str] | None,
        name: str = "the server",
    ) -> None:
        self._client, self._sampling, self._lay_out, self._name = client, sampling, lay_out, name
        self._failures = 0

    async def ask(self, messages: Sequence[Message], *, seed: int) -> Reply:
        """Raises Failure after MAX_FAILURES questions in a row without a reply."""
        started, clock = time.time(), time.perf_counter()
        written, error = 0, ""
        for attempt in range(ATTEMPTS):
            chunks: list[Chunk] = []
            stream = self._open(messages, seed)
            try:
                await stream.each(chunks.append)
            except ContextOverflow as overflow:  # the question is too long: that says nothing about the server
                return Reply(seconds=time.perf_counter() - clock, started=started, error=str(overflow))
            except RequestError as failed:
                error = str(failed)
                if failed.status is not None and failed.status < 500 and failed.status != 429:
                    break  # refused: asking again cannot help
                if attempt + 1 < ATTEMPTS:
                    await asyncio.sleep(0.2 * 2**attempt)
                continue
            finally:
                written += sum(chunk.num_tokens for chunk in chunks)
            self._failures = 0
            return Reply(
                text="".join(chunk.text for chunk in chunks),
                finish_reason=next((c.finish_reason for c in reversed(chunks) if c.finish_reason), None),
                num_prompt_tokens=stream.num_prompt_tokens,
                num_tokens=written,
                seconds=time.perf_counter() - clock,
                started=started,
            )
        self._failures += 1
        if self._failures >= MAX_FAILURES:
            raise Failure(f"{self._name} failed {self._failures} questions in a row; the last with: {error}")
        return Reply(num_tokens=written, seconds=time.perf_counter() - clock, started=started, error=error)

    def _open(self, messages: Sequence[Message], seed: int) -> Stream:
        limit = self._sampling.max_tokens
        if self._lay_out is None:
            return self._client.stream_chat(messages, self._sampling, max_tokens=limit, seed=seed)
        return self._client.stream_completion(
            self._lay_out(messages), self._sampling, stop=[], max_tokens=limit, seed=seed
        )
