"""Builds text data: problems with solutions, from a file or the hub, laid out as the model sees them.

    rows (problem, solution)  ->  prompt + solution + end of turn, with spans  ->  parquet (see omr/text.py)

Calibration, fine-tuning and drafter training all read the result. A solution carries its tool calls and the output
blocks that the harness appended when it was generated; `model_spans` finds those blocks by the model's code tags. Rows
are taken in the order of the source, unshuffled: "the first 4096 rows" means the same rows everywhere.

Rows without a problem or a solution are passed over; too few good ones is an error, never a smaller set.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from omr import hub
from omr.errors import InputError
from omr.model import TextSource
from omr.records import read_records, sound
from omr.solve.prompt import CodeTags, prompt_named, render, tags_named
from omr.text import Span, TextRow, encode_text, iter_text, load_tokenizer, read_text

__all__ = ["TextRow", "encode_text", "iter_text", "model_spans", "read_rows", "read_text", "source_key", "write_text"]

GROUP_ROWS = 512
"""Rows per parquet row group: what a reader must hold at once."""


def write_text(
    rows: Iterable[tuple[str, str]],
    *,
    tokenizer_dir: Path,
    prompt: str,
    code_tags: str,
    out: Path,
    min_rows: int,
    source: str = "the source",
) -> int:
    """Write all `rows` (problem, solution) to the parquet file `out` and return how many there are.

    Raises InputError, which names `source`, leaving no file, when fewer than `min_rows` have both a problem and a
    solution.
    """
    ask, tags = prompt_named(prompt), tags_named(code_tags)
    tokenizer = load_tokenizer(tokenizer_dir)
    end_of_turn = end_of_turn_text(tokenizer)

    def laid_out() -> Iterator[TextRow]:
        good = 0
        for problem, solution in rows:
            if problem.strip() and solution.strip():
                good += 1
                yield lay_out(problem, solution, render(tokenizer, ask.messages(problem)), end_of_turn, tags)
        if good < min_rows:
            raise InputError(
                f"found {good} of the {min_rows} rows of text wanted, with a problem and a solution that are not "
                f"empty, in {source}; give a larger source in model.text, or ask for fewer"
            )

    return write_parquet(laid_out(), out)


def write_parquet(rows: Iterable[TextRow], out: Path) -> int:
    """Write `rows` as a text file (see omr/text.py) and return how many there are; no file if `rows` raises."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema(
        [
            ("problem", pyarrow.string()),
            ("text", pyarrow.string()),
            ("spans", pyarrow.list_(pyarrow.list_(pyarrow.int64()))),
        ]
    )
    written = 0
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        with pyarrow.parquet.ParquetWriter(partial, schema) as writer:
            waiting: list[dict[str, Any]] = []
            for row in rows:
                waiting.append({"problem": row.problem, "text": row.text, "spans": [list(span) for span in row.spans]})
                written += 1
                if len(waiting) == GROUP_ROWS:
                    writer.write_table(pyarrow.Table.from_pylist(waiting, schema=schema))
                    waiting = []
            if waiting:
                writer.write_table(pyarrow.Table.from_pylist(waiting, schema=schema))
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return written


def lay_out(problem: str, solution: str, prompt_text: str, end_of_turn: str, tags: CodeTags) -> TextRow:
    """One document. A solution that stops inside an output block ends there: its end of turn is nobody's."""
    start = len(prompt_text)
    spans = [(a + start, b + start) for a, b in model_spans(solution + end_of_turn, tags)]
    return TextRow(text=prompt_text + solution + end_of_turn, spans=spans, problem=problem)


def model_spans(solution: str, tags: CodeTags) -> list[Span]:
    """The [start, end) ranges of `solution` that the model writes: all but the output blocks (and notices after them).

    The model's part ends with the tag that closes its code; a block reaches to the end of its closing mark. A block
    that never closes reaches to the end of the solution.
    """
    opening, code_end = tags.output_begin.strip(), tags.end.rstrip()
    lead = tags.output_begin[: tags.output_begin.index(opening)]
    spans: list[Span] = []
    at = 0
    while (found := _find_mark(solution, opening, at)) >= 0:
        tag = solution.rfind(code_end, at, found)
        if tag >= 0 and not solution[tag + len(code_end) : found].strip():
            begin = tag + len(tags.end if solution.startswith(tags.end, tag) else code_end)
        else:
            begin = found - len(lead) if solution.endswith(lead, at, found) else found
        if at < begin:
            spans.append((at, begin))
        at = _block_end(solution, found + len(opening), tags)
    if at < len(solution):
        spans.append((at, len(solution)))
    return spans


def _find_mark(text: str, mark: str, at: int) -> int:
    """Where `mark` next stands at or after `at` (a fence only at the start of a line); -1 if nowhere."""
    while (found := text.find(mark, at)) >= 0:
        if not mark.startswith("`") or found == 0 or text[found - 1] == "\n":
            return found
        at = found + 1
    return -1


