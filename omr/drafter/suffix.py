"""Suffix decoding (arXiv 2411.04975): draft from how the newest tokens went on before, in any request.

Prompt lookup (`ngram`) sees one sequence. This drafter also remembers what other requests wrote, which pays when many
answers resemble each other: the samples of one problem, or one problem of a family after the other. Where the paper
keeps a suffix tree, the native engine keeps an index from the last MIN_MATCH tokens to the places where they occurred
(the most recent PLACES of them). The places that match furthest to the left vote on each next token; the draft ends
where the share of places that agree with all of it falls under `min_token_prob`, or never begins.

What it proposes depends on what was served before; the output does not. vLLM has its own implementation, which takes
the same knobs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from omr.drafter import Drafter, filled_up
from omr.errors import ConfigError
from omr.option import option

if TYPE_CHECKING:
    import torch

    from omr.nn.transformer import Transformer

MIN_MATCH = 2
"""Shortest suffix looked up, in tokens."""
PLACES = 32
"""Places compared for one suffix."""
REMEMBERED_TOK = 200_000
"""Tokens of text that the native engine keeps, the oldest sequences forgotten first."""


@option("drafter", "suffix")
@dataclass(kw_only=True)
class Suffix(Drafter):
    """Looks the newest tokens up in everything served so far."""

    draft_tok: int = 5
    """Tokens drafted per step, at most. vLLM's own default is 24."""
    max_tree_depth: int = 24
    """Longest pattern matched, in tokens."""
    max_spec_factor: float = 1.0
    """Drafted tokens per token of the matched pattern, at most."""
    min_token_prob: float = 0.1
    """Least estimated probability of a drafted token."""
    adaptive: bool = field(default=True, metadata={"content": False})
    """Draft only while that is faster than plain decoding, as measured while serving; output is the same either way."""

    def __post_init__(self) -> None:
        if self.draft_tok < 1:
            raise ConfigError(f"drafter.draft_tok must be >= 1, got {self.draft_tok}; drafter=none drafts nothing")
        if self.max_tree_depth < MIN_MATCH:
            raise ConfigError(f"drafter.max_tree_depth must be >= {MIN_MATCH}, got {self.max_tree_depth}")
        if self.max_spec_factor <= 0:
            raise ConfigError(f"drafter.max_spec_factor must be > 0, got {self.max_spec_factor}")
        if not 0 <= self.min_token_prob <= 1:
            raise ConfigError(f"drafter.min_token_prob must be in [0, 1], got {self.min_token_prob}")

    def load(self, folder: object, base: Transformer) -> SuffixLookup:
        return SuffixLookup(self)


class SuffixLookup:
    """The DraftModel of `suffix`. A text is the list of a sequence's ids; a place is a text and a number of its ids."""

    needs_hidden = False

    def __init__(self, option: Suffix, remembered_tok: int = REMEMBERED_TOK) -> None:
        self.option, self.remembered_tok = option, remembered_tok
        self.num_draft_tok, self.adaptive = option.draft_tok, option.adaptive
        self._places: dict[tuple[int, ...], deque[tuple[list[int], int]]] = {}
        self._texts: deque[list[int]] = deque()
        self._live: dict[int, list[int]] = {}  # by identity of the sequence's list
        self.num_remembered = 0
        """Tokens kept."""

    def propose(
        self, hidden: torch.Tensor | None, tokens: torch.Tensor, history: Sequence[Sequence[int]] | None
    ) -> torch.Tensor:
        """See DraftModel. `history` ends with the newest token."""
        assert history is not None and len(history) == len(tokens), "suffix lookup reads the history"
        return filled_up([self._draft(self._follow(ids)) for ids in history])

    def _draft(self, text: list[int]) -> list[int]:
        best: list[tuple[list[int], int]] = []  # the places that match furthest, most recent first
        longest = 0
        for other, end in reversed(self._places.get(tuple(text[-MIN_MATCH:]), ())):
            if end < len(other):
                match = self._match(text, other, end)
                if match > longest:
                    best, longest = [], match
                if match == longest:
                    best.append((other, end))
        draft: list[int] = []
        places = len(best)
        while best and len(draft) < min(self.num_draft_tok, max(1, int(longest * self.option.max_spec_factor))):
            step = len(draft)
            going = [(other, end) for other, end in best if end + step < len(other)]
            counts: dict[int, int] = {}
            for other, end in going:
                token = other[end + step]
                counts[token] = counts.get(token, 0) + 1
            token = max(counts, key=lambda t: counts[t], default=-1)  # the most recent place wins a tie
            if counts.get(token, 0) < max(self.option.min_token_prob * places, 1):
                break
            best = [(other, end) for other, end in going if other[end + step] == token]
            draft.append(token)
        return draft

    def _match(self, text: list[int], other: list[int], end: int) -> int:
        """Tokens that end alike in `text` and other[:end], at most max_tree_depth."""
        n, limit = MIN_MATCH, min(len(text), end, self.option.max_tree_depth)
        while n < limit and text[-n - 1] == other[end - n - 1]:
            n += 1
        return n

    def _follow(self, ids: Sequence[int]) -> list[int]:
        """Our text of this sequence, brought up to date."""
        text = self._live.get(id(ids))
        if text is None or not _continues(text, ids):
            text = self._live[id(ids)] = []
            self._texts.append(text)
        first = len(text)
        text.extend(ids[first:])
        self.num_remembered += len(text) - first
        for end in range(max(first + 1, MIN_MATCH), len(text) + 1):
            self._places.setdefault(tuple(text[end - MIN_MATCH : end]), deque(maxlen=PLACES)).append((text, end))
        while len(self._texts) > 1 and self.num_remembered > self.remembered_tok:
            self._forget(self._texts.popleft())
        return text

    def _forget(self, old: list[int]) -> None:
        self.num_remembered -= len(old)
        for end in range(MIN_MATCH, len(old) + 1):
            key = tuple(old[end - MIN_MATCH : end])
            if left := [place for place in self._places.get(key, ()) if place[0] is not old]:
                self._places[key] = deque(left, maxlen=PLACES)
            else:
                self._places.pop(key, None)
        self._live = {identity: text for identity, text in self._live.items() if text is not old}


def _continues(known: list[int], ids: Sequence[int]) -> bool:
    """Whether `ids` can be `known` grown on; a list freed and allocated again has the same identity."""
    return len(known) <= len(ids) and list(ids[max(0, len(known) - 8) : len(known)]) == known[-8:]
