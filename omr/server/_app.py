"""The native server's HTTP side: routes, validation of what needs the model, streams.

A request is parsed (`_body`), encoded, checked against the context, and becomes n sequences in the engine thread
(`_engine_thread`). One mailbox brings their tokens, `_answer` turns them into JSON. Three things end a request early: a
stop string (the sequence is aborted in the engine), the client hanging up (all its sequences are), and the service
stopping (they end with finish_reason `abort`). Whatever happens, `finally` frees what the engine still holds.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from omr.engine.request import Output
from omr.engine.request import Request as EngineRequest
from omr.errors import InputError
from omr.server import SpecCounts, _body
from omr.server._answer import Answer, ChatAnswer, Choice, CompletionAnswer, Delta
from omr.server._body import BadRequest, Generation
from omr.server._engine_thread import EngineDead, EngineThread, Mailbox, Refused
from omr.server._metrics import Clock, Metrics
from omr.server._prometheus import CONTENT_TYPE
from omr.server._text import Vocabulary

MAX_BODY_BYTES = 64 << 20


@dataclass(kw_only=True)
class Loaded:
    """What the engine thread has built."""

    engine: Any
    tokenizer: Any
    """A transformers tokenizer: chat template and encoding."""
    vocabulary: Vocabulary
    vocab_size: int
    speculates: bool
    """Whether a drafter is at work: its counters are shown only then."""
    load: Callable[[], tuple[int, int, float]]
    """(sequences running, sequences waiting, share of KV blocks in use)."""


@dataclass
class _Sequence:
    """One of a request's n sequences."""

    request_id: str
    choice: Choice
    clock: Clock
    started: bool = field(default=False)
    """Whether a chunk of it has been sent."""