def _block_end(text: str, body: int, tags: CodeTags) -> int:
    """End of the block whose opening mark ends at `body`, its closing mark and a notice after it included.

    The closing mark stands at the start of a line; where none does before the next call, anywhere.
    """
    mark = tags.output_end + ("\n\n" if tags.style == "header" else "")
    core = mark.rstrip("\n")
    newlines = len(mark) - len(core)
    closing = rf"{re.escape(core)}(?:\n{{{newlines}}}|\n{{0,{newlines}}}\Z)"
    next_call = text.find(tags.begin, body)
    for stop in (next_call if next_call >= 0 else len(text), len(text)):
        for pattern in (rf"(?<=\n){closing}", closing):
            if match := re.compile(pattern).search(text, body, stop):
                return _notice_end(text, match.end())
    return len(text)


def _notice_end(text: str, at: int) -> int:
    """End of the harness's note on remaining executions, if one starts at `at`."""
    if not text.startswith("```system\n", at):
        return at
    end = text.find("```\n", at + len("```system\n"))
    return len(text) if end < 0 else end + len("```\n")


def end_of_turn_text(tokenizer: Any) -> str:
    """What the model writes when its turn is over, by its chat template; the eos token when that says nothing."""
    probe = "sentinel 7f3a"
    eos = str(getattr(tokenizer, "eos_token", None) or "")
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": probe}]
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
        tail = text[text.rfind(probe) + len(probe) :].strip()
        if tail:
            return tail[: tail.index(eos) + len(eos)] if eos and eos in tail else tail
    if not eos:
        raise InputError("the tokenizer has neither an eos token nor a chat template that ends a turn")
    return eos


def read_rows(source: TextSource, limit: int) -> Iterator[tuple[str, str]]:
    """The first `limit` (problem, solution) with both parts, in the order of the file or hub dataset.

    Fewer come out when the source ends early. Raises InputError for a missing, unreadable or wrongly shaped source.
    """
    assert not source.corpus, "the synthetic corpus is generated, not read"
    if source.path is not None:
        files: Iterable[Path] = [Path(source.path).expanduser()]
    elif source.hub is not None:
        files = _hub_files(source)
    else:
        raise InputError("no text to read: set one of model.text.path, model.text.hub, model.text.corpus")
    wanted = (source.problem_key, source.solution_key)
    pairs = (pair for path in files for pair in _read_file(path, wanted))
    return islice(((p, s) for p, s in pairs if p.strip() and s.strip()), limit)


def preflight(source: TextSource) -> None:
    """Refuse a text file that is not there, without reading it. Raises InputError."""
    if source.path is not None and not Path(source.path).expanduser().is_file():
        raise InputError(f"model.text.path {source.path} does not exist; give a jsonl or parquet file")


def source_key(source: TextSource) -> dict[str, str]:
    """What the rows of a file or hub source depend on, for artifact keys (a file's digest, a dataset's commit)."""
    from omr.artifact import file_sha256

    keys = {"problem_key": source.problem_key, "solution_key": source.solution_key}
    if source.path is not None:
        preflight(source)
        return {"sha256": file_sha256(Path(source.path).expanduser()), **keys}
    if source.hub is not None:
        commit = hub.resolve_revision(source.hub, source.revision, "dataset")
        return {"hub": source.hub, "revision": commit, "split": source.split, **keys}
    return {}


def _hub_files(source: TextSource) -> Iterator[Path]:
    """Files of a dataset's split, in order, each downloaded when its turn comes."""
    assert source.hub is not None
    commit = hub.resolve_revision(source.hub, source.revision, "dataset")
    names = hub.list_files(source.hub, commit, "dataset")
    data = [n for n in names if n.endswith((".parquet", ".jsonl", ".jsonl.gz"))]
    of_split = re.compile(rf"(^|/){re.escape(source.split)}([-_./]|$)")
    chosen = [n for n in data if of_split.search(n)]
    if not chosen:
        known = sorted({m[1] for n in data if (m := re.match(r"(?:.*/)?([^/]+?)-\d{5}-of-\d{5}\.", n))})
        hint = f"; splits there: {', '.join(known)}" if known else ""
        raise InputError(
            f"dataset {source.hub}@{commit[:8]} has no parquet or jsonl file of split {source.split!r}{hint}; "
            "set model.text.split"
        )
    for number, name in enumerate(chosen):
        part = re.search(r"-(\d{5})-of-\d{5}\.", name)
        if part and int(part[1]) != number:  # offline, and the cache has later parts only
            raise InputError(
                f"part {number} of {source.hub} split {source.split} is not in the hub cache; unset HF_HUB_OFFLINE"
            )
        yield hub.file(source.hub, commit, name, "dataset")


def _read_file(path: Path, keys: tuple[str, str]) -> Iterator[tuple[str, str]]:
    if not path.is_file():
        raise InputError(f"text file {path} does not exist; set model.text.path")
    for where, record in read_records(path, columns=keys):
        for key in keys:
            if key not in record:
                there = ", ".join(sorted(record)[:12])
                raise InputError(
                    f"{path} {where} has no {key!r} (it has {there}); set model.text.problem_key and solution_key"
                )
        problem, solution = (_text(path, key, record[key]) for key in keys)
        yield problem, solution


def _text(path: Path, key: str, value: object) -> str:
    """A missing value counts as empty, and empty rows are passed over."""
    if value is not None and not isinstance(value, str):
        raise InputError(
            f"{path}: {key!r} must be text, got {type(value).__name__}; set model.text.problem_key and solution_key"
        )
    return sound(value or "")
