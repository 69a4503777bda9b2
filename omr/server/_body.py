"""Request bodies of the OpenAI API, read strictly: every wrong type or range is a BadRequest that names the field.

The dialect is vLLM's: OpenAI's fields plus top_k, min_p, repetition_penalty, ignore_eos, stop_token_ids and the like;
`speculate` is ours.
Fields that nobody knows are passed over, as there. Known fields that this server cannot honour (suffix, logit_bias) are
refused unless they carry their neutral value, because ignoring them would change what is asked for.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_CHOICES = 1024
"""Most sequences that one request may start (prompts x n)."""
MAX_LOGPROBS = 20
CALL_END = "</tool_call>"
"""Where a reply ends that may make one call only."""


class BadRequest(Exception):
    """The request cannot be carried out as written: HTTP 400 with `message`, naming the field `param`."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


@dataclass(kw_only=True)
class Generation:
    """What completions and chat have in common."""

    prompts: list[str | list[int]] = field(default_factory=list)
    model: str | None = None
    n: int = 1
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    include_stop: bool = False
    ignore_eos: bool = False
    skip_special: bool = True
    logprobs: int | None = None
    """Alternatives per token beside the token itself; None for no logprobs."""
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    interval_s: float = 0.0
    """Shortest time between two events of a stream; tokens that come in between share the next one."""
    return_token_ids: bool = False
    speculate: bool = True
    """False decodes without drafts, whatever drafter the server has."""
    add_special: bool = True
    """Whether encoding a text prompt adds what the tokenizer adds (a bos token)."""
    echo: bool = False
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    """Function schemas shown to the model."""
    reads_calls: bool = False
    """Whether its reply is searched for calls of them."""
    template_options: dict[str, Any] = field(default_factory=dict)


class _Fields:
    """Typed access to a JSON object."""

    def __init__(self, data: Mapping[str, Any], where: str = "") -> None:
        self.data = data
        self.where = where

    def _wrong(self, key: str, wanted: str) -> BadRequest:
        shown = json.dumps(self.data.get(key), default=str)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        name = f"{self.where}{key}"
        return BadRequest(f"{name} must be {wanted}, got {shown}", name)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.data.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def text(self, key: str) -> str | None:
        value = self.data.get(key)
        if value is not None and not isinstance(value, str):
            raise self._wrong(key, "a string")
        return value

    def number(self, key: str, default: float, low: float, high: float = math.inf, *, above: bool = False) -> float:
        """A number in [low, high], or in (low, high] with `above`."""
        value = self.data.get(key)
        if value is None:
            return default
        wanted = f"a number {'>' if above else '>='} {low:g}" + (f" and <= {high:g}" if high < math.inf else "")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, wanted)
        if not low <= value <= min(high, sys.float_info.max) or (above and value == low):
            raise self._wrong(key, wanted)
        return float(value)

    def integer(self, key: str, low: int, high: int) -> int | None:
        value = self.data.get(key)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._wrong(key, f"an integer from {low} to {high}")
        return value

    def token_ids(self, key: str, vocab_size: int) -> list[int]:
        value = self.data.get(key)
        if value is None:
            return []
        if not _is_token_ids(value):
            raise self._wrong(key, "a list of token ids")
        return _checked_ids(value, vocab_size, f"{self.where}{key}")

    def strings(self, key: str) -> list[str]:
        value = self.data.get(key)
        value = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
            raise self._wrong(key, "a non-empty string or a list of them")
        return [encodable(v, f"{self.where}{key}") for v in value]

    def mapping(self, key: str) -> Mapping[str, Any]:
        value = self.data.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self._wrong(key, "an object")
        return value

    def refuse(self, key: str, *neutral: Any) -> None:
        """Raise unless the field is absent, null or one of the neutral values."""
        value = self.data.get(key)
        if value is not None and value not in neutral:
            raise BadRequest(f"{self.where}{key} is not supported by this server; leave it out", f"{self.where}{key}")


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)


def _checked_ids(ids: list[int], vocab_size: int, name: str) -> list[int]:
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise BadRequest(f"{name} holds token id {token_id}; the vocabulary has 0 to {vocab_size - 1}", name)
    return ids


