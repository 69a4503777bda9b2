"""The frozen base's side of drafter training: final hidden states, computed some steps ahead.

A drafter learns best from small optimiser steps, the base runs best in large batches. So the documents of the next few
steps go through the base together, sorted by length to keep padding small, and their states wait until their step
comes. Which steps go together depends on the plan alone, never on where a training was resumed: products over other
batches round differently, and a resumed training shall give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from omr.drafter._documents import Document
from omr.nn.draft_loss import Targets, target_mask
from omr.nn.transformer import Transformer


@dataclass
class Batch:
    """Documents of one forward of the head, padded on the right, on the device."""

    hidden: Tensor  # (B, T, H)
    embedded: Tensor  # (B, T, H)
    targets: Targets


class BaseStates:
    def __init__(
        self,
        base: Transformer,
        documents: list[Document],
        steps: Sequence[Iterable[int]],
        *,
        predict_n: int,
        forward_tok: int,
    ) -> None:
        """`steps[s]` are the numbers of the documents that step s will ask for."""
        self.base, self.documents, self.predict_n, self.forward_tok = base, documents, predict_n, forward_tok
        self._rows = [list(rows) for rows in steps]
        self._group_of: list[int] = []
        self._groups: list[list[int]] = []
        tokens = 0
        for rows in self._rows:
            size = sum(len(documents[row].ids) for row in rows)
            if not self._groups or tokens + size > forward_tok:
                self._groups.append([])
                tokens = 0
            tokens += size
            self._groups[-1] += rows
            self._group_of.append(len(self._groups) - 1)
        self._ready = -1
        self._states: dict[int, Tensor] = {}

    def batch(self, step: int, rows: Sequence[int]) -> Batch:
        """The batch of `rows`, which are among those of `step`."""
        group = self._group_of[step]
        if group != self._ready:
            self._states = {}  # free the last group's before the next one's are made
            self._states, self._ready = self._forward(self._groups[group]), group
        documents = [self.documents[row] for row in rows]
        hidden = pad_sequence([self._states[row] for row in rows], batch_first=True)
        ids, marks, lengths = padded(documents)
        targets = Targets.of(ids, target_mask(marks, lengths, self.predict_n))  # on the host: its sizes are needed here
        embedded = self.base.embed(_to(ids, self.base.device))
        return Batch(hidden, embedded, targets.to(self.base.device))

    @torch.no_grad()
    def _forward(self, rows: list[int]) -> dict[int, Tensor]:
        """States (T, H) of each document, in batches of at most forward_tok tokens, padding included."""
        states: dict[int, Tensor] = {}
        order = sorted(set(rows), key=lambda row: (len(self.documents[row].ids), row))
        while order:
            longest, count = 0, 0
            for row in order:
                longest = max(longest, len(self.documents[row].ids))
                if count and longest * (count + 1) > self.forward_tok:
                    break
                count += 1
            now, order = order[:count], order[count:]
            ids, _, _ = padded([self.documents[row] for row in now])
            hidden = self.base.hidden_states(_to(ids, self.base.device))
            for row, state in zip(now, hidden, strict=True):
                states[row] = state[: len(self.documents[row].ids)].clone()
        return states


def padded(documents: list[Document]) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T) int64 ids, padded with 0 on the right; (B, T) bool marks; (B,) int64 lengths. On the host."""
    lengths = torch.tensor([len(d.ids) for d in documents])
    ids = torch.zeros(len(documents), int(lengths.max()), dtype=torch.int64)
    marks = torch.zeros(ids.shape, dtype=torch.bool)
    for i, document in enumerate(documents):
        ids[i, : len(document.ids)] = torch.from_numpy(document.ids)
        marks[i, : len(document.marks)] = torch.from_numpy(document.marks)
    return ids, marks, lengths


def _to(ids: Tensor, device: torch.device) -> Tensor:
    return ids.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ids
