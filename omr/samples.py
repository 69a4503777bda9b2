"""samples.jsonl: every finished generation, on disk before the next one starts. Of an evaluation, or of training text.

One JSON object a line, appended and fsynced as a generation ends, so a kill at any moment costs what was in flight and
nothing else. A later run of the same config opens the same folder and goes on: a torn last line, rows that the server
failed, and rows of a problem that reads differently now are dropped, and asked for again.

Field names are those of NeMo-Skills' output files where it has the field. transcript.jsonl beside it holds the events
of each generation (what was written, run, printed, and when); it is written first: no sample is without a transcript.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from omr.benchmark import Problem
from omr.errors import Failure, InputError

_encode = json.JSONEncoder(ensure_ascii=False, default=str).encode

SAMPLES, TRANSCRIPTS, LOCK = "samples.jsonl", "transcript.jsonl", "lock"


class SampleFile:
    """Samples in `folder`. Hold it in a `with`; one process at a time has a folder."""

    def __init__(self, folder: Path, problems: Mapping[str, Problem], planned: int) -> None:
        """Open or create. `rows` holds what an earlier run finished. Raises BlockingIOError when another run has it."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._lock = (folder / LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise
        kept: dict[tuple[str, int], dict[str, Any]] = {}
        for row in intact_rows(folder / SAMPLES):
            problem, sample = problems.get(str(row.get("id"))), row.get("sample")
            usable = problem is not None and row.get("problem") == problem.text and "error" not in row
            if usable and isinstance(sample, int) and 0 <= sample < planned:
                kept.setdefault((str(row["id"]), sample), row)
        self.rows: list[dict[str, Any]] = list(kept.values())
        write_rows(folder / SAMPLES, self.rows)
        told = {(str(r.get("id")), r.get("sample")): r for r in intact_rows(folder / TRANSCRIPTS)}
        write_rows(folder / TRANSCRIPTS, [row for key, row in told.items() if key in kept])
        self._samples = (folder / SAMPLES).open("ab")
        self._transcripts = (folder / TRANSCRIPTS).open("ab")

    def __enter__(self) -> SampleFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._samples, self._transcripts, self._lock):
            file.close()

    def append(self, row: dict[str, Any], events: list[dict[str, Any]]) -> None:
        """Record a finished generation; on return it survives a kill and a loss of power."""
        self._transcripts.write(jsonl_line({"id": row["id"], "sample": row["sample"], "events": events}))
        self._transcripts.flush()
        self._samples.write(jsonl_line(row))
        self._samples.flush()
        os.fsync(self._samples.fileno())
        self.rows.append(row)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """`folder`, created, for this process alone. Raises Failure while another has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failure("another run of the same config is going on; wait for it or stop it") from None
        yield


def intact_rows(file: Path, *, strict: bool = False) -> list[dict[str, Any]]:
    """The whole rows of a jsonl file; none when there is no file.

    A line cut short (no newline, or not an object) is left out. With `strict` a damaged line before the last raises
    InputError: no crash leaves one.
    """
    if not file.exists():
        return []
    rows: list[dict[str, Any]] = []
    *lines, _ = file.read_bytes().split(b"\n")  # what follows the last newline was never synced
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif strict and line.strip():
            raise InputError(f"{file} line {number} is damaged: one JSON object a line is expected; delete that line")
    return rows


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """Replace `file` by `rows`, all or nothing."""
    partial = file.with_name(file.name + ".partial")
    with partial.open("wb") as out:
        for row in rows:
            out.write(jsonl_line(row))
        out.flush()
        os.fsync(out.fileno())
    os.replace(partial, file)


def jsonl_line(row: dict[str, Any]) -> bytes:
    return _encode(row).encode("utf-8", "replace") + b"\n"
