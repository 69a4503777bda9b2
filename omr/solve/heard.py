"""What one request of a generation has given so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from omr.chunks import Chunk
from omr.solve.limits import Finish
from omr.solve.prompt import CodeTags

_TAIL_CHARS = 256


@dataclass
class Heard:
    """Times are seconds into the generation."""

    start: int
    """Where its text begins in the transcript's."""
    sent: float
    seed: int
    tags: CodeTags | None
    """Those at which the request ends."""
    first: float | None = None
    """When its first token came."""
    tokens: int = 0
    finish_reason: str | None = None
    stop_reason: Any = None
    pieces: list[str] = field(default_factory=list)
    tail: str = ""
    """The newest piece and the characters before it."""
    found: Finish | Literal["tag"] | None = None
    """Why its text, as far as it has come, ends the request."""

    def add(self, chunk: Chunk, clock: float) -> None:
        """Take in a chunk of a generation that began at perf_counter() `clock`."""
        if self.first is None and (chunk.num_tokens or chunk.text or chunk.tool_calls or chunk.reasoning):
            self.first = chunk.time - clock
        self.tokens += chunk.num_tokens
        self.finish_reason = chunk.finish_reason or self.finish_reason
        self.stop_reason = chunk.stop_reason if chunk.stop_reason is not None else self.stop_reason
        if chunk.text:
            self.pieces.append(chunk.text)
            self.tail = self.tail[-_TAIL_CHARS:] + chunk.text
