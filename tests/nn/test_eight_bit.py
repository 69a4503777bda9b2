"""8-bit products: close to the exact ones, row by row."""

from __future__ import annotations

import pytest
import torch

from omr.nn import eight_bit as eight_bit_module
from omr.nn.eight_bit import Int8Linear, eight_bit


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_int8_product_is_within_its_rounding(rows: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, 64), torch.randn(48, 64) * torch.rand(48, 1), torch.randn(48)
    x[0] *= 100
    layer = eight_bit(weight, bias)
    assert isinstance(layer, Int8Linear)
    exact = x @ weight.T + bias
    # Each factor is off by half a step of its row: 1/254 of the row's largest value.
    steps = x.abs().amax(1, keepdim=True) / 254, weight.abs().amax(1) / 254
    bound = steps[0] * weight.abs().sum(1) + steps[1] * x.abs().sum(1, keepdim=True) + 64 * steps[0] * steps[1]
    assert ((layer(x) - exact).abs() <= bound * 1.001 + 1e-5).all()
    assert torch.equal(layer(x)[:1], layer(x[:1])), "a row depends on the others"
    assert layer(x.view(rows, 1, 64)).shape == (rows, 1, 48)


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_both_ways_of_the_int8_product_are_equal(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN's over a re-ordered weight, where there is VNNI, and torch._int_mm: the same integers, to both ends."""
    torch.manual_seed(0)
    weight, bias = torch.randn(1024, eight_bit_module.LARGE // 1024), torch.randn(1024)
    x = torch.randn(rows, weight.shape[1])
    x[0], weight[0] = x[0].sign() * 3, weight[0].sign()
    fast = Int8Linear(weight, bias)(x)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    plain = Int8Linear(weight, bias)(x)
    assert torch.allclose(fast, plain, rtol=1e-6, atol=1e-5)
    assert ((fast - x @ weight.T - bias).norm() / fast.norm()).item() < 0.02


def test_zero_rows_stay_zero() -> None:
    assert not eight_bit(torch.zeros(4, 8), None)(torch.zeros(2, 8)).any()


@pytest.mark.gpu
def test_fp8_product_on_cuda() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 64, device="cuda"), torch.randn(48, 64, device="cuda")
    layer = eight_bit(weight.bfloat16(), None)
    exact = x @ weight.T
    assert ((layer(x.bfloat16()).float() - exact).norm() / exact.norm()).item() < 0.08
