"""Linear products in 8 bits for drafting, where exactness does not matter and bytes do.

A draft may be wrong: verification keeps the output exact whatever is proposed. So a draft head can be read at one byte
a weight without any calibration.

    CPU     int8 weights with a scale per row, activations rounded to int8 with a scale per row of x, int32 products
            (torch._int_mm: 2 to 4 times faster than float32 at 1 to 8 rows)
    CUDA    E4M3 weights with one scale, activations cast to E4M3 at unit scale (they are of order 1), where the GPU and
            the shape allow the product; otherwise the rounded weights in the model's dtype

Nothing depends on batch mates: activations are scaled row by row or not at all.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from omr.nn.linear import E4M3_MAX, Fp8Linear


class Int8Linear(nn.Module):
    """x (M, K) float32 -> (M, N) float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8).t())
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        largest = torch.linalg.vector_norm(flat, float("inf"), dim=-1, keepdim=True).clamp_(min=1e-12)
        whole = torch._int_mm((flat * (127 / largest)).round_().to(torch.int8), self.weight)
        out = (whole * self.scale).mul_(largest / 127)
        return (out if self.bias is None else out.add_(self.bias)).view(*x.shape[:-1], -1)


def eight_bit(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The linear layer of `weight` (N, K) and `bias` in 8 bits, on the weight's device."""
    weight = weight.detach()
    bias = None if bias is None else bias.detach()
    if weight.device.type == "cpu":
        return Int8Linear(weight.float(), None if bias is None else bias.float())
    scale = (weight.float().abs().amax() / E4M3_MAX).clamp(min=1e-12).reshape(1)
    rounded = (weight.float() / scale).to(torch.float8_e4m3fn)
    return Fp8Linear(rounded, scale, torch.ones(1, device=weight.device), bias, weight.dtype)
