"""Linear layers whose weights are stored in 8 or 4 bits.

All compute y = x W^T + b with W the dequantised weight; they differ in what is kept in memory and what is multiplied:

    class        stored                        CPU                                   CUDA
    Fp8Linear    E4M3, scale per tensor or     W dequantised once; x rounded to      E4M3 x E4M3 product
                 row, static input scale       E4M3 at the input scale each call     (torch._scaled_mm)
    Int8Linear   int8, scale per row           float32: W dequantised once           int8 product up to 64
                                               bf16: int8 product up to 32 rows,     rows, else W dequantised
                                               else W dequantised each call          each call
    GroupLinear  4 or 8 bits, scale per group  W dequantised once                    W dequantised once

The E4M3 cast is scalar code on CPU and an FP8 product through it is 60 to 190 times slower than bf16, so the CPU
keeps the dequantised weight: the numbers are those of FP8 arithmetic with a wide accumulator, the memory is not.
torch's int8 product is fast for bf16 activations only (in float32 it is 8 to 40 times slower than the dense product),
and reads past the end of rows that are not a multiple of 16 long. Rounding x on CPU does not go through the cast
either: `round_e4m3` rounds in float32 arithmetic, exactly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

E4M3_MAX = 448.0
SHIFT = 1.5 * 2.0**20
CAST_ELEMENTS = 2048
"""Below this many elements the scalar cast to E4M3 is faster than the arithmetic, which takes more calls."""


def to_e4m3(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x / scale in E4M3, clamped to its range."""
    return (x.float() / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def round_e4m3(x: torch.Tensor) -> torch.Tensor:
    """x (float32) rounded to the nearest E4M3 value, ties to even, clamped to +-448; exact for every finite input.

    For 2^e <= |x| < 2^(e+1) the E4M3 spacing is 2^(max(e, -6) - 3). Adding and taking away 1.5 * 2^(20 + max(e, -6))
    leaves exactly the float32 rounding at that spacing.
    """
    x = x.clamp(-E4M3_MAX, E4M3_MAX)
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=2.0**-6)
    return torch.add(x, power, alpha=SHIFT).sub_(power, alpha=SHIFT)


class QuantLinear(nn.Module):
    """Base: `weight` and `scale` are buffers, `bias` is a buffer or None, (N, K) is the logical weight shape."""

    bias: torch.Tensor | None
    is_dense = True
    """Whether `weight` is the dequantised weight itself."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.out_features, self.in_features = rows, columns

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The dequantised weight (N, K)."""
        raise TypeError(f"{type(self).__name__} has no dense form")


