"""Triton kernels against float64 on the same inputs, outputs poisoned first."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from omr.nn import rope
from omr.nn.draft_loss import linear_cross_entropy
from omr.nn.linear import to_e4m3

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
if importlib.util.find_spec("triton"):
    from omr.nn import kernels, loss_kernel

DTYPES = {"float32": (torch.float32, 1e-5), "bfloat16": (torch.bfloat16, 1e-2), "float16": (torch.float16, 2e-3)}


def close(got: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    error = ((got.double() - expected.double()).norm() / expected.double().norm()).item()
    assert error < bound, f"relative error {error:.2e}"


@pytest.fixture(params=sorted(DTYPES))
def kind(request: pytest.FixtureRequest) -> tuple[torch.dtype, float]:
    """Also fills the allocator's free memory with NaN: an element that a kernel does not write shows."""
    poison = torch.full((1 << 22,), float("nan"), device="cuda")
    del poison
    return DTYPES[request.param]


@pytest.mark.parametrize("size", [96, 576, 5120])
def test_add_norm(kind, size: int) -> None:
    dtype, bound = kind
    x, delta = torch.randn(7, size, device="cuda").to(dtype), torch.randn(7, size, device="cuda").to(dtype)
    weight = torch.randn(size, device="cuda").to(dtype)
    total = x + delta
    wide = total.double()
    expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight.double()
    got = kernels.add_norm(x, delta, weight, 1e-6, None)
    close(got, expected, bound)
    assert torch.equal(x, total)
    close(kernels.add_norm(total.clone(), None, weight, 1e-6, None), expected, bound)
    scale = torch.tensor([0.015], device="cuda")
    eight = kernels.add_norm(total.clone(), None, weight, 1e-6, scale)
    assert (eight.float() != to_e4m3(got, scale).float()).float().mean() < 1e-3


def test_silu_mul(kind) -> None:
    dtype, bound = kind
    gate_up = torch.randn(5, 2 * 1300, device="cuda").to(dtype)
    gate, up = gate_up.double().chunk(2, -1)
    got = kernels.silu_mul(gate_up, None)
    close(got, torch.nn.functional.silu(gate) * up, bound)
    scale = torch.tensor([0.01], device="cuda")
    eight = kernels.silu_mul(gate_up, scale).float()
    assert (eight != to_e4m3(got, scale).float()).float().mean() < 1e-3


@pytest.mark.parametrize("width", [11, 4096, 49152, 151936])
@pytest.mark.parametrize("gradient", [True, False])
def test_cross_entropy(kind, width: int, gradient: bool) -> None:
    dtype, bound = kind
    logits = (4 * torch.randn(37, width, device="cuda")).to(dtype)
    logits[0] = 1.0  # all alike: a tie counts for the lower word
    words = torch.randint(0, width, (37,), device="cuda")
    wide = logits.double()
    expected = torch.nn.functional.cross_entropy(wide, words, reduction="none")
    slope = wide.softmax(-1) - torch.nn.functional.one_hot(words, width)
    order = torch.argsort(logits, dim=-1, descending=True, stable=True)
    losses, ranks = torch.empty(37, device="cuda"), torch.empty(37, dtype=torch.int64, device="cuda")
    before = logits.clone()
    loss_kernel.cross_entropy_(logits, words, losses, ranks, gradient=gradient)
    close(losses, expected, 1e-5)
    assert torch.equal(ranks, (order == words[:, None]).nonzero()[:, 1])
    if gradient:
        close(logits, slope, bound)
    else:
        assert torch.equal(logits, before)
    before[3, -1] = float("nan")
    loss_kernel.cross_entropy_(before, words, losses, None, gradient=True)
    assert losses.isnan().tolist() == [row == 3 for row in range(37)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_cross_entropy_with_the_kernel(dtype: torch.dtype) -> None:
    """Loss and gradients against float64 autograd, in chunks that do not divide the rows."""
    torch.manual_seed(0)
    z = torch.randn(300, 64, device="cuda", requires_grad=True)
    matrix = torch.randn(5000, 64, device="cuda", requires_grad=True)
    words, weights = torch.randint(5000, (300,), device="cuda"), torch.rand(300, device="cuda")
    wide_z, wide_matrix = (t.detach().to(dtype).double().requires_grad_() for t in (z, matrix))
    loss = torch.nn.functional.cross_entropy(wide_z @ wide_matrix.T, words, reduction="none") @ weights.double()
    expected = torch.autograd.grad(3 * loss, (wide_z, wide_matrix))
    total, _, _ = linear_cross_entropy(z, matrix, words, weights, dtype=dtype, chunk=128)
    bound = 1e-4 if dtype == torch.float32 else 2e-2
    close(total, loss, bound)
    for got, wanted in zip(torch.autograd.grad(3 * total, (z, matrix)), expected, strict=True):
        close(got, wanted, bound)


@pytest.mark.parametrize("rows", [1, 5, 33, 64])
@pytest.mark.parametrize("shape", [(70, 200), (4608, 576)])
def test_int8_linear(kind, rows: int, shape: tuple[int, int]) -> None:
    dtype, bound = kind
    x = torch.randn(rows, shape[1], device="cuda").to(dtype)
    weight = torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda")
    scale, bias = (torch.rand(shape[0], device="cuda") / 100).to(dtype), torch.randn(shape[0], device="cuda").to(dtype)
    expected = x.double() @ (weight.double() * scale.double()[:, None]).t()
    close(kernels.int8_linear(x, weight, scale, None), expected, bound)
    close(kernels.int8_linear(x, weight, scale, bias), expected + bias.double(), bound)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (40, 8, 128), (6, 2, 32), (4, 4, 80)])
