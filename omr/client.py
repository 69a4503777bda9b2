"""An async client of any OpenAI-style server that omr can start or reach.

One method streams a text completion, one a chat; both give the same `Stream` of `Chunk`s. Bodies are written in vLLM's
dialect and handed to the endpoint's server option, which knows what its server takes. All times are the client's own
clock: a stream remembers when it was sent and every chunk when it came.

Cancelling is closing: `await stream.aclose()`, or leaving `contextlib.aclosing(stream)`, closes the connection, on
which the server drops the request. A request that fails before its first token is sent again a few times if the
connection or an overloaded server was at fault; after the first token it never is, because the text would not be the
same stream. Failures are RequestErrors: the caller counts them and goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from omr.errors import ContextOverflow, RequestError, StreamDropped
from omr.sampling import Sampling
from omr.server import Endpoint
from omr.transport import Transport

_RETRY_STATUS = frozenset({429, 502, 503, 504})
_COMPLETIONS, _CHAT = "/v1/completions", "/v1/chat/completions"
_OVERFLOW = re.compile(
    "maximum context length"
    "|longer than the model's context"
    "|max_tokens must be at least 1, got -"
    "|context_length_exceeded"
)


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one event brought."""

    text: str
    num_tokens: int
    """Tokens it added. Over a whole stream the sum is what the server counted, if it counts at all; a server that
    reports no usage is taken to send one token an event."""
    finish_reason: str | None
    stop_reason: str | int | None
    """The stop string or stop token that ended it, where the server says so; it is not part of `text`."""
    time: float
    """time.perf_counter() when it arrived, seconds."""
    tool_calls: Sequence[Any] = ()
    """Pieces of tool calls (chat only), as the server sent them; see omr/solve/tool_calls.py."""
    reasoning: str = ""
    """Thinking that the server keeps apart from the text (chat only)."""


@dataclass(frozen=True)
class Completion:
    """A stream read to its end."""

    text: str
    num_tokens: int
    num_prompt_tokens: int
    finish_reason: str
    stop_reason: str | int | None
    sent: float
    first: float
    """perf_counter() of the first token; that of the end when there was none."""
    end: float


class Stream(AsyncGenerator[Chunk, None]):
    """The chunks of one request, in order. Close it when done: an unfinished one is then cancelled on the server."""

    def __init__(self, chunks: AsyncGenerator[Chunk, None]) -> None:
        self._chunks = chunks
        self.sent: float | None = None
        """perf_counter() when the request was first sent; None before the first chunk was asked for."""
        self.first: float | None = None
        """perf_counter() of the first token."""
        self.num_prompt_tokens = 0
        """As the server counts them, known at the end at the latest; 0 when it does not say."""
        self.speculation: tuple[int, int, int] | None = None
        """(drafts, draft tokens, accepted), known at the end; None when the server does not say."""

    async def asend(self, value: None) -> Chunk:
        chunk = await self._chunks.asend(value)
        if self.first is None and (chunk.text or chunk.num_tokens or chunk.tool_calls or chunk.reasoning):
            self.first = chunk.time
        return chunk

    async def athrow(self, typ: Any, val: Any = None, tb: Any = None) -> Chunk:
        if val is None and tb is None:
            return await self._chunks.athrow(typ)  # the form with three arguments is deprecated
        return await self._chunks.athrow(typ, val, tb)

    async def aclose(self) -> None:
        await self._chunks.aclose()

    async def read(self) -> Completion:
        """The rest of the stream as one value. Raises RequestError."""
        text, count, last = [], 0, None
        async for chunk in self:
            text.append(chunk.text)
            count += chunk.num_tokens
            if chunk.finish_reason is not None:
                last = chunk
        assert last is not None and last.finish_reason is not None, "a stream that ends well has a finish reason"
        end = time.perf_counter()
        return Completion(
            text="".join(text),
            num_tokens=count,
            num_prompt_tokens=self.num_prompt_tokens,
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
            sent=self.sent or end,
            first=self.first or end,
            end=end,
        )


