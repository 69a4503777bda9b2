"""FP8: E4M3 weights and activations, with scales fixed beforehand from calibration text.

An FP8 product multiplies codes and scales the sum once. So a weight and an input each get one factor that maps their
largest value to 448, the largest E4M3 number. A weight's range is known; an input's is measured on documents in the
model's own style (omr/quant/_ranges.py) and then fixed ("static"), which spares a pass over the activations at every
step.

  granularity  tensor: one scale a weight, shared by q, k, v and by gate, up (the largest of their ranges), because
               engines multiply those as one; what TensorRT-LLM reads. channel: one scale an output row, not shared.
  range        amax: nothing that calibration saw is cut off. percentile: the largest `100 - percentile` % of the inputs
               are clamped. Measure before using it: E4M3 has exponents of its own, so outliers coarsen it little, and
               decoders with a few massive activations break when those are cut (docs/quantisation.md).
  export       which dialect config.json speaks (omr/quant/_dialect.py); the tensors are the same.

lm_head and embeddings stay as they are. A range of zero gets scale 1. ranges.json and curve.jsonl beside the weights
tell what was measured and whether more rows would have changed it.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from omr.errors import ConfigError, InputError
from omr.option import option
from omr.quant import Quantiser
from omr.quant._dialect import arguments, compressed_tensors, modelopt_file, modelopt_inline

if TYPE_CHECKING:
    import torch

    from omr.quant._ranges import Ranges
    from omr.quant._rewrite import Encoded


class Granularity(Enum):
    tensor = "tensor"
    channel = "channel"


class Range(Enum):
    amax = "amax"
    percentile = "percentile"


class Export(Enum):
    compressed_tensors = "compressed_tensors"
    modelopt = "modelopt"


@option("quant", "fp8")
@dataclass(kw_only=True)
class Fp8(Quantiser):
    """E4M3 weights and activations with static scales from calibration."""

    calibrates: ClassVar[bool] = True
    calib_samples: int = 512
    granularity: Granularity = Granularity.tensor
    """Weight scales: one a tensor, or one an output channel."""
    range: Range = Range.amax
    """How an input's range is taken from what was seen."""
    percentile: float = 99.99
    """With range=percentile: the share of input values, in percent, that is not cut off."""
    export: Export = Export.compressed_tensors
    """Dialect of config.json. hf_quant_config.json (ModelOpt's) is written beside it wherever the format allows."""

    def __post_init__(self) -> None:
        if self.calib_samples < 1:
            raise ConfigError(f"quant.calib_samples must be >= 1, got {self.calib_samples}; fp8 scales are calibrated")
        if self.calib_tokens < 1:
            raise ConfigError(f"quant.calib_tokens must be >= 1, got {self.calib_tokens}")
        if not 50 <= self.percentile <= 100:
            raise ConfigError(f"quant.percentile must be in [50, 100], got {self.percentile}; 99.99 is usual")
        if self.export is Export.modelopt and self.granularity is Granularity.channel:
            raise ConfigError(
                "quant.export=modelopt has no static per-channel FP8; use quant.granularity=tensor or "
                "quant.export=compressed_tensors"
            )

    def quantise(self, src: Path, out: Path, calibration: Path | None, device: str) -> dict[str, float]:
        from omr.quant._ranges import collect
        from omr.quant._rewrite import open_unquantised, rewrite, write_json

        if calibration is None:
            raise InputError("fp8 needs calibration text; set model.text to a source of problems and solutions")
        started = time.monotonic()
        opened = open_unquantised(src)
        ranges = collect(
            src,
            calibration,
            rows=self.calib_samples,
            max_tokens=self.calib_tokens,
            percentile=self.percentile if self.range is Range.percentile else None,
            device=device,
            num_bytes=opened.num_bytes,
        )
        calib_seconds = time.monotonic() - started
        report: dict[str, Any] = {}
        per_channel = self.granularity is Granularity.channel
        metrics = rewrite(
            opened, out, lambda weights: encode(weights, ranges, per_channel, report), self._config(), device
        )
        if not per_channel:
            write_json(out / "hf_quant_config.json", modelopt_file())
        write_json(out / "ranges.json", {"rows": ranges.rows, "tokens": ranges.tokens, "layers": report})
        (out / "curve.jsonl").write_text("".join(json.dumps(point) + "\n" for point in ranges.curve))
        half = [point["calibration/range_share_min"] for point in ranges.curve if point["step"] <= ranges.rows / 2]
        return {
            **metrics,
            "seconds": round(time.monotonic() - started, 3),
            "calib_seconds": round(calib_seconds, 3),
            "calib_rows": float(ranges.rows),
            "calib_tokens": float(ranges.tokens),
            "range_share_at_half_min": half[-1] if half else 0.0,
        }

    def _config(self) -> dict[str, Any]:
        if self.export is Export.modelopt:
            return modelopt_inline()
        weights = arguments("float", 8, self.granularity.name)
        return compressed_tensors("float-quantized", weights, arguments("float", 8, "tensor"))


def encode(
    weights: dict[str, torch.Tensor], ranges: Ranges, per_channel: bool, report: dict[str, Any]
) -> dict[str, tuple[Encoded, float]]:
    """A fused group as E4M3: `weight` (N, K), `weight_scale` (1,) or (N, 1), `input_scale` (1,), scales in float32.

    Adds a line on each layer to `report`.
    """
    import torch

    from omr.quant._scales import e4m3_codes, e4m3_scale, relative_error

    largest = torch.stack([w.abs().amax() for w in weights.values()]).amax().reshape(1)
    encoded: dict[str, tuple[Encoded, float]] = {}
    for name, weight in weights.items():
        scale = e4m3_scale(weight.abs().amax(-1, keepdim=True) if per_channel else largest)
        codes = e4m3_codes(weight, scale)
        error = relative_error(weight, codes.float() * scale)
        input_scale = e4m3_scale(torch.tensor([ranges.amax[name]]))
        encoded[name] = {"weight": codes, "weight_scale": scale, "input_scale": input_scale}, error
        report[name] = {
            "input_amax": ranges.largest[name],
            "input_range": ranges.amax[name],
            "input_scale": float(input_scale),
            "weight_amax": float(weight.abs().amax()),
            "weight_scale_max": float(scale.max()),
            "weight_rel_error": error,
        }
    return encoded
