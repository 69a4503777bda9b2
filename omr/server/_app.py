"""The native server's HTTP side: routes, and the validation that needs the model.

A request is parsed (`_body`), encoded, checked against the context, and becomes n sequences in the engine thread
(`_engine_thread`). `_reply` brings their tokens back to the client, `_answer` turns them into JSON.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from omr.engine.request import Request as EngineRequest
from omr.errors import InputError
from omr.server import SpecCounts, _body, _tools
from omr.server._answer import Answer, ChatAnswer, Choice, CompletionAnswer
from omr.server._body import BadRequest, Generation
from omr.server._engine_thread import EngineThread
from omr.server._metrics import Clock, Metrics
from omr.server._prometheus import CONTENT_TYPE
from omr.server._reply import Generating, Reply, dead, error_response
from omr.server._text import Vocabulary
from omr.server._tool_answer import ToolAnswer

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


class Service:
    """The routes of one model."""

    def __init__(self, thread: EngineThread, *, model: str, context_tokens: int, seed: int = 0) -> None:
        self._thread = thread
        self._model = model
        self._context = context_tokens
        self._rng = random.Random(seed)
        self._created = int(time.time())
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
        self._thread.close_all()

    # plain routes

    async def _health(self, request: Request) -> Response:
        if self._thread.error is not None:
            return error_response(500, "InternalServerError", dead(self._thread.error))
        if not self._thread.ready.is_set() or self._thread.closing:
            return error_response(
                503, "ServiceUnavailable", "stopping" if self._thread.closing else "the model is being loaded"
            )
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
        return self._generate(loaded, body, ToolAnswer if body.reads_calls else ChatAnswer)

    def _need(self) -> Loaded:
        if self._thread.error is not None:
            raise HTTPException(500, dead(self._thread.error))
        if self._thread.closing or self._thread.loaded is None:
            raise HTTPException(503, "the server is stopping" if self._thread.closing else "the model is being loaded")
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
        num_prompt_tokens = sum(map(len, prompts))
        self._metrics.prompt_tokens += num_prompt_tokens
        sequences = [
            Generating(
                self._request(f"{request_id}-{i}", prompts[i // body.n], body, i % body.n),
                Choice(i, prompts[i // body.n], body, loaded.vocabulary),
                Clock(self._metrics),
            )
            for i in range(len(prompts) * body.n)
        ]
        return Reply(answer, sequences, num_prompt_tokens, self._thread)

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
                speculate=body.speculate,
            )
        except InputError as error:
            raise BadRequest(str(error)) from None


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
    messages, options = body.messages, dict(body.template_options)
    if _tools.template_knows_tools(tokenizer.chat_template):
        messages = _tools.for_template(messages)
        if body.tools:
            options["tools"] = body.tools
    elif body.tools:
        parameter = _tools.source_parameter(body.tools)
        if parameter is None:
            raise BadRequest(
                "this model's chat template knows no tools: it can be offered one function with one string parameter",
                "tools",
            )
        messages, is_open = _tools.as_text(messages, parameter)
        if is_open:
            options |= {"continue_final_message": True, "add_generation_prompt": False}
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise BadRequest(f"the chat template refuses these messages: {error}", "messages") from None
    return _body.encodable(text, "messages")


async def _on_bad_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, BadRequest)
    return error_response(400, "BadRequestError", error.message, error.param)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kinds = {404: "NotFoundError", 405: "MethodNotAllowed", 503: "ServiceUnavailable"}
    return error_response(error.status_code, kinds.get(error.status_code, "HTTPError"), error.detail)


async def _on_hang_up(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _on_bug(request: Request, error: Exception) -> Response:
    return error_response(500, "InternalServerError", f"{type(error).__name__}: {error}")
