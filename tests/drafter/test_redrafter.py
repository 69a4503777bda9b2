"""The option `redrafter`: its knobs, its training from text to artifact, and what `load` refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

from omr.artifact import content
from omr.drafter import _training
from omr.drafter._training import schedule
from omr.drafter.redrafter import Base, Head, Redrafter, Schedule, Train
from omr.errors import ChildError, ConfigError, InputError, OmrError, ResourceError, TrainingError
from omr.nn.loader import load
from omr.nn.redrafter import load_redrafter
from omr.option import fields_of, from_fields
from omr.quant import Quantiser
from omr.quant.fp8 import Fp8
from omr.quant.int8_wo import Int8Wo

DATA = Path(__file__).parents[1] / "data" / "redrafter"
SHORT = Train(rows=300, lr=3e-3, held_out=30, batch_rows=8)


def fit(option: Redrafter, base: Path, text: Path, out: Path) -> dict[str, float]:
    out.mkdir()
    return option.fit(base, text, out, "cpu")


@pytest.fixture(scope="module")
def trained(base: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    out = tmp_path_factory.mktemp("trained") / "head"
    return out, fit(Redrafter(train=replace(SHORT, epochs=6)), base, text, out)


def test_training_learns_and_reports(trained: tuple[Path, dict[str, float]], base: Path) -> None:
    out, metrics = trained
    curve = [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]
    assert curve[-1]["step"] == metrics["steps"] == 6 * 34 and curve[-1]["drafter/lr"] < 1e-5
    assert curve[-1]["drafter/loss"] < 0.85 * curve[0]["drafter/loss"]
    for i in range(3):
        tops = [metrics[f"redrafter{i}_top{k}"] for k in range(1, 6)]
        assert tops == sorted(tops) and metrics[f"redrafter{i}_prefix"] <= tops[0]
    assert metrics["redrafter0_top1"] > 0.1 and metrics["redrafter0_loss"] < 4.2  # log(128) = 4.85
    prefixes = [metrics[f"redrafter{i}_prefix"] for i in range(3)]
    assert metrics["predicted_len_mean_tok"] == pytest.approx(1 + sum(prefixes))
    replays = [metrics[f"redrafter{i}_replay"] for i in range(3)]
    assert metrics["replayed_len_mean_tok"] == pytest.approx(1 + sum(replays)) and replays == sorted(replays)[::-1]
    config = json.loads((out / "config.json").read_text())
    assert config["predict_n"] == 3 and config["exit_dim"] == 64 and config["rnn"] is True
    assert {p.name for p in out.iterdir()} == {"model.safetensors", "config.json", "curve.jsonl"}
    assert sum(p.numel() for p in load_redrafter(out).parameters()) == metrics["parameters"]


def test_same_recipe_same_bytes(base: Path, text: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        fit(Redrafter(train=SHORT), base, text, tmp_path / name)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert (tmp_path / "a" / "curve.jsonl").read_text() == (tmp_path / "b" / "curve.jsonl").read_text()


def test_accumulation_is_the_big_batch(base: Path, text: Path, tmp_path: Path) -> None:
    """Losses are normalised over the step, so how a step is cut into forwards only changes rounding."""
    whole = fit(Redrafter(train=SHORT), base, text, tmp_path / "whole")
    parts = fit(Redrafter(train=replace(SHORT, batch_rows=2, accumulation=4)), base, text, tmp_path / "parts")
    assert whole["steps"] == parts["steps"]
    assert parts["redrafter0_loss"] == pytest.approx(whole["redrafter0_loss"], rel=1e-4)


RUN = """
import sys
from pathlib import Path
from omr.drafter.redrafter import Redrafter, Train
how = Train(
    rows=300, lr=3e-3, held_out=30, batch_rows=8, epochs=12, checkpoint_min=0, eval_every=50, patience=99
)
Redrafter(train=how).fit(*map(Path, sys.argv[1:4]), "cpu")
"""


@pytest.mark.slow
def test_killed_training_resumes_to_the_same_bytes(
    base: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    how = replace(SHORT, epochs=12, checkpoint_min=0.0, eval_every=50, patience=99)
    fit(Redrafter(train=how), base, text, tmp_path / "straight")
    out = tmp_path / "killed"
    out.mkdir()
    state = tmp_path / ".killed.resume" / "training_state.safetensors"
    child = subprocess.Popen([sys.executable, "-c", RUN, base, text, out], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not state.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "the training ended before it could be killed"
    assert state.exists() and not list(out.iterdir())
    with pytest.raises(InputError, match=r"recipe.train.lr=0.003, now it is 0.002"):
        Redrafter(train=replace(how, lr=2e-3)).fit(base, text, out, "cpu")
    fit(Redrafter(train=replace(how, lr=2e-3, epochs=1)), base, text, tmp_path / "other")
    said = capfd.readouterr().err
    assert f"starts anew; {state} holds step" in said and "train.lr=0.003, now 0.002" in said
    Redrafter(train=how).fit(base, text, out, "cpu")
    assert "goes on from step" in capfd.readouterr().err
    for name in ("model.safetensors", "curve.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    state.write_bytes(state.read_bytes()[:500])
    with pytest.raises(InputError, match="delete it to start anew"):
        Redrafter(train=how).fit(base, text, out, "cpu")


def test_early_stop_keeps_the_best_head(base: Path, text: Path, tmp_path: Path) -> None:
    """So many epochs of so few rows that the head learns them by heart: what is kept is the best seen before."""
    how = replace(SHORT, rows=30, lr=1e-2, schedule=Schedule.constant, epochs=90, eval_every=10, patience=2)
    metrics = fit(Redrafter(train=how), base, text, tmp_path / "out")
    curve = [json.loads(line) for line in (tmp_path / "out" / "curve.jsonl").read_text().splitlines()]
    seen = [sum(row[f"drafter/held_out_redrafter{i}_loss"] for i in range(3)) for row in curve]
    assert metrics["steps"] < 90 * 4 and curve[-1]["step"] == metrics["steps"]
    assert sum(metrics[f"redrafter{i}_loss"] for i in range(3)) == pytest.approx(min(seen), rel=1e-6)
    assert min(seen[-2:]) > min(seen)


@pytest.mark.slow
def test_two_ranks_train_the_head_of_one(base: Path, text: Path, tmp_path: Path) -> None:
    how = {"rows": 300, "lr": 3e-3, "held_out": 30, "batch_rows": 4, "accumulation": 2}
    alone = fit(Redrafter(train=Train(**how)), base, text, tmp_path / "alone")  # type: ignore[arg-type]
    both = Redrafter(train=Train(**how, cache_states=True), num_processes=2)  # type: ignore[arg-type]
    together = fit(both, base, text, tmp_path / "both")
    assert together["redrafter0_loss"] == pytest.approx(alone["redrafter0_loss"], rel=1e-4)
    written = [(tmp_path / out / "curve.jsonl").read_text().splitlines() for out in ("alone", "both")]
    for one, two in zip(*(map(json.loads, lines) for lines in written), strict=True):
        assert two["drafter/loss"] == pytest.approx(one["drafter/loss"], rel=1e-5)
    ours, theirs = (load_file(tmp_path / out / "model.safetensors") for out in ("alone", "both"))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in ours)
    assert content(both) == content(replace(both, num_processes=1))


@pytest.mark.slow
def test_a_killed_rank_ends_all_and_is_named(base: Path, text: Path, tmp_path: Path) -> None:
    option = Redrafter(train=replace(SHORT, epochs=500, accumulation=2), num_processes=2)
    logs = tmp_path / ".out.resume"
    victim: list[psutil.Process] = []

    def kill_one() -> None:
        for _ in range(600):
            time.sleep(0.1)
            ranks = psutil.Process().children(recursive=True)
            victim[:] = [rank for rank in ranks if str(logs / "rank1.json") in rank.cmdline()]
            if victim and (logs / "rank0.log").exists() and b"train drafter" in (logs / "rank0.log").read_bytes():
                victim[0].kill()
                return

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(ChildError, match=r"rank 1 of 2, was killed by signal 9 \(out of memory\?\) .*rank1\.log"):
        fit(option, base, text, tmp_path / "out")
    killer.join()
    assert victim and not any("omr.worker" in child.cmdline() for child in psutil.Process().children(recursive=True))


def test_loss_that_is_not_finite_stops_with_its_batch_saved(base: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"drafter loss is \w+ at step \d+ of 34; its batch is in .*lr=1e\+30"
    ) as caught:
        fit(Redrafter(train=replace(SHORT, lr=1e30)), base, text, tmp_path / "out")
    saved = load_file(tmp_path / ".out.resume" / "failed_batch.safetensors")
    assert saved["0.ids"].shape == saved["0.is_target"].shape and "7.ids" in saved
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("eval_every", [0, 1])
def test_a_last_step_that_ruins_the_head_is_no_success(eval_every: int, base: Path, text: Path, tmp_path: Path) -> None:
    how = replace(SHORT, batch_rows=300, warmup=0.0, lr=1e30, eval_every=eval_every)  # one step, of a sound loss
    with pytest.raises(TrainingError, match=r"drafter loss is \w+ at step 1 of 1; its batch is in "):
        fit(Redrafter(train=how), base, text, tmp_path / "out")
    assert "269.ids" in load_file(tmp_path / ".out.resume" / "failed_batch.safetensors")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_out_of_memory_says_what_to_lower_and_loses_nothing(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how, real, calls = replace(SHORT, checkpoint_min=0.0), _training.draft_loss, 0
    fit(Redrafter(train=how), base, text, tmp_path / "straight")

    def full(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 31:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(_training, "draft_loss", full)
    with pytest.raises(
        ResourceError, match=r"out of GPU memory.*lower drafter\.train\.forward_tok=8192.*batch_rows=8"
    ) as e:
        fit(Redrafter(train=how), base, text, tmp_path / "out")
    assert "\n" not in str(e.value)
    assert (tmp_path / ".out.resume" / "training_state.safetensors").exists()
    Redrafter(train=how).fit(base, text, tmp_path / "out", "cpu")
    assert calls < 30 + 34 + 40, "it went on from step 20"
    for name in ("model.safetensors", "curve.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


EXTERNAL = """
import sys
from pathlib import Path
from omr.drafter.redrafter import Redrafter, Train
how = Train(rows=300, lr=3e-3, held_out=30, batch_rows=4, accumulation=2)
loss = Redrafter(train=how).fit(*map(Path, sys.argv[1:4]), "cpu")["redrafter0_loss"]
sys.stdout.write(f"{loss}\\n")  # in one piece: both ranks write to one pipe
"""


@pytest.mark.slow
def test_under_torchrun_it_is_one_of_the_ranks(base: Path, text: Path, tmp_path: Path) -> None:
    """For clusters that start the processes themselves."""
    alone = fit(Redrafter(train=replace(SHORT, batch_rows=4, accumulation=2)), base, text, tmp_path / "alone")
    script, out = tmp_path / "script.py", tmp_path / "both"
    script.write_text(EXTERNAL)
    out.mkdir()
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*argv, script, base, text, out], capture_output=True, text=True, env=environment, check=True)
    losses = [float(line) for line in done.stdout.splitlines()]
    assert len(losses) == 2 and losses == pytest.approx([alone["redrafter0_loss"]] * 2, rel=1e-4)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "both"))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in ours)


def test_long_documents_are_trained_to_their_end(base: Path, tmp_path: Path) -> None:
    """Beyond 2048 tokens, and beyond what one forward of the base is meant to hold."""
    wide = shutil.copytree(base, tmp_path / "wide")
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    words = " ".join(f"w{i % 100 + 3}" for i in range(3000))
    rows = write(tmp_path / "long.parquet", [{"text": words, "spans": [[0, len(words)]]}] * 4)
    how = Train(rows=4, max_length=4096, forward_tok=512, held_out=1, lr=3e-3)
    metrics = fit(Redrafter(train=how), wide, rows, tmp_path / "long")
    assert metrics["train_targets"] == 3 * (2998 + 2997 + 2996)
    cut = fit(Redrafter(train=replace(how, max_length=2048)), wide, rows, tmp_path / "cut")
    assert cut["train_targets"] == 3 * (2046 + 2045 + 2044)
    with pytest.raises(
        InputError, match=r"a document of 3000 tokens, the base takes \d+; lower drafter.train.max_length"
    ):
        fit(Redrafter(train=how), base, rows, tmp_path / "refused")


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_text_without_anything_to_train_on(base: Path, tmp_path: Path) -> None:
    option = Redrafter(train=SHORT)
    nothing = write(tmp_path / "none.parquet", [{"text": "w3 w4 w5 w6", "spans": [[6, 8]]}] * 5)
    with pytest.raises(InputError, match="none of 5 rows has a token to train on within 2048 tokens"):
        fit(option, base, nothing, tmp_path / "a")
    one = write(tmp_path / "one.parquet", [{"text": "w3 w4 w5 w6", "spans": [[0, 11]]}])
    with pytest.raises(InputError, match="one usable row"):
        fit(option, base, one, tmp_path / "b")
    with pytest.raises(InputError, match="does not exist"):
        fit(option, base, tmp_path / "nowhere.parquet", tmp_path / "c")


def test_tokenizer_of_another_vocabulary(base: Path, text: Path, tmp_path: Path) -> None:
    other = shutil.copytree(base, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {word: i + 100 for word, i in tokenizer["model"]["vocab"].items()}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="the base has 128"):
        fit(Redrafter(train=SHORT), other, text, tmp_path / "out")


@pytest.mark.parametrize(
    "change",
    [
        {"head": Head.low_rank, "head_rank": 16},
        {"head": Head.base, "draft_vocab_size": 50},
        {"exit_dim": 32, "rnn": False, "num_draft_layers": 0},
        {"draft_vocab_size": 1000},
    ],
)
def test_every_head_trains_and_loads(change: dict[str, object], base: Path, text: Path, tmp_path: Path) -> None:
    option = Redrafter(**change, stop_below=0.0, train=replace(SHORT, distil=0.5))  # type: ignore[arg-type]
    metrics = fit(option, base, text, tmp_path / "out")
    config = load_redrafter(tmp_path / "out").config
    assert config.head == option.head.value and config.exit_dim == (option.exit_dim or 64)
    assert config.draft_vocab_size == (50 if option.draft_vocab_size == 50 else 0)
    assert (metrics["draft_vocab_coverage"] < 1) == bool(config.draft_vocab_size)
    model = load(base, device="cpu")
    drafts = option.load(tmp_path / "out", model).propose(torch.randn(5, 32), torch.arange(5), None)
    assert drafts.shape == (5, 3)


def test_a_low_rank_head_that_is_larger_than_a_full_one(base: Path, text: Path, tmp_path: Path) -> None:
    option = Redrafter(head=Head.low_rank, head_rank=43, train=SHORT)  # 64 x 128 is 42.7 x (64 + 128)
    with pytest.raises(ConfigError, match=r"head_rank=43 .* full one of 64 x 128; set it below 43"):
        fit(option, base, text, tmp_path / "out")


def test_load_refuses_what_does_not_belong(trained: tuple[Path, dict[str, float]], base: Path, tmp_path: Path) -> None:
    out, _ = trained
    model = load(base, device="cpu")
    assert Redrafter(draft_tok=2).load(out, model).num_draft_tok == 2
    assert Redrafter().load(DATA / "drafter_proj", model).num_draft_tok == 3  # a checkpoint that does not say
    with pytest.raises(InputError, match=r"drafter=redrafter needs a trained head"):
        Redrafter().load(None, model)
    with pytest.raises(InputError, match="trained to draft 3 tokens, 4 were asked for"):
        Redrafter(predict_n=4).load(out, model)
    with pytest.raises(InputError, match="for another base model"):
        other = load(base, device="cpu")
        other.embed.weight += 0.1
        Redrafter().load(out, other)
    config = json.loads((out / "config.json").read_text())
    wrong = shutil.copytree(out, tmp_path / "wrong")
    (wrong / "config.json").write_text(json.dumps(config | {"base": ""}))
    model.config.hidden_size = 48
    with pytest.raises(InputError, match="hidden size 32 and 128 tokens, the base has 48 and 128"):
        Redrafter().load(wrong, model)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"predict_n": 0}, "predict_n"),
        ({"num_draft_layers": -1}, "num_draft_layers"),
        ({"exit_dim": 0}, "exit_dim"),
        ({"head_rank": 3}, "head_rank"),
        ({"head": Head.low_rank}, "head_rank"),
        ({"draft_tok": 4}, "draft_tok"),
        ({"draft_vocab_size": -1}, "draft_vocab_size"),
        ({"draft_vocab_size": 3, "num_beams": 4}, "num_beams"),
        ({"num_processes": 0}, "num_processes"),
        ({"num_processes": 2}, "accumulation"),
    ],
)
def test_knobs_out_of_range(change: dict[str, object], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"drafter\.(train\.)?{name}"):
        Redrafter(**change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"patience": 1},
        {"eval_every": -1},
        {"lr": 0.0},
        {"epochs": 0},
        {"warmup": 1.5},
        {"distil": -0.1},
        {"max_length": 2},
        {"rows": 0},
        {"held_out": -1},
    ],
)
def test_training_knobs_out_of_range(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"drafter.train.{next(iter(change))}"):
        Train(**change)  # type: ignore[arg-type]


def test_option_crosses_a_process_border_and_keys_on_its_recipe() -> None:
    option = Redrafter(head=Head.low_rank, head_rank=8, train=Train(lr=0.5))
    assert from_fields(Redrafter, fields_of(option)) == option
    same = replace(option, draft_tok=1, train=replace(option.train, checkpoint_min=1.0))
    assert content(same) == content(option) != content(replace(option, predict_n=2))


def test_trains_on_the_weights_unless_told_otherwise() -> None:
    assert not Redrafter().fits_checkpoint()
    assert Redrafter(train=Train(base=Base.checkpoint)).fits_checkpoint()


@pytest.mark.parametrize("quant", [Fp8(calib_samples=20), Int8Wo()], ids=["fp8", "int8"])
def test_trains_on_the_hidden_states_of_a_quantised_checkpoint(
    quant: Quantiser, trained: tuple[Path, dict[str, float]], base: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "served").mkdir()
    quant.quantise(base, tmp_path / "served", text if quant.calib_samples else None, "cpu")
    option = Redrafter(train=replace(SHORT, epochs=6))
    metrics = fit(option, tmp_path / "served", text, tmp_path / "head")
    assert metrics["redrafter0_loss"] == pytest.approx(trained[1]["redrafter0_loss"], rel=0.03)
    assert metrics["redrafter0_loss"] != trained[1]["redrafter0_loss"], "the states are the quantised model's"
    served = load(tmp_path / "served", device="cpu")
    assert option.load(tmp_path / "head", served).num_draft_tok == 3


def test_schedules() -> None:
    assert [schedule("cosine", s, 11, 0.1) for s in range(3)] == [0.0, 0.5, 1.0]
    assert schedule("cosine", 6, 10, 0.2) == pytest.approx(0.5)
    assert schedule("linear", 6, 10, 0.2) == pytest.approx(0.5)
    assert [schedule("constant", s, 4, 0.0) for s in range(4)] == [1.0] * 4
    assert 0 < schedule("cosine", 99, 100, 0.1) < 1e-3


def test_a_bad_knob_is_one_line() -> None:
    with pytest.raises(OmrError) as caught:
        Redrafter(predict_n=0)
    assert "\n" not in str(caught.value) and os.linesep not in str(caught.value)
