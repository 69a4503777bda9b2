"""Drafter training on one device: omr's loop beside a plain port of the reference's, on one random base.

    python bench/drafter_training.py --shape 1.5b --out training.json     # one GPU, some 30 seconds
    python bench/drafter_training.py                                      # a tiny shape on the CPU

The port does what the reference programs do: transformers runs the base on one micro-batch after the other, padded to
its longest row; the logits of all draft positions and all tokens exist at once; every real token is a target, the mean
is taken per micro-batch; the five accuracies of every position are measured at every step by five top-k searches. Base
and products are bfloat16 on a GPU (float32 on a CPU), the drafter's weights and AdamW's state float32. It is run once
more without the accuracies, to show what the rest of it costs. When its micro-batch does not fit, a smaller one is
taken. omr runs as in job=train, with the same rows an optimiser step and bfloat16 products; it counts accuracies at
every twentieth step, and once more is run with all of them at every step.

Two kinds of documents of random tokens: `full` are all of one length and all target, so both sides have the same work,
and the losses of the first step are compared; `text` have lengths between a half and one, a tenth of each is prompt and
a fifth a tool's output, neither of which omr trains on. Figures are real tokens (padding left out) over wall seconds.
The weights are random and shared by all: nothing is learnt, the speed is that of a trained model.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import transformers

from omr.drafter._documents import Document
from omr.drafter._ranks import Ranks
from omr.drafter._training import Training
from omr.drafter.redrafter import Precision, Redrafter, Train
from omr.nn.config import parse
from omr.nn.redrafter import Redrafter as Head
from omr.nn.redrafter import RedrafterConfig, parameter_count
from omr.nn.transformer import Transformer

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
    },
    "1.5b": {
        "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 4096,
    },
}  # fmt: skip
"""Dimensions as in config.json; 1.5b are those of Qwen2.5-1.5B."""
PREDICT_N, TOP_K, LR, GRAD_CLIP = 3, 5, 1e-3, 1.0
IGNORED = -100


@dataclass
class Setting:
    """What all contestants share."""

    theirs: Any
    """The base as transformers runs it."""
    ours: Transformer
    """The same tensors in omr's modules."""
    device: torch.device
    low: bool
    """bfloat16 products."""

    def head(self) -> Head:
        """The drafter of the AIMO-2 recipe, with the same random weights at every call."""
        config = self.ours.config
        torch.manual_seed(0)
        with self.device:
            return Head(
                RedrafterConfig(
                    vocab_size=config.vocab_size, hidden_size=config.hidden_size, exit_dim=2 * config.hidden_size,
                    num_draft_layers=2, rnn=True, predict_n=PREDICT_N,
                )
            )  # fmt: skip


