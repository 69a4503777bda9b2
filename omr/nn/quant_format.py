"""The quantised checkpoint dialects that are read: what config.json declares, and how packed integers are unpacked.

`compressed-tensors` (vLLM, SGLang, transformers) and `modelopt` (TensorRT-LLM) describe the same FP8 tensors; omr
writes the first in config.json and the second in hf_quant_config.json beside it. Layouts, for a weight (N, K):

    float-quantized  X.weight E4M3 (N, K), X.weight_scale (1,) or (N, 1), X.input_scale (1,) if activations are static
    pack-quantized   X.weight_packed int32 (N, ceil(K / n)) with n = 32 / bits: value + 2^(bits-1), the first value in
                     the low bits; X.weight_scale (N, 1) or (N, K / group); X.weight_shape int64 (2,)
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from omr.errors import InputError


@dataclass(kw_only=True)
class QuantFormat:
    """How the quantised linear layers of one checkpoint are stored."""

    kind: str
    """`fp8` or `packed`."""
    bits: int = 8
    strategy: str = "tensor"
    """Granularity of the weight scales: tensor, channel or group."""
    group_size: int = 0
    static_input: bool = True
    """FP8 only: whether the layers carry an input_scale."""
    ignore: list[str] = field(default_factory=list)

    def covers(self, name: str) -> bool:
        """Whether the linear layer `name` (Hugging Face name, without `.weight`) is stored quantised."""
        for pattern in self.ignore:
            if pattern.startswith("re:"):
                if re.match(pattern[3:], name):
                    return False
            elif pattern == name or (pattern.endswith("*") and name.startswith(pattern[:-1])):
                return False
        return True


def quant_format(raw: dict[str, Any], folder: Path) -> QuantFormat | None:
    """The QuantFormat declared by a config.json (or by hf_quant_config.json beside it); None when unquantised."""
    declared = raw.get("quantization_config")
    if declared is None:
        beside = folder / "hf_quant_config.json"
        if not beside.exists():
            return None
        try:
            declared = {"quant_method": "modelopt", **json.loads(beside.read_text(encoding="utf-8"))}
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{beside} cannot be read as JSON: {error}") from None
    method = declared.get("quant_method")
    if method == "compressed-tensors":
        return _compressed_tensors(declared)
    if method == "modelopt":
        return _modelopt(declared)
    raise InputError(
        f"quant_method {method!r} in config.json is not supported; supported: compressed-tensors, modelopt (FP8)"
    )


def _compressed_tensors(declared: dict[str, Any]) -> QuantFormat:
    groups = list((declared.get("config_groups") or {}).values())
    if len(groups) != 1:
        raise InputError(f"config.json: quantization_config has {len(groups)} config_groups, expected one for Linear")
    group = groups[0]
    if group.get("targets") != ["Linear"]:
        raise InputError(f"config.json: quantisation targets {group.get('targets')!r} are not supported, only Linear")
    layout = declared.get("format") or group.get("format")
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    bits, kind, strategy = weights.get("num_bits"), weights.get("type"), weights.get("strategy")
    if not weights.get("symmetric", True):
        raise InputError("config.json: asymmetric weight quantisation (zero points) is not supported")
    if weights.get("actorder") not in (None, False, "weight", "static"):
        raise InputError(f"config.json: activation ordering {weights.get('actorder')!r} is not supported")
    ignore = list(declared.get("ignore") or [])
    if layout == "float-quantized" and kind == "float" and bits == 8 and strategy in ("tensor", "channel"):
        if inputs is not None and (
            inputs.get("dynamic") or inputs.get("type") != "float" or inputs.get("strategy") != "tensor"
        ):
            raise InputError(
                "config.json: FP8 activations must have a static per-tensor scale; "
                f"got dynamic={inputs.get('dynamic')!r}, strategy={inputs.get('strategy')!r}"
            )
        return QuantFormat(kind="fp8", strategy=strategy, static_input=inputs is not None, ignore=ignore)
    if layout == "pack-quantized" and kind == "int" and bits in (4, 8) and strategy in ("channel", "group"):
        if inputs is not None:
            raise InputError("config.json: integer activations are not supported, only weight-only int8 and int4")
        size = weights.get("group_size") or 0
        if strategy == "group" and size < 1:
            raise InputError(f"config.json: quantisation group_size must be >= 1, got {size!r}")
        return QuantFormat(
            kind="packed", bits=bits, strategy=strategy, group_size=size, static_input=False, ignore=ignore
        )
    raise InputError(
        f"config.json: quantisation format {layout!r} with {bits}-bit {kind} weights per {strategy} is not supported; "
        "supported: float-quantized 8-bit, pack-quantized 4- and 8-bit int"
    )


def _modelopt(declared: dict[str, Any]) -> QuantFormat:
    inner = declared.get("quantization") or declared
    algorithm = inner.get("quant_algo")
    if algorithm != "FP8":
        raise InputError(f"modelopt quant_algo {algorithm!r} is not supported; supported: FP8")
    return QuantFormat(kind="fp8", ignore=list(inner.get("exclude_modules") or inner.get("ignore") or []))


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """int32 (N, ceil(columns / n)) -> int8 (N, columns), values -2^(bits-1) .. 2^(bits-1) - 1."""
    per_word = 32 // bits
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
    values = (packed[..., None] >> shifts) & ((1 << bits) - 1)
    values = values.view(packed.shape[0], packed.shape[1] * per_word)[:, :columns]
    return (values - (1 << (bits - 1))).to(torch.int8)
