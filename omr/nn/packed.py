"""Dense products on CPU in oneDNN's own weight layout.

oneDNN multiplies a weight that it has re-ordered beforehand 1.3 to 2.3 times as fast as `F.linear` for a few rows of x:
in float32 from 3 rows on (below that the column-by-column layout of `omr.nn.linear.lay_out` wins), in bf16 always.
The re-ordered copy costs the weight's memory again, so only models up to `MAX_BYTES` get it. Measured on AVX-512 with
torch 2.13.

These are the operators that torch's own compiler emits for frozen weights; they are looked up, and where a build lacks
them or refuses a weight the product is the ordinary one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

Product = Callable[[torch.Tensor], torch.Tensor]
Add = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

FEW_ROWS = 3
"""Rows of x from which float32 products use the packed weight."""
MANY_ROWS = 64
"""Rows up to which it is used. oneDNN compiles a kernel for every number of rows, half a millisecond each, and prompts
come in all lengths; the gain there is small."""
MAX_BYTES = 2 << 30
"""Weights of a model that are kept twice at most."""


def pack(weight: torch.Tensor) -> torch.Tensor | None:
    """The weight (N, K) re-ordered; None off the CPU, for other dtypes and where oneDNN has no such operator."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    return if_there(lambda: torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 8))


def if_there(prepare: Callable[[], torch.Tensor]) -> torch.Tensor | None:
    """What `prepare` makes of a weight; None where this build of torch lacks the operator or it refuses the weight."""
    try:
        return prepare()
    except (AttributeError, RuntimeError, NotImplementedError):
        return None


def dense_product(weight: torch.Tensor, bias: torch.Tensor | None, *, packed: bool) -> Product:
    """x (T, K) -> x W^T + b (T, N) for a dense weight (N, K), by the fastest way for the number of rows."""
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    plain = _plain(weight, bias)
    ready = pack(weight) if packed else None
    if ready is None:
        return plain
    linear = torch.ops.mkldnn._linear_pointwise
    rows = range(FEW_ROWS if weight.dtype == torch.float32 else 1, MANY_ROWS + 1)
    return lambda x: linear(x, ready, bias, "none", [], "") if x.shape[0] in rows else plain(x)


def dense_add(weight: torch.Tensor, *, packed: bool) -> Add:
    """residual (T, N), x (T, K) -> residual + x W^T."""
    weight = weight.detach()
    turned = weight.t()
    ready = pack(weight) if packed else None
    if ready is None:
        return lambda residual, x: torch.addmm(residual, x, turned)
    linear = torch.ops.mkldnn._linear_pointwise.binary
    rows = range(FEW_ROWS if weight.dtype == torch.float32 else 1, MANY_ROWS + 1)

    def add(residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] in rows:
            return linear(x, residual, ready, None, "add")
        return torch.addmm(residual, x, turned)

    return add


def _plain(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    turned = weight.t()
    if not turned.is_contiguous():
        return lambda x: F.linear(x, weight, bias)
    if bias is None:
        return lambda x: torch.mm(x, turned)
    return lambda x: torch.addmm(bias, x, turned)
