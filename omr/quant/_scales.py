"""From weights to codes and scales, and back. Symmetric throughout: value = code * scale, no zero points.

    E4M3   scale = amax / 448, float32; rounding is off by 6.25 % of a value at most
    int8   scale = amax / 127, bfloat16, one per row
    int4   scale = amax / 7, bfloat16, one per group of columns; `best_clip` may shrink it

Scales are rounded to the type that they are stored in before codes are chosen, so that what is written is what was
meant. Weights (N, K), any float type, any device; codes come back on the same device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

E4M3_MAX = 448.0
TINY = torch.finfo(torch.bfloat16).tiny


def positive(scale: torch.Tensor) -> torch.Tensor:
    """1 where a range is zero: zeros stay zeros, and no reader ever divides by zero."""
    return torch.where(scale >= TINY, scale, torch.ones_like(scale))


def e4m3_scale(amax: torch.Tensor) -> torch.Tensor:
    """The float32 scale that maps `amax` to the largest E4M3 value."""
    return positive(amax.float() / E4M3_MAX)


def e4m3_codes(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """weight / scale in E4M3, nearest even. `scale` is (1,) or (N, 1)."""
    return (weight.float() / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def int_scale(amax: torch.Tensor, bits: int) -> torch.Tensor:
    """The bfloat16 scale that maps `amax` to the largest code."""
    return positive((amax.float() / (2 ** (bits - 1) - 1)).to(torch.bfloat16))


def int_codes(groups: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """`groups` (N, G, K / G) over `scale` (N, G) as int8, round half to even, clamped to the codes there are."""
    limit = 2 ** (bits - 1)
    return (groups.float() / scale.float()[..., None]).round_().clamp_(-limit, limit - 1).to(torch.int8)


def grouped(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """(N, K) -> (N, K / group_size, group_size)."""
    rows, columns = weight.shape
    assert columns % group_size == 0, (columns, group_size)
    return weight.reshape(rows, columns // group_size, group_size)


def best_clip(groups: torch.Tensor, bits: int, shrink: Sequence[float]) -> torch.Tensor:
    """For each group the scale, out of amax / limit times each of `shrink`, whose rounding error is least in squares.

    A smaller scale cuts the largest weight of the group off and rounds all others more finely.
    """
    groups = groups.float()
    amax = groups.abs().amax(-1)
    best = int_scale(amax, bits)
    least = _squared_error(groups, best, bits)
    for factor in shrink:
        scale = int_scale(amax * factor, bits)
        error = _squared_error(groups, scale, bits)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def _squared_error(groups: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    limit, wide = 2 ** (bits - 1), scale.float()[..., None]
    return ((groups / wide).round_().clamp_(-limit, limit - 1).mul_(wide) - groups).square_().sum(-1)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 codes (N, K) -> int32 (N, ceil(K * bits / 32)): offset binary, the first code in the lowest bits."""
    per_word = 32 // bits
    rows, columns = codes.shape
    raw = codes.to(torch.int32) + (1 << (bits - 1))
    raw = torch.nn.functional.pad(raw, (0, -columns % per_word)).view(rows, -1, per_word)
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=codes.device)
    return (raw << shifts).sum(-1, dtype=torch.int32)


def packed(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> tuple[dict[str, torch.Tensor], float]:
    """`weight` (N, K) with `scale` (N, G) in the pack-quantized layout, by suffix; and its relative error."""
    rows, columns = weight.shape
    codes = int_codes(grouped(weight, columns // scale.shape[1]), scale, bits)
    error = relative_error(weight, (codes.float() * scale.float()[..., None]).view(rows, columns))
    tensors = {
        "weight_packed": pack(codes.view(rows, columns), bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([rows, columns], dtype=torch.int64),
    }
    return tensors, error


def relative_error(weight: torch.Tensor, stored: torch.Tensor) -> float:
    """||stored - weight|| / ||weight|| in float32; 0 for a weight of zeros."""
    wide = weight.float()
    norm = torch.linalg.vector_norm(wide)
    return float(torch.linalg.vector_norm(stored.float() - wide) / norm) if norm > 0 else 0.0
