"""ReDrafter heads trained by the reference programs: their command lines, and the import of what they write.

    nemo_skills   torchrun -m nemo_skills.training.train_redrafter     reads our text as a Hugging Face dataset
    apple         torchrun -m recurrent_drafting.cmd.train             always reads ShareGPT from the hub, Vicuna format

Both need a GPU, write Apple's checkpoint layout into a folder whose name they make up, train every real token (prompt
and tool output too), start from random weights, compute in bfloat16 and know the full head of width 2H only. A recipe
that says otherwise is refused before anything starts. The imported head is measured on our held-out rows, so its
numbers compare with ours.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from omr.drafter._training_state import resume_of
from omr.errors import ChildError, ConfigError, MissingBackend
from omr.process import spawn
from omr.text import iter_text

if TYPE_CHECKING:
    from omr.drafter.redrafter import Redrafter as Option

MODULES = {"nemo_skills": "nemo_skills.training.train_redrafter", "apple": "recurrent_drafting.cmd.train"}
PACKAGES = {
    "nemo_skills": ("nemo_skills", "pip install 'omr[nemo]'"),
    "apple": (
        "recurrent_drafting",
        "pip install git+https://github.com/apple/ml-recurrent-drafter in an environment of Python 3.10, named by "
        "drafter.train.python",
    ),
}
"""Package of each program, and how it is had."""
LOG_EVERY = 20


def argv(option: Option, base: Path, data: Path, out: Path) -> list[str]:
    """The command that trains `option` for `base` on the dataset folder `data`; it writes beside `out`."""
    how, trainer = option.train, option.train.trainer.value
    flags: dict[str, object] = {
        "llm_name_or_path": base,
        "bf16": True,
        "output_dir": out,
        "num_train_epochs": how.epochs,
        "per_device_train_batch_size": how.batch_rows,
        "gradient_accumulation_steps": how.accumulation // option.num_processes,
        "save_strategy": "no",
        "learning_rate": how.lr,
        "weight_decay": how.weight_decay,
        "warmup_ratio": how.warmup,
        "lr_scheduler_type": how.schedule.value,
        "max_grad_norm": how.grad_clip,
        "seed": how.seed,
        "logging_steps": LOG_EVERY,
        "tf32": True,
        "model_max_length": how.max_length,
        "drafter_predict_n_tokens": option.predict_n,
        "drafter_num_layers": option.num_draft_layers,
        "rnn": option.rnn,
        "phase": "train",
        "report_to": "none",
    }
    if trainer == "nemo_skills":
        flags |= {"dataset": data, "dataset_split": "train", "dataset_nrows": how.rows}
    torchrun = [how.python or sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={option.num_processes}"]
    return [*torchrun, "-m", MODULES[trainer], *(str(word) for k, v in flags.items() for word in (f"--{k}", v))]


def output_folder(option: Option, base: Path, out: Path) -> Path:
    """Where both programs write, given output_dir=`out`."""
    how = option.train
    name = f"{out.name}_redrafter_{base.name}_n_{option.predict_n}_lr_{how.lr}_layers_{option.num_draft_layers}"
    return out.with_name(name)


def check(option: Option) -> None:
    """Raise ConfigError for a recipe that the reference programs cannot train."""
    how = option.train
    asked = {
        "drafter.head": (option.head.value, "full"),
        "drafter.exit_dim": (option.exit_dim, None),
        "drafter.draft_vocab_size": (option.draft_vocab_size, 0),
        "drafter.train.start": (how.start.value, "random"),
        "drafter.train.precision": (how.precision.value, "bfloat16"),
        "drafter.train.distil": (how.distil, 0.0),
        "drafter.train.eval_every": (how.eval_every, 0),
        "drafter.train.cache_states": (how.cache_states, False),
    }
    for name, (value, able) in asked.items():
        if value != able:
            raise ConfigError(
                f"drafter.train.trainer={how.trainer.value} trains {name}={_shown(able)} only, got "
                f"{_shown(value)}; set it so, or use drafter.train.trainer=omr"
            )


def _shown(value: object) -> str:
    """As it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def fit_elsewhere(option: Option, base: Path, text: Path, out: Path, device: str) -> dict[str, float]:
    """Run the reference program, import its checkpoint into `out` and measure it."""
    from omr.drafter._redrafter_fit import import_head

    trainer = option.train.trainer.value
    package, fix = PACKAGES[trainer]
    if option.train.python is None and importlib.util.find_spec(package) is None:
        raise MissingBackend(package, fix=fix, why=f"drafter.train.trainer={trainer} runs it")
    if device != "cuda" and option.train.python is None:
        raise MissingBackend(
            "a CUDA device",
            why=f"drafter.train.trainer={trainer} trains in bfloat16 on GPUs",
            fix="drafter.train.trainer=omr, or a machine with one",
        )
    work = resume_of(out)
    shutil.rmtree(work, ignore_errors=True)
    data, log, target = work / "data", work / f"{trainer}.log", work / "head"
    write_dataset(text, data, option.train.rows)
    command = argv(option, base.resolve(), data, target)
    with spawn(command, log=log, echo=True) as child:
        status = child.wait()
    if status:
        raise ChildError(f"{MODULES[trainer]} exited with status {status}; log: {log}", child.log_tail())
    made = output_folder(option, base.resolve(), target)
    if not (made / "config.json").is_file():
        raise ChildError(f"{MODULES[trainer]} ended without writing {made}; log: {log}", child.log_tail())
    return import_head(replace(option, num_processes=1), made, base, text, out, device)


def write_dataset(text: Path, folder: Path, rows: int) -> None:
    """Our text as a dataset of `problem` and `generated_solution`, which those programs put into the chat template.

    The solution is what lies between the first and the last character that the model writes, tool output included and
    the end-of-turn token, which the template adds, left out.
    """
    folder.mkdir(parents=True)
    with (folder / "train.jsonl").open("w") as file:
        for row in iter_text(text, rows):
            if row.spans:
                solution = row.text[row.spans[0][0] : row.spans[-1][1]].rstrip()
                for end in ("<|im_end|>", "<|eot_id|>", "</s>", "<|endoftext|>"):
                    solution = solution.removesuffix(end)
                file.write(json.dumps({"problem": row.problem, "generated_solution": solution}) + "\n")