class Service:
    """The routes of one model."""

    def __init__(self, thread: EngineThread, *, model: str, context_tokens: int, seed: int = 0) -> None:
        self._thread = thread
        self._model = model
        self._context = context_tokens
        self._rng = random.Random(seed)
        self._created = int(time.time())
        self._stopping = False
        self._metrics = Metrics(model)

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/health", self._health),
                Route("/metrics", self._metrics_page),
                Route("/version", self._version),
                Route("/v1/models", self._models),
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/tokenize", self._tokenize, methods=["POST"]),
                Route("/detokenize", self._detokenize, methods=["POST"]),
            ],
            exception_handlers={
                BadRequest: _on_bad_request,
                HTTPException: _on_http_error,
                ClientDisconnect: _on_hang_up,
                Exception: _on_bug,
            },
        )

    def stop(self) -> None:
        """End all open requests and refuse new ones."""
        self._stopping = True
        self._thread.close_all()

    # plain routes

    async def _health(self, request: Request) -> Response:
        if self._thread.error is not None:
            return _error(500, "InternalServerError", _dead(self._thread.error))
        if not self._thread.ready.is_set() or self._stopping:
            return _error(503, "ServiceUnavailable", "stopping" if self._stopping else "the model is being loaded")
        return PlainTextResponse("")

    async def _version(self, request: Request) -> Response:
        import omr

        return JSONResponse({"version": omr.__version__, "server": "omr"})

    async def _models(self, request: Request) -> Response:
        card = {
            "id": self._model,
            "object": "model",
            "created": self._created,
            "owned_by": "omr",
            "max_model_len": self._context,
        }
        return JSONResponse({"object": "list", "data": [card]})

    async def _metrics_page(self, request: Request) -> Response:
        loaded: Loaded | None = self._thread.loaded
        running, waiting, usage = loaded.load() if loaded else (0, 0, 0.0)
        spec: SpecCounts | None = loaded.engine.counts if loaded and loaded.speculates else None
        text = self._metrics.render(running=running, waiting=waiting, kv_usage=usage, spec=spec)
        return Response(text, media_type=CONTENT_TYPE)

    async def _tokenize(self, request: Request) -> Response:
        data = await _read(request)
        loaded = self._need()
        if "messages" in data:
            body = _body.chat({**data, "n": 1}, loaded.vocab_size)
            [ids] = self._encode(loaded, body)
        else:
            text = data.get("prompt")
            if not isinstance(text, str):
                raise BadRequest("prompt must be a string", "prompt")
            body = _body.completion({"prompt": text, **_only(data, "add_special_tokens")}, loaded.vocab_size)
            [ids] = self._encode(loaded, body)
        return JSONResponse({"count": len(ids), "max_model_len": self._context, "tokens": ids})

    async def _detokenize(self, request: Request) -> Response:
        data = await _read(request)
        loaded = self._need()
        ids = data.get("tokens")
        if ids == []:
            return JSONResponse({"prompt": ""})
        [checked] = _body.prompts(ids, loaded.vocab_size) if isinstance(ids, list) else [""]
        if isinstance(checked, str):
            raise BadRequest("tokens must be a list of token ids", "tokens")
        return JSONResponse({"prompt": loaded.vocabulary.decode(checked, skip_special=False)})

    # generation

    async def _completions(self, request: Request) -> Response:
        data = await _read(request)
        loaded = self._need()
        body = _body.completion(data, loaded.vocab_size)
        return self._generate(loaded, body, CompletionAnswer)

    async def _chat(self, request: Request) -> Response:
        data = await _read(request)
        loaded = self._need()
        body = _body.chat(data, loaded.vocab_size)
        return self._generate(loaded, body, ChatAnswer)

    def _need(self) -> Loaded:
        if self._thread.error is not None:
            raise HTTPException(500, _dead(self._thread.error))
        if self._stopping or self._thread.loaded is None:
            raise HTTPException(503, "the server is stopping" if self._stopping else "the model is being loaded")
        loaded: Loaded = self._thread.loaded
        return loaded

    def _encode(self, loaded: Loaded, body: Generation) -> list[list[int]]:
        """Token ids of every prompt; a chat's one prompt is made here."""
        if body.messages:
            body.prompts = [_apply_template(loaded.tokenizer, body)]
        encode = loaded.vocabulary.tokenizer.encode
        return [encode(p, add_special_tokens=body.add_special).ids if isinstance(p, str) else p for p in body.prompts]

    def _generate(self, loaded: Loaded, body: Generation, shape: type[Answer]) -> Response:
        if body.model is not None and body.model != self._model:
            raise HTTPException(404, f"the model {body.model!r} does not exist; this server has {self._model!r}")
        prompts = self._encode(loaded, body)
        for ids in prompts:
            self._check_length(ids, body)
        request_id = uuid.uuid4().hex
        answer = shape(body, loaded.vocabulary, self._model, request_id, int(time.time()))
        if body.echo:
            decode = loaded.vocabulary.decode
            answer.echoed = [p if isinstance(p, str) else decode(p, skip_special=False) for p in body.prompts]
        self._metrics.prompt_tokens += sum(map(len, prompts))
        sequences, requests = [], []
        for i in range(len(prompts) * body.n):
            ids = prompts[i // body.n]
            name = f"{request_id}-{i}"
            sequences.append(_Sequence(name, Choice(i, ids, body, loaded.vocabulary), Clock(self._metrics)))
            requests.append(self._request(name, ids, body, i % body.n))
        num_prompt_tokens = sum(map(len, prompts))

        async def run(receive: Receive, send: Send) -> None:
            mailbox = Mailbox()
            watcher = asyncio.create_task(_watch(receive, mailbox))
            steps = self._steps(mailbox, sequences)
            try:
                if body.max_tokens == 0:
                    for sequence in sequences:
                        sequence.choice.end("length")
                else:
                    for engine_request in requests:
                        self._thread.submit(engine_request, mailbox)
                reply = self._stream if body.stream else self._collect
                await reply(answer, sequences, steps, num_prompt_tokens, send)
            finally:
                watcher.cancel()
                await steps.aclose()
                for sequence in sequences:
                    if not sequence.choice.finished:
                        sequence.clock.finish("abort", sequence.choice.num_tokens)
                    self._thread.abort(sequence.request_id)

        return _Generated(run)

    def _check_length(self, ids: Sequence[int], body: Generation) -> None:
        limit = f"this model's maximum context length is {self._context} tokens"
        if not ids:
            raise BadRequest("the prompt is empty: it holds no token", "prompt")
        if len(ids) >= self._context and body.max_tokens != 0:
            raise BadRequest(f"{limit}, but your request has {len(ids)} input tokens; shorten the prompt", "prompt")
        if body.max_tokens is None:
            return
        if len(ids) + body.max_tokens > self._context:
            raise BadRequest(
                f"{limit} and your request has {len(ids)} input tokens: max_tokens={body.max_tokens} is too large "
                f"({body.max_tokens} > {self._context} - {len(ids)})",
                "max_tokens",
            )

    def _request(self, name: str, ids: list[int], body: Generation, offset: int) -> EngineRequest:
        seed = self._rng.getrandbits(62) if body.seed is None else (body.seed + offset) % 2**63
        room = max(self._context - len(ids), 1)
        try:
            return EngineRequest(
                id=name,
                prompt_ids=ids,
                temperature=body.temperature,
                top_p=body.top_p,
                top_k=body.top_k,
                min_p=body.min_p,
                repetition_penalty=body.repetition_penalty,
                frequency_penalty=body.frequency_penalty,
                presence_penalty=body.presence_penalty,
                seed=seed,
                max_tokens=body.max_tokens or room,
                stop_token_ids=body.stop_token_ids,
                ignore_eos=body.ignore_eos,
                logprobs=body.logprobs,
            )
        except InputError as error:
            raise BadRequest(str(error)) from None

    async def _steps(self, mailbox: Mailbox, sequences: Sequence[_Sequence]) -> AsyncGenerator[list[_Sequence], None]:
        """The sequences that got something, wake-up after wake-up, until all are finished or the client is gone."""
        by_id = {s.request_id: s for s in sequences}
        if all(s.choice.finished for s in sequences):
            yield list(sequences)
        while not all(s.choice.finished for s in sequences):
            touched: dict[str, _Sequence] = {}
            output: Output
            for output in await mailbox.take():
                sequence = by_id[output.id]
                choice = sequence.choice
                if choice.finished:
                    continue  # the step that was running when its stop string was found
                before = choice.num_tokens
                if choice.push(output):
                    self._thread.abort(output.id)
                sequence.clock.tokens(choice.num_tokens - before)
                if choice.finished:
                    sequence.clock.finish(choice.finish_reason or "", choice.num_tokens)
                touched[output.id] = sequence
            if mailbox.gone:
                if not self._stopping:
                    return
                for sequence in sequences:
                    if not sequence.choice.finished:
                        sequence.choice.end("abort")
                        sequence.clock.finish("abort", sequence.choice.num_tokens)
                        touched[sequence.request_id] = sequence
            yield list(touched.values())

    async def _collect(
        self,
        answer: Answer,
        sequences: Sequence[_Sequence],
        steps: AsyncIterator[list[_Sequence]],
        num_prompt_tokens: int,
        send: Send,
    ) -> None:
        try:
            async for _ in steps:
                pass
        except (EngineDead, Refused) as error:
            await _send(send, _engine_error(error))
            return
        choices = [s.choice for s in sequences]
        if all(c.finished for c in choices):
            await _send(send, JSONResponse(answer.whole(choices, num_prompt_tokens)))

    async def _stream(
        self,
        answer: Answer,
        sequences: Sequence[_Sequence],
        steps: AsyncIterator[list[_Sequence]],
        num_prompt_tokens: int,
        send: Send,
    ) -> None:
        open_ = False
        body = answer.body
        try:
            async for touched in steps:
                events: list[dict[str, Any]] = []
                for sequence in touched:
                    delta = sequence.choice.take()
                    if delta is not None:
                        events += self._events(answer, sequence, delta)
                if not open_:
                    await send({"type": "http.response.start", "status": 200, "headers": _SSE_HEADERS})
                    open_ = True
                if events:
                    await _send_events(send, events)
        except (EngineDead, Refused) as error:
            if not open_:
                await _send(send, _engine_error(error))
                return
            await _send_events(send, [_error_body(500, "InternalServerError", _dead(error))])
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        choices = [s.choice for s in sequences]
        if all(c.finished for c in choices):
            if body.include_usage:
                await _send_events(send, [answer.last(answer.usage(choices, num_prompt_tokens))])
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    def _events(self, answer: Answer, sequence: _Sequence, delta: Delta) -> list[dict[str, Any]]:
        first, sequence.started = not sequence.started, True
        opening = answer.opening(sequence.choice) if first else None
        chunk = answer.chunk(sequence.choice, delta, first=first)
        if answer.body.continuous_usage:
            chunk["usage"] = answer.usage([sequence.choice], len(sequence.choice.prompt_ids))
        return [chunk] if opening is None else [opening, chunk]


class _Generated(Response):
    """A response that writes itself, with the client's hang-up in sight."""

    def __init__(self, run: Callable[[Receive, Send], Awaitable[None]]) -> None:
        super().__init__()
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._run(receive, send)


_SSE_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


async def _watch(receive: Receive, mailbox: Mailbox) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    mailbox.close()


async def _send(send: Send, response: Response) -> None:
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body})


