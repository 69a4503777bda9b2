"""Linear products in 8 bits for drafting, where exactness does not matter and bytes do.

A draft may be wrong: verification keeps the output exact whatever is proposed. So a draft head can be read at one byte
a weight without any calibration.

    CPU     int8 weights with a scale per row, activations rounded to 8 bits with a scale per row of x, int32 products:
            torch._int_mm, or oneDNN's over a re-ordered copy for large weights where the processor has VNNI
    CUDA    E4M3 weights with one scale, activations cast to E4M3 at unit scale (they are of order 1), where the GPU and
            the shape allow the product; otherwise the rounded weights in the model's dtype

Nothing depends on batch mates: activations are scaled row by row or not at all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from omr.nn.linear import E4M3_MAX, Fp8Linear
from omr.nn.packed import if_there

LARGE = 3 << 18
"""Elements of a weight from which oneDNN's int8 product is worth its 30 microseconds a call, for two rows of x or more.
At 4 and 16 rows it then takes 0.5 to 0.8 of the time of torch._int_mm."""


def _whole_product(weight: Tensor, scale: Tensor) -> Callable[[Tensor], Tensor]:
    """q (M, K) int8 -> q W^T * scale (M, N) float32 for a weight (N, K) int8 and a scale (N,) of its rows.

    oneDNN multiplies unsigned activations by signed weights fast, signed ones by a reference loop: q goes in as q + 128
    with 128 named as its zero point.
    """
    turned = weight.t()

    def plain(q: Tensor) -> Tensor:
        return torch._int_mm(q, turned) * scale

    if weight.numel() < LARGE or not torch.cpu._is_vnni_supported():
        return plain
    ready = if_there(lambda: torch.ops.onednn.qlinear_prepack(weight, None))
    if ready is None:
        return plain
    zeros = torch.zeros(len(weight), dtype=torch.int32)
    run, tail = torch.ops.onednn.qlinear_pointwise.default, (None, 1.0, 0, torch.float32, "none", [], "")

    def packed(q: Tensor) -> Tensor:
        if q.shape[0] == 1:
            return plain(q)
        return run(q.view(torch.uint8).add_(128), 1.0, 128, ready, scale, zeros, *tail)

    return packed


class Int8Linear(nn.Module):
    """x (..., K) float32 -> (..., N) float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127
        self.run = _whole_product((weight / scale[:, None]).round().to(torch.int8), scale / 127)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)

    def rows(self, x: Tensor) -> Tensor:
        """forward of (M, K), in fewer calls."""
        largest = x.abs().amax(-1, keepdim=True).clamp_(min=1e-12)
        out = self.run((x * (127 / largest)).round_().to(torch.int8)).mul_(largest)
        return out if self.bias is None else out.add_(self.bias)


def eight_bit(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The linear layer of `weight` (N, K) and `bias` in 8 bits, on the weight's device."""
    weight = weight.detach()
    bias = None if bias is None else bias.detach()
    if weight.device.type == "cpu":
        return Int8Linear(weight.float(), None if bias is None else bias.float())
    scale = (weight.float().abs().amax() / E4M3_MAX).clamp(min=1e-12).reshape(1)
    rounded = (weight.float() / scale).to(torch.float8_e4m3fn)
    return Fp8Linear(rounded, scale, torch.ones(1, device=weight.device), bias, weight.dtype)
