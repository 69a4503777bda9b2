"""The training loop of a ReDrafter head on a frozen base.

One optimiser step reads `accumulation` micro-batches. Each is one forward of the base without gradients, then the
head's loss on its final hidden states, already divided by the number of targets of the whole step (known on the host
before anything runs). On several GPUs rank r takes every world-th micro-batch of the step and gradients are summed, so
the number of GPUs changes rounding and nothing else.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from omr.artifact import key_of
from omr.drafter._base_states import BaseStates, Batch
from omr.drafter._documents import Document, plan
from omr.drafter._draft_meter import DraftMeter
from omr.drafter._ranks import Ranks
from omr.drafter._state_cache import StateCache
from omr.drafter._training_state import Progress, left_by_another_recipe, load_state, save_state
from omr.errors import TrainingError
from omr.nn.draft_loss import DraftLoss, draft_loss
from omr.nn.redrafter import Redrafter
from omr.nn.transformer import Transformer

if TYPE_CHECKING:
    from omr.drafter.redrafter import Redrafter as Option

LOG_EVERY = 20
"""Steps per line of the curve, for which accuracies are counted."""


class Training:
    """The head, its data and its optimiser. `run` trains it and returns what it measured."""

    def __init__(
        self,
        option: Option,
        base: Transformer,
        drafter: Redrafter,
        kept: list[Document],
        held_out: list[Document],
        ranks: Ranks,
    ) -> None:
        self.option, self.how, self.base, self.drafter, self.ranks = option, option.train, base, drafter, ranks
        self.kept, self.held_out = kept, held_out
        self.device, self.log_every = ranks.device, LOG_EVERY
        self.steps = plan(
            [len(d.ids) for d in kept],
            batch_rows=self.how.batch_rows,
            accumulation=self.how.accumulation,
            epochs=self.how.epochs,
            seed=self.how.seed,
        )
        self.states = self._states(kept, [[row for rows in self._mine(step) for row in rows] for step in self.steps])
        self.base_matrix = output_matrix(base)
        self.parameters = list(drafter.parameters())
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=self.how.lr, weight_decay=self.how.weight_decay, fused=True
        )
        self.progress = Progress({})
        self._held_out_states: StateCache | None = None
        self._losses: list[Tensor] = []  # since the last line of the curve
        self._saved_at = time.monotonic()

    def run(self, resume: Path, recipe: dict[str, Any]) -> dict[str, float]:
        """Train from the state in `resume`, if there is one, to the end; then measure on the held-out documents."""
        self.progress = Progress(recipe)
        total = len(self.steps)
        resumed = load_state(resume, self.progress, self.drafter, self.optimiser)
        if self.ranks.rank == 0:
            if resumed:
                print(f"drafter training goes on from step {self.progress.step} of {total}", file=sys.stderr)
            elif other := left_by_another_recipe(resume, recipe):
                print(f"drafter training starts anew; {other}", file=sys.stderr)
        if self.how.cache_states:
            self._cache(resume / f"states-{key_of('states', recipe, {})}")
        self._saved_at = time.monotonic()
        quiet = self.ranks.rank > 0
        bar = tqdm(
            total=total,
            initial=self.progress.step,
            desc="train drafter",
            file=sys.stderr,
            disable=quiet,
            mininterval=1.0,
        )
        with bar, _fast_products(self.device):
            while self.progress.step < total and not self._out_of_patience():
                self.one_step(resume)
                bar.update()
                if not self._losses:  # a line of the curve was written: everything is settled up to here
                    bar.set_postfix(loss=f"{self.progress.curve[-1]['drafter/loss']:.3f}", refresh=False)
                    self._save_in_time(resume)
        if self.progress.best:
            self.drafter.load_state_dict(self.progress.best, strict=False)
        taken = self.steps[: self.progress.step]
        measured = self.measure()
        self._check(len(taken) - 1, held_out_loss(measured), resume)  # what the last step did shows here alone
        return {
            **measured,
            "steps": float(len(taken)),
            "train_targets": float(
                sum(sum(self.kept[row].counts) for step in taken for batch in step for row in batch)
            ),
            "held_out_rows": float(len(self.held_out)),
            "parameters": float(sum(p.numel() for p in self.parameters)),
        }

    def one_step(self, resume: Path) -> Tensor:
        """Train the next step of the plan and return its loss, on the device. `resume` gets the batch of a failure."""
        step, every = self.progress.step, self.how.eval_every
        evaluates = bool(every) and ((step + 1) % every == 0 or step + 1 == len(self.steps))
        logs = evaluates or (step + 1) % self.log_every == 0 or step + 1 == len(self.steps)
        meter = DraftMeter(self.option.predict_n, self.device) if logs else None
        rate = self.how.lr * schedule(self.how.schedule.value, step, len(self.steps), self.how.warmup)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        loss, norm = self._optimise(step, meter)
        if self._losses:
            self._check(step - 1, self._losses[-1], resume)  # one step late: the device is not waited for
        self._losses.append(loss)
        self.progress.step = step + 1
        if meter is None:
            return loss
        self._check(step, loss, resume)
        row = {f"drafter/{k}": v for k, v in meter.read().items()}
        row |= {"drafter/lr": rate, "drafter/grad_norm": float(norm)}
        row["drafter/loss"] = torch.stack(self._losses).mean().item()
        self._losses.clear()
        if evaluates:
            held_out = self.measure()
            self._check(step, held_out_loss(held_out), resume)
            row |= {f"drafter/held_out_{k}": v for k, v in held_out.items()}
            self._remember(self.ranks.from_first(held_out_loss(held_out)))
        self.progress.curve.append({"step": float(step + 1), **row})
        return loss

    def _remember(self, held_out_loss: float) -> None:
        """Keep the parameters if they are the best so far."""
        self.progress.misses += 1
        if held_out_loss < self.progress.best_loss:
            self.progress.best_loss, self.progress.misses = held_out_loss, 0
            if self.how.patience:
                self.progress.best = {k: p.detach().cpu().clone() for k, p in self.drafter.named_parameters()}

    def _out_of_patience(self) -> bool:
        return bool(self.how.patience) and self.progress.misses >= self.how.patience

    def _save_in_time(self, resume: Path) -> None:
        if time.monotonic() - self._saved_at < 60 * self.how.checkpoint_min or self.progress.step == len(self.steps):
            return
        if self.ranks.rank == 0:
            save_state(resume, self.progress, self.drafter, self.optimiser)
        self._saved_at = time.monotonic()

    def measure(self) -> dict[str, float]:
        """Losses and accuracies on the held-out documents."""
        meter = DraftMeter(self.option.predict_n, self.device)
        order = sorted(range(len(self.held_out)), key=lambda i: len(self.held_out[i].ids))
        states = self._states(self.held_out, [[i] for i in order])
        states.cache = self._held_out_states
        with torch.no_grad():
            for step, i in enumerate(order):
                self._forward(states.batch(step, [i]), [1] * self.option.predict_n, meter, replay=True)
        return meter.read()

    def _states(self, documents: list[Document], steps: list[list[int]]) -> BaseStates:
        n, tokens = self.option.predict_n, self.how.forward_tok
        return BaseStates(self.base, documents, steps, predict_n=n, forward_tok=tokens)

    def _cache(self, folder: Path) -> None:
        """Have all states on disk, where a killed training finds them again."""
        tokens = self.how.forward_tok
        self.states.cache = StateCache(self.base, self.kept, folder / "train", tokens).fill(self.ranks, "training")
        held_out = StateCache(self.base, self.held_out, folder / "held_out", tokens)
        self._held_out_states = held_out.fill(self.ranks, "held-out")

    def _mine(self, step: list[list[int]]) -> list[list[int]]:
        """The micro-batches of a step that this rank computes."""
        return step[self.ranks.rank :: self.ranks.world]

    def _optimise(self, step: int, meter: DraftMeter | None) -> tuple[Tensor, Tensor]:
        """One optimiser step: (loss of the step, gradient norm before clipping), on the device."""
        counts = [[*self.kept[row].counts] for batch in self.steps[step] for row in batch]
        normalisers = [sum(column) for column in zip(*counts, strict=True)]
        loss = torch.zeros((), device=self.device)
        for rows in self._mine(self.steps[step]):
            total = self._forward(self.states.batch(step, rows), normalisers, meter).total
            torch.autograd.backward(total)
            loss += total.detach()
        self.ranks.sum_gradients(self.parameters, loss)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.how.grad_clip or math.inf)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return loss, norm

    def _forward(
        self, batch: Batch, normalisers: list[int], meter: DraftMeter | None, *, replay: bool = False
    ) -> DraftLoss:
        low = self.how.precision.value == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=low):
            out = draft_loss(
                self.drafter,
                batch.hidden if low else batch.hidden.float(),
                batch.embedded if low else batch.embedded.float(),
                batch.targets,
                normalisers,
                want_ranks=meter is not None,
                distil=self.how.distil,
                base_matrix=self.base_matrix,
                product_dtype=torch.bfloat16 if low else None,
            )
        if meter is not None:
            meter.add(batch.targets, out, replay=replay)
        return out

    def _check(self, step: int, step_loss: Tensor | float, resume: Path) -> None:
        """Raise TrainingError if the loss in that step or after it is not finite, with the step's batch saved."""
        loss = float(step_loss)
        if math.isfinite(loss):
            return
        path = resume / "failed_batch.safetensors"
        resume.mkdir(parents=True, exist_ok=True)
        rows = [self.kept[row] for batch in self.steps[step] for row in batch]
        if self.ranks.rank == 0:
            tensors = {f"{i}.ids": torch.from_numpy(d.ids) for i, d in enumerate(rows)}
            tensors |= {f"{i}.is_target": torch.from_numpy(d.marks) for i, d in enumerate(rows)}
            save_file(tensors, path)
        raise TrainingError(
            f"drafter loss is {loss} at step {step + 1} of {len(self.steps)}; its batch is in {path}. Lower "
            f"drafter.train.lr={self.how.lr:g}, or raise drafter.train.warmup={self.how.warmup:g}"
        )


def held_out_loss(measured: Mapping[str, float]) -> float:
    """Sum of the losses of all positions in what `Training.measure` returned."""
    return sum(value for name, value in measured.items() if name.endswith("_loss"))


def schedule(kind: str, step: int, steps: int, warmup: float) -> float:
    """Factor of the rate at `step` (from 0): up over ceil(warmup * steps) steps, then cosine, linear, or constant."""
    rise = math.ceil(warmup * steps)
    if step < rise:
        return step / rise
    done = (step - rise) / max(1, steps - rise)
    return {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[kind]


def output_matrix(base: Transformer) -> Tensor:
    """The base's (V, H) output matrix, dequantised if need be."""
    head = base.lm_head
    return head.weight if isinstance(head, torch.nn.Linear) else head.dense(base.dtype)


@contextlib.contextmanager
def _fast_products(device: torch.device) -> Iterator[None]:
    """TF32 products on CUDA, as in the pipeline; the CPU stays at full float32."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
