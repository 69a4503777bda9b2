"""Supervised fine-tuning of any Hugging Face causal LM on text rows (see omr/text.py).

    text.parquet --encode--> documents (ids, is_target) --plan--> steps of documents --train--> bf16 folder + loss curve

The loss counts only tokens that the model itself writes; the prompt and every tool-output block are context. One
document is one row of a batch: padded on the right, no packing, no mask (a causal model never looks right), so no
document sees another. Documents of similar length share a batch; a step holds about `tokens_per_step` padded tokens,
split into forwards of at most `tokens_per_forward` with the loss averaged over the whole step's target tokens.

Everything that a step does depends on (recipe, data, step number) alone: a killed training goes on from its last saved
state and ends, on the same machine, in the same weights. Weights and optimiser state are float32; on a GPU the
products run in bfloat16 (autocast). The optimiser is AdamW, decay on matrices only.

It runs without the rest of omr's configuration: `python -m omr.sft --help`. A new model is a folder of random weights
(`write_fresh`), trained the same way as any other.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from omr.errors import ConfigError, InputError, TrainingError
from omr.sft_data import Documents, encode, plan

REVISION = 1
"""Bump when the same recipe on the same text gives other weights."""
CURVE, STATE = "curve.jsonl", "state.pt"
LOG_EVERY = 10
"""Steps between points of the curve and looks at the loss."""


class Schedule(Enum):
    linear = "linear"
    cosine = "cosine"
    constant = "constant"


@dataclass(kw_only=True)
class Recipe:
    """How a model is trained: all that its weights depend on besides the base and the text."""

    epochs: float = 1.0
    """Passes over the text; a part of one is allowed."""
    tokens_per_step: int = 16384
    """Padded tokens in one optimiser step, at most (a single longer document is a step of its own)."""
    tokens_per_forward: int = 16384
    """Padded tokens in one forward and backward: what must fit in memory."""
    max_length: int = 2048
    """Longest document in tokens; longer ones are cut."""
    lr: float = 1e-5
    """Peak learning rate. 1e-5 suits a pretrained model, 3e-3 a new small one."""
    schedule: Schedule = Schedule.cosine
    warmup: float = 0.03
    """Share of the steps in which the rate rises from 0."""
    weight_decay: float = 0.05
    beta2: float = 0.95
    grad_clip: float = 1.0
    """Largest gradient norm; 0 does not clip."""
    seed: int = 0
    checkpoint_min: float = field(default=5.0, metadata={"content": False})
    """Minutes between saves of the training state."""

    def __post_init__(self) -> None:
        for name in ("epochs", "tokens_per_step", "tokens_per_forward", "max_length", "lr"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"job.recipe.{name} must be > 0, got {getattr(self, name)}")
        for name in ("weight_decay", "grad_clip", "checkpoint_min"):
            if getattr(self, name) < 0:
                raise ConfigError(f"job.recipe.{name} must be >= 0, got {getattr(self, name)}")
        if not 0 <= self.warmup < 1 or not 0 < self.beta2 < 1:
            raise ConfigError(f"job.recipe: warmup in [0, 1) and beta2 in (0, 1), got {self.warmup} and {self.beta2}")


@dataclass(kw_only=True)
class Shape:
    """Sizes of a new Qwen2 model with tied embeddings."""

    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int = 2
    intermediate_size: int = 640
    context_tokens: int = 2048

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"job.fresh: num_heads must divide hidden_size and num_kv_heads must divide num_heads, got "
                f"{self.hidden_size}, {self.num_heads}, {self.num_kv_heads}"
            )


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json",
                   "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model")  # fmt: skip


def write_fresh(out: Path, *, tokenizer_dir: Path, shape: Shape, seed: int) -> None:
    """Write a folder with random float32 weights of `shape` and the tokenizer's files."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, local_files_only=True)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=shape.context_tokens,
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config).float()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(out, safe_serialization=True)
    copy_tokenizer(tokenizer_dir, out)