def setting(shape: str, device: torch.device, dtype: torch.dtype) -> Setting:
    """A random Qwen2 of `shape`, twice around one set of tensors."""
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model("qwen2", tie_word_embeddings=True, **SHAPES[shape])
    with device:
        theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        ours = Transformer(parse(config.to_dict()))
    theirs.eval().requires_grad_(False)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.02)  # made as zeros, which would hide a bias that is not read
    state = {name.removeprefix("model."): tensor for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict(state, assign=True)
    ours.tie()
    return Setting(theirs, ours.eval().requires_grad_(False), device, dtype is torch.bfloat16)


def documents(kind: str, count: int, length: int, vocab: int) -> list[Document]:
    """`count` documents of random tokens, see the module text."""
    rng = torch.Generator().manual_seed(2)
    made = []
    for _ in range(count):
        size = length if kind == "full" else int(torch.randint(length // 2, length + 1, (), generator=rng))
        ids = torch.randint(0, vocab, (size,), generator=rng).tolist()
        marks = torch.ones(size, dtype=torch.bool)
        if kind == "text":
            marks[: size // 10] = False
            marks[size // 2 : size // 2 + size // 5] = False
        made.append(Document.of(ids, marks.tolist(), PREDICT_N))
    return made


class Port:
    """The reference's loop; see the module text."""

    def __init__(self, about: Setting, rows: list[list[Document]], micro_batch: int, *, accuracies: bool) -> None:
        self.about, self.rows, self.micro_batch, self.accuracies = about, rows, micro_batch, accuracies
        self.drafter = about.head()
        self.optimiser = torch.optim.AdamW(self.drafter.parameters(), lr=LR, weight_decay=0.0)
        self.log: dict[str, float] = {}

    def step(self, number: int) -> Tensor:
        documents, total = self.rows[number], torch.zeros((), device=self.about.device)
        batches = [documents[i : i + self.micro_batch] for i in range(0, len(documents), self.micro_batch)]
        for batch in batches:
            ids, mask = (part.to(self.about.device) for part in collate(batch))
            with torch.autocast(self.about.device.type, torch.bfloat16, enabled=self.about.low):
                loss = self.loss(self.logits(ids, mask), ids.masked_fill(mask == 0, IGNORED)) / len(batches)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.drafter.parameters(), GRAD_CLIP)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return total

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, T) -> (P, B, T, V): at [i, b, t] from context t and tokens t+1 .. t+1+i."""
        body = self.about.theirs.model
        with torch.no_grad():
            context = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            embedded = body.embed_tokens(ids)
        state, logits = torch.zeros_like(context), []
        for i in range(PREDICT_N):
            state = self.drafter.advance(state, self.drafter.embed_term(embedded.roll(-1 - i, dims=1)))
            logits.append(self.drafter.logits(context, state))
        return torch.stack(logits)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = torch.zeros((), device=labels.device)
        for i in range(PREDICT_N):
            guessed = logits[i, :, : -(2 + i)].reshape(-1, logits.shape[-1])
            wanted = labels[:, 2 + i :].reshape(-1)
            loss = loss + F.cross_entropy(guessed, wanted, ignore_index=IGNORED)
            if self.accuracies:
                real = wanted != IGNORED
                for k in range(1, TOP_K + 1):
                    best = guessed.detach().topk(k, dim=-1).indices
                    right = (best[real] == wanted[real, None]).any(-1)
                    self.log[f"redrafter{i}_top{k}"] = right.float().mean().item()
        return loss


def collate(batch: list[Document]) -> tuple[Tensor, Tensor]:
    """(B, T) int64 ids padded with 0 on the right, (B, T) int64 mask."""
    longest = max(len(d.ids) for d in batch)
    ids, mask = torch.zeros(len(batch), longest, dtype=torch.int64), torch.zeros(len(batch), longest, dtype=torch.int64)
    for row, document in enumerate(batch):
        ids[row, : len(document.ids)] = torch.from_numpy(document.ids)
        mask[row, : len(document.ids)] = 1
    return ids, mask


def run_omr(
    about: Setting, rows: list[Document], *, per_step: int, batch: int, length: int, warm: int, accuracies: bool
) -> tuple[dict[str, float], list[list[Document]]]:
    """Figures of omr's own loop over `rows` but for the last step of the plan, and the documents of those steps.

    The last step always counts accuracies, so it is not run; `accuracies` counts them at every step.
    """
    how = Train(
        rows=len(rows),
        batch_rows=batch,
        accumulation=per_step // batch,
        forward_tok=per_step * length // 2,  # no more than one step: a step that waits for nothing would look too fast
        max_length=length,
        lr=LR,
        grad_clip=GRAD_CLIP,
        warmup=0.0,
        precision=Precision.bfloat16 if about.low else Precision.float32,
    )
    option = Redrafter(predict_n=PREDICT_N, train=how)
    loop = Training(option, about.ours, about.head(), rows, rows[:1], Ranks(0, 1, about.device))
    if accuracies:
        loop.log_every = 1
    taken = [[rows[row] for batch in step for row in batch] for step in loop.steps[:-1]]
    timed = clock(lambda number: loop.one_step(Path("unused")), warm, len(taken) - warm, about.device)
    return {"micro_batch": batch, **timed}, taken


def clock(step: Callable[[int], Tensor], warm: int, steps: int, device: torch.device) -> dict[str, float]:
    """Run `warm` steps, then time `steps`: seconds, the first step's loss, peak GiB of device memory."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    losses = [step(number) for number in range(warm)]
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    losses += [step(warm + number) for number in range(steps)]
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    figures = {"seconds": seconds, "first_loss": losses[0].item()}
    return figures | ({"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if cuda else {})


def tidy(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def run_port(
    about: Setting, rows: list[list[Document]], batch: int, warm: int, *, accuracies: bool
) -> dict[str, float] | None:
    """The port's figures, with the largest micro-batch up to `batch` that fits; None when not even one row does."""
    while batch:
        try:
            port = Port(about, rows, batch, accuracies=accuracies)
            return {"micro_batch": batch, **clock(port.step, warm, len(rows) - warm, about.device)}
        except torch.OutOfMemoryError:
            port = None  # type: ignore[assignment]
        tidy(about.device)  # outside of the handler: the traceback holds the tensors
        print(f"  a micro-batch of {batch} rows does not fit", flush=True)
        batch //= 2
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--length", type=int, help="longest document, in tokens; default 2048, tiny 128")
    parser.add_argument("--rows", type=int, default=8, help="documents of an optimiser step")
    parser.add_argument("--batch", type=int, default=4, help="documents of a micro-batch; the port's may turn smaller")
    parser.add_argument("--warm", type=int, default=1, help="steps before the clock starts")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    if args.rows % args.batch:
        parser.error(f"--rows {args.rows} must be a multiple of --batch {args.batch}")
    device, length = torch.device(args.device), args.length or (128 if args.shape == "tiny" else 2048)
    cuda = device.type == "cuda"
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high" if cuda else "highest")
    start = time.perf_counter()
    about = setting(args.shape, device, getattr(torch, args.dtype or ("bfloat16" if cuda else "float32")))
    head = replace(about.head().config)
    probe = documents("full", 1, length, head.vocab_size)
    ids, mask = (part.to(device) for part in collate(probe))
    with torch.no_grad():
        known = about.theirs.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.float()
        apart = float((about.ours.hidden_states(ids).float() - known).norm() / known.norm())
    results: dict[str, Any] = {
        "shape": args.shape,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": str(about.ours.dtype).removeprefix("torch."),
        "commit": commit(),
        "drafter_parameters": parameter_count(head),
        "length": length,
        "rows_per_step": args.rows,
        "steps": args.steps,
        "base_states_apart": apart,
        "set_up_s": time.perf_counter() - start,
        "figures": {},
        "ratios": {},
    }
    print(f"{results['device']}, torch {results['torch']}, transformers {results['transformers']}, {results['commit']}")
    print(f"drafter of {results['drafter_parameters'] / 1e6:.1f} M parameters; set up in {results['set_up_s']:.1f} s")
    print(f"relative distance of the base's states, omr to transformers: {apart:.1e}")
    for kind in ("full", "text"):
        every = documents(kind, args.rows * (args.warm + args.steps + 1), length, head.vocab_size)
        figures = results["figures"][kind] = {}
        tidy(device)
        knobs = {"per_step": args.rows, "batch": args.batch, "length": length, "warm": args.warm}
        for name, accuracies in (("omr", False), ("omr, accuracies at every step", True)):
            tidy(device)
            figures[name], plan = run_omr(about, every, accuracies=accuracies, **knobs)
        tokens = sum(len(d.ids) for step in plan[args.warm :] for d in step)
        for name, accuracies in (("port", True), ("port without accuracies", False)):
            tidy(device)
            if made := run_port(about, plan, args.batch, args.warm, accuracies=accuracies):
                figures[name] = made
        for name, row in figures.items():
            row["tok_s"] = tokens / row["seconds"]
            row["ms_step"] = 1e3 * row["seconds"] / args.steps
            peak = f"  peak {row['peak_gib']:.1f} GiB" if "peak_gib" in row else ""
            print(
                f"{kind:5s} {name:30s} {row['tok_s']:10,.0f} tok/s  {row['ms_step']:8.1f} ms a step  micro-batch "
                f"{row['micro_batch']}{peak}  first loss {row['first_loss']:.4f}",
                flush=True,
            )
        for name in figures:
            if name.startswith("port"):
                ratio = results["ratios"][f"{kind}: omr to {name}"] = figures["omr"]["tok_s"] / figures[name]["tok_s"]
                print(f"{kind:5s} omr to {name}: {ratio:.2f}", flush=True)
    results["total_s"] = time.perf_counter() - start
    print(f"total {results['total_s']:.1f} s")
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


def commit() -> str:
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "no commit"


if __name__ == "__main__":
    main()
