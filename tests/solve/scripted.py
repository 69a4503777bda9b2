"""A server and a sandbox that do as they are told, for tests of the loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from omr.errors import Failure
from omr.sandbox import Outcome


@dataclass
class Piece:
    text: str
    num_tokens: int = 1
    finish_reason: str | None = None
    stop_reason: Any = None
    time: float = 0.0


@dataclass
class Reply:
    """What one request gets: its text in pieces of `step` characters (a token each), then an end or an error."""

    text: str = ""
    finish_reason: str = "stop"
    stop_reason: Any = None
    error: Exception | None = None
    step: int = 4
    delay_s: float = 0.0
    hang: bool = False


@dataclass
class Request:
    prompt: str
    stop: list[str]
    max_tokens: int
    seed: int
    closed: bool = False
    """Closed before its end: what a cancelled request looks like to a server."""


@dataclass
class ScriptedClient:
    """Answers request number i with reply number i, or with what `script(request)` returns."""

    script: Callable[[Request], Reply] | Iterable[Reply]
    requests: list[Request] = field(default_factory=list)

    def stream_completion(
        self, prompt: str, sampling: Any, *, stop: list[str], max_tokens: int, seed: int
    ) -> AsyncGenerator[Piece, None]:
        request = Request(prompt, stop, max_tokens, seed)
        self.requests.append(request)
        if callable(self.script):
            reply = self.script(request)
        else:
            self.script = iter(self.script)
            reply = next(self.script)
        return self._stream(request, reply)

    async def _stream(self, request: Request, reply: Reply) -> AsyncGenerator[Piece, None]:
        ended = False
        try:
            pieces = [reply.text[i : i + reply.step] for i in range(0, len(reply.text), reply.step)]
            for number, piece in enumerate(pieces):
                await asyncio.sleep(reply.delay_s)
                if number == request.max_tokens:
                    ended = True
                    yield Piece("", 0, "length", None, time.perf_counter())
                    return
                yield Piece(piece, 1, None, None, time.perf_counter())
            if reply.hang:
                await asyncio.sleep(3600)
            ended = True
            if reply.error:
                raise reply.error
            yield Piece("", 0, reply.finish_reason, reply.stop_reason, time.perf_counter())
        finally:
            request.closed = not ended


@dataclass
class ScriptedSession:
    run: Callable[[str], Outcome | Exception]
    blocks: list[str] = field(default_factory=list)
    closed: int = 0

    async def execute(self, code: str, timeout_s: float | None = None) -> Outcome:
        assert not self.closed
        self.blocks.append(code)
        await asyncio.sleep(0)
        outcome = self.run(code)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def close(self) -> None:
        self.closed += 1


@dataclass
class ScriptedSandbox:
    run: Callable[[str], Outcome | Exception] = lambda code: Outcome(status="completed", stdout=f"ran {code}\n")
    sessions: list[ScriptedSession] = field(default_factory=list)
    tier: str = "process"

    def session(self) -> ScriptedSession:
        self.sessions.append(ScriptedSession(self.run))
        return self.sessions[-1]


class SandboxDied(Failure):
    pass
