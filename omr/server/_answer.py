"""What goes back to the client: one `Choice` per sequence, and the two JSON shapes of the OpenAI API.

A choice takes the engine's tokens and gives out deltas: text that is safe to show (see `_text.py`), with the tokens and
logprobs that belong to it. The token that ends a sequence (end of text, or a stop token) is counted but has no text,
unless the request asks for stop strings to be included. Tokens behind a stop string are neither shown nor counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from omr.engine.request import Output, TokenLogprob
from omr.server._body import Generation
from omr.server._text import Detokeniser, StopStrings, Vocabulary


@dataclass
class Delta:
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class Choice:
    """The state of one sequence on its way to the client."""

    def __init__(self, index: int, prompt_ids: Sequence[int], body: Generation, vocabulary: Vocabulary) -> None:
        self.index = index
        self.prompt_ids = prompt_ids
        self.num_tokens = 0
        self.num_cached = 0
        """Prompt tokens that the engine found in its cache."""
        self.num_drafts = self.num_draft_tokens = self.num_accepted_tokens = 0
        """Speculative steps, and the tokens drafted and accepted in them."""
        self.finish_reason: str | None = None
        self.text_length = 0
        """Characters given out so far: where the next token's text begins."""
        self._body = body
        self._detokeniser: Detokeniser = vocabulary.detokeniser(prompt_ids, skip_special=body.skip_special)
        self._stops = StopStrings(body.stop, include=body.include_stop)
        self._user_stop_ids = frozenset(body.stop_token_ids)
        self._pending = Delta()

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def push(self, output: Output) -> bool:
        """Take what one engine step gave. True when a stop string has ended the sequence before the engine did."""
        assert not self.finished, f"choice {self.index} got tokens after {self.finish_reason}"
        delta = self._pending
        self.num_cached = max(self.num_cached, output.num_cached_tokens)
        self.num_drafts = output.num_drafts
        self.num_draft_tokens, self.num_accepted_tokens = output.num_draft_tokens, output.num_accepted_tokens
        for i, token_id in enumerate(output.token_ids):
            self.num_tokens += 1
            delta.token_ids.append(token_id)
            if output.logprobs:
                delta.logprobs.append(output.logprobs[i])
            if output.finish_reason == "stop" and i == len(output.token_ids) - 1:
                delta.stop_reason = token_id if token_id in self._user_stop_ids else None
                if not self._body.include_stop:
                    continue
            text, stop = self._stops.push(self._detokeniser.push(token_id))
            delta.text += text
            if stop is not None:
                delta.stop_reason = stop
                self.end("stop", flush=False)
                return output.finish_reason is None
        if output.finish_reason is not None:
            self.end(output.finish_reason)
        return False

    def end(self, reason: str, *, flush: bool = True) -> None:
        """The sequence is over; what was held back for a stop string that did not come is shown."""
        if flush:
            self._pending.text += self._stops.flush()
        self.finish_reason = self._pending.finish_reason = reason

    def take(self) -> Delta | None:
        """What can be sent now, or None when there is nothing to show yet."""
        delta = self._pending
        if not delta.text and not delta.finish_reason and not (self._body.return_token_ids and delta.token_ids):
            return None
        self._pending = Delta()
        return delta