@pytest.mark.parametrize(("batch", "new"), [(1, 1), (3, 1), (2, 4), (33, 2), (1, 8)])
def test_rotation_cache_and_attention(kind, heads: int, kv_heads: int, dim: int, batch: int, new: int) -> None:
    dtype, bound = kind
    block_size, width = 16, 80
    torch.manual_seed(batch * new)
    cache = torch.randn(batch * width * block_size + block_size, 2 * kv_heads * dim, device="cuda").to(dtype)
    tables = (torch.randperm(batch * width, device="cuda") + 1).view(batch, width).int()
    starts = torch.randint(0, width * block_size - new, (batch,), device="cuda")
    starts[0] = 0
    positions, slots = kernels.place(starts, tables, new, block_size)
    assert torch.equal(positions, (starts[:, None] + torch.arange(new, device="cuda")).flatten())
    sequence = torch.arange(batch, device="cuda").repeat_interleave(new)
    blocks = tables[sequence, positions // block_size].long()
    assert torch.equal(slots, blocks * block_size + positions % block_size)

    qkv = torch.randn(batch * new, (heads + 2 * kv_heads) * dim, device="cuda").to(dtype)
    head_weight = torch.randn(heads + kv_heads, dim, device="cuda").to(dtype)
    angle = torch.outer(torch.arange(width * block_size), 1e4 ** -(torch.arange(0, dim, 2) / dim)).cuda()
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([-angle.sin(), angle.sin()], -1)
    rotated = qkv.view(batch * new, -1, dim)[:, : heads + kv_heads].double()
    rotated = rotated * torch.rsqrt(rotated.square().mean(-1, keepdim=True) + 1e-6) * head_weight.double()
    rotated = rope.rotate(rotated, cos[positions][:, None].double(), sin[positions][:, None].double())
    kernels.rotate_and_store(qkv, cos, sin, positions, slots, cache, heads, kv_heads, head_weight, 1e-6)
    close(qkv.view(batch * new, -1, dim)[:, : heads + kv_heads], rotated, bound)
    assert torch.equal(cache[slots], qkv[:, heads * dim :])

    got = kernels.paged_attention(qkv, cache, tables, starts, new, heads, kv_heads, block_size)
    for row in range(batch * new):
        seen = torch.arange(int(positions[row]) + 1, device="cuda")
        at = tables[sequence[row], seen // block_size].long() * block_size + seen % block_size
        k, v = cache[at].double().view(-1, 2, kv_heads, dim).repeat_interleave(heads // kv_heads, 2).unbind(1)
        q = qkv[row, : heads * dim].double().view(heads, dim)
        weights = (torch.einsum("hd,nhd->hn", q, k) / dim**0.5).softmax(-1)
        close(got[row], torch.einsum("hn,nhd->hd", weights, v).flatten(), bound)
    scale = torch.tensor([0.01], device="cuda")
    eight = kernels.paged_attention(qkv, cache, tables, starts, new, heads, kv_heads, block_size, scale)
    assert (eight.float() != to_e4m3(got, scale).float()).float().mean() < 2e-3


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (40, 8, 128), (4, 4, 80)])
@pytest.mark.parametrize(("batch", "nodes"), [(1, 1), (3, 13), (2, 29), (1, 70)])
def test_tree_attention(kind, heads: int, kv_heads: int, dim: int, batch: int, nodes: int) -> None:
    dtype, bound = kind
    block_size, width = 16, 40
    torch.manual_seed(nodes)
    cache = torch.randn(batch * width * block_size + block_size, 2 * kv_heads * dim, device="cuda").to(dtype)
    tables = (torch.randperm(batch * width, device="cuda") + 1).view(batch, width).int()
    starts = torch.randint(1, width * block_size, (batch,), device="cuda")
    starts[0] = 0
    sees = torch.rand(batch, nodes, nodes, device="cuda") < 0.3
    sees |= torch.eye(nodes, dtype=torch.bool, device="cuda")
    qkv = torch.randn(batch * nodes, (heads + 2 * kv_heads) * dim, device="cuda").to(dtype)
    kept = torch.randn(batch * nodes, 2 * kv_heads * dim, device="cuda").to(dtype)
    shape = (tables, starts, nodes, heads, kv_heads, block_size)
    got = kernels.paged_attention(qkv, cache, *shape, tree=(kept, sees))
    for row in range(batch * nodes):
        b, node = divmod(row, nodes)
        before = torch.arange(int(starts[b]), device="cuda")
        slots = tables[b, before // block_size].long() * block_size + before % block_size
        seen = torch.cat([cache[slots], kept[b * nodes : (b + 1) * nodes][sees[b, node]]]).double()
        k, v = seen.view(-1, 2, kv_heads, dim).repeat_interleave(heads // kv_heads, 2).unbind(1)
        q = qkv[row, : heads * dim].double().view(heads, dim)
        weights = (torch.einsum("hd,nhd->hn", q, k) / dim**0.5).softmax(-1)
        close(got[row], torch.einsum("hn,nhd->hd", weights, v).flatten(), bound)
    scale = torch.tensor([0.01], device="cuda")
    eight = kernels.paged_attention(qkv, cache, *shape, scale, tree=(kept, sees))
    assert (eight.float() != to_e4m3(got, scale).float()).float().mean() < 2e-3
