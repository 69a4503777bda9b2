"""The frozen base's side of drafter training: final hidden states, computed some steps ahead.

A drafter learns best from small optimiser steps, the base runs best in large batches. So the documents of the next few
steps go through the base together, sorted by length to keep padding small, and their states wait until their step
comes. Which steps go together depends on the plan alone, never on where a training was resumed: products over other
batches round differently, and a resumed training shall give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from omr.drafter._documents import Document
from omr.drafter._state_cache import StateCache, forward, groups, on_device, padded
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
        self.cache: StateCache | None = None
        """Where the states are read from instead of being computed."""
        self._ready = -1
        self._states: dict[int, Tensor] = {}

    def batch(self, step: int, rows: Sequence[int]) -> Batch:
        """The batch of `rows`, which are among those of `step`."""
        if self.cache is not None:
            states = [self.cache.read(row) for row in rows]
        else:
            self._make_ready(self._group_of[step])
            states = [self._states[row] for row in rows]
        documents = [self.documents[row] for row in rows]
        hidden = pad_sequence(states, batch_first=True).to(self.base.device)
        ids, marks, lengths = padded(documents)
        targets = Targets.of(ids, target_mask(marks, lengths, self.predict_n))  # on the host: its sizes are needed here
        embedded = self.base.embed(on_device(ids, self.base.device))
        return Batch(hidden, embedded, targets.to(self.base.device))

    def _make_ready(self, group: int) -> None:
        """Compute the states of a group, in batches of at most forward_tok tokens, padding included."""
        if group == self._ready:
            return
        self._states = {}  # free the last group's before the next one's are made
        for rows in groups(self.documents, self._groups[group], self.forward_tok):
            self._states |= forward(self.base, self.documents, rows)
        self._ready = group
