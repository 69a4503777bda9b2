"""Token ids to text, as they come: bytes to whole characters, and stop strings that never leak.

Two automata stand between the engine and a stream. The first turns tokens into text and holds back a character until
its last byte has come, because one character may span several tokens. The second looks for stop strings and holds back
the longest tail that could still become one. Both work on tokens and text alone, so it makes no difference how many
tokens the engine delivers at once: speculation changes the rhythm of a stream, never its text.

A stop string is found where its last character comes first: of two stop strings the one that is complete earlier wins,
of two complete at the same place the longer one. The text ends before it (or after it, on request).
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Any, Protocol


class Detokeniser(Protocol):
    """The text of one sequence, token by token."""

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        ...


class Vocabulary:
    """What the ids of one tokenizer stand for.

    `tokenizer` is a `tokenizers.Tokenizer`. With a byte-level decoder (GPT-2, Llama 3, Qwen) a token is a fixed string
    of bytes and detokenising is a table look-up; any other decoder is asked for a short window of tokens each time.
    """

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers import decoders

        self.tokenizer = tokenizer
        self.size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self.special = frozenset(i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special)
        self._is_bytes = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self._bytes: dict[int, bytes] = {}

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; empty for an id that no token has."""
        known = self._bytes.get(token_id)
        if known is None:
            token = self.tokenizer.id_to_token(token_id)
            if token is None:
                known = b""
            elif self._is_bytes:
                known = _from_byte_level(token)
            else:
                known = str(self.tokenizer.decode([token_id], skip_special_tokens=False)).encode()
            self._bytes[token_id] = known
        return known

    def token_text(self, token_id: int) -> str:
        """One token as text, for logprob tables; broken characters become U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")

    def detokeniser(self, prompt_ids: Sequence[int] = (), *, skip_special: bool = True) -> Detokeniser:
        """For a sequence that continues `prompt_ids`."""
        if self._is_bytes:
            return _ByteTable(self, skip_special)
        return _Window(self, prompt_ids, skip_special)

    def decode(self, token_ids: Iterable[int], *, skip_special: bool = True) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=skip_special))


class _ByteTable:
    def __init__(self, vocabulary: Vocabulary, skip_special: bool) -> None:
        self._vocabulary = vocabulary
        self._skipped = vocabulary.special if skip_special else frozenset()
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        return self._decode(self._vocabulary.token_bytes(token_id))


class _Window:
    """Decode from a few tokens back and take what is new: right for decoders that look at neighbours."""

    CONTEXT = 6

    def __init__(self, vocabulary: Vocabulary, prompt_ids: Sequence[int], skip_special: bool) -> None:
        self._vocabulary = vocabulary
        self._skip_special = skip_special
        self._ids = list(prompt_ids[-self.CONTEXT :])
        self._read = len(self._ids)  # tokens before this one have been emitted
        self._emitted = self._text()

    def _text(self) -> str:
        return self._vocabulary.decode(self._ids, skip_special=self._skip_special)

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._text()
        if text.endswith("\ufffd") or len(text) <= len(self._emitted):
            return ""
        new = text[len(self._emitted) :]
        self._ids, self._read = self._ids[self._read :], len(self._ids) - self._read
        self._emitted = self._text()
        return new


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in printable}
    rest = (b for b in range(256) if b not in set(printable))
    table.update({chr(256 + i): b for i, b in enumerate(rest)})
    return table


_ALPHABET = _byte_level_alphabet()


def _from_byte_level(token: str) -> bytes:
    """Bytes of a token; one with a character outside the alphabet (an added token) stands for itself."""
    try:
        return bytes(_ALPHABET[c] for c in token)
    except KeyError:
        return token.encode()


class StopStrings:
    """Cuts a growing text at the first stop string."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        assert all(stops), f"an empty stop string: {stops!r}"
        self._stops = tuple(stops)
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(what may be shown now, the stop string found or None). After a find, push nothing more."""
        if not self._stops:
            return text, None
        text = self._held + text
        found: tuple[int, int, str] | None = None  # (end, start, stop): the least wins
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (found is None or (start + len(stop), start) < found[:2]):
                found = (start + len(stop), start, stop)
        if found is not None:
            end, start, stop = found
            self._held = ""
            return text[: end if self._include else start], stop
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """What was held back, when the sequence ends without a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest tail of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
