"""The fast argmax is torch's, ties and what is not a number included."""

from __future__ import annotations

import pytest
import torch

from omr.nn.argmax import MANY, argmax


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 70), (16, 8192)])
def test_the_first_of_the_largest(rows: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.randint(-3, 4, (rows, width)).to(dtype)  # full of ties
    values[0, -1] = float("-inf")
    got = argmax(values)
    assert got.dtype == torch.int64 and got.shape == (rows,)
    for row, index in zip(values.tolist(), got.tolist(), strict=True):
        assert index == row.index(max(row))
    assert torch.equal(got, values.argmax(-1))


def test_a_view_and_a_row_without_numbers() -> None:
    values = torch.randn(80, 400)[::2, 3:300]
    assert torch.equal(argmax(values), values.argmax(-1))
    assert argmax(torch.full((2, MANY), float("nan"))).tolist() == [0, 0]
