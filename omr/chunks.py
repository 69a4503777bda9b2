"""What a server streams: server-sent events of the OpenAI API, read as chunks of text with their tokens counted."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from omr.errors import StreamDropped

_decode = json.JSONDecoder().decode  # json.loads looks for UTF-16 first


class Chunk(NamedTuple):
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


class Reader:
    """A server-sent event stream: bytes in, chunks out, up to [DONE]."""

    def __init__(self) -> None:
        self.first: float | None = None
        """perf_counter() of the first token."""
        self.num_prompt_tokens = 0
        """As the server counts them, known at the end at the latest; 0 when it does not say."""
        self.speculation: tuple[int, int, int] | None = None
        """(drafts, draft tokens, accepted), known at the end; None when the server does not say."""
        self._held = b""
        self._done = self._finished = False
        self._broken: StreamDropped | None = None
        """An error that waits until the chunks before it are out."""
        self._counted = 0
        """Tokens in the chunks given out."""
        self._texts = 0
        """Of them, chunks with text."""
        self._total: int | None = None

    def feed(self, part: bytes) -> list[Chunk]:
        """What `part` completes. Lines that are no data (comments, keep-alives, event names) are skipped.

        Raises StreamDropped for an event that is none, or that says that the server failed.
        """
        if self._broken is not None:
            raise self._broken
        now = time.perf_counter()
        chunks: list[Chunk] = []
        *lines, self._held = (self._held + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and not self._done:
                data = line[5:].strip()
                if data == b"[DONE]":
                    self._done = True
                    continue
                try:
                    self._take(_event(data), now, chunks)
                except StreamDropped as error:
                    if not chunks:
                        raise
                    self._broken, self._done = error, True
        return chunks

    def _take(self, event: dict[str, Any], now: float, chunks: list[Chunk]) -> None:
        if usage := event.get("usage"):
            self._total = int(usage.get("completion_tokens") or 0)
            self.num_prompt_tokens = int(usage.get("prompt_tokens") or 0)
            self.speculation = _speculation(usage) or self.speculation
        for choice in event.get("choices") or ():
            calls: Sequence[Any] = ()
            text, thought = choice.get("text"), ""
            if text is None:
                text, calls, thought = _delta(choice)
            ids = choice.get("token_ids")
            new = self._total - self._counted if self._total is not None else len(ids) if ids else 0
            self._counted += new
            said = bool(text or calls or thought)
            self._texts += said
            reason = choice.get("finish_reason")
            self._finished = self._finished or reason is not None
            if said or new or reason is not None:
                if self.first is None and (said or new):
                    self.first = now
                stop = choice.get("stop_reason")
                stop = choice.get("matched_stop") if stop is None else stop
                chunks.append(Chunk(_sound(text), new, reason, stop, now, calls, thought))

    def end(self) -> list[Chunk]:
        """Tokens that were counted only at the end. Raises StreamDropped when there was no finish reason."""
        if self._broken is not None:
            raise self._broken
        if not self._finished:
            raise StreamDropped("the server ended the stream without a finish reason")
        total = self._total if self._total is not None else self._counted or self._texts
        rest = total - self._counted
        return [Chunk("", rest, None, None, time.perf_counter())] if rest else []


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


def _sound(text: str) -> str:
    """`text` without lone surrogates: JSON can spell them, but no prompt, file or tokenizer takes them."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _event(data: bytes) -> dict[str, Any]:
    try:
        event = _decode(data.decode())
    except ValueError:
        raise StreamDropped(f"the server sent an event that is no JSON: {data[:80]!r}") from None
    if not isinstance(event, dict):
        raise StreamDropped(f"the server sent an event that is no object: {data[:80]!r}")
    if event.get("error"):
        error = event["error"]
        raise StreamDropped(f"the server broke off: {error.get('message') if isinstance(error, dict) else error}")
    return event
