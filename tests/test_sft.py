"""Fine-tuning: what counts in the loss, the order of documents, exact resume, and that it learns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from omr import sft
from omr.dataset import write_text
from omr.errors import ConfigError, InputError, TrainingError
from omr.sft import CURVE, STATE, Recipe, Schedule, Shape, rate, train, write_fresh
from omr.sft_data import Documents, encode, encode_rows, join, plan
from omr.text import TextRow, encode_text

SMALL = {"tokens_per_step": 600, "tokens_per_forward": 300, "max_length": 200, "lr": 3e-3, "warmup": 0.1}
ROWS = [
    (
        f"What is {a} + {b}?",
        f"We add.\n<tool_call>\nprint({a} + {b})\n</tool_call>\n```output\n{a + b}\n```\nSo \\boxed{{{a + b}}}.",
    )
    for a in range(6)
    for b in range(6)
]


@pytest.fixture
def base(make_model: Callable[..., Path]) -> Path:
    return make_model("qwen2", dtype=torch.float32)


@pytest.fixture
def text(base: Path, tmp_path: Path) -> Path:
    out = tmp_path / "text.parquet"
    write_text(ROWS, tokenizer_dir=base, prompt="generic/math", code_tags="openmath", out=out, min_rows=len(ROWS))
    return out


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / CURVE).read_text().splitlines()]


def documents(lengths: list[int]) -> Documents:
    starts = numpy.cumsum([0, *lengths])
    return Documents(numpy.arange(starts[-1], dtype=numpy.int32), numpy.ones(starts[-1], dtype=bool), starts)


def test_encoding_in_one_call_equals_row_by_row(base: Path, text: Path) -> None:
    from transformers import AutoTokenizer

    from omr.text import read_text

    tokenizer, rows = AutoTokenizer.from_pretrained(base), read_text(text)
    made = encode_rows(rows, tokenizer, 200)
    for number, row in enumerate(rows):
        ids, mask = encode_text(row, tokenizer)
        part = slice(made.starts[number], made.starts[number + 1])
        assert made.ids[part].tolist() == ids[:200] and made.is_target[part].tolist() == mask[:200]
    halves = join([encode_rows(rows[:7], tokenizer, 200), encode_rows(rows[7:], tokenizer, 200)])
    assert halves.digest() == made.digest()


def test_documents_without_a_target_are_left_out(base: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [TextRow(text="asked only"), TextRow(text="asked, answered", spans=[(6, 15)])]
    assert len(encode_rows(rows, tokenizer, 100).lengths) == 1
    assert len(encode_rows(rows, tokenizer, 2).lengths) == 0, "the answer lies beyond the cut"


def test_the_loss_counts_model_written_tokens_only(base: Path, text: Path, tmp_path: Path) -> None:
    """Against a plain loop over the documents, one by one and without padding."""
    from transformers import AutoModelForCausalLM

    made = encode(text, base, 200)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.inference_mode():
        total, count = 0.0, 0
        for number in range(len(made.lengths)):
            part = slice(made.starts[number], made.starts[number + 1])
            ids, mask = torch.from_numpy(made.ids[part].astype("int64")), made.is_target[part]
            logits = model(ids[None]).logits[0, :-1].log_softmax(-1)
            for at in range(len(ids) - 1):
                if mask[at + 1]:
                    total -= float(logits[at, ids[at + 1]])
                    count += 1
    assert 0 < count < len(made.ids) - len(made.lengths)
    recipe = Recipe(**{**SMALL, "tokens_per_step": 10**6, "lr": 1e-12})
    train(base=base, text=text, out=tmp_path / "out", recipe=recipe, device="cpu")
    assert losses(tmp_path / "out")[0] == pytest.approx(total / count, rel=1e-5)


def test_plan_takes_each_document_once_an_epoch_and_keeps_the_limit() -> None:
    lengths = numpy.random.default_rng(0).integers(5, 90, 500)
    steps = plan(lengths, 2.0, 400, seed=1)
    half = len(steps) // 2
    for epoch in (steps[:half], steps[half:]):
        assert sorted(int(i) for step in epoch for i in step) == list(range(500))
    assert all(len(step) * int(lengths[step].max()) <= 400 for step in steps)
    padded = sum(len(step) * int(lengths[step].max()) for step in steps)
    assert padded < 1.15 * 2 * lengths.sum(), "similar lengths go together"
    again = plan(lengths, 2.0, 400, seed=1)
    assert all(numpy.array_equal(a, b) for a, b in zip(steps, again, strict=True))
    assert len(plan(lengths, 1.5, 400, seed=1)) == pytest.approx(1.5 * half, abs=1)


def test_forwards_of_a_step_hold_all_its_documents() -> None:
    made = documents([5, 9, 3, 30, 2])
    chosen = numpy.array([3, 0, 4, 1])
    parts = list(made.batches(chosen, 30))
    assert len(parts) > 1
    assert sum(int(mask.sum()) for _, mask in parts) == 30 + 5 + 2 + 9
    assert {int(ids[row, 0]) for ids, _ in parts for row in range(len(ids))} == {17, 0, 47, 5}


@pytest.mark.parametrize("schedule", list(Schedule))
def test_rate_rises_then_follows_its_schedule(schedule: Schedule) -> None:
    recipe = Recipe(lr=1.0, warmup=0.1, schedule=schedule)
    rates = [rate(recipe, step, 100) for step in range(100)]
    assert rates[:10] == sorted(rates[:10]) and 0 < rates[0] < 0.2
    assert max(rates) == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == (1.0 if schedule is Schedule.constant else pytest.approx(0.0, abs=0.02))


def test_it_learns(base: Path, text: Path, tmp_path: Path) -> None:
    result = train(base=base, text=text, out=tmp_path / "out", recipe=Recipe(epochs=4, **SMALL), device="cpu")
    curve = losses(tmp_path / "out")
    assert curve[-1] < 0.7 * curve[0] and result["loss"] < curve[0]
    made = weights(tmp_path / "out")
    assert {w.dtype for w in made.values()} == {torch.bfloat16}
    assert (tmp_path / "out" / "tokenizer.json").is_file() and not (tmp_path / "out" / STATE).exists()


def test_a_killed_training_ends_in_the_same_weights(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(epochs=3, checkpoint_min=0.0, **SMALL)
    train(base=base, text=text, out=tmp_path / "whole", recipe=recipe, device="cpu")

    step = sft._Training._step
    done = 0

    def dies(self: Any, *args: Any) -> Any:
        nonlocal done
        done += 1
        if done > 23:
            raise KeyboardInterrupt
        return step(self, *args)

    kept = tmp_path / "kept"
    monkeypatch.setattr(sft._Training, "_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train(base=base, text=text, out=tmp_path / "first", recipe=recipe, device="cpu", keep=kept)
    assert (kept / STATE).is_file()
    done = 0
    train(base=base, text=text, out=tmp_path / "second", recipe=recipe, device="cpu", keep=kept)
    assert 0 < done < 20, "it did not begin again"
    assert losses(tmp_path / "second") == losses(tmp_path / "whole")
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "second")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not (kept / STATE).exists()


def test_a_state_of_another_recipe_or_a_torn_one_is_not_used(base: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / STATE).write_bytes(b"PK torn")
    train(base=base, text=text, out=out, recipe=Recipe(epochs=0.3, **SMALL), device="cpu")
    torch.save({"fingerprint": "another", "step": 3}, out / STATE)
    fresh = train(base=base, text=text, out=out, recipe=Recipe(epochs=0.3, **SMALL), device="cpu")
    assert len(losses(out)) == -(-int(fresh["steps"]) // sft.LOG_EVERY)


def test_a_loss_that_is_not_finite_stops_it(base: Path, text: Path, tmp_path: Path) -> None:
    recipe = Recipe(**{**SMALL, "epochs": 8, "lr": 1e30, "grad_clip": 0.0, "warmup": 0.0})
    with pytest.raises(TrainingError, match=r"the loss is \w+ at step \d+ of \d+; lower job.recipe.lr"):
        train(base=base, text=text, out=tmp_path / "out", recipe=recipe, device="cpu")
    only = Recipe(**{**SMALL, "tokens_per_step": 1 << 20, "epochs": 1, "lr": 1e30, "grad_clip": 0.0, "warmup": 0.0})
    with pytest.raises(TrainingError, match=r"the loss is \w+ at step 1 of 1"):  # the update that spoils it is the last
        train(base=base, text=text, out=tmp_path / "out", recipe=only, device="cpu")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_fresh_model_is_a_folder_like_any_other(tokenizer_dir: Path, text: Path, tmp_path: Path) -> None:
    shape = Shape(hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=48, context_tokens=256)
    for name in ("a", "b"):
        write_fresh(tmp_path / name, tokenizer_dir=tokenizer_dir, shape=shape, seed=5)
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)
    result = train(
        base=tmp_path / "a", text=text, out=tmp_path / "out", recipe=Recipe(epochs=0.2, **SMALL), device="cpu"
    )
    assert result["steps"] >= 1


def test_the_shell_entry_trains(base: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = encode(text, base, 200)
    made.save(tmp_path / "text.npz")
    settings = [f"--set={k}={v}" for k, v in {**SMALL, "epochs": 0.2, "schedule": "linear"}.items()]
    sft.main([f"--base={base}", f"--text={tmp_path / 'text.npz'}", f"--out={tmp_path / 'out'}", *settings])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["documents"] == len(ROWS)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda base, tmp: {"base": tmp}, InputError, "no Hugging Face folder|no tokenizer"),
        (lambda base, tmp: {"text": tmp / "none.parquet"}, InputError, "does not exist"),
        (lambda base, tmp: {"text": tmp / "none.npz"}, InputError, "is no encoded text"),
        (lambda base, tmp: {"recipe": Recipe(max_length=4096)}, ConfigError, "is over the model's 512 positions"),
    ],
)
def test_bad_input_is_refused(
    make: Any, error: type[Exception], says: str, base: Path, text: Path, tmp_path: Path
) -> None:
    kwargs = {"base": base, "text": text, "out": tmp_path / "out", "recipe": Recipe(**SMALL), "device": "cpu"}
    with pytest.raises(error, match=says):
        train(**{**kwargs, **make(base, tmp_path / "empty")})


def test_a_quantised_base_is_refused(base: Path, text: Path, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(InputError, match="is quantised; fine-tune the bf16 model"):
        train(base=base, text=text, out=tmp_path / "out", recipe=Recipe(**SMALL), device="cpu")


@pytest.mark.parametrize(
    "values", [{"lr": 0}, {"epochs": -1}, {"warmup": 1.0}, {"tokens_per_step": 0}, {"grad_clip": -1}, {"beta2": 1.0}]
)
def test_values_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"job.recipe"):
        Recipe(**values)


def test_a_shape_that_cannot_be_built_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_heads must divide"):
        Shape(hidden_size=100, num_heads=8)
