"""The training split as encoded documents: what a model of this corpus is trained on."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from omr.corpus.compose import training_examples
from omr.corpus.held_out import guard
from omr.corpus.layout import Layout
from omr.sft_data import Documents, encode_rows, join
from omr.text import load_tokenizer

BLOCK = 2000
"""Examples that a worker makes at a time."""


def encode_corpus(tokenizer_dir: Path, count: int, *, seed: int, max_length: int = 512, workers: int = 1) -> Documents:
    """Training examples 0 .. count - 1 under `seed`, less the held-out ones, in the chat template of a tokenizer.

    The result does not depend on `workers`, the number of processes.
    """
    starts = range(0, count, BLOCK)
    work = partial(_block, tokenizer_dir, seed, max_length, count)
    if workers <= 1:
        return join([work(start) for start in starts])
    import multiprocessing

    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return join(list(pool.imap(work, starts)))


def _block(tokenizer_dir: Path, seed: int, max_length: int, count: int, start: int) -> Documents:
    tokenizer = load_tokenizer(tokenizer_dir)
    layout = Layout(tokenizer)
    made = training_examples(seed, start, min(start + BLOCK, count), guard())
    return encode_rows([layout.row(e) for e in made], tokenizer, max_length)
