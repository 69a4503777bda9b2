"""Codes and scales: error bounds, and the packing of the compressed-tensors library itself."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from omr.nn.quant_format import unpack
from omr.quant import _scales as scales

shapes = st.tuples(st.integers(1, 5), st.integers(1, 40))


def weights(rows: int, columns: int, seed: int, size: float) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size


@settings(max_examples=80, deadline=None)
@given(
    shape=shapes, seed=st.integers(0, 99), size=st.sampled_from([1e-6, 0.02, 1.0, 300.0]), bits=st.sampled_from([4, 8])
)
def test_integers_are_within_half_a_step(shape: tuple[int, int], seed: int, size: float, bits: int) -> None:
    groups = weights(*shape, seed, size)[:, None, :]
    scale = scales.int_scale(groups.abs().amax(-1), bits)
    codes = scales.int_codes(groups, scale, bits)
    limit = 2 ** (bits - 1)
    assert codes.dtype == torch.int8 and -limit <= int(codes.min()) and int(codes.max()) < limit
    wide = scale.float()[..., None]
    # half a step, and what bfloat16 took off the scale, which only the largest codes feel
    assert ((codes.float() * wide - groups).abs() <= wide * (0.5 + limit / 2**8)).all()
    inside = groups.abs() <= wide * (limit - 1)
    assert ((codes.float() * wide - groups).abs()[inside] <= wide.expand_as(groups)[inside] * 0.5001).all()


@settings(max_examples=80, deadline=None)
@given(shape=shapes, seed=st.integers(0, 99), size=st.sampled_from([1e-4, 0.02, 1.0, 300.0]))
def test_e4m3_is_within_a_sixteenth(shape: tuple[int, int], seed: int, size: float) -> None:
    weight = weights(*shape, seed, size)
    scale = scales.e4m3_scale(weight.abs().amax().reshape(1))
    stored = scales.e4m3_codes(weight, scale).float() * scale
    normal = weight.abs() >= scale * 2.0**-6
    assert ((stored - weight).abs()[normal] <= weight.abs()[normal] / 16 * 1.0001).all()
    assert ((stored - weight).abs()[~normal] <= scale * 2.0**-10 * 1.0001).all()
    assert stored.abs().max() <= weight.abs().max() * 1.0001  # the largest value maps to the largest code
    assert torch.equal(scales.e4m3_codes(stored, scale).float() * scale, stored)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 99), bits=st.sampled_from([4, 8]))
def test_packing_is_that_of_compressed_tensors_and_of_the_loader(shape: tuple[int, int], seed: int, bits: int) -> None:
    limit = 2 ** (bits - 1)
    codes = torch.randint(-limit, limit, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = scales.pack(codes, bits)
    assert torch.equal(packed, pack_to_int32(codes, bits))
    assert torch.equal(unpack(packed, bits, shape[1]), codes)


def test_zeros_stay_zeros_and_scales_stay_positive() -> None:
    zero = torch.zeros(2, 8)
    for bits in (4, 8):
        tensors, error = scales.packed(zero, scales.int_scale(zero.abs().amax(-1, keepdim=True), bits), bits)
        assert error == 0 and (tensors["weight_scale"] > 0).all()
        assert not unpack(tensors["weight_packed"], bits, 8).any()
    assert scales.e4m3_scale(torch.zeros(1)) == 1


@pytest.mark.parametrize("bits", [4, 8])
def test_a_clipped_scale_never_has_the_larger_error(bits: int) -> None:
    weight = weights(16, 128, 5, 0.02)
    weight[0, 3] = 1.0  # an outlier: what clipping is for
    groups = scales.grouped(weight, 32)
    plain = scales.best_clip(groups, bits, ())
    assert torch.equal(plain, scales.int_scale(groups.abs().amax(-1), bits))
    tried = scales.best_clip(groups, bits, (0.9, 0.8, 0.7))
    before, after = (scales.packed(weight, scale, bits)[1] for scale in (plain, tried))
    assert after <= before
    if bits == 4:
        assert after < before * 0.98


def test_relative_error_against_its_definition() -> None:
    weight, stored = weights(4, 9, 1, 1.0), weights(4, 9, 2, 1.0)
    want = float(((stored - weight) ** 2).sum() ** 0.5 / (weight**2).sum() ** 0.5)
    assert scales.relative_error(weight, stored) == pytest.approx(want, rel=1e-6)
