"""Quantised linear layers against their dequantised weight, and the E4M3 rounding against torch's cast."""

from __future__ import annotations

import pytest
import torch

from omr.nn.linear import Fp8Linear, GroupLinear, Int8Linear, Parallel, fuse, round_e4m3


def test_round_e4m3_is_the_cast() -> None:
    """Every E4M3 value, every midpoint and its float32 neighbours, and random values of every exponent."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = codes[codes.isfinite()].sort().values
    midpoints = (values[1:] + values[:-1]) / 2
    noise = torch.randn(20000, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(-16, 9).repeat(800)
    x = torch.cat(
        [values, midpoints, midpoints.nextafter(values[1:]), midpoints.nextafter(values[:-1]), noise, values * 3]
    )
    assert torch.equal(round_e4m3(x), x.clamp(-448, 448).to(torch.float8_e4m3fn).float())


def _fp8(rows: int, columns: int, *, input_scale: float | None, per_row: bool = False, seed: int = 0) -> Fp8Linear:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(rows, 1, generator=generator) + 0.5 if per_row else torch.tensor([0.25])
    bias = torch.randn(rows, generator=generator)
    return Fp8Linear(weight, scale, None if input_scale is None else torch.tensor([input_scale]), bias, torch.float32)


@pytest.mark.parametrize("per_row", [False, True])
def test_fp8_rounds_weights_and_activations(per_row: bool) -> None:
    layer = _fp8(24, 20, input_scale=0.01, per_row=per_row)
    x = torch.randn(3, 5, 20)
    rounded = (x / 0.01).clamp(-448, 448).to(torch.float8_e4m3fn).float() * 0.01
    expected = rounded @ layer.dense(torch.float32).t() + layer.bias
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(layer(x), x @ layer.dense(torch.float32).t() + layer.bias, atol=1e-3)


@pytest.mark.parametrize("columns", [20, 48])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 32, 33])
def test_int8_equals_its_dequantised_weight(rows: int, dtype: torch.dtype, columns: int) -> None:
    weight = torch.randint(-127, 128, (48, columns), dtype=torch.int8)
    scale = (torch.rand(48, 1) * 0.1 + 0.01).to(dtype)
    layer = Int8Linear(weight, scale, torch.randn(48), dtype)
    x = torch.randn(rows, columns, dtype=dtype)
    expected = x.double() @ (weight.double() * scale.double()).t() + layer.bias.double()
    error = (layer(x).double() - expected).norm() / expected.norm()
    assert error < (1e-6 if dtype == torch.float32 else 6e-3)


def test_group_scales_multiply_their_columns() -> None:
    weight = torch.randint(-8, 8, (6, 20), dtype=torch.int8)
    scale = torch.rand(6, 5)
    layer = GroupLinear(weight, scale, None, torch.float32)
    dense = torch.tensor([[weight[i, j] * scale[i, j // 4] for j in range(20)] for i in range(6)])
    torch.testing.assert_close(layer.weight, dense)


def _layers(kind: str, count: int) -> list[torch.nn.Module]:
    torch.manual_seed(0)
    if kind == "plain":
        return [torch.nn.Linear(20, 8 + 4 * i) for i in range(count)]
    if kind == "fp8":
        return [_fp8(8 + 4 * i, 20, input_scale=0.02, seed=i) for i in range(count)]
    if kind == "fp8-channel":
        return [_fp8(8 + 4 * i, 20, input_scale=0.02, per_row=True, seed=i) for i in range(count)]
    if kind == "fp8-other-scales":
        return [_fp8(8, 20, input_scale=0.02 * (i + 1), seed=i) for i in range(count)]
    values = [torch.randint(-8, 8, (8 + 4 * i, 20), dtype=torch.int8) for i in range(count)]
    if kind == "int8":
        return [Int8Linear(v, torch.rand(len(v), 1), torch.randn(len(v)), torch.float32) for v in values]
    return [GroupLinear(v, torch.rand(len(v), 5), None, torch.float32) for v in values]


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kind", ["plain", "fp8", "fp8-channel", "fp8-other-scales", "int8", "group"])
def test_fused_product_is_the_parts_side_by_side(kind: str, count: int) -> None:
    parts = _layers(kind, count)
    x = torch.randn(4, 20)
    expected = torch.cat([part(x) for part in parts], -1)
    fused = fuse(parts)
    assert isinstance(fused, Parallel) == (kind == "fp8-other-scales")
    torch.testing.assert_close(fused(x), expected)
    torch.testing.assert_close(torch.cat([part(x) for part in parts], -1), expected)
    if kind != "fp8-other-scales":
        start = fused.weight.untyped_storage().data_ptr()
        assert all(part.weight.untyped_storage().data_ptr() == start for part in parts), "weights are held twice"


def test_layers_of_different_kinds_are_not_fused() -> None:
    parts = [torch.nn.Linear(20, 8), *_layers("int8", 2)]
    x = torch.randn(2, 20)
    assert isinstance(fuse(parts), Parallel)
    torch.testing.assert_close(fuse(parts)(x), torch.cat([part(x) for part in parts], -1))
