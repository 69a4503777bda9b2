"""An async client of any OpenAI-style server that omr can start or reach.

One method streams a text completion, one a chat; both give the same `Stream` of `Chunk`s. Bodies are written in vLLM's
dialect and handed to the endpoint's server option, which knows what its server takes. All times are the client's own
clock: a stream remembers when it was sent and every chunk when it came.

Cancelling `stream.each`, or telling it that you have had enough, closes the connection, on which the server drops the
request. A request that fails before its first token is sent again a few times if the
connection or an overloaded server was at fault; after the first token it never is, because the text would not be the
same stream. Failures are RequestErrors: the caller counts them and goes on.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from omr.chunks import Chunk, Reader
from omr.errors import ContextOverflow, RequestError, StreamDropped
from omr.sampling import Sampling
from omr.server import Endpoint
from omr.wire import Wire

_RETRY_STATUS = frozenset({429, 502, 503, 504})
_COMPLETIONS, _CHAT = "/v1/completions", "/v1/chat/completions"
_OVERFLOW = re.compile(
    "maximum context length"
    "|longer than the model's context"
    "|max_tokens must be at least 1, got -"
    "|context_length_exceeded"
)


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


Take = Callable[[Chunk], bool | None]
"""Hears a chunk; True: that was enough."""


class Stream:
    """One request, sent by `each` or `read`."""

    def __init__(self, each: Callable[[Stream, Take], Awaitable[None]]) -> None:
        self._each = each
        self.sent: float | None = None
        """perf_counter() when the request was first sent."""
        self.reader = Reader()

    @property
    def first(self) -> float | None:
        """perf_counter() of the first token."""
        return self.reader.first

    @property
    def num_prompt_tokens(self) -> int:
        """As the server counts them, known at the end at the latest; 0 when it does not say."""
        return self.reader.num_prompt_tokens

    @property
    def speculation(self) -> tuple[int, int, int] | None:
        """(drafts, draft tokens, accepted), known at the end; None when the server does not say."""
        return self.reader.speculation

    async def each(self, take: Take) -> None:
        """Send the request and hand every chunk of the reply to `take` as it comes, to the end or to its first True.

        `take` runs in a callback of the event loop. What it raises is raised here. Raises RequestError.
        """
        await self._each(self, take)

    async def read(self) -> Completion:
        """The reply as one value. Raises RequestError."""
        chunks: list[Chunk] = []
        await self.each(chunks.append)
        last = next((chunk for chunk in reversed(chunks) if chunk.finish_reason is not None), None)
        assert last is not None and last.finish_reason is not None, "a stream that ends well has a finish reason"
        end = time.perf_counter()
        return Completion(
            text="".join(chunk.text for chunk in chunks),
            num_tokens=sum(chunk.num_tokens for chunk in chunks),
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
        here = base.host in ("127.0.0.1", "::1", "localhost")
        headers = {
            "authorization": f"Bearer {endpoint.api_key}",
            "accept-encoding": "identity",
            "content-type": "application/json",
        }
        self._http: httpx.AsyncClient | Wire
        if here and base.scheme == "http" and transport is None:
            self._http = Wire(base.host, base.port or 80, timeout_s=timeout_s)
        else:
            self._http = httpx.AsyncClient(
                base_url=base,
                headers=headers,
                timeout=httpx.Timeout(timeout_s, connect=10.0, pool=None),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=256, keepalive_expiry=30.0),
                trust_env=not here,  # a proxy must not see the loopback
                transport=transport,
            )
        self._path = base.path.rstrip("/")
        self._lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()

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

        Raises, when sent: ContextOverflow, RequestError, StreamDropped; ConfigError for a parameter that this
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
            async with asyncio.timeout(30.0):
                status, content = await self._request("GET", path)
        except (httpx.TransportError, TimeoutError) as error:
            raise RequestError(f"GET {path} at {self.endpoint.base_url}: {_reason(error)}") from None
        if status != 200:
            raise _refusal(status, content)
        return content.decode(errors="replace")

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

    async def _request(
        self, method: str, path: str, body: bytes = b"", hear: Callable[[bytes], bool] | None = None
    ) -> tuple[int, bytes]:
        """Status and body; the body of a 200 goes to `hear` as it comes, until that is True. Raises TransportError."""
        if isinstance(self._http, Wire):
            return await self._http.request(method, self._path + path, self._lines, body, hear)
        async with self._http.stream(method, path, content=body) as response:
            if hear is None or response.status_code != 200:
                return response.status_code, await response.aread()
            async for part in response.aiter_bytes():
                if hear(part):
                    break
            return 200, b""

    def _open(self, path: str, body: dict[str, Any], *, chat: bool) -> Stream:
        async def each(stream: Stream, take: Take) -> None:
            data = json.dumps(self.endpoint.server.request_body(body, chat=chat)).encode()
            stream.sent = time.perf_counter()
            for attempt in range(1, self._attempts + 1):
                heard = _Heard(take)
                stream.reader = heard.reader
                try:
                    status, content = await self._request("POST", path, data, heard.hear)
                    if status != 200:
                        raise _refusal(status, content)
                    heard.end()
                    return
                except httpx.TransportError as error:
                    if heard.anything:
                        raise StreamDropped(
                            f"the stream from {self.endpoint.base_url} broke: {_reason(error)}"
                        ) from None
                    if attempt == self._attempts or isinstance(error, httpx.ReadTimeout):
                        raise RequestError(f"POST {path} at {self.endpoint.base_url}: {_reason(error)}") from None
                except RequestError as error:
                    if heard.anything or attempt == self._attempts or error.status not in _RETRY_STATUS:
                        raise
                await asyncio.sleep(self._pause_s * 2 ** (attempt - 1))

        return Stream(each)


class _Heard:
    """What has come of a stream, on its way to `take`."""

    def __init__(self, take: Take) -> None:
        self.reader = Reader()
        self.anything = False
        self._take, self._enough = take, False

    def hear(self, part: bytes) -> bool:
        return self._hand_on(self.reader.feed(part))

    def end(self) -> None:
        if not self._enough:
            self._hand_on(self.reader.end())

    def _hand_on(self, chunks: list[Chunk]) -> bool:
        for chunk in chunks:
            self.anything = True
            if self._take(chunk):
                self._enough = True
                break
        return self._enough


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
