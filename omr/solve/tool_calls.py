"""OpenAI-style tool calling: the one tool that is offered, and calls as they come in pieces.

A call is streamed as deltas: an index, at first an id and a name, then the arguments' JSON in pieces. The arguments are
whatever the model wrote: not JSON, another tool's name or a missing field is told to the model as the call's result.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omr.solve.prompt import Message

PYTHON = "python"
PYTHON_TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": PYTHON,
        "description": (
            "Run Python code. Variables are kept from call to call; the result is what the code prints and the value "
            "of its last expression. numpy, sympy and the standard library can be imported; there is no network."
        ),
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "string", "description": "Python source"}},
            "required": ["code"],
        },
    },
}


class BadCall(Exception):
    """A call that cannot be carried out; the text is meant for the model."""


@dataclass(kw_only=True)
class ToolCall:
    """A call as the model wrote it."""

    id: str = ""
    name: str = ""
    arguments: str = ""

    def code(self) -> str:
        """The Python source it asks to run. Raises BadCall."""
        if self.name != PYTHON:
            raise BadCall(f"There is no tool {self.name!r}; call {PYTHON!r} with an object that has 'code'.")
        try:
            arguments = json.loads(self.arguments)
        except (ValueError, RecursionError) as error:
            raise BadCall(f"The arguments are not JSON: {error}.") from None
        code = arguments if isinstance(arguments, str) else None
        if isinstance(arguments, dict):
            code = arguments.get("code")
        if not isinstance(code, str):
            raise BadCall("The arguments must be an object with the source under 'code'.")
        return code

    def message(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class CallPieces:
    """Puts streamed calls together."""

    def __init__(self) -> None:
        self._calls: dict[int, ToolCall] = {}

    def add(self, deltas: Iterable[Any]) -> None:
        """Take the `tool_calls` of one delta; what has no usable form is passed over."""
        for delta in deltas:
            if not isinstance(delta, Mapping):
                continue
            index = delta.get("index")
            call = self._calls.setdefault(index if isinstance(index, int) else len(self._calls), ToolCall())
            function = delta.get("function")
            function = function if isinstance(function, Mapping) else {}
            call.id = _text(delta.get("id")) or call.id
            call.name += _text(function.get("name"))
            call.arguments += _text(function.get("arguments"))

    def calls(self, prefix: str) -> list[ToolCall]:
        """All of them, in order; one without an id gets one that begins with `prefix`."""
        found = [self._calls[index] for index in sorted(self._calls)]
        for number, call in enumerate(found):
            call.id = call.id or f"{prefix}{number}"
        return found


def assistant_turn(content: str, calls: Sequence[ToolCall]) -> Message:
    """The model's turn as it goes back to the server."""
    turn: Message = {"role": "assistant", "content": content}
    return turn | {"tool_calls": [call.message() for call in calls]} if calls else turn


def result_turn(call: ToolCall, output: str) -> Message:
    return {"role": "tool", "tool_call_id": call.id, "content": output}


def _text(value: Any) -> str:
    """A string without lone surrogates, which neither a prompt nor a file takes; empty for anything else."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""
