"""The chat answer of a request with tools: calls are taken out of the text."""

from __future__ import annotations

from typing import Any

from omr.server._answer import ChatAnswer, Choice, Delta
from omr.server._tools import Call, CallText


class ToolAnswer(ChatAnswer):
    """A turn that makes a call ends with finish_reason `tool_calls`, however the model ended it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._texts: dict[int, CallText] = {}

    def choice(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        text, calls = self._split(choice, delta)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if calls:
            message["tool_calls"] = calls
        return {"index": choice.index, "message": message, "logprobs": self._logprobs(delta)}

    def delta(self, choice: Choice, delta: Delta, *, first: bool) -> dict[str, Any]:
        text, calls = self._split(choice, delta)
        before = len(self._texts[choice.index].calls) - len(calls)
        said: dict[str, Any] = {"content": text}
        if calls:
            said["tool_calls"] = [{"index": before + i, **call} for i, call in enumerate(calls)]
        return {"index": choice.index, "delta": said, "logprobs": self._logprobs(delta)}

    def _split(self, choice: Choice, delta: Delta) -> tuple[str, list[Call]]:
        parser = self._texts.setdefault(choice.index, CallText(self.body.tools))
        text, calls = parser.push(delta.text)
        if delta.finish_reason is not None:
            rest, more = parser.end(delta.stop_reason)
            text, calls = text + rest, calls + more
            if parser.calls and delta.finish_reason == "stop":
                delta.finish_reason, delta.stop_reason = "tool_calls", None
        return text, calls
