"""A jsonl file of answers to questions: each on disk before the next is asked, none asked twice.

It lives in the folder of a SampleFile, whose lock keeps other processes away. A torn last line and rows of questions
that the server failed are dropped when the file is opened, so a resumed run asks them again.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from omr.samples import intact_rows, jsonl_line, write_rows

Row = dict[str, Any]


class Ledger:
    """Rows under a key made of the fields `key`; a later row of a key replaces the earlier."""

    def __init__(self, file: Path, key: tuple[str, ...]) -> None:
        self._file, self._key = file, key
        self._rows = {self._key_of(row): row for row in intact_rows(file) if "error" not in row and self._fits(row)}
        if file.exists():
            write_rows(file, list(self._rows.values()))

    @property
    def rows(self) -> list[Row]:
        return list(self._rows.values())

    def get(self, *key: Any) -> Row | None:
        return self._rows.get(key)

    def append(self, row: Row) -> None:
        """Record a row; on return it survives a kill and a loss of power."""
        with self._file.open("ab") as out:
            out.write(jsonl_line(row))
            out.flush()
            os.fsync(out.fileno())
        self._rows[self._key_of(row)] = row

    def _fits(self, row: Row) -> bool:
        return all(isinstance(row.get(name), str | int) for name in self._key)

    def _key_of(self, row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in self._key)
