"""int8 weight-only: one scale per output row, activations untouched, no calibration.

Rounds each weight to one of 255 values of its row: about 1 % relative error, half the bytes of bf16. Stored four to an
int32 (compressed-tensors `pack-quantized`), which is what vLLM's weight-only kernels take. A scale per row rather than
per group of columns fits any K: 576 or 1000 are nothing special.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omr.option import option
from omr.quant import Quantiser
from omr.quant._dialect import arguments, compressed_tensors

if TYPE_CHECKING:
    import torch

    from omr.quant._rewrite import Encoded


@option("quant", "int8_wo")
@dataclass(kw_only=True)
class Int8Wo(Quantiser):
    """int8 weights with one scale per output channel."""

    def quantise(self, src: Path, out: Path, calibration: Path | None, device: str) -> dict[str, float]:
        from omr.quant._rewrite import open_unquantised, rewrite

        scheme = compressed_tensors("pack-quantized", arguments("int", 8, "channel"), None)
        return rewrite(open_unquantised(src), out, encode, scheme, device)


def encode(weights: dict[str, torch.Tensor]) -> dict[str, tuple[Encoded, float]]:
    """Each weight (N, K) as packed int8 with scale (N, 1)."""
    from omr.quant._scales import int_scale, packed

    return {name: packed(w, int_scale(w.abs().amax(-1, keepdim=True), 8), 8) for name, w in weights.items()}
