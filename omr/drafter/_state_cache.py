"""The base's hidden states on disk: computed once, before training, and read back document by document.

    FOLDER/states.bin   (tokens of all documents, H) in the base's dtype, documents one after the other
    FOLDER/done.bin     one byte for each group of documents, set when its states are on disk

The base computes groups of documents of similar length. Groups depend on the documents alone, so states are the same
bytes whatever the order of training, the number of ranks or the kills on the way; ranks share the groups and the files.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from omr.drafter._documents import Document
from omr.drafter._ranks import Ranks
from omr.errors import ResourceError
from omr.nn.transformer import Transformer

SPARE_BYTES = 1 << 30
"""Disk that must stay free."""
_WORDS: dict[int, tuple[Any, torch.dtype]] = {2: (np.int16, torch.int16), 4: (np.int32, torch.int32)}


class StateCache:
    """States of `documents`; `fill` first, then `read`."""

    def __init__(self, base: Transformer, documents: list[Document], folder: Path, forward_tok: int) -> None:
        self._base, self._documents = base, documents
        lengths = np.array([len(d.ids) for d in documents])
        self._ends = np.cumsum(lengths)
        self._groups = groups(documents, range(len(documents)), forward_tok)
        self._dtype = base.dtype
        numpy_word, self._word = _WORDS[base.dtype.itemsize]
        shape = (int(self._ends[-1]), base.config.hidden_size)
        self.num_bytes = shape[0] * shape[1] * base.dtype.itemsize
        fresh = not (folder / "states.bin").exists()
        folder.mkdir(parents=True, exist_ok=True)
        if fresh and (free := shutil.disk_usage(folder).free) < self.num_bytes + SPARE_BYTES:
            raise ResourceError(
                f"drafter.train.cache_states=true needs {self.num_bytes / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} GB "
                "are free; free some, set OMR_HOME, lower drafter.train.rows or set it to false"
            )
        self._states = _mapped(folder / "states.bin", numpy_word, shape)
        self._done = _mapped(folder / "done.bin", np.uint8, (len(self._groups),))

    def fill(self, ranks: Ranks, what: str) -> Self:
        """Compute what is missing, this rank's share of the groups, and wait for the other ranks."""
        mine = range(ranks.rank, len(self._groups), ranks.world)
        with tqdm(mine, f"states, {what}", unit="batch", disable=ranks.rank > 0, leave=False, mininterval=1.0) as bar:
            for number in bar:
                if self._done[number]:
                    continue
                for row, state in forward(self._base, self._documents, self._groups[number]).items():
                    end = self._ends[row]
                    self._states[end - len(state) : end] = state.contiguous().view(self._word).cpu().numpy()
                self._states.flush()
                self._done[number] = 1
                self._done.flush()
        ranks.wait()
        return self

    def read(self, row: int) -> Tensor:
        """(T, H) states of a document, on the host."""
        end = self._ends[row]
        words = np.array(self._states[end - len(self._documents[row].ids) : end])
        return torch.from_numpy(words).view(self._dtype)


def groups(documents: list[Document], rows: range | list[int], forward_tok: int) -> list[list[int]]:
    """`rows` sorted by length, cut into batches of at most `forward_tok` tokens, padding included, or of one row."""
    made: list[list[int]] = []
    for row in sorted(set(rows), key=lambda row: (len(documents[row].ids), row)):
        if not made or (len(made[-1]) + 1) * len(documents[row].ids) > forward_tok:
            made.append([])
        made[-1].append(row)
    return made


@torch.no_grad()
def forward(base: Transformer, documents: list[Document], rows: list[int]) -> dict[int, Tensor]:
    """States (T, H) of each of `rows`, on the device, all in one forward."""
    ids, _, _ = padded([documents[row] for row in rows])
    hidden = base.hidden_states(on_device(ids, base.device))
    return {row: state[: len(documents[row].ids)].clone() for row, state in zip(rows, hidden, strict=True)}


def padded(documents: list[Document]) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T) int64 ids, padded with 0 on the right; (B, T) bool marks; (B,) int64 lengths. On the host."""
    lengths = torch.tensor([len(d.ids) for d in documents])
    ids = torch.zeros(len(documents), int(lengths.max()), dtype=torch.int64)
    marks = torch.zeros(ids.shape, dtype=torch.bool)
    for i, document in enumerate(documents):
        ids[i, : len(document.ids)] = torch.from_numpy(document.ids)
        marks[i, : len(document.marks)] = torch.from_numpy(document.marks)
    return ids, marks, lengths


def on_device(ids: Tensor, device: torch.device) -> Tensor:
    return ids.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ids


def _mapped(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """A file as an array, zeros where it was never written. Several processes may open it at once."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    with path.open("ab") as file:
        file.truncate(size)
    return np.memmap(path, dtype=dtype, mode="r+", shape=shape)
