"""Tool calls on the native server: how a conversation with tools becomes a prompt, and a reply's text becomes calls.

Two ways of writing a call are known, both between `<tool_call>` and `</tool_call>`:
  - JSON, `{"name": ..., "arguments": {...}}`, as Qwen and Hermes models write it. Their chat templates show the tools
    and lay out calls and results;
  - the source itself, as OpenMath models and omr's embedded one write Python. Their templates know no tools: the turns
    of a call, its result and what follows are one assistant turn, with the result in an output block. This takes a
    single tool with a single string parameter.
Which one holds for a prompt is decided by the template: the first if it mentions tools. A reply may be in either.

A call is given out once it is complete. What is no call after all, or was cut off, is text.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from omr.solve.prompt import CODE_TAGS

TAGS = CODE_TAGS["openmath"]
BEGIN, END = TAGS.begin, TAGS.end

Message = dict[str, Any]
Call = dict[str, Any]


def template_knows_tools(template: str) -> bool:
    return "tools" in template


def for_template(messages: Sequence[Message]) -> list[Message]:
    """Messages with the arguments of calls as objects, which is what templates expect."""
    result = []
    for message in messages:
        calls = [
            {**call, "function": {**call["function"], "arguments": _object(call["function"].get("arguments"))}}
            for call in message.get("tool_calls") or ()
        ]
        result.append({**message, "tool_calls": calls} if calls else message)
    return result


def as_text(messages: Sequence[Message], parameter: str) -> tuple[list[Message], bool]:
    """(messages without calls and results, each run of them one assistant turn; whether the last turn is unfinished).

    `parameter` is the one whose value is the source.
    """
    result: list[Message] = []
    is_open = False
    for message in messages:
        text = str(message.get("content") or "")
        if message["role"] == "tool":
            text = TAGS.output_block("completed", text, "")
        for call in message.get("tool_calls") or ():
            arguments = _object(call["function"].get("arguments"))
            source = arguments.get(parameter) if isinstance(arguments, dict) else arguments
            text += f"{BEGIN}\n{source}\n{END}"
        if is_open and message["role"] in ("tool", "assistant"):
            result[-1]["content"] += text
        else:
            result.append({"role": message["role"], "content": text})
        is_open = message["role"] == "tool" or bool(message.get("tool_calls"))
    return result, is_open


def source_parameter(tools: Sequence[Mapping[str, Any]]) -> str | None:
    """The name of the single string parameter of the single tool; None for any other set of tools."""
    if len(tools) != 1:
        return None
    schema = tools[0]["function"].get("parameters") or {}
    properties = schema.get("properties") if isinstance(schema, dict) else None
    if not isinstance(properties, dict) or len(properties) != 1:
        return None
    (name, kind), *_ = properties.items()
    return name if isinstance(kind, dict) and kind.get("type") == "string" else None


class CallText:
    """Splits a growing reply into text and calls."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self._tools = tools
        self._held = ""
        self.calls: list[Call] = []
        """Every call so far."""

    def push(self, text: str) -> tuple[str, list[Call]]:
        """(text that is no call, calls completed by it)."""
        self._held += text
        shown, calls = "", list[Call]()
        while True:
            begin = self._held.find(BEGIN)
            if begin < 0:
                safe = len(self._held) - _overlap(self._held, BEGIN)
                shown, self._held = shown + self._held[:safe], self._held[safe:]
                break
            shown, self._held = shown + self._held[:begin], self._held[begin:]
            end = self._held.find(END)
            if end < 0:
                break
            body, whole = self._held[len(BEGIN) : end], self._held[: end + len(END)]
            self._held = self._held[end + len(END) :]
            call = self._call(body)
            if call is None:
                shown += whole
            else:
                calls.append(call)
        self.calls += calls
        return shown, calls

    def end(self, stop_reason: Any) -> tuple[str, list[Call]]:
        """The rest, when the reply is over. A stop at END closes the call that is open."""
        if stop_reason == END and self._held.startswith(BEGIN):
            return self.push(END)
        rest, self._held = self._held, ""
        return rest, []

    def _call(self, body: str) -> Call | None:
        try:
            said = json.loads(body)
        except (ValueError, RecursionError):
            said = None
        if isinstance(said, dict) and isinstance(said.get("name"), str):
            arguments = said.get("arguments", said.get("parameters", {}))
            text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            return self._made(said["name"], text)
        parameter = source_parameter(self._tools)
        if parameter is None:
            return None
        source = body.removeprefix("\n").removesuffix("\n")
        return self._made(self._tools[0]["function"]["name"], json.dumps({parameter: source}, ensure_ascii=False))

    def _made(self, name: str, arguments: str) -> Call:
        function = {"name": name, "arguments": arguments}
        return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that `tag` begins with."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)


def _object(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
