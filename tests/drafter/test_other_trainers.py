"""The reference training programs: their argv, what is refused, and the import of their checkpoint."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from omr.drafter._other_trainers import argv, output_folder
from omr.drafter.redrafter import Head, Precision, Redrafter, Start, Train, Trainer
from omr.errors import ChildError, ConfigError, InputError, MissingBackend, TrainingError
from omr.nn.loader import load

DATA = Path(__file__).parents[1] / "data" / "redrafter"
THEIRS = Train(rows=300, held_out=30, start=Start.random, precision=Precision.bfloat16, trainer=Trainer.nemo_skills)
AIMO2 = replace(THEIRS, rows=100000, batch_rows=1, accumulation=8, python="/env/bin/python")

FAKE = """#!{python}
import json, pathlib, shutil, sys
args = dict(zip(sys.argv[6::2], sys.argv[7::2]))
pathlib.Path({seen!r}).write_text(json.dumps(sys.argv[1:]))
rows = [json.loads(line) for line in open(args["--dataset"] + "/train.jsonl")] if "--dataset" in args else []
if {fails}:
    sys.exit("CUDA error: device-side assert")
name = "{{}}_redrafter_{{}}_n_{{}}_lr_{{}}_layers_{{}}".format(
    args["--output_dir"], args["--llm_name_or_path"].split("/")[-1], args["--drafter_predict_n_tokens"],
    float(args["--learning_rate"]), args["--drafter_num_layers"])
shutil.copytree({head!r}, name)
pathlib.Path({seen!r}).with_suffix(".rows").write_text(json.dumps(rows))
"""


def fake(tmp_path: Path, head: Path, *, fails: bool = False) -> Path:
    """An interpreter that writes down its arguments and `head` where the reference program would."""
    path = tmp_path / "python"
    path.write_text(FAKE.format(python=sys.executable, seen=str(tmp_path / "seen"), head=str(head), fails=fails))
    path.chmod(0o755)
    return path


def test_the_pipeline_s_command_line(tmp_path: Path) -> None:
    option = Redrafter(train=AIMO2, num_processes=2)
    words = argv(option, Path("/m/OpenMath-Nemotron-1.5B"), Path("/d"), Path("/o/head"))
    assert words[:6] == [
        "/env/bin/python", "-m", "torch.distributed.run", "--nproc_per_node=2", "-m",
        "nemo_skills.training.train_redrafter",
    ]  # fmt: skip
    flags = dict(zip(words[6::2], words[7::2], strict=True))
    known = {
        "--llm_name_or_path": "/m/OpenMath-Nemotron-1.5B", "--bf16": "True", "--num_train_epochs": "1",
        "--per_device_train_batch_size": "1", "--gradient_accumulation_steps": "4", "--save_strategy": "no",
        "--learning_rate": "0.001", "--weight_decay": "0.0", "--warmup_ratio": "0.1", "--lr_scheduler_type": "cosine",
        "--logging_steps": "20", "--tf32": "True", "--model_max_length": "2048", "--dataset_nrows": "100000",
        "--drafter_predict_n_tokens": "3", "--drafter_num_layers": "2", "--rnn": "True", "--phase": "train",
    }  # fmt: skip
    assert {k: flags[k] for k in known} == known
    apple = argv(replace(option, train=replace(AIMO2, trainer=Trainer.apple)), Path("/m"), Path("/d"), Path("/o"))
    assert apple[5] == "recurrent_drafting.cmd.train" and "--dataset" not in apple
    assert output_folder(option, Path("/m/X"), Path("/o/head")).name == "head_redrafter_X_n_3_lr_0.001_layers_2"


def test_checkpoint_is_imported_and_measured(base: Path, text: Path, tmp_path: Path) -> None:
    how = replace(THEIRS, python=str(fake(tmp_path, DATA / "drafter_rnn2")))
    option, out = Redrafter(train=how), tmp_path / "out"
    out.mkdir()
    metrics = option.fit(base, text, out, "cpu")
    assert metrics["redrafter0_top1"] > 0.2 and metrics["parameters"] == 18592
    config = json.loads((out / "config.json").read_text())
    assert config["predict_n"] == 3 and config["base"]
    assert option.load(out, load(base, device="cpu")).num_draft_tok == 3
    rows = json.loads((tmp_path / "seen.rows").read_text())
    assert len(rows) == 300 and rows[0]["problem"] == "0"
    assert len(rows[0]["generated_solution"].split()) == 16  # the prompt of 4 is not in it


def test_what_goes_wrong_there(base: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    how = replace(THEIRS, trainer=Trainer.apple, python=str(fake(tmp_path, DATA / "drafter_rnn2", fails=True)))
    with pytest.raises(ChildError, match=r"exited with status 1(.|\n)*device-side assert"):
        Redrafter(train=how).fit(base, text, out, "cpu")
    how = replace(how, python=str(fake(tmp_path, DATA)))
    with pytest.raises(ChildError, match="ended without writing"):
        Redrafter(train=how).fit(base, text, out, "cpu")
    with pytest.raises(MissingBackend, match=r"omr\[nemo\]"):
        Redrafter(train=replace(how, trainer=Trainer.nemo_skills, python=None)).fit(base, text, out, "cpu")


def test_a_head_that_is_not_finite(base: Path, text: Path, tmp_path: Path) -> None:
    head, out = shutil.copytree(DATA / "drafter_rnn2", tmp_path / "head"), tmp_path / "out"
    out.mkdir()
    tensors = load_file(head / "model.safetensors")
    tensors["rnn_u.bias"][0] = torch.nan
    save_file(tensors, head / "model.safetensors")
    how = replace(THEIRS, python=str(fake(tmp_path, head)))
    with pytest.raises(TrainingError, match=r"has a loss of nan on held-out text; lower drafter\.train\.lr=0\.001"):
        Redrafter(train=how).fit(base, text, out, "cpu")
    assert not list(out.iterdir())


def test_head_for_another_base(base: Path, text: Path, tmp_path: Path) -> None:
    head, out = tmp_path / "head", tmp_path / "out"
    out.mkdir()
    from omr.nn.redrafter import Redrafter as Module
    from omr.nn.redrafter import RedrafterConfig

    head.mkdir()
    Module(RedrafterConfig(vocab_size=64, hidden_size=16, exit_dim=32, num_draft_layers=1)).save(head)
    how = replace(THEIRS, trainer=Trainer.apple, python=str(fake(tmp_path, head)))
    with pytest.raises(InputError, match="is for hidden size 16 and 64 tokens, the base has 32 and 128"):
        Redrafter(train=how).fit(base, text, out, "cpu")


@pytest.mark.parametrize(
    ("change", "how", "name"),
    [
        ({"head": Head.base}, {}, "drafter.head"),
        ({"exit_dim": 48}, {}, "drafter.exit_dim"),
        ({"draft_vocab_size": 9}, {}, "drafter.draft_vocab_size"),
        ({}, {"start": Start.base}, r"drafter\.train\.start=random only, got base"),
        ({}, {"precision": Precision.float32}, r"drafter\.train\.precision=bfloat16 only"),
        ({}, {"distil": 0.5}, "drafter.train.distil"),
        ({}, {"eval_every": 5}, "drafter.train.eval_every"),
        ({}, {"cache_states": True}, "drafter.train.cache_states"),
    ],
)
def test_recipes_they_cannot_train(change: dict[str, object], how: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        Redrafter(**change, train=replace(THEIRS, trainer=Trainer.apple, **how))  # type: ignore[arg-type]