def encodable(text: str, name: str) -> str:
    """`text`, which no tokenizer takes with a lone surrogate in it. Raises BadRequest."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRequest(f"{name} holds a lone surrogate, which is no character", name) from None
    return text


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def parse_json(raw: bytes) -> dict[str, Any]:
    """The JSON object in a request body."""
    try:
        data = json.loads(raw, parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise BadRequest("the body is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        detail = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise BadRequest(f"the body is not valid JSON: {detail}") from None
    if not isinstance(data, dict):
        raise BadRequest(f"the body must be a JSON object, got {type(data).__name__}")
    return data


def completion(data: dict[str, Any], vocab_size: int) -> Generation:
    """Body of POST /v1/completions."""
    fields = _Fields(data)
    body = _generation(fields, vocab_size)
    body.prompts = prompts(data.get("prompt"), vocab_size)
    body.echo = fields.flag("echo")
    low = 0 if body.echo else 1
    body.max_tokens = fields.integer("max_tokens", low, 2**31 - 1)
    if body.max_tokens is None:
        body.max_tokens = 16
    body.logprobs = fields.integer("logprobs", 0, MAX_LOGPROBS)
    body.add_special = fields.flag("add_special_tokens", True)
    fields.refuse("suffix", "")
    fields.refuse("prompt_logprobs")
    fields.refuse("best_of", 1, body.n)
    if body.echo and body.logprobs is not None:
        raise BadRequest("echo together with logprobs is not supported by this server", "echo")
    _check_choices(body)
    return body


def chat(data: dict[str, Any], vocab_size: int) -> Generation:
    """Body of POST /v1/chat/completions. `prompts` is filled once the template has been applied."""
    fields = _Fields(data)
    body = _generation(fields, vocab_size)
    body.messages = messages(data.get("messages"))
    newer = fields.integer("max_completion_tokens", 1, 2**31 - 1)
    body.max_tokens = newer if newer is not None else fields.integer("max_tokens", 1, 2**31 - 1)
    top = fields.integer("top_logprobs", 0, MAX_LOGPROBS)
    if fields.flag("logprobs"):
        body.logprobs = top or 0
    elif top:
        raise BadRequest("top_logprobs needs logprobs to be true", "top_logprobs")
    body.add_special = fields.flag("add_special_tokens", False)
    body.tools = tools(data.get("tools"))
    fields.refuse("tool_choice", "none", "auto")
    body.reads_calls = bool(body.tools) and data.get("tool_choice") != "none"
    if body.reads_calls:
        body.skip_special = False  # the tags around a call may be special tokens
        if not fields.flag("parallel_tool_calls", True) and CALL_END not in body.stop:
            body.stop.append(CALL_END)
    fields.refuse("functions", [])
    fields.refuse("prompt_logprobs")
    options = _Fields(fields.mapping("chat_template_kwargs"), "chat_template_kwargs.")
    options.refuse("chat_template")  # a program of the client's, which would run in the event loop
    body.template_options = {
        **options.data,
        "add_generation_prompt": fields.flag("add_generation_prompt", True),
        "continue_final_message": fields.flag("continue_final_message"),
    }
    if body.template_options["continue_final_message"] and body.template_options["add_generation_prompt"]:
        if "add_generation_prompt" in data:
            raise BadRequest("continue_final_message and add_generation_prompt exclude each other")
        body.template_options["add_generation_prompt"] = False
    _check_choices(body)
    return body


def _generation(fields: _Fields, vocab_size: int) -> Generation:
    top_k = fields.integer("top_k", -1, 2**31 - 1) or 0
    options = _Fields(fields.mapping("stream_options"), "stream_options.")
    stream = fields.flag("stream")
    fields.refuse("logit_bias", {})
    fields.refuse("response_format", {"type": "text"})
    for key in ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"):
        fields.refuse(key)
    for key in ("use_beam_search",):
        fields.refuse(key, False)
    fields.refuse("min_tokens", 0)
    return Generation(
        model=fields.text("model"),
        n=fields.integer("n", 1, MAX_CHOICES) or 1,
        temperature=fields.number("temperature", 1.0, 0.0),
        top_p=fields.number("top_p", 1.0, 0.0, 1.0, above=True),
        top_k=max(top_k, 0),
        min_p=fields.number("min_p", 0.0, 0.0, 1.0),
        repetition_penalty=fields.number("repetition_penalty", 1.0, 0.0, above=True),
        frequency_penalty=fields.number("frequency_penalty", 0.0, -2.0, 2.0),
        presence_penalty=fields.number("presence_penalty", 0.0, -2.0, 2.0),
        seed=fields.integer("seed", -(2**63), 2**63 - 1),
        stop=fields.strings("stop"),
        stop_token_ids=fields.token_ids("stop_token_ids", vocab_size),
        include_stop=fields.flag("include_stop_str_in_output"),
        ignore_eos=fields.flag("ignore_eos"),
        skip_special=fields.flag("skip_special_tokens", True),
        stream=stream,
        include_usage=options.flag("include_usage"),
        continuous_usage=options.flag("continuous_usage_stats"),
        interval_s=options.number("interval_s", 0.0, 0.0, 10.0),
        return_token_ids=fields.flag("return_token_ids"),
        speculate=fields.flag("speculate", True),
    )


def prompts(value: Any, vocab_size: int) -> list[str | list[int]]:
    """The `prompt` field: a string, a list of strings, a list of token ids, or a list of such lists."""
    if isinstance(value, str) or (_is_token_ids(value) and value):
        value = [value]
    if not isinstance(value, list) or not value:
        raise BadRequest("prompt must be a string, a list of token ids, or a non-empty list of either", "prompt")
    if all(isinstance(v, str) for v in value):
        return [encodable(v, "prompt") for v in value]
    if all(_is_token_ids(v) and v for v in value):
        return [_checked_ids(v, vocab_size, "prompt") for v in value]
    raise BadRequest("prompt must hold strings only or non-empty lists of token ids only", "prompt")


def tools(value: Any) -> list[dict[str, Any]]:
    """The `tools` field: functions, each with a name."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadRequest("tools must be a list", "tools")
    for i, tool in enumerate(value):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise BadRequest(f"tools[{i}] must be of type function, with a function that has a name", f"tools[{i}]")
    return value