class Client:
    """`async with Client(endpoint) as client`. One per event loop; any number of streams at a time."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        attempts: int = 4,
        pause_s: float = 0.25,
        timeout_s: float = 600.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`timeout_s` is the longest silence on a connection; `pause_s` doubles after every failed attempt."""
        assert attempts >= 1, attempts
        self.endpoint = endpoint
        self._attempts = attempts
        self._pause_s = pause_s
        base = httpx.URL(endpoint.base_url.rstrip("/"))
        self._transport = transport or Transport(base, timeout_s=timeout_s)
        self._urls = {path: httpx.URL(f"{base}{path}") for path in (_COMPLETIONS, _CHAT)}
        self._headers = httpx.Headers(
            {
                "authorization": f"Bearer {endpoint.api_key}",
                "accept-encoding": "identity",
                "content-type": "application/json",
            }
        )
        self._http = httpx.AsyncClient(base_url=base, headers=self._headers, timeout=30.0, transport=self._transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None
    ) -> None:
        await self._http.aclose()

    def stream_completion(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling,
        *,
        stop: Sequence[str] = (),
        max_tokens: int | None = None,
        seed: int | None = None,
    ) -> Stream:
        """Continue `prompt`, a text or token ids. `max_tokens` and `seed` default to those of `sampling`.

        Raises, when iterated: ContextOverflow, RequestError, StreamDropped; ConfigError for a parameter that this
        server has not.
        """
        body = self._body(sampling, stop, max_tokens, seed)
        body["prompt"] = prompt if isinstance(prompt, str) else list(prompt)
        return self._open(_COMPLETIONS, body, chat=False)

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: Sampling,
        *,
        stop: Sequence[str] = (),
        max_tokens: int | None = None,
        seed: int | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        tool_choice: str | None = None,
    ) -> Stream:
        """The same through the server's own chat template. `tools` are function schemas, called one at a time."""
        body = self._body(sampling, stop, max_tokens, seed)
        body["messages"] = list(messages)
        if tools:
            body["tools"] = list(tools)
            body["parallel_tool_calls"] = False
            if tool_choice is not None:
                body["tool_choice"] = tool_choice
        return self._open(_CHAT, body, chat=True)

    async def metrics(self) -> str:
        """The body of the server's metrics page. Raises RequestError."""
        return await self._get(self.endpoint.server.metrics_path)

    async def models(self) -> list[str]:
        """Names that the server answers to. Raises RequestError."""
        data = json.loads(await self._get("/v1/models"))
        return [str(card["id"]) for card in data["data"]]

    async def _get(self, path: str) -> str:
        try:
            reply = await self._http.get(path)
        except httpx.TransportError as error:
            raise RequestError(f"GET {path} at {self.endpoint.base_url}: {_reason(error)}") from None
        if reply.status_code != 200:
            raise _refusal(reply.status_code, reply.content)
        return reply.text

    def _body(
        self, sampling: Sampling, stop: Sequence[str], max_tokens: int | None, seed: int | None
    ) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.endpoint.model,
            "max_tokens": sampling.max_tokens if max_tokens is None else max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed if seed is None else seed,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "skip_special_tokens": False,  # code tags may be special tokens, and stop strings must see them
        }
        if stop:
            body["stop"] = list(stop)
        if sampling.top_k:
            body["top_k"] = sampling.top_k
        if sampling.min_p:
            body["min_p"] = sampling.min_p
        if sampling.repetition_penalty != 1:
            body["repetition_penalty"] = sampling.repetition_penalty
        return body

    @contextlib.asynccontextmanager
    async def _post(self, path: str, body: bytes) -> AsyncIterator[httpx.Response]:
        """The reply's head, its body yet to be read; straight to the transport: httpx's client does nothing for it."""
        request = httpx.Request("POST", self._urls[path], headers=self._headers, content=body)
        reply = await self._transport.handle_async_request(request)
        try:
            yield reply
        finally:
            await reply.aclose()

    def _open(self, path: str, body: dict[str, Any], *, chat: bool) -> Stream:
        stream: Stream

        async def chunks() -> AsyncGenerator[Chunk, None]:
            data = json.dumps(self.endpoint.server.request_body(body, chat=chat)).encode()
            stream.sent = time.perf_counter()
            for attempt in range(1, self._attempts + 1):
                started = False
                try:
                    async with self._post(path, data) as reply:
                        if reply.status_code != 200:
                            raise _refusal(reply.status_code, await reply.aread())
                        parts = reply.aiter_bytes() if "content-encoding" in reply.headers else reply.stream
                        assert isinstance(parts, AsyncIterable), parts
                        async with contextlib.aclosing(_chunks(parts, stream)) as inner:
                            async for chunk in inner:
                                started = True
                                yield chunk
                        return
                except httpx.TransportError as error:
                    if started:
                        raise StreamDropped(
                            f"the stream from {self.endpoint.base_url} broke: {_reason(error)}"
                        ) from None
                    if attempt == self._attempts or isinstance(error, httpx.ReadTimeout):
                        raise RequestError(f"POST {path} at {self.endpoint.base_url}: {_reason(error)}") from None
                except RequestError as error:
                    if started or attempt == self._attempts or error.status not in _RETRY_STATUS:
                        raise
                await asyncio.sleep(self._pause_s * 2 ** (attempt - 1))

        stream = Stream(chunks())
        return stream


