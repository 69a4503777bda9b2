"""The largest of a row. torch's own argmax on CPU compares one number at a time: of 16 rows of 8192 it takes 160
microseconds, numpy 12. A few hundred numbers are quicker with torch's, whose code is in the cache already."""

from __future__ import annotations

import torch
from torch import Tensor

MANY = 1 << 13
"""Numbers from which numpy is faster."""


def argmax(rows: Tensor) -> Tensor:
    """(R, V) -> (R,) int64: the first of the largest numbers of each row, a NaN counting as larger than any."""
    if rows.numel() >= MANY and rows.device.type == "cpu" and rows.dtype == torch.float32:
        return torch.from_numpy(rows.detach().numpy().argmax(-1))
    return rows.argmax(-1)
