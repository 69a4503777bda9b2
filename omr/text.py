"""Text data: whole chat documents, and which characters of them the model itself writes.

A row holds one document exactly as the tokenizer must see it (prompt in the chat template, solution, end of turn) and
`spans`, the [start, end) character ranges that come from the model. What lies outside is given to it: the prompt, and
the blocks in which the harness hands back what its code printed. Losses and acceptance rates count only tokens inside
spans.

`encode_text` encodes the pieces between span borders one by one. That is how they meet the model: the prompt is
complete before it writes, and its call is complete before the output block is appended. A tokenizer run over the whole
document could join characters across such a border into a token that no generation ever contains.

The file is parquet with columns `problem` (str), `text` (str), `spans` (list of [int, int]). `omr.dataset` writes it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omr.errors import InputError

Span = tuple[int, int]

_IMPORTING = threading.Lock()
"""transformers replaces its own module while it is imported: a second thread meeting that finds names missing."""


@dataclass(kw_only=True)
class TextRow:
    """One document. Spans are sorted, non-empty, within the text and do not touch."""

    text: str
    spans: list[Span] = field(default_factory=list)
    problem: str = ""

    def __post_init__(self) -> None:
        last = -1
        for start, end in self.spans:
            if not (last < start < end <= len(self.text)):
                raise InputError(f"spans {self.spans} do not lie in order within a text of {len(self.text)} characters")
            last = end

    def pieces(self) -> Iterator[tuple[str, bool]]:
        """The text cut at the span borders: (piece, written by the model). Empty pieces are left out."""
        at = 0
        for start, end in self.spans:
            if at < start:
                yield self.text[at:start], False
            yield self.text[start:end], True
            at = end
        if at < len(self.text):
            yield self.text[at:], False


def encode_text(row: TextRow, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Token ids of the row and, for each, whether the model writes it (and it so counts in a loss).

    `tokenizer` is a transformers tokenizer; nothing is added (no bos: the text carries what the template wants).
    """
    ids: list[int] = []
    is_target: list[bool] = []
    for piece, target in row.pieces():
        new = tokenizer(piece, add_special_tokens=False)["input_ids"]
        ids += new
        is_target += [target] * len(new)
    return ids, is_target


def load_tokenizer(folder: Path) -> Any:
    """The transformers tokenizer of a model folder. Raises InputError. May be called from several threads."""
    with _IMPORTING:
        from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        raise InputError(f"{folder} has no tokenizer (tokenizer.json); copy it from the base model")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise InputError(f"the tokenizer of {folder} cannot be loaded: {str(error).splitlines()[0]}") from None


def read_text(path: Path, limit: int | None = None) -> list[TextRow]:
    """The first `limit` rows (all by default) of a text file. Raises InputError for anything that is not one."""
    return list(iter_text(path, limit))


def iter_text(path: Path, limit: int | None = None) -> Iterator[TextRow]:
    """As `read_text`, a few rows at a time. A file with a `text` column alone is read too: all of it is target."""
    import pyarrow
    import pyarrow.parquet

    if not path.is_file():
        raise InputError(f"{path} does not exist; it should be a parquet file with columns text and spans")
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [name for name in ("problem", "text", "spans") if name in file.schema_arrow.names]
            if "text" not in columns:
                raise InputError(f"{path} has columns {', '.join(file.schema_arrow.names)}; a column text is needed")
            left = file.metadata.num_rows if limit is None else limit
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for record in batch.to_pylist()[:left]:
                    yield _row(path, record)
                left -= batch.num_rows
                if left <= 0:
                    return
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as parquet: {str(error).splitlines()[0]}") from None


def _row(path: Path, record: dict[str, Any]) -> TextRow:
    text, spans = record["text"], record.get("spans")
    if not isinstance(text, str) or not text:
        raise InputError(f"{path}: a row has no text; build the file again")
    try:
        chosen = [(int(start), int(end)) for start, end in spans] if spans is not None else [(0, len(text))]
    except (TypeError, ValueError):
        raise InputError(f"{path}: spans must be a list of [start, end], got {spans!r}") from None
    return TextRow(text=text, spans=chosen, problem=record.get("problem") or "")
