"""Every way to multiply gives the product, for every number of rows that changes the way."""

from __future__ import annotations

import pytest
import torch

from omr.nn import packed
from omr.nn.linear import lay_out
from omr.nn.packed import dense_add, dense_product, pack


@pytest.mark.parametrize("use", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(96, 40), (40, 96), (64, 64)])
def test_products_and_sums(shape: tuple[int, int], dtype: torch.dtype, use: bool) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype)
    bound = 1e-6 if dtype == torch.float32 else 5e-3
    for stored in (weight, lay_out(weight)):
        assert torch.equal(stored, weight)
        with torch.inference_mode():
            plain = dense_product(stored, None, packed=use)
            biased = dense_product(stored, bias, packed=use)
            add = dense_add(stored, packed=use)
            for rows in (1, 2, 3, 4, 64, 65):
                x, residual = torch.randn(rows, shape[1]).to(dtype), torch.randn(rows, shape[0]).to(dtype)
                before = residual.clone()
                expected = x.double() @ weight.double().t()
                for got, wanted in (
                    (plain(x), expected),
                    (biased(x), expected + bias.double()),
                    (add(residual, x), expected + residual.double()),
                ):
                    assert got.dtype == dtype and (got.double() - wanted).norm() / wanted.norm() < bound
                assert torch.equal(residual, before), "the residual was written to"


def test_without_the_operator_products_are_ordinary(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("not built in")

    weight, x = torch.randn(8, 6), torch.randn(5, 6)
    monkeypatch.setattr(packed.torch.ops.mkldnn, "_reorder_linear_weight", refuse)
    assert pack(weight) is None
    torch.testing.assert_close(dense_product(weight, None, packed=True)(x), x @ weight.t())
    assert pack(weight.double()) is None
