"""Training of a ReDrafter head on a frozen base.

One optimiser step reads `accumulation` micro-batches. Each is one forward of the base without gradients, then the
head's loss on its final hidden states, already divided by the number of targets of the whole step (known on the host
before anything runs). On several GPUs rank r takes every world-th micro-batch of the step and gradients are summed, so
the number of GPUs changes rounding and nothing else.

    out/model.safetensors, config.json    the head, float32, Apple's names
    out/curve.jsonl                       one line per LOG_EVERY steps
    <out's resume folder>/                training state, and the batch that made the loss not finite
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from omr.artifact import content, file_sha256
from omr.drafter._documents import Document, frequent_tokens, plan, read_documents, split
from omr.drafter._draft_meter import DraftMeter
from omr.drafter._ranks import Ranks
from omr.drafter._training_state import Progress, load_state, resume_of, save_state
from omr.errors import ResourceError, TrainingError
from omr.nn.draft_loss import DraftLoss, Targets, draft_loss, target_mask
from omr.nn.loader import load
from omr.nn.redrafter import Redrafter, RedrafterConfig, fingerprint
from omr.nn.transformer import Transformer

if TYPE_CHECKING:
    from omr.drafter.redrafter import Redrafter as Option

LOG_EVERY = 20


def fit(option: Option, base: Path, text: Path, out: Path, device: str) -> dict[str, float]:
    """See Drafter.fit. Runs as one rank of several when started by torchrun."""
    from transformers import AutoTokenizer

    with Ranks.join(device) as ranks:
        documents = read_documents(
            text,
            AutoTokenizer.from_pretrained(base),
            rows=option.train.rows,
            max_length=option.train.max_length,
            predict_n=option.predict_n,
            vocab_size=_vocab_size(base),
            progress=lambda rows: tqdm(rows, "read", file=sys.stderr, unit="row", disable=ranks.rank > 0, leave=False),
        )
        with _memory_advice(option):
            training = Training(option, load(base, device=str(ranks.device)), documents, ranks)
            recipe = {"recipe": content(option), "base": training.drafter.config.base, "text": file_sha256(text)}
            metrics = training.run(resume_of(out), recipe)
        if ranks.rank == 0:
            training.drafter.save(out)
            with (out / "curve.jsonl").open("w") as file:
                file.writelines(json.dumps(row) + "\n" for row in training.progress.curve)
    return metrics


class Training:
    """The head, its data and its optimiser. `run` trains it and returns what it measured."""

    def __init__(self, option: Option, base: Transformer, documents: list[Document], ranks: Ranks) -> None:
        self.option, self.how, self.base, self.ranks = option, option.train, base, ranks
        self.device = ranks.device
        self.kept, self.held_out = split(documents, self.how.held_out, self.how.seed)
        self.steps = plan(
            [len(d.ids) for d in self.kept],
            batch_rows=self.how.batch_rows,
            accumulation=self.how.accumulation,
            epochs=self.how.epochs,
            seed=self.how.seed,
        )
        self.base_matrix = output_matrix(base)
        self.drafter, self.coverage = self._new_head()
        self.optimiser = torch.optim.AdamW(
            self.drafter.parameters(),
            lr=self.how.lr,
            weight_decay=self.how.weight_decay,
            fused=True,
        )
        self.progress = Progress({})

    def _new_head(self) -> tuple[Redrafter, float]:
        option, hidden, vocab = self.option, self.base.config.hidden_size, self.base.config.vocab_size
        cut = option.draft_vocab_size if option.draft_vocab_size < vocab else 0
        config = RedrafterConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            exit_dim=option.exit_dim or 2 * hidden,
            num_draft_layers=option.num_draft_layers,
            rnn=option.rnn,
            head=option.head.value,
            head_rank=option.head_rank,
            draft_vocab_size=cut,
            predict_n=option.predict_n,
            base=fingerprint(self.base.embed.weight),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.how.seed)
            drafter = Redrafter(config)
        coverage = 1.0
        if cut:
            tokens, coverage = frequent_tokens(self.kept, vocab, cut)
            drafter.set_draft_tokens(torch.from_numpy(tokens))
        if self.how.start.value == "base":
            drafter.start_from(self.base.embed.weight.cpu(), self.base_matrix.cpu())
        drafter.to(self.device)
        drafter.attach(self.base_matrix)
        return drafter, coverage

    def run(self, resume: Path, recipe: dict[str, Any]) -> dict[str, float]:
        """Train from the state in `resume`, if there is one, to the end; then measure on the held-out documents."""
        self.progress = Progress(recipe)
        resumed = load_state(resume, self.progress, self.drafter, self.optimiser)
        total, first = len(self.steps), self.progress.step
        if resumed and self.ranks.rank == 0:
            print(f"drafter training goes on from step {first} of {total}", file=sys.stderr)
        saved_at, window = time.monotonic(), _Window()
        pending: tuple[int, Tensor] | None = None
        bar = tqdm(
            total=total,
            initial=first,
            desc="train drafter",
            file=sys.stderr,
            disable=self.ranks.rank > 0,
            mininterval=1.0,
        )
        with bar, _fast_products(self.device):
            for step in range(first, total):
                log = (step + 1) % LOG_EVERY == 0 or step + 1 == total
                meter = DraftMeter(self.option.predict_n, self.device) if log else None
                rate = self._set_rate(step)
                loss, norm = self._step(self.steps[step], meter)
                self._check(pending, resume)  # one step late: the device is not waited for
                pending = (step, loss)
                window.add(loss)
                bar.update()
                self.progress.step = step + 1
                if meter is not None:
                    self._check(pending, resume)
                    pending = None
                    mean = window.read()
                    row = {f"drafter/{k}": v for k, v in meter.read().items()}
                    row |= {"drafter/loss": mean, "drafter/lr": rate, "drafter/grad_norm": float(norm)}
                    self.progress.curve.append({"step": float(step + 1), **row})
                    bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
                if time.monotonic() - saved_at >= 60 * self.how.checkpoint_min and step + 1 < total and window.empty:
                    if self.ranks.rank == 0:
                        save_state(resume, self.progress, self.drafter, self.optimiser)
                    saved_at = time.monotonic()
        self.drafter.eval()
        targets = sum(sum(self.kept[row].counts) for step in self.steps for batch in step for row in batch)
        return {
            **self.measure(),
            "steps": float(total),
            "train_targets": float(targets),
            "held_out_rows": float(len(self.held_out)),
            "draft_vocab_coverage": self.coverage,
            "parameters": float(sum(p.numel() for p in self.drafter.parameters())),
        }

    def measure(self) -> dict[str, float]:
        """Losses and accuracies on the held-out documents."""
        meter = DraftMeter(self.option.predict_n, self.device)
        order = sorted(range(len(self.held_out)), key=lambda i: len(self.held_out[i].ids))
        with torch.no_grad():
            for start in range(0, len(order), self.how.batch_rows):
                rows = [self.held_out[i] for i in order[start : start + self.how.batch_rows]]
                self._forward(rows, [1] * self.option.predict_n, meter)
        return meter.read()

    def _step(self, micro_batches: list[list[int]], meter: DraftMeter | None) -> tuple[Tensor, Tensor]:
        """One optimiser step: (loss of the step, gradient norm before clipping), on the device."""
        counts = [[*self.kept[row].counts] for batch in micro_batches for row in batch]
        normalisers = [sum(column) for column in zip(*counts, strict=True)]
        loss = torch.zeros((), device=self.device)
        for batch in micro_batches[self.ranks.rank :: self.ranks.world]:
            total = self._forward([self.kept[row] for row in batch], normalisers, meter).total
            torch.autograd.backward(total)
            loss += total.detach()
        parameters = [p for p in self.drafter.parameters() if p.requires_grad]
        self.ranks.sum_gradients(parameters, loss)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.how.grad_clip or math.inf)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return loss, norm

    def _forward(self, rows: list[Document], normalisers: list[int], meter: DraftMeter | None) -> DraftLoss:
        batch = Batch.of(rows, self.option.predict_n, self.device)
        with torch.no_grad():
            hidden = self.base.hidden_states(batch.ids)
            embedded = self.base.embed(batch.ids)
        low = self.how.precision.value == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=low):
            out = draft_loss(
                self.drafter,
                hidden if low else hidden.float(),
                embedded if low else embedded.float(),
                batch.targets,
                normalisers,
                want_ranks=meter is not None,
                distil=self.how.distil,
                base_matrix=self.base_matrix,
                product_dtype=torch.bfloat16 if low else None,
            )
        if meter is not None:
            meter.add(batch.targets, out)
        return out

    def _set_rate(self, step: int) -> float:
        rate = self.how.lr * schedule(self.how.schedule.value, step, len(self.steps), self.how.warmup)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        return rate

    def _check(self, pending: tuple[int, Tensor] | None, resume: Path) -> None:
        """Raise TrainingError if the loss of that step is not finite, with its batch saved."""
        if pending is None or math.isfinite(loss := pending[1].item()):
            return
        step, path = pending[0], resume / "failed_batch.safetensors"
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


@dataclasses.dataclass
class Batch:
    """Documents padded on the right with id 0, on the device."""

    ids: Tensor  # (B, T) int64
    targets: Targets

    @classmethod
    def of(cls, rows: list[Document], predict_n: int, device: torch.device) -> Batch:
        lengths = torch.tensor([len(row.ids) for row in rows])
        ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
        marks = torch.zeros(ids.shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row.ids)] = torch.from_numpy(row.ids)
            marks[i, : len(row.marks)] = torch.from_numpy(row.marks)
        targets = Targets.of(ids, target_mask(marks, lengths, predict_n))  # on the host: its sizes are needed here
        if device.type == "cuda":
            ids = ids.pin_memory()
        return cls(ids.to(device, non_blocking=True), targets.to(device))


class _Window:
    """Mean of the losses since it was last read, without waiting for the device."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        self._losses.append(loss)

    @property
    def empty(self) -> bool:
        return not self._losses

    def read(self) -> float:
        mean = torch.stack(self._losses).mean().item()
        self._losses.clear()
        return mean


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


def _vocab_size(base: Path) -> int:
    from omr.nn import config

    return config.read(base)[0].vocab_size


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


@contextlib.contextmanager
def _memory_advice(option: Option) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        how = option.train
        raise ResourceError(
            f"out of GPU memory while training the drafter on {how.batch_rows} rows of up to {how.max_length} tokens; "
            f"lower drafter.train.batch_rows={how.batch_rows} (and raise drafter.train.accumulation={how.accumulation} "
            "as much), or drafter.train.max_length, or set drafter.draft_vocab_size"
        ) from None
