"""Examples as text rows (see omr/text.py): the whole chat document and what of it the model writes."""

from __future__ import annotations

from typing import Any

from omr.corpus.compose import Example
from omr.dataset import end_of_turn_text
from omr.solve.prompt import render
from omr.text import Span, TextRow

_MARK = "\ue000"


class Layout:
    """Lays examples out in a tokenizer's chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self._before, self._after = render(tokenizer, [{"role": "user", "content": _MARK}]).split(_MARK)
        self._end = end_of_turn_text(tokenizer)

    def row(self, example: Example) -> TextRow:
        text = f"{self._before}{example.user}{self._after}"
        spans: list[Span] = []
        for piece in (*example.pieces, None):
            start = len(text)
            text += self._end if piece is None else piece.text
            if piece is not None and not piece.by_model:
                continue
            if spans and spans[-1][1] == start:
                start = spans.pop()[0]
            spans.append((start, len(text)))
        return TextRow(text=text, spans=spans, problem=example.problem)