async def _chunks(body: AsyncIterable[bytes], stream: Stream) -> AsyncGenerator[Chunk, None]:
    """Chunks of a server-sent event stream. Raises StreamDropped when it ends without a finish reason."""
    counted = 0  # tokens in the chunks given out
    texts = 0  # of them, chunks with text
    total: int | None = None
    finished = False
    events = _Events()
    async for part in body:  # to its end, even after [DONE], or the connection could not be used again
        now = time.perf_counter()
        for event in events.feed(part):
            if usage := event.get("usage"):
                total = int(usage.get("completion_tokens") or 0)
                stream.num_prompt_tokens = int(usage.get("prompt_tokens") or 0)
                stream.speculation = _speculation(usage) or stream.speculation
            for choice in event.get("choices") or ():
                calls: Sequence[Any] = ()
                text, thought = choice.get("text"), ""
                if text is None:
                    text, calls, thought = _delta(choice)
                ids = choice.get("token_ids")
                new = total - counted if total is not None else len(ids) if ids else 0
                counted += new
                texts += bool(text or calls or thought)
                reason = choice.get("finish_reason")
                finished = finished or reason is not None
                if text or new or reason is not None or calls or thought:
                    stop = choice.get("stop_reason")
                    stop = choice.get("matched_stop") if stop is None else stop
                    yield Chunk(_sound(text), new, reason, stop, now, calls, thought)
    if not finished:
        raise StreamDropped("the server ended the stream without a finish reason")
    rest = (texts if counted == 0 else counted) - counted if total is None else total - counted
    if rest:
        yield Chunk("", rest, None, None, time.perf_counter())


def _delta(choice: Mapping[str, Any]) -> tuple[str, Sequence[Any], str]:
    """(text, pieces of tool calls, thinking) of a chat event's choice."""
    delta = choice.get("delta") or {}
    calls = delta.get("tool_calls")
    thought = delta.get("reasoning_content") or delta.get("reasoning")
    return (
        delta.get("content") or "",
        calls if isinstance(calls, list) else (),
        thought if isinstance(thought, str) else "",
    )


def _speculation(usage: Mapping[str, Any]) -> tuple[int, int, int] | None:
    details = usage.get("completion_tokens_details") or {}
    if not details.get("drafts"):
        return None
    accepted, rejected = (int(details.get(f"{kind}_prediction_tokens") or 0) for kind in ("accepted", "rejected"))
    return int(details["drafts"]), accepted + rejected, accepted


class _Events:
    """A stream's bytes in, its events out, up to [DONE]."""

    def __init__(self) -> None:
        self._held = b""
        self._done = False

    def feed(self, part: bytes) -> Iterator[dict[str, Any]]:
        """The events that `part` completes. Lines that are no data (comments, keep-alives, event names) are skipped."""
        *lines, self._held = (self._held + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and not self._done:
                data = line[5:].strip()
                self._done = data == b"[DONE]"
                if not self._done:
                    yield _event(data)


def _sound(text: str) -> str:
    """`text` without lone surrogates: JSON can spell them, but no prompt, file or tokenizer takes them."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _event(data: bytes) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError:
        raise StreamDropped(f"the server sent an event that is no JSON: {data[:80]!r}") from None
    if not isinstance(event, dict):
        raise StreamDropped(f"the server sent an event that is no object: {data[:80]!r}")
    if event.get("error"):
        error = event["error"]
        raise StreamDropped(f"the server broke off: {error.get('message') if isinstance(error, dict) else error}")
    return event


def _refusal(status: int, body: bytes) -> RequestError:
    """The error of a reply that is not 200, with the server's own message."""
    text = body.decode(errors="replace")
    try:
        data = json.loads(text)
        error = data.get("error", data)
        text = str(error.get("message", text) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        pass
    line = f"the server answered {status}: {' '.join(text.split())[:500]}"
    overflow = status < 500 and _OVERFLOW.search(body.decode(errors="replace"))
    return ContextOverflow(line, status) if overflow else RequestError(line, status)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")
