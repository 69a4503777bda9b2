"""Encoded documents of a fine-tuning, and the order in which they are trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from omr.errors import InputError
from omr.text import TextRow, iter_text, load_tokenizer

CHUNK = 2000
"""Rows that a worker encodes at a time."""
SORT_STEPS = 64
"""Steps' worth of documents that are sorted by length together: more saves padding, fewer mixes lengths better."""


@dataclass
class Documents:
    """Token ids of all documents, one after the other, and where each begins."""

    ids: Any
    """int32 (tokens,)"""
    is_target: Any
    """bool (tokens,): written by the model."""
    starts: Any
    """int64 (documents + 1,)"""

    @property
    def lengths(self) -> Any:
        """int64 (documents,)"""
        return self.starts[1:] - self.starts[:-1]

    def digest(self) -> str:
        return hashlib.sha256(self.ids.tobytes() + self.is_target.tobytes() + self.starts.tobytes()).hexdigest()

    def save(self, path: Path) -> None:
        import numpy

        numpy.savez(path, ids=self.ids, is_target=self.is_target, starts=self.starts)

    def batches(self, chosen: Any, tokens: int) -> Iterator[tuple[Any, Any]]:
        """The documents `chosen` in forwards of at most `tokens` padded tokens: ids int64, mask bool (rows, time)."""
        for part in _cut(self.lengths[chosen], tokens):
            yield self._pad(chosen[part])

    def _pad(self, chosen: Any) -> tuple[Any, Any]:
        import numpy

        longest = int(self.lengths[chosen].max())
        ids = numpy.zeros((len(chosen), longest), dtype=numpy.int64)
        mask = numpy.zeros((len(chosen), longest), dtype=bool)
        for row, document in enumerate(chosen):
            start, stop = self.starts[document], self.starts[document + 1]
            ids[row, : stop - start] = self.ids[start:stop]
            mask[row, : stop - start] = self.is_target[start:stop]
        return ids, mask


def encode(text: Path, tokenizer_dir: Path, max_length: int, workers: int = 1) -> Documents:
    """Encode a text file (or read an .npz made by `Documents.save`). Raises InputError."""
    import numpy

    if text.suffix == ".npz":
        try:
            with numpy.load(text) as data:
                return Documents(data["ids"], data["is_target"], data["starts"])
        except (OSError, KeyError, ValueError) as error:
            raise InputError(f"{text} is no encoded text: {error}") from None
    load_tokenizer(tokenizer_dir)  # a bad folder is refused here, not in a worker
    rows = iter_text(text)
    chunks = iter(lambda: list(islice(rows, CHUNK)), [])
    work = partial(_encode_chunk, tokenizer_dir, max_length)
    if workers > 1:
        import multiprocessing

        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            parts = list(pool.imap(work, chunks))
    else:
        parts = [work(chunk) for chunk in chunks]
    made = join(parts)
    if not len(made.lengths):
        raise InputError(f"{text} has no document with a token that the model writes")
    return made


def encode_rows(rows: list[TextRow], tokenizer: Any, max_length: int) -> Documents:
    """Encode rows here, piece by piece as `encode_text` does, but in one call of the tokenizer.

    Documents without a target token within `max_length` are left out.
    """
    import numpy

    pieces = [piece for row in rows for piece in row.pieces()]
    encoded = iter(tokenizer([text for text, _ in pieces], add_special_tokens=False)["input_ids"] if pieces else [])
    ids: list[int] = []
    targets: list[bool] = []
    starts = [0]
    for row in rows:
        new: list[int] = []
        mask: list[bool] = []
        for _, by_model in row.pieces():
            part = next(encoded)
            new += part
            mask += [by_model] * len(part)
        if any(mask[1:max_length]):
            ids += new[:max_length]
            targets += mask[:max_length]
            starts.append(len(ids))
    return Documents(
        numpy.array(ids, dtype=numpy.int32), numpy.array(targets, dtype=bool), numpy.array(starts, dtype=numpy.int64)
    )


def _encode_chunk(tokenizer_dir: Path, max_length: int, rows: list[TextRow]) -> Documents:
    return encode_rows(rows, load_tokenizer(tokenizer_dir), max_length)


def join(parts: list[Documents]) -> Documents:
    """Several sets of documents as one, in order."""
    import numpy

    if not parts:
        return encode_rows([], None, 1)
    offsets = numpy.cumsum([0] + [len(part.ids) for part in parts[:-1]])
    starts = [part.starts[:-1] + offset for part, offset in zip(parts, offsets, strict=True)]
    end = numpy.array([sum(len(part.ids) for part in parts)])
    return Documents(
        numpy.concatenate([part.ids for part in parts]),
        numpy.concatenate([part.is_target for part in parts]),
        numpy.concatenate([*starts, end]).astype(numpy.int64),
    )


def plan(lengths: Any, epochs: float, tokens_per_step: int, seed: int) -> list[Any]:
    """Which documents each step takes: every document once per epoch, similar lengths together, steps shuffled."""
    import numpy

    steps: list[Any] = []
    whole = int(numpy.ceil(epochs))
    for epoch in range(whole):
        rng = numpy.random.default_rng((seed, epoch))
        order = rng.permutation(len(lengths))
        pool = max(1, SORT_STEPS * tokens_per_step // max(1, int(lengths.mean())))
        made: list[Any] = []
        for start in range(0, len(order), pool):
            some = order[start : start + pool]
            some = some[numpy.argsort(lengths[some], kind="stable")]
            made += [some[part] for part in _cut(lengths[some], tokens_per_step)]
        shuffled = [made[i] for i in rng.permutation(len(made))]
        if epoch == whole - 1:
            shuffled = shuffled[: max(1, round(len(made) * (epochs - epoch)))]
        steps += shuffled
    return steps


def _cut(lengths: Any, tokens: int) -> list[slice]:
    """Consecutive slices whose rows x longest stay within `tokens`; one row at least."""
    slices: list[slice] = []
    start = longest = 0
    for at, length in enumerate(lengths):
        longest = max(longest, int(length))
        if at > start and (at - start + 1) * longest > tokens:
            slices.append(slice(start, at))
            start, longest = at, int(length)
    if len(lengths):
        slices.append(slice(start, len(lengths)))
    return slices
