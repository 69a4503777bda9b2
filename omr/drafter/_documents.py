"""Training text as token ids, and the order in which a training reads it.

Everything here lives on the host and is a pure function of the text and the seed, so that a killed training, or one on
more GPUs, sees the same batches. Rows of similar length go into one batch (shuffled rows, sorted within a window of
some 50 steps, steps shuffled again): at the cost of slightly less random steps, little of a batch is padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from omr.errors import InputError
from omr.text import encode_text, iter_text

WINDOW_STEPS = 50


@dataclass(frozen=True)
class Document:
    """One row: ids (T,) int32 and whether the model writes each (T,) bool; `counts[i]` targets at draft position i."""

    ids: npt.NDArray[np.int32]
    marks: npt.NDArray[np.bool_]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, ids: list[int], marks: list[bool], predict_n: int) -> Document:
        ok = np.asarray(marks, dtype=np.bool_)
        run, counts = ok[1:], []
        for i in range(predict_n):
            run = run[: max(0, len(ok) - i - 2)] & ok[i + 2 :]  # run[t]: tokens t+1 .. t+i+2 are all targets
            counts.append(int(run.sum()))
        return cls(np.asarray(ids, dtype=np.int32), ok, tuple(counts))


def read_documents(
    text: Path, tokenizer: Any, *, rows: int, max_length: int, predict_n: int, vocab_size: int, progress: Any = iter
) -> list[Document]:
    """The first `rows` documents, cut to `max_length` tokens, those without any target left out.

    Raises InputError when none is left or an id is not in the base's vocabulary. `progress` wraps the iterator.
    """
    documents, seen = [], 0
    for row in progress(iter_text(text, rows)):
        ids, marks = encode_text(row, tokenizer)
        seen += 1
        document = Document.of(ids[:max_length], marks[:max_length], predict_n)
        if document.counts[0]:
            if document.ids.max() >= vocab_size:
                raise InputError(
                    f"{text}: the tokenizer gives id {document.ids.max()}, the base has {vocab_size}; "
                    "they do not belong together"
                )
            documents.append(document)
    if not documents:
        raise InputError(
            f"{text}: none of {seen} rows has a token to train on within {max_length} tokens; check the spans, or "
            "raise drafter.train.max_length"
        )
    if len(documents) == 1:
        raise InputError(f"{text}: one usable row of {seen} is too few, one is held out; give more text")
    return documents


def split(documents: list[Document], held_out: int, seed: int) -> tuple[list[Document], list[Document]]:
    """(training, held out), chosen by `seed`: at most a tenth is held out, and at least one document."""
    order = np.random.default_rng([seed, 0]).permutation(len(documents))
    count = max(1, min(held_out, len(documents) // 10))
    return [documents[i] for i in order[count:]], [documents[i] for i in order[:count]]


def plan(lengths: list[int], *, batch_rows: int, accumulation: int, epochs: int, seed: int) -> list[list[list[int]]]:
    """Steps of a training: each a list of at most `accumulation` micro-batches of at most `batch_rows` row numbers.

    Every epoch reads every row once. The last step of an epoch may be short.
    """
    steps: list[list[list[int]]] = []
    per_step = batch_rows * accumulation
    for epoch in range(epochs):
        rng = np.random.default_rng([seed, 1, epoch])
        order = rng.permutation(len(lengths))
        window, new = WINDOW_STEPS * per_step, []
        for start in range(0, len(order), window):
            rows = sorted(order[start : start + window].tolist(), key=lambda row: (lengths[row], row))
            groups = [rows[i : i + per_step] for i in range(0, len(rows), per_step)]
            new += [[group[i : i + batch_rows] for i in range(0, len(group), batch_rows)] for group in groups]
        steps += [new[i] for i in rng.permutation(len(new))]
    return steps


def frequent_tokens(documents: list[Document], vocab_size: int, count: int) -> tuple[npt.NDArray[np.int64], float]:
    """The `count` tokens that the model writes most often, lower id first among equals, and the share they cover."""
    seen = np.zeros(vocab_size, dtype=np.int64)
    for document in documents:
        seen += np.bincount(document.ids[document.marks], minlength=vocab_size)
    chosen = np.argsort(-seen, kind="stable")[:count]
    return np.sort(chosen), float(seen[chosen].sum() / max(seen.sum(), 1))
