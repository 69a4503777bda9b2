"""int4 weight-only: one scale per group of columns, round to nearest, no calibration.

Sixteen values a group are coarse, about 10 % relative error, so the group is small and its scale matters. `clip=mse`
tries a few smaller scales for every group and keeps the one with the least squared error. On SmolLM2-135M that lowered
the weight error from 11.4 to 9.8 % and raised the loss (docs/quantisation.md), so it is not the default. Calibrated
methods (GPTQ, AWQ) do better and are not built here: a checkpoint made by them in the same format is served like any
other.

The format holds one group size for the whole checkpoint. Where `group_size` does not divide the K of every layer the
largest usual size below it that does is taken (576 columns: 64), else the largest common divisor of at least 8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from omr.errors import ConfigError, InputError
from omr.option import option
from omr.quant import Quantiser
from omr.quant._dialect import arguments, compressed_tensors

if TYPE_CHECKING:
    import torch

    from omr.quant._rewrite import Encoded

USUAL_SIZES = (128, 64, 32)
"""Group sizes that GPU kernels are written for."""
SHRINK = (0.95, 0.9, 0.85, 0.8, 0.75)


class Clip(Enum):
    none = "none"
    mse = "mse"


@option("quant", "int4")
@dataclass(kw_only=True)
class Int4(Quantiser):
    """int4 weights with one scale per group of input columns."""

    group_size: int = 128
    """Columns that share a scale; a smaller size is taken when it does not divide every layer's K."""
    clip: Clip = Clip.none
    """`none` maps each group's largest weight to the largest code; `mse` looks for the scale with the least error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 8 or self.group_size % 8:
            raise ConfigError(f"quant.group_size must be a multiple of 8, got {self.group_size}; 128 is usual")

    def quantise(self, src: Path, out: Path, calibration: Path | None, device: str) -> dict[str, float]:
        from omr.quant._rewrite import groups, open_unquantised, rewrite

        opened = open_unquantised(src)
        columns = {opened.tensors[f"{name}.weight"].shape[1] for group in groups(opened) for name in group}
        size = fitting_group(columns, self.group_size)
        scheme = compressed_tensors("pack-quantized", arguments("int", 4, "group", size), None)
        metrics = rewrite(opened, out, lambda weights: self._encode(weights, size), scheme, device)
        return {**metrics, "group_size": float(size)}

    def _encode(self, weights: dict[str, torch.Tensor], size: int) -> dict[str, tuple[Encoded, float]]:
        from omr.quant._scales import best_clip, grouped, packed

        shrink = SHRINK if self.clip is Clip.mse else ()
        return {name: packed(w, best_clip(grouped(w, size), 4, shrink), 4) for name, w in weights.items()}


def fitting_group(columns: set[int], wanted: int) -> int:
    """The group size for layers with these numbers of columns: see the module's docstring. Raises InputError."""
    common = math.gcd(*columns)
    for size in (wanted, *(s for s in USUAL_SIZES if s < wanted)):
        if common % size == 0:
            return size
    for size in range(min(wanted, common), 7, -1):
        if common % size == 0:
            return size
    raise InputError(
        f"int4 needs groups of at least 8 columns; the layers have {sorted(columns)}, which share no such divisor; "
        "use quant=int8_wo"
    )
