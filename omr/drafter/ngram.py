"""Prompt lookup: draft what followed the last occurrence of the newest tokens. No weights, no training.

Math solutions repeat themselves: numbers of the problem in the code, the printed value in the answer. The longest
suffix of the sequence, at most `max_ngram` and at least `min_ngram` tokens, that occurred before is looked up, its most
recent occurrence wins (recent text resembles what comes next more than old text), and the tokens after it are the
draft. Where they run into the end of the sequence the draft goes on with its own beginning, as if the text were
periodic. A sequence without a match has no draft; if no sequence of the batch has one, the step is a plain one.

The search is one `rfind` per suffix length over the ids packed as int32, so it runs at memory speed. Packing takes five
times as long as searching, so what is packed is kept for the sequences of the last step.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from omr.drafter import Drafter, filled_up
from omr.errors import ConfigError
from omr.option import option

if TYPE_CHECKING:
    import torch

    from omr.nn.transformer import Transformer

SIZE = 4
"""Bytes of a packed id."""


@option("drafter", "ngram")
@dataclass(kw_only=True)
class Ngram(Drafter):
    """Looks the newest tokens up in the sequence itself."""

    draft_tok: int = 3
    """Tokens drafted per step."""
    max_ngram: int = 4
    """Longest suffix looked up, in tokens."""
    min_ngram: int = 1
    """Shortest suffix looked up, in tokens."""
    adaptive: bool = field(default=True, metadata={"content": False})
    """Draft only while that is faster than plain decoding, as measured while serving; output is the same either way."""

    def __post_init__(self) -> None:
        if self.draft_tok < 1:
            raise ConfigError(f"drafter.draft_tok must be >= 1, got {self.draft_tok}; drafter=none drafts nothing")
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise ConfigError(
                f"drafter.min_ngram={self.min_ngram} and drafter.max_ngram={self.max_ngram} must hold "
                "1 <= min_ngram <= max_ngram"
            )

    def load(self, folder: object, base: Transformer) -> PromptLookup:
        return PromptLookup(self.draft_tok, self.max_ngram, self.min_ngram, adaptive=self.adaptive)


class PromptLookup:
    """The DraftModel of `ngram`."""

    needs_hidden = False

    def __init__(self, num_draft_tok: int, max_ngram: int, min_ngram: int, *, adaptive: bool = False) -> None:
        self.adaptive = adaptive
        self.num_draft_tok, self.max_ngram, self.min_ngram = num_draft_tok, max_ngram, min_ngram
        self._packed: dict[int, tuple[Sequence[int], bytearray]] = {}
        """By identity of a sequence's list, which is held so that no other can take its address."""

    def propose(
        self, hidden: torch.Tensor | None, tokens: torch.Tensor, history: Sequence[Sequence[int]] | None
    ) -> torch.Tensor:
        """See DraftModel. `history` ends with the newest token."""
        assert history is not None and len(history) == len(tokens), "prompt lookup reads the history"
        packed, chains = {}, []
        for ids in history:
            _, data = packed[id(ids)] = self._packed.get(id(ids), (ids, bytearray()))
            data += pack(ids[len(data) // SIZE :])
            chains.append(lookup(ids, data, self.num_draft_tok, self.max_ngram, self.min_ngram))
        self._packed = packed
        return filled_up(chains)


def pack(ids: Sequence[int]) -> bytes:
    """Token ids as int32."""
    return array("i", ids).tobytes()


def lookup(
    ids: Sequence[int], packed: bytes | bytearray, num_draft_tok: int, max_ngram: int, min_ngram: int
) -> list[int]:
    """Draft `num_draft_tok` ids after `ids` (not empty), none without a match; `packed` is the same ids as of `pack`.

    lookup([5, 6, 7, 8, 5, 6], ..., 3, 4, 1) == [7, 8, 5]: the suffix 5 6 occurred before, 7 8 5 6 followed.
    """
    end = len(packed)
    for n in range(min(max_ngram, len(ids) - 1), min_ngram - 1, -1):
        suffix = packed[end - n * SIZE :]
        at = packed.rfind(suffix, 0, end - SIZE)
        while at % SIZE and at > 0:  # a match across the border of two ids is none
            at = packed.rfind(suffix, 0, at + len(suffix) - 1)
        if at >= 0 and at % SIZE == 0:
            start = at // SIZE + n
            period = len(ids) - start
            return [ids[start + i % period] for i in range(num_draft_tok)]
    return []
