"""Tables as people keep them: the rows of a .jsonl, .jsonl.gz, .parquet or .csv file, each with where it stands.

Benchmarks and training text come this way. Whatever is wrong with a file is an InputError of one line with its place.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omr.errors import InputError

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".csv")

Record = tuple[str, dict[str, Any]]
"""(`line 7` or `row 7`, the row)"""


def read_records(file: Path, columns: Sequence[str] | None = None) -> Iterator[Record]:
    """The rows of `file`, which is there, in order. Raises InputError for a file or line that cannot be read.

    `columns` are all that is needed of a row; a parquet file that has them gives no others.
    """
    if file.name.endswith(".parquet"):
        yield from _parquet(file, columns)
    elif file.name.endswith(".csv"):
        yield from _csv(file)
    else:
        yield from _jsonl(file)


def sound(text: str) -> str:
    """`text` without halves of surrogate pairs: JSON can spell them, but no prompt, file or tokenizer takes them."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _jsonl(file: Path) -> Iterator[Record]:
    number = 0
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise InputError(f"{file} line {number}: expected a JSON object, got {type(row).__name__}")
                yield f"line {number}", row
    except (ValueError, RecursionError) as error:  # malformed JSON or UTF-8, or nested without end
        raise InputError(f"{file} line {number}: not JSON ({error}); one object a line is expected") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{file} cannot be read after line {number}: {error}") from None


def _csv(file: Path) -> Iterator[Record]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {error}") from None
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                columns: Sequence[str] = reader.fieldnames or ()
                raise InputError(
                    f"{file} line {reader.line_num}: expected {len(columns)} columns ({', '.join(columns)})"
                )
            yield f"line {reader.line_num}", dict(row)
    except csv.Error as error:
        raise InputError(f"{file} line {reader.line_num}: {error}") from None


def _parquet(file: Path, columns: Sequence[str] | None) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            there = columns is not None and set(columns) <= set(table.schema_arrow.names)
            number = 0
            for batch in table.iter_batches(batch_size=64, columns=list(columns) if columns and there else None):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{file} cannot be read as parquet: {str(error).splitlines()[0]}") from None
