"""Activation ranges against transformers run row by row, and what calibration refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from omr.errors import Failure, InputError, ResourceError
from omr.quant import _ranges
from omr.quant._ranges import Ranges, collect
from omr.text import encode_text, load_tokenizer, read_text

Make = Callable[..., Path]


def ranges(src: Path, text: Path, rows: int = 24, max_tokens: int = 64, percentile: float | None = None) -> Ranges:
    return collect(
        src, text, rows=rows, max_tokens=max_tokens, percentile=percentile, device="cpu", num_bytes=1_000_000
    )


def inputs_by_row(src: Path, text: Path, max_tokens: int) -> dict[str, torch.Tensor]:
    """The oracle: |input| of every linear layer of transformers' model, one document at a time, no padding."""
    model = AutoModelForCausalLM.from_pretrained(src, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(src)
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            keep = seen.setdefault(name, [])
            module.register_forward_pre_hook(lambda _, args, keep=keep: keep.append(args[0].abs().flatten()))
    with torch.no_grad():
        for row in read_text(text):
            model(torch.tensor([encode_text(row, tokenizer)[0][:max_tokens]]))
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_ranges_are_those_of_a_plain_loop(family: str, make_model: Make, calibration: Path) -> None:
    src = make_model(family)
    want = inputs_by_row(src, calibration, 64)
    found = ranges(src, calibration)
    assert set(found.amax) == set(want)
    for name, values in want.items():
        assert found.amax[name] == found.largest[name] == pytest.approx(float(values.max()), rel=1e-4)
    assert found.rows == 24


def test_a_percentile_is_that_of_all_values(make_model: Make, calibration: Path) -> None:
    src = make_model()
    want = inputs_by_row(src, calibration, 64)
    for percentile in (90.0, 99.0, 100.0):
        found = ranges(src, calibration, percentile=percentile)
        for name, values in want.items():
            exact = float(torch.quantile(values[:: max(1, len(values) // 2_000_000)], percentile / 100))
            assert exact * 0.995 <= found.amax[name] <= exact * 1.03
            assert found.amax[name] <= found.largest[name]


def test_batching_changes_nothing(make_model: Make, calibration: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = make_model()
    batched = ranges(src, calibration, percentile=99.0)
    monkeypatch.setattr(_ranges, "BATCH_TOKENS", 1)
    single = ranges(src, calibration, percentile=99.0)
    assert batched.tokens == single.tokens
    assert batched.amax == pytest.approx(single.amax, rel=1e-5)


def test_rows_are_cut(make_model: Make, calibration: Path) -> None:
    assert ranges(make_model(), calibration, rows=5, max_tokens=7).tokens == 35


def test_too_few_rows_are_refused(make_model: Make, calibration: Path) -> None:
    with pytest.raises(InputError, match=r"has 24 of the 25 rows that quant\.calib_samples wants"):
        ranges(make_model(), calibration, rows=25)


def test_ranges_that_are_not_finite_are_refused(make_model: Make, calibration: Path) -> None:
    src = make_model()
    tensors = load_file(src / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].fill_(3e38)
    save_file(tensors, src / "model.safetensors")
    with pytest.raises(Failure, match=r"the input of model\.layers\.0\.mlp\.down_proj is not finite"):
        ranges(src, calibration)


def test_a_foreign_tokenizer_is_refused(make_model: Make, calibration: Path) -> None:
    with pytest.raises(InputError, match="tokenizer and weights do not belong together"):
        ranges(make_model(vocab_size=100), calibration)


def test_no_room_is_refused_before_anything_is_loaded(make_model: Make, calibration: Path) -> None:
    with pytest.raises(ResourceError, match=r"calibration on cpu needs .* GB for the weights"):
        collect(make_model(), calibration, rows=2, max_tokens=8, percentile=None, device="cpu", num_bytes=1 << 50)