class Answer:
    """One request's reply, streamed or whole. Subclasses give the JSON of completions and of chat."""

    kind = ""
    chunk_kind = ""
    prefix = ""

    def __init__(self, body: Generation, vocabulary: Vocabulary, model: str, request_id: str, created: int) -> None:
        self.body = body
        self.vocabulary = vocabulary
        self.head = {"id": f"{self.prefix}{request_id}", "created": created, "model": model}
        self.echoed: list[str] = []
        """Prompt texts to repeat, per prompt, with `echo`."""

    def usage(self, choices: Sequence[Choice], num_prompt_tokens: int) -> dict[str, Any]:
        written = sum(c.num_tokens for c in choices)
        usage = {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": written,
            "total_tokens": num_prompt_tokens + written,
            "prompt_tokens_details": {"cached_tokens": sum(c.num_cached for c in choices)},
        }
        drafts = sum(c.num_drafts for c in choices)
        if drafts and all(c.finished for c in choices):  # the first two are OpenAI's names, `drafts` is ours
            accepted = sum(c.num_accepted_tokens for c in choices)
            usage["completion_tokens_details"] = {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": sum(c.num_draft_tokens for c in choices) - accepted,
                "drafts": drafts,
            }
        return usage

    def whole(self, choices: Sequence[Choice], num_prompt_tokens: int) -> dict[str, Any]:
        parts = []
        for choice in choices:
            delta = choice.take()
            assert delta is not None, f"choice {choice.index} is not finished"
            parts.append(self._ids(choice, delta, self.choice(choice, delta), first=True))
        return {**self.head, "object": self.kind, "choices": parts, "usage": self.usage(choices, num_prompt_tokens)}

    def chunk(self, choice: Choice, delta: Delta, *, first: bool) -> dict[str, Any]:
        part = self._ids(choice, delta, self.delta(choice, delta, first=first), first=first)
        choice.text_length += len(delta.text)
        return {**self.head, "object": self.chunk_kind, "choices": [part]}

    def last(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The event after the last choice's, with `stream_options.include_usage`."""
        return {**self.head, "object": self.chunk_kind, "choices": [], "usage": usage}

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """An event before the first token, if this shape has one."""
        return None

    def _ids(self, choice: Choice, delta: Delta, part: dict[str, Any], *, first: bool) -> dict[str, Any]:
        part["finish_reason"] = delta.finish_reason
        part["stop_reason"] = delta.stop_reason
        if self.body.return_token_ids:
            part["token_ids"] = delta.token_ids
            if first:
                part["prompt_token_ids"] = list(choice.prompt_ids)
        return part

    def choice(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        raise TypeError(f"{type(self).__name__} has no shape")

    def delta(self, choice: Choice, delta: Delta, *, first: bool) -> dict[str, Any]:
        raise TypeError(f"{type(self).__name__} has no shape")


class CompletionAnswer(Answer):
    kind = "text_completion"
    chunk_kind = "text_completion"
    prefix = "cmpl-"

    def _echo(self, choice: Choice) -> str:
        return self.echoed[choice.index // self.body.n] if self.echoed else ""

    def choice(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        return self.delta(choice, delta, first=True)

    def delta(self, choice: Choice, delta: Delta, *, first: bool) -> dict[str, Any]:
        echo = self._echo(choice) if first else ""
        logprobs = None if self.body.logprobs is None else self._logprobs(choice, delta)
        return {"index": choice.index, "text": echo + delta.text, "logprobs": logprobs}

    def _logprobs(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        name = self.vocabulary.token_text
        tokens = [name(t.token_id) for t in delta.logprobs]
        offsets, at = [], choice.text_length
        for token in tokens:
            offsets.append(at)
            at += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [t.logprob for t in delta.logprobs],
            "top_logprobs": [
                {name(i): p for i, p in [*t.top[: self.body.logprobs], (t.token_id, t.logprob)]} for t in delta.logprobs
            ],
            "text_offset": offsets,
        }


class ChatAnswer(Answer):
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl-"

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        start = {"role": "assistant", "content": ""}
        part: dict[str, Any] = {"index": choice.index, "delta": start, "logprobs": None, "finish_reason": None}
        return {**self.head, "object": self.chunk_kind, "choices": [part]}

    def choice(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        message = {"role": "assistant", "content": delta.text}
        return {"index": choice.index, "message": message, "logprobs": self._logprobs(delta)}

    def delta(self, choice: Choice, delta: Delta, *, first: bool) -> dict[str, Any]:
        return {"index": choice.index, "delta": {"content": delta.text}, "logprobs": self._logprobs(delta)}

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        return {
            "content": [
                {
                    **self._named(t.token_id, t.logprob),
                    "top_logprobs": [self._named(*p) for p in t.top[: self.body.logprobs]],
                }
                for t in delta.logprobs
            ]
        }

    def _named(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self.vocabulary.token_bytes(token_id)
        return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}