def _calls(value: Any, name: str) -> list[dict[str, Any]]:
    """The `tool_calls` of an assistant's message."""
    named = isinstance(value, list) and all(
        isinstance(call, dict)
        and isinstance(call.get("function"), dict)
        and isinstance(call["function"].get("name"), str)
        for call in value
    )
    if not named:
        raise BadRequest(f"{name} must be a list of calls, each with a function that has a name", name)
    assert isinstance(value, list)
    return value


def messages(value: Any) -> list[dict[str, Any]]:
    """The `messages` field with every content as one string."""
    if not isinstance(value, list) or not value:
        raise BadRequest("messages must be a non-empty list", "messages")
    result = []
    for i, message in enumerate(value):
        name = f"messages[{i}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRequest(f"{name} must be an object with a role", name)
        content = message.get("content")
        if isinstance(content, list):
            parts = [p.get("text") if isinstance(p, dict) and p.get("type") == "text" else None for p in content]
            if not all(isinstance(p, str) for p in parts):
                raise BadRequest(f"{name}.content may hold parts of type text only", f"{name}.content")
            content = "".join(p for p in parts if p)
        if content is None:
            content = ""
        if not isinstance(content, str):
            raise BadRequest(f"{name}.content must be a string or a list of text parts", f"{name}.content")
        if message.get("tool_calls"):
            _calls(message["tool_calls"], f"{name}.tool_calls")
        result.append({**message, "content": encodable(content, f"{name}.content")})
    return result


def _check_choices(body: Generation) -> None:
    if body.n * max(len(body.prompts), 1) > MAX_CHOICES:
        raise BadRequest(f"prompts x n must be at most {MAX_CHOICES}, got {body.n * len(body.prompts)}", "n")