class Fp8Linear(QuantLinear):
    """E4M3 weight (N, K) with float32 scale (1,) or (N, 1), and a static input scale (1,) or None (weight only)."""

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor,
        input_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(*weight.shape)
        self.dtype = dtype
        self.product = weight.is_cuda and input_scale is not None and not any(n % 16 for n in weight.shape)
        self.register_buffer("scale", scale.float())
        self.register_buffer("input_scale", None if input_scale is None else input_scale.float())
        self.register_buffer("bias", None if bias is None else bias.to(dtype))
        self.register_buffer("weight", weight if self.product else self._dequantised(weight, dtype))

    def _dequantised(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return (weight.float() * self.scale).to(dtype)

    @property
    def is_dense(self) -> bool:
        return not self.product

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self._dequantised(self.weight, dtype) if self.product else self.weight.to(dtype)

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """x as an FP8 product would see it: rounded to E4M3 at the input scale, in its own dtype again."""
        if x.numel() < CAST_ELEMENTS:
            return to_e4m3(x, self.input_scale).float().mul_(self.input_scale).to(x.dtype)
        return round_e4m3(x.float() / self.input_scale).mul_(self.input_scale).to(x.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.input_scale is None:
            return F.linear(x, self.weight, self.bias)
        if not self.product:
            return F.linear(self.rounded(x), self.weight, self.bias)
        flat = x.reshape(-1, self.in_features)
        return self.multiply(to_e4m3(flat, self.input_scale)).view(*x.shape[:-1], self.out_features)

    def multiply(self, x8: torch.Tensor) -> torch.Tensor:
        """x8 (M, K) E4M3, already divided by the input scale, times the weight: (M, N) in the layer's dtype."""
        if self.scale.numel() == 1:
            return torch._scaled_mm(
                x8, self.weight.t(), self.input_scale, self.scale, bias=self.bias, out_dtype=self.dtype
            )
        rows = self.input_scale.reshape(1, 1).expand(x8.shape[0], 1).contiguous()
        return torch._scaled_mm(x8, self.weight.t(), rows, self.scale.view(1, -1), bias=self.bias, out_dtype=self.dtype)


class Int8Linear(QuantLinear):
    """int8 weight (N, K) with one scale per row; activations stay in the model's dtype."""

    MAX_PACKED_ROWS = 32
    MAX_KERNEL_ROWS = 64

    def __init__(
        self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__(*weight.shape)
        self.is_dense = not weight.is_cuda and dtype == torch.float32
        self.register_buffer("scale", scale.reshape(-1).to(dtype))
        self.register_buffer("weight", weight.to(dtype) * self.scale[:, None] if self.is_dense else weight)
        self.register_buffer("bias", None if bias is None else bias.to(dtype))

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self.weight.to(dtype) if self.is_dense else self.weight.to(dtype) * self.scale.to(dtype)[:, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_dense:
            return F.linear(x, self.weight, self.bias)
        flat = x.reshape(-1, self.in_features)
        if x.is_cuda and flat.shape[0] <= self.MAX_KERNEL_ROWS:
            from omr.nn.kernels import int8_linear  # Triton is there with CUDA builds of torch only

            return int8_linear(flat, self.weight, self.scale, self.bias).view(*x.shape[:-1], self.out_features)
        if x.is_cuda or flat.shape[0] > self.MAX_PACKED_ROWS or self.in_features % 16:
            return F.linear(x, self.dense(x.dtype), self.bias)
        out = torch._weight_int8pack_mm(flat, self.weight, self.scale)
        if self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], self.out_features)


class GroupLinear(QuantLinear):
    """Integer weight given as int8 values (N, K) with a scale per group of columns (N, groups). Dequantised once."""

    def __init__(
        self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__(*weight.shape)
        rows, columns = weight.shape
        wide = weight.view(rows, scale.shape[1], -1).float() * scale.float()[..., None]
        self.register_buffer("weight", wide.view(rows, columns).to(dtype))
        self.register_buffer("bias", None if bias is None else bias.to(dtype))

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self.weight.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


def lay_out(weight: torch.Tensor) -> torch.Tensor:
    """The same weight (N, K), in memory as torch multiplies it fastest by few rows.

    On CPU in float32 a wide weight is kept column by column: measured with 2 cores busy, x W^T then takes 0.4 to 0.6
    of the time for one row of x (weights out of the second-level cache), and no longer for many.
    """
    wide = weight.dim() == 2 and weight.shape[0] >= weight.shape[1]
    if weight.is_cuda or weight.dtype != torch.float32 or not wide:
        return weight
    return weight.t().contiguous().t()


class Parallel(nn.Module):
    """Products of one input that cannot be one product (their scales or kinds differ), results side by side."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self.parts], -1)


def fuse(parts: list[nn.Module]) -> nn.Module:
    """One module whose output is the parts' outputs side by side, over one stacked weight.

    The parts keep working: their weights become views of the stacked one, so memory holds each weight once. Parts with
    different input scales (FP8), or of different kinds, are run one after the other instead.
    """
    kind = type(parts[0])
    if any(type(part) is not kind for part in parts) or len({part.bias is None for part in parts}) > 1:
        return Parallel(parts)
    if kind is Fp8Linear and not _same_scales(parts):
        return Parallel(parts)
    fused = kind.__new__(kind)
    nn.Module.__init__(fused)
    fused.in_features = parts[0].in_features
    fused.out_features = sum(part.out_features for part in parts)
    for name in ("dtype", "product", "is_dense"):
        if name in parts[0].__dict__:
            fused.__dict__[name] = parts[0].__dict__[name]
    for name in ("weight", "bias", "scale", "input_scale"):
        tensors = [getattr(part, name, None) for part in parts]
        if not hasattr(parts[0], name):
            continue
        folded = name == "scale" and kind is Fp8Linear and not fused.product
        if tensors[0] is None or tensors[0].numel() == 1 or name == "input_scale" or folded:
            fused.register_buffer(name, tensors[0])
        else:
            _stack(fused, parts, name)
    return fused


def _same_scales(parts: list[nn.Module]) -> bool:
    first = parts[0]
    if any((part.input_scale is None) != (first.input_scale is None) for part in parts):
        return False
    if any(part.product != first.product for part in parts):
        return False
    if first.input_scale is not None and any(not torch.equal(part.input_scale, first.input_scale) for part in parts):
        return False
    per_tensor = first.product and first.scale.numel() == 1
    return not per_tensor or all(torch.equal(part.scale, first.scale) for part in parts)


def _stack(fused: nn.Module, parts: list[nn.Module], name: str) -> None:
    tensors = [getattr(part, name).detach() for part in parts]
    whole = torch.cat([t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for t in tensors])
    whole = lay_out(whole.view(tensors[0].dtype))
    is_parameter = isinstance(getattr(parts[0], name), nn.Parameter)
    if is_parameter:
        fused.register_parameter(name, nn.Parameter(whole, requires_grad=False))
    else:
        fused.register_buffer(name, whole)
    start = 0
    for part, tensor in zip(parts, tensors, strict=True):
        view = whole[start : start + tensor.shape[0]]
        setattr(part, name, nn.Parameter(view, requires_grad=False) if is_parameter else view)
        start += tensor.shape[0]
