"""Suffix decoding (arXiv 2411.04975): draft from the continuations of the longest suffix seen before, in any request.

Prompt lookup (`ngram`) sees one sequence. This drafter also remembers what other requests wrote, which pays when many
answers resemble each other: the samples of one problem, or one problem family after the other. It keeps an index from
the last `min_match` tokens to the places where they occurred, in the running sequences and in a bounded store of
earlier text; among these places the one with the longest match to the left wins, the most recent among equals, and the
tokens after it are the draft.

What it learns from is the text alone, so what it proposes depends on what was served before; the output does not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from omr.drafter import Drafter
from omr.errors import ConfigError
from omr.option import option

if TYPE_CHECKING:
    import torch

    from omr.nn.transformer import Transformer


@option("drafter", "suffix")
@dataclass(kw_only=True)
class Suffix(Drafter):
    """Looks the newest tokens up in everything served so far."""

    draft_tok: int = 3
    """Tokens drafted per step."""
    min_match: int = 2
    """Shortest suffix looked up, in tokens."""
    max_match: int = 16
    """A match longer than this counts as this long."""
    remember_tok: int = 200_000
    """Tokens of text kept, oldest sequences forgotten first."""
    max_places: int = 16
    """Most recent places compared for one suffix."""

    def __post_init__(self) -> None:
        for name in ("draft_tok", "min_match", "max_places"):
            if getattr(self, name) < 1:
                raise ConfigError(f"drafter.{name} must be >= 1, got {getattr(self, name)}")
        if self.max_match < self.min_match:
            raise ConfigError(f"drafter.max_match={self.max_match} is below drafter.min_match={self.min_match}")
        if self.remember_tok < 0:
            raise ConfigError(f"drafter.remember_tok must be >= 0, got {self.remember_tok}")

    def load(self, folder: object, base: Transformer) -> SuffixLookup:
        return SuffixLookup(self)


class _Text:
    """One remembered sequence; a place is a text and a number of its tokens."""

    def __init__(self) -> None:
        self.ids: list[int] = []


class SuffixLookup:
    """The DraftModel of `suffix`."""

    needs_hidden = False

    def __init__(self, option: Suffix) -> None:
        self.option = option
        self.num_draft_tok = option.draft_tok
        self._places: dict[tuple[int, ...], deque[tuple[_Text, int]]] = {}
        self._texts: deque[_Text] = deque()
        self._live: dict[int, _Text] = {}
        self._size = 0

    def propose(
        self, hidden: torch.Tensor | None, tokens: torch.Tensor, history: Sequence[Sequence[int]] | None
    ) -> torch.Tensor:
        """See DraftModel. `history` ends with the newest token."""
        import torch

        assert history is not None and len(history) == len(tokens), "suffix lookup reads the history"
        drafts = [self._draft(ids) for ids in history]
        return torch.tensor(drafts, dtype=torch.int64, device=tokens.device)

    def _draft(self, ids: Sequence[int]) -> list[int]:
        text = self._follow(ids)
        wanted, n = self.num_draft_tok, self.option.min_match
        best, best_match = None, n - 1
        for other, end in reversed(self._places.get(tuple(ids[-n:]), ())):
            if other is text and end == len(ids):
                continue  # the suffix itself
            match = self._match(ids, other.ids, end)
            if match > best_match:
                best, best_match = (other.ids, end), match
                if match >= self.option.max_match:
                    break
        if best is None:
            return [ids[-1]] * wanted
        found, end = best
        draft = found[end : end + wanted]
        return draft + [draft[-1] if draft else ids[-1]] * (wanted - len(draft))

    def _match(self, ids: Sequence[int], other: list[int], end: int) -> int:
        """Tokens that end alike in `ids` and in other[:end], at most max_match."""
        n = self.option.min_match
        limit = min(len(ids), end, self.option.max_match)
        while n < limit and ids[-n - 1] == other[end - n - 1]:
            n += 1
        return n

    def _follow(self, ids: Sequence[int]) -> _Text:
        """The remembered text of this sequence, brought up to date: list identity, checked by its tokens."""
        text = self._live.get(id(ids))
        if text is None or not self._continues(text.ids, ids):
            text = self._live[id(ids)] = _Text()
            self._texts.append(text)
        n, first = self.option.min_match, len(text.ids)
        text.ids.extend(ids[first:])
        self._size += len(ids) - first
        for end in range(max(first + 1, n), len(ids) + 1):
            places = self._places.setdefault(tuple(text.ids[end - n : end]), deque(maxlen=self.option.max_places))
            places.append((text, end))
        self._forget()
        return text

    @staticmethod
    def _continues(known: list[int], ids: Sequence[int]) -> bool:
        """Whether `ids` can be `known` grown on; a list freed and allocated again has the same identity."""
        return len(known) <= len(ids) and list(ids[max(0, len(known) - 8) : len(known)]) == known[-8:]

    def _forget(self) -> None:
        while self._size > self.option.remember_tok and len(self._texts) > 1:
            old = self._texts.popleft()
            self._size -= len(old.ids)
            n = self.option.min_match
            for end in range(n, len(old.ids) + 1):
                key = tuple(old.ids[end - n : end])
                if places := [place for place in self._places.get(key, ()) if place[0] is not old]:
                    self._places[key] = deque(places, maxlen=self.option.max_places)
                else:
                    self._places.pop(key, None)
            self._live = {k: text for k, text in self._live.items() if text is not old}
