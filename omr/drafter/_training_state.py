"""What a killed training needs to go on: one safetensors file, replaced atomically.

Tensors are the head's parameters and AdamW's two moments; the step and the curve so far are in the file's metadata,
with the recipe that they belong to. The order of the data and the rate are functions of the step, and nothing in the
loop is random, so the curve of a resumed training is the curve of an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from omr.artifact import resume_folder
from omr.errors import InputError

FILE = "training_state.safetensors"


@dataclass
class Progress:
    """Where a training is. `recipe` is plain JSON that must not change between two attempts."""

    recipe: Mapping[str, Any]
    step: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    best_loss: float = math.inf
    """Least held-out loss so far, if it is measured on the way."""
    misses: int = 0
    """Measurements since then."""
    best: dict[str, torch.Tensor] = field(default_factory=dict)
    """The parameters that had it."""


def resume_of(out: Path) -> Path:
    """The folder of the training that fills `out`: beside it, under a name that the next attempt finds again."""
    return resume_folder(out) if out.name.endswith(".building") else out.with_name(f".{out.name}.resume")


def save_state(folder: Path, progress: Progress, module: torch.nn.Module, optimiser: torch.optim.AdamW) -> None:
    tensors = {f"param.{name}": p.detach() for name, p in module.named_parameters()}
    for name, p in module.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            if p in optimiser.state:
                tensors[f"{moment}.{name}"] = optimiser.state[p][moment]
    tensors |= {f"best.{name}": tensor for name, tensor in progress.best.items()}
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {
        "recipe": json.dumps(progress.recipe, sort_keys=True),
        "step": str(progress.step),
        "curve": json.dumps(progress.curve),
        "best_loss": repr(progress.best_loss),
        "misses": str(progress.misses),
    }
    temporary = folder / (FILE + ".tmp")
    save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, temporary, metadata=metadata)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, folder / FILE)


def load_state(folder: Path, progress: Progress, module: torch.nn.Module, optimiser: torch.optim.AdamW) -> bool:
    """Restore all three from `folder`, if it holds a state. Raises InputError for the state of another recipe."""
    path = folder / FILE
    if not path.exists():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            _same_recipe(path, json.loads(metadata["recipe"]), progress.recipe)
            progress.step, progress.curve = int(metadata["step"]), json.loads(metadata["curve"])
            progress.best_loss, progress.misses = float(metadata["best_loss"]), int(metadata["misses"])
            bests = [name for name in file.keys() if name.startswith("best.")]  # noqa: SIM118 - not a dict
            progress.best = {name.removeprefix("best."): file.get_tensor(name) for name in bests}
            for name, p in module.named_parameters():
                with torch.no_grad():
                    p.copy_(file.get_tensor(f"param.{name}"))
                if progress.step:
                    optimiser.state[p] = {
                        "step": torch.tensor(float(progress.step), device=p.device if p.is_cuda else None),
                        "exp_avg": file.get_tensor(f"exp_avg.{name}").to(p.device),
                        "exp_avg_sq": file.get_tensor(f"exp_avg_sq.{name}").to(p.device),
                    }
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} is not a training state ({error}); delete it to start anew") from None
    return True


def left_by_another_recipe(folder: Path, recipe: Mapping[str, Any]) -> str | None:
    """One line on the newest state beside `folder` of a training on the same base and text; None without one.

    Another recipe is another artifact with a folder of its own, so such a state is neither used nor lost.
    """
    states = [path for path in folder.parent.glob(f".*.resume/{FILE}") if path.parent != folder]
    for path in sorted(states, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            with safe_open(path, framework="pt") as file:
                old, step = json.loads(file.metadata()["recipe"]), file.metadata()["step"]
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            continue
        if all(old.get(name) == recipe.get(name) for name in ("base", "text")):
            changes = [f"{name.removeprefix('recipe.')}={was}, now {now}" for name, was, now in _changes(old, recipe)]
            return f"{path} holds step {step} of a training with {'; '.join(changes)}: set back, it goes on from there"
    return None


def _same_recipe(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    for name, before, now in _changes(old, new):
        raise InputError(
            f"{path} was left by a training with {name}={before}, now it is {now}; "
            "set it back to go on, or delete that file to start anew"
        )


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, value before, value now) of every knob that differs."""
    before, now = _flat(old), _flat(new)
    names = sorted(before.keys() | now.keys())
    return [(name, before.get(name), now.get(name)) for name in names if before.get(name) != now.get(name)]


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
