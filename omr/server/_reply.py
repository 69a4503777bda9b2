"""One generation request from the engine to the wire: whole or streamed, ended early, or broken.

A stream sends the first text of a sequence and its end at once. What comes between waits for the interval that the
request allows, times the streams that are open, so that several short steps share one event: writing an event takes as
long as decoding a token of a small model does, and reading it as long again.

Three things end a request early: a stop string (its sequence is aborted in the engine), the client hanging up (all its
sequences are), and the service stopping (they end with finish_reason `abort`). Whatever happens, `finally` frees what
the engine still holds.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from omr.engine.request import Request
from omr.server._answer import Answer, Choice, Delta
from omr.server._engine_thread import EngineDead, EngineThread, Mailbox, Refused
from omr.server._metrics import Clock

_LONGEST_PAUSE_S = 1.0
_SSE_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


@dataclass
class Generating:
    """One of a request's n sequences."""

    request: Request
    choice: Choice
    clock: Clock
    started: bool = False
    """Whether a chunk of it has been sent."""

    @property
    def id(self) -> str:
        return self.request.id

    def end(self, reason: str) -> None:
        self.choice.end(reason)
        self.clock.finish(reason, self.choice.num_tokens)


class Reply(Response):
    """A response that writes itself while the engine works, with the client's hang-up in sight."""

    def __init__(
        self,
        answer: Answer,
        sequences: Sequence[Generating],
        num_prompt_tokens: int,
        thread: EngineThread,
    ) -> None:
        super().__init__()
        self._answer = answer
        self._sequences = sequences
        self._num_prompt_tokens = num_prompt_tokens
        self._thread = thread

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        mailbox = Mailbox()
        watcher = asyncio.create_task(_watch(receive, mailbox))
        steps = self._steps(mailbox)
        try:
            for sequence in self._sequences:
                if self._answer.body.max_tokens == 0:
                    sequence.end("length")
                else:
                    self._thread.submit(sequence.request, mailbox)
            if self._answer.body.stream:
                await self._stream(steps, mailbox, send)
            else:
                await self._collect(steps, send)
        finally:
            watcher.cancel()
            await steps.aclose()
            for sequence in self._sequences:
                if not sequence.choice.finished:
                    sequence.end("abort")
                self._thread.abort(sequence.id)

    @property
    def _done(self) -> bool:
        return all(s.choice.finished for s in self._sequences)

    def _usage(self) -> dict[str, Any]:
        return self._answer.usage([s.choice for s in self._sequences], self._num_prompt_tokens)

    async def _steps(self, mailbox: Mailbox) -> AsyncGenerator[list[Generating], None]:
        """The sequences that got something, wake-up after wake-up, until all are finished or the client is gone."""
        by_id = {s.id: s for s in self._sequences}
        if self._done:
            yield list(self._sequences)
        while not self._done:
            touched: dict[str, Generating] = {}
            for output in await mailbox.take():
                sequence = by_id[output.id]
                choice = sequence.choice
                if choice.finished:
                    continue  # the step that was running when its stop string was found
                before = choice.num_tokens
                if choice.push(output):
                    self._thread.abort(output.id)
                sequence.clock.tokens(choice.num_tokens - before)
                if choice.finish_reason is not None:
                    sequence.clock.finish(choice.finish_reason, choice.num_tokens)
                touched[output.id] = sequence
            if mailbox.gone:
                if not self._thread.closing:
                    return
                for sequence in self._sequences:
                    if not sequence.choice.finished:
                        sequence.end("abort")
                        touched[sequence.id] = sequence
            yield list(touched.values())

    async def _collect(self, steps: AsyncGenerator[list[Generating], None], send: Send) -> None:
        try:
            async for _ in steps:
                pass
        except (EngineDead, Refused) as error:
            await _send(send, engine_error(error))
            return
        if self._done:
            whole = self._answer.whole([s.choice for s in self._sequences], self._num_prompt_tokens)
            await _send(send, JSONResponse(whole))

    async def _stream(self, steps: AsyncGenerator[list[Generating], None], mailbox: Mailbox, send: Send) -> None:
        loop = asyncio.get_running_loop()
        is_open = False
        unsent: dict[str, Generating] = {}
        due_s = 0.0
        timer: asyncio.TimerHandle | None = None
        try:
            async for touched in steps:
                unsent |= {s.id: s for s in touched}
                now_s = loop.time()
                if now_s < due_s and all(s.started and not s.choice.finished for s in touched):
                    timer = timer or loop.call_at(due_s, mailbox.wake)
                    continue
                if timer is not None:
                    timer.cancel()
                    timer = None
                events: list[dict[str, Any]] = []
                for sequence in unsent.values():
                    delta = sequence.choice.take()
                    if delta is not None:
                        events += self._events(sequence, delta)
                unsent.clear()
                if self._done and self._answer.body.include_usage:
                    events.append(self._answer.last(self._usage()))
                if events:
                    if not is_open:
                        await send({"type": "http.response.start", "status": 200, "headers": _SSE_HEADERS})
                        is_open = True
                    await _send_events(send, events, last=self._done)
                    due_s = now_s + self._pause_s()
        except (EngineDead, Refused) as error:
            if not is_open:
                await _send(send, engine_error(error))
                return
            await _send_events(send, [error_body(500, "InternalServerError", dead(error))])
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _pause_s(self) -> float:
        """Until the next event: what the request allows, for all open streams in turn, but no more than a second."""
        interval_s = self._answer.body.interval_s
        return max(interval_s, min(interval_s * self._thread.num_open, _LONGEST_PAUSE_S))

    def _events(self, sequence: Generating, delta: Delta) -> list[dict[str, Any]]:
        answer, choice = self._answer, sequence.choice
        first, sequence.started = not sequence.started, True
        opening = answer.opening(choice) if first else None
        chunk = answer.chunk(choice, delta, first=first)
        if answer.body.continuous_usage:
            chunk["usage"] = answer.usage([choice], len(choice.prompt_ids))
        return [chunk] if opening is None else [opening, chunk]


async def _watch(receive: Receive, mailbox: Mailbox) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    mailbox.close()


async def _send(send: Send, response: Response) -> None:
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body})


async def _send_events(send: Send, events: Sequence[dict[str, Any]], *, last: bool = False) -> None:
    text = "".join(f"data: {json.dumps(e, ensure_ascii=False, separators=(',', ':'))}\n\n" for e in events)
    text += "data: [DONE]\n\n" * last
    await send({"type": "http.response.body", "body": text.encode(), "more_body": not last})


def dead(error: Exception) -> str:
    return f"the engine failed: {error}"


def engine_error(error: Exception) -> Response:
    """The response to a request that the engine refused (400) or died under (500)."""
    if isinstance(error, Refused):
        return error_response(400, "BadRequestError", str(error))
    return error_response(500, "InternalServerError", dead(error))


def error_body(status: int, kind: str, message: str, param: str | None = None) -> dict[str, Any]:
    """An error in the OpenAI API's form."""
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def error_response(status: int, kind: str, message: str, param: str | None = None) -> Response:
    return JSONResponse(error_body(status, kind, message, param), status_code=status)
