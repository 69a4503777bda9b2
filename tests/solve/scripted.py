"""A server and a sandbox that do as they are told, for tests of the loop."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from omr.client import Stream
from omr.errors import Failure
from omr.sandbox import Outcome


@dataclass
class Piece:
    text: str
    num_tokens: int = 1
    finish_reason: str | None = None
    stop_reason: Any = None
    time: float = 0.0
    tool_calls: Sequence[Any] = ()
    reasoning: str = ""


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
    calls: Sequence[Any] = ()
    """Pieces of tool calls, one a chunk, after the text."""
    reasoning: str = ""
    prompt_tokens: int = 0
    """What the server says it read."""


@dataclass
class Request:
    prompt: str
    stop: list[str]
    max_tokens: int
    seed: int
    closed: bool = False
    """Closed before its end: what a cancelled request looks like to a server."""
    messages: list[Any] = field(default_factory=list)
    tools: list[Any] = field(default_factory=list)
    tool_choice: str | None = None


@dataclass
class ScriptedClient:
    """Answers request number i with reply number i, or with what `script(request)` returns."""

    script: Callable[[Request], Reply] | Iterable[Reply]
    requests: list[Request] = field(default_factory=list)

    def stream_completion(self, prompt: str, sampling: Any, *, stop: list[str], max_tokens: int, seed: int) -> Stream:
        return self._reply(Request(prompt, stop, max_tokens, seed))

    def stream_chat(
        self,
        messages: Sequence[Any],
        sampling: Any,
        *,
        max_tokens: int,
        seed: int,
        tools: Sequence[Any] = (),
        tool_choice: str | None = None,
    ) -> Stream:
        sent = copy.deepcopy(list(messages))
        return self._reply(Request("", [], max_tokens, seed, messages=sent, tools=list(tools), tool_choice=tool_choice))

    def _reply(self, request: Request) -> Stream:
        self.requests.append(request)
        if callable(self.script):
            reply = self.script(request)
        else:
            self.script = iter(self.script)
            reply = next(self.script)

        async def each(stream: Stream, take: Callable[[Any], bool | None]) -> None:
            async with aclosing(self._stream(request, reply)) as pieces:
                async for piece in pieces:
                    if take(piece):
                        break

        stream = Stream(each)
        stream.reader.num_prompt_tokens = reply.prompt_tokens
        return stream

    async def _stream(self, request: Request, reply: Reply) -> AsyncGenerator[Piece, None]:
        ended = False
        try:
            if reply.reasoning:
                yield Piece("", 1, None, None, time.perf_counter(), (), reply.reasoning)
            pieces = [reply.text[i : i + reply.step] for i in range(0, len(reply.text), reply.step)]
            for number, piece in enumerate(pieces):
                await asyncio.sleep(reply.delay_s)
                if number == request.max_tokens:
                    ended = True
                    yield Piece("", 0, "length", None, time.perf_counter())
                    return
                yield Piece(piece, 1, None, None, time.perf_counter())
            for call in reply.calls:
                yield Piece("", 1, None, None, time.perf_counter(), [call])
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