async def _send_events(send: Send, events: Sequence[dict[str, Any]]) -> None:
    text = "".join(f"data: {json.dumps(e, ensure_ascii=False, separators=(',', ':'))}\n\n" for e in events)
    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})


async def _read(request: Request) -> dict[str, Any]:
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
    return _body.parse_json(bytes(raw))


def _only(data: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {k: data[k] for k in keys if k in data}


def _apply_template(tokenizer: Any, body: Generation) -> str:
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise BadRequest("this model has no chat template; use /v1/completions")
    try:
        return str(tokenizer.apply_chat_template(body.messages, tokenize=False, **body.template_options))
    except (TemplateError, TypeError, ValueError) as error:
        raise BadRequest(f"the chat template refuses these messages: {error}", "messages") from None


def _dead(error: Exception) -> str:
    return f"the engine failed: {error}"


def _engine_error(error: Exception) -> Response:
    if isinstance(error, Refused):
        return _error(400, "BadRequestError", str(error))
    return _error(500, "InternalServerError", _dead(error))


def _error_body(status: int, kind: str, message: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def _error(status: int, kind: str, message: str, param: str | None = None) -> Response:
    return JSONResponse(_error_body(status, kind, message, param), status_code=status)


async def _on_bad_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, BadRequest)
    return _error(400, "BadRequestError", error.message, error.param)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kinds = {404: "NotFoundError", 405: "MethodNotAllowed", 503: "ServiceUnavailable"}
    return _error(error.status_code, kinds.get(error.status_code, "HTTPError"), error.detail)


async def _on_hang_up(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _on_bug(request: Request, error: Exception) -> Response:
    return _error(500, "InternalServerError", f"{type(error).__name__}: {error}")
