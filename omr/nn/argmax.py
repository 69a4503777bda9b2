"""The largest of a row. torch's own argmax on CPU compares one number at a time: of 16 rows of 8192 it takes 160
microseconds, numpy 12, and a vocabulary has up to 20 times as many."""

from __future__ import annotations

import torch
from torch import Tensor


def argmax(rows: Tensor) -> Tensor:
    """(R, V) -> (R,) int64: the first of the largest numbers of each row, a NaN counting as larger than any."""
    if rows.device.type == "cpu" and rows.dtype == torch.float32:
        return torch.from_numpy(rows.numpy().argmax(-1))
    return rows.argmax(-1)