def copy_tokenizer(source: Path, out: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def train(
    *, base: Path, text: Path, out: Path, recipe: Recipe, device: str, workers: int = 1, keep: Path | None = None
) -> dict[str, float]:
    """Fine-tune the folder `base` on the text file (parquet rows, or an encoded .npz) and fill the folder `out`.

    `out` gets a bf16 checkpoint with the tokenizer, and curve.jsonl. The folder `keep` (`out` by default) holds the
    state of an unfinished training; it is taken up again when recipe, text and base are the same, and removed at the
    end. Raises InputError for an unusable base or text, TrainingError when the loss is not finite.
    """
    documents = encode(text, base, recipe.max_length, workers)
    steps = plan(documents.lengths, recipe.epochs, recipe.tokens_per_step, recipe.seed)
    model = _load(base, device, recipe)
    limit = model.get_input_embeddings().weight.shape[0]
    if documents.ids.size and int(documents.ids.max()) >= limit:
        raise InputError(f"{base}: the tokenizer has ids up to {int(documents.ids.max())}, the model only {limit}")
    return _Training(
        model, documents, steps, recipe, device, out, keep or out, _fingerprint(base, documents, recipe)
    ).run(base)


def rate(recipe: Recipe, step: int, num_steps: int) -> float:
    """The learning rate of step 0, 1, ..., num_steps - 1: linear warmup, then the schedule down to 0."""
    warm = max(1, round(recipe.warmup * num_steps))
    if step < warm:
        return recipe.lr * (step + 1) / (warm + 1)
    left = 1 - (step - warm) / max(1, num_steps - warm)
    shape = {
        Schedule.linear: left,
        Schedule.cosine: 0.5 * (1 - math.cos(math.pi * left)),
        Schedule.constant: 1.0,
    }
    return recipe.lr * shape[recipe.schedule]


def _load(base: Path, device: str, recipe: Recipe) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    if not (base / "config.json").is_file():
        raise InputError(f"{base} is no Hugging Face folder: config.json is missing")
    config = json.loads((base / "config.json").read_text())
    if config.get("quantization_config"):
        raise InputError(f"{base} is quantised; fine-tune the bf16 model and quantise the result")
    context = config.get("max_position_embeddings")
    if context and recipe.max_length > context:
        raise ConfigError(f"job.recipe.max_length={recipe.max_length} is over the model's {context} positions")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{base} cannot be loaded: {str(error).splitlines()[0]}") from None
    model.config.use_cache = False
    return model.to(device).train()


def _fingerprint(base: Path, documents: Documents, recipe: Recipe) -> str:
    fixed = {
        f.name: str(getattr(recipe, f.name)) for f in dataclasses.fields(recipe) if f.metadata.get("content", True)
    }
    weights = sorted((p.name, p.stat().st_size) for p in base.glob("*.safetensors"))
    return json.dumps([REVISION, fixed, documents.digest(), weights], sort_keys=True)


@dataclass
class _Training:
    model: Any
    documents: Documents
    steps: list[Any]
    recipe: Recipe
    device: str
    out: Path
    keep: Path
    fingerprint: str
    curve: list[dict[str, float]] = field(default_factory=list)

    def run(self, base: Path) -> dict[str, float]:
        import torch
        from tqdm import tqdm

        self.out.mkdir(parents=True, exist_ok=True)
        decay = [p for p in self.model.parameters() if p.dim() >= 2]
        rest = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": decay, "weight_decay": self.recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        optimiser = torch.optim.AdamW(
            groups, lr=self.recipe.lr, betas=(0.9, self.recipe.beta2), fused=self.device.startswith("cuda")
        )
        first = self._resume(optimiser)
        started = saved = time.monotonic()
        waiting: list[tuple[Any, float]] = []
        with tqdm(total=len(self.steps), initial=first, desc="fine-tune", unit="step", mininterval=1.0) as bar:
            for number in range(first, len(self.steps)):
                speed = rate(self.recipe, number, len(self.steps))
                for group in optimiser.param_groups:
                    group["lr"] = speed
                torch.manual_seed(self.recipe.seed * 1_000_003 + number)
                waiting.append((self._step(self.steps[number], optimiser), speed))
                bar.update()
                if (number + 1) % LOG_EVERY == 0 or number + 1 == len(self.steps):
                    loss = self._look(number + 1, waiting)
                    waiting = []
                    bar.set_postfix(loss=f"{loss:.4f}")
                    if time.monotonic() - saved > 60 * self.recipe.checkpoint_min and number + 1 < len(self.steps):
                        self._save_state(number + 1, optimiser)
                        saved = time.monotonic()
        return self._finish(base, time.monotonic() - started)

    def _step(self, chosen: Any, optimiser: Any) -> Any:
        """One optimiser step on the documents `chosen`; returns its mean loss, still on the device."""
        import torch

        optimiser.zero_grad(set_to_none=True)
        forwards = list(self.documents.batches(chosen, self.recipe.tokens_per_forward))
        targets = sum(int(mask[:, 1:].sum()) for _, mask in forwards)
        total = torch.zeros((), device=self.device)
        for ids, mask in forwards:
            loss = self._loss(torch.from_numpy(ids), torch.from_numpy(mask)) / max(1, targets)
            loss.backward()
            total += loss.detach()
        if self.recipe.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.grad_clip)
        optimiser.step()
        return total

    def _loss(self, ids: Any, mask: Any) -> Any:
        """Summed cross-entropy of the target tokens. ids (batch, time) int64, mask (batch, time) bool."""
        import torch

        rows, columns = mask[:, 1:].nonzero(as_tuple=True)  # found on the CPU: the device need not be waited for
        wanted = ids[rows, columns + 1].to(self.device, non_blocking=True)
        at = (rows * ids.shape[1] + columns).to(self.device, non_blocking=True)
        ids = ids.to(self.device, non_blocking=True)
        with torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.device.startswith("cuda")):
            hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (batch, time, hidden)
            logits = self.model.get_output_embeddings()(hidden.flatten(0, 1)[at])  # (targets, vocabulary)
        return torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="sum")

    def _look(self, step: int, waiting: list[tuple[Any, float]]) -> float:
        """Write a point of the curve: the mean loss of the steps since the last. Raises TrainingError."""
        losses = [float(loss) for loss, _ in waiting]
        mean = sum(losses) / len(losses)
        self._must_be_finite(mean, step)
        self.curve.append({"step": step, "loss": mean, "lr": waiting[-1][1]})
        with (self.out / CURVE).open("a") as file:
            file.write(json.dumps(self.curve[-1]) + "\n")
        return mean

    def _must_be_finite(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {step} of {len(self.steps)}; lower job.recipe.lr (now {self.recipe.lr:g})"
            )

    def _save_state(self, step: int, optimiser: Any) -> None:
        import torch

        self.keep.mkdir(parents=True, exist_ok=True)
        partial = self.keep / f".{STATE}.partial"
        state = {
            "fingerprint": self.fingerprint,
            "step": step,
            "curve": self.curve,
            "model": self.model.state_dict(),
            "optimiser": optimiser.state_dict(),
        }
        torch.save(state, partial)
        os.replace(partial, self.keep / STATE)

    def _resume(self, optimiser: Any) -> int:
        """Load the state of an unfinished training, if it is of the same kind. Returns the first step to do."""
        import torch

        path = self.keep / STATE
        state: dict[str, Any] = {}
        if path.is_file():
            try:
                state = torch.load(path, map_location=self.device, weights_only=True)
            except Exception:  # a torn file: begin again
                state = {}
        if state.get("fingerprint") != self.fingerprint:
            (self.out / CURVE).unlink(missing_ok=True)
            return 0
        self.model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        self.curve = list(state["curve"])
        (self.out / CURVE).write_text("".join(json.dumps(point) + "\n" for point in self.curve))
        print(f"going on from step {state['step']} of {len(self.steps)}", file=sys.stderr)
        return int(state["step"])

    def _finish(self, base: Path, seconds: float) -> dict[str, float]:
        import torch

        ids, mask = next(self.documents.batches(self.steps[-1], self.recipe.tokens_per_forward))
        with torch.no_grad():  # no step's loss has seen the last update yet
            self._must_be_finite(float(self._loss(torch.from_numpy(ids), torch.from_numpy(mask))), len(self.steps))
        self.model.config.use_cache = True
        self.model.to(torch.bfloat16).save_pretrained(self.out, safe_serialization=True)
        copy_tokenizer(base, self.out)
        (self.keep / STATE).unlink(missing_ok=True)
        last = self.curve[-5:]
        return {
            "steps": float(len(self.steps)),
            "loss": sum(point["loss"] for point in last) / len(last),
            "documents": float(len(self.documents.lengths)),
            "target_tokens": float(self.documents.is_target.sum()),
            "seconds": seconds,
        }


def main(argv: list[str] | None = None) -> None:
    """`python -m omr.sft`: train from a shell, without a run, a store or a tracker."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="Hugging Face folder to start from")
    parser.add_argument("--text", type=Path, required=True, help="parquet of text rows, or an encoded .npz")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that encode")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a field of the recipe")
    args = parser.parse_args(argv)
    known = {f.name: f for f in dataclasses.fields(Recipe)}
    values: dict[str, Any] = {}
    for item in args.set:
        name, _, value = item.partition("=")
        if name not in known:
            raise ConfigError(f"--set {name}: the recipe has no such field; it has {', '.join(known)}")
        kind = type(known[name].default)
        values[name] = Schedule[value] if kind is Schedule else int(value) if kind is int else float(value)
    result = train(
        base=args.base, text=args.text, out=args.out, recipe=Recipe(**values), device=args.device, workers=args.workers
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
