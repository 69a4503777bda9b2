"""Rotary positions: cosine and sine tables for the default, linear, llama3 and yarn frequency rules.

A head vector x of even size d is rotated in pairs (x_i, x_{i + d/2}) by the angle position * f_i. With
swap(x) = concat(x[d/2:], x[:d/2]) that is

    rotated(x) = x * cos + swap(x) * sin        cos = [c, c], sin = [-s, s]

so the sign of the first half is stored in the sine table, and one roll, one product and one fused multiply-add do it.
Frequency rules: YaRN arXiv 2309.00071; llama3 as published with Llama 3.1; both as transformers computes them.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from omr.errors import InputError
from omr.nn.config import DecoderConfig


def frequencies(config: DecoderConfig) -> tuple[torch.Tensor, float]:
    """Angular frequencies (head_dim / 2,) float32 and the factor that multiplies cosine and sine."""
    dim, base, rope = config.head_dim, config.rope_theta, config.rope
    inv = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))
    kind = rope["rope_type"]
    if kind == "default":
        return inv, 1.0
    factor = float(_need(rope, "factor"))
    if kind == "linear":
        return inv / factor, 1.0
    if kind == "llama3":
        return _llama3(inv, rope, factor), 1.0
    return _yarn(dim, base, rope, factor, config.max_position_embeddings)


def tables(config: DecoderConfig, num_positions: int, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """cos, sin (num_positions, head_dim) float32; the first half of sin is negated (see the module text)."""
    inv, scale = frequencies(config)
    angle = torch.outer(torch.arange(num_positions, dtype=torch.float32), inv)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    return torch.cat([cos, cos], -1).to(device), torch.cat([-sin, sin], -1).to(device)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (..., head_dim) rotated by tables that broadcast against it."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _need(rope: dict[str, Any], key: str) -> Any:
    if rope.get(key) is None:
        raise InputError(f"config.json: rope type {rope['rope_type']!r} needs {key}")
    return rope[key]


def _llama3(inv: torch.Tensor, rope: dict[str, Any], factor: float) -> torch.Tensor:
    low, high = float(_need(rope, "low_freq_factor")), float(_need(rope, "high_freq_factor"))
    context = int(_need(rope, "original_max_position_embeddings"))
    wavelength = 2 * math.pi / inv
    smooth = (context / wavelength - low) / (high - low)
    blended = (1 - smooth) * inv / factor + smooth * inv
    scaled = torch.where(wavelength > context / low, inv / factor, inv)
    medium = (wavelength <= context / low) & (wavelength >= context / high)
    return torch.where(medium, blended, scaled)


def _yarn(dim: int, base: float, rope: dict[str, Any], factor: float, served: int) -> tuple[torch.Tensor, float]:
    context = int(rope.get("original_max_position_embeddings") or served)

    def magnitude(scale: float, weight: float) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    attention = rope.get("attention_factor")
    if attention is None:
        m, m_all = rope.get("mscale"), rope.get("mscale_all_dim")
        attention = magnitude(factor, m) / magnitude(factor, m_all) if m and m_all else magnitude(factor, 1.0)

    def rotations(count: float) -> float:
        return dim * math.log(context / (count * 2 * math.pi)) / (2 * math.log(base))

    low, high = rotations(rope.get("beta_fast") or 32), rotations(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    position = base ** (torch.arange(0, dim, 2).float() / dim)
    ramp = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    inv = 1.0 / (factor * position) * (1 - ramp) + 1.0 / position * ramp
    return inv, float(attention)
