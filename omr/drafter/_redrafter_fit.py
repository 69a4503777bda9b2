"""From a frozen base and text to a trained head on disk.

out/model.safetensors, config.json    the head, float32, Apple's names
out/curve.jsonl                       one line per LOG_EVERY steps
<out's resume folder>/                training state, and the batch that made the loss not finite
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from omr.artifact import content, file_sha256
from omr.drafter._documents import Document, frequent_tokens, read_documents, split
from omr.drafter._ranks import Ranks
from omr.drafter._training import Training, held_out_loss, output_matrix
from omr.drafter._training_state import resume_of
from omr.errors import ConfigError, InputError, ResourceError, TrainingError
from omr.nn import config as decoder_config
from omr.nn.loader import load
from omr.nn.redrafter import Redrafter, RedrafterConfig, fingerprint, load_redrafter
from omr.nn.transformer import Transformer

if TYPE_CHECKING:
    from omr.drafter.redrafter import Redrafter as Option


def fit(option: Option, base: Path, text: Path, out: Path, device: str) -> dict[str, float]:
    """See Drafter.fit. One rank of several when the environment says so."""
    with Ranks.join(device) as ranks:
        kept, held_out = _documents(option, base, text, ranks)
        with _memory_advice(option):
            model = load(base, device=str(ranks.device))
            drafter, coverage = new_head(option, model, kept)
            training = Training(option, model, drafter, kept, held_out, ranks)
            recipe = {"recipe": content(option), "base": drafter.config.base, "text": file_sha256(text)}
            metrics = training.run(resume_of(out), recipe)
        if ranks.rank == 0:
            drafter.save(out)
            with (out / "curve.jsonl").open("w") as file:
                file.writelines(json.dumps(row) + "\n" for row in training.progress.curve)
    return {**metrics, "draft_vocab_coverage": coverage}


def import_head(option: Option, made: Path, base: Path, text: Path, out: Path, device: str) -> dict[str, float]:
    """Take over the head that another program wrote into `made`: check it, say what it is for, measure it."""
    with Ranks.join(device) as ranks:
        model = load(base, device=str(ranks.device))
        drafter = load_redrafter(made, device=str(ranks.device), dtype=torch.float32)
        config = drafter.config
        if (config.hidden_size, config.vocab_size) != (model.config.hidden_size, model.config.vocab_size):
            raise InputError(
                f"{made} is for hidden size {config.hidden_size} and {config.vocab_size} tokens, the base has "
                f"{model.config.hidden_size} and {model.config.vocab_size}"
            )
        drafter.config = replace(config, predict_n=option.predict_n, base=fingerprint(model.embed.weight))
        kept, held_out = _documents(option, base, text, ranks)
        metrics = Training(option, model, drafter, kept, held_out, ranks).measure()
        if not math.isfinite(loss := held_out_loss(metrics)):
            raise TrainingError(
                f"{made} has a loss of {loss} on held-out text; lower drafter.train.lr={option.train.lr:g}"
            )
        drafter.save(out)
    return {**metrics, "parameters": float(sum(p.numel() for p in drafter.parameters()))}


def new_head(option: Option, base: Transformer, documents: list[Document]) -> tuple[Redrafter, float]:
    """An untrained head for `base` on its device, and the share of the text that its draft vocabulary covers."""
    how, hidden, vocab = option.train, base.config.hidden_size, base.config.vocab_size
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
        base=fingerprint(base.embed.weight),
    )
    full = config.exit_dim * config.num_draft_words
    if config.head_rank * (config.exit_dim + config.num_draft_words) >= full:
        raise ConfigError(
            f"drafter.head_rank={config.head_rank} makes two matrices no smaller than the full one of "
            f"{config.exit_dim} x {config.num_draft_words}; set it below "
            f"{-(-full // (config.exit_dim + config.num_draft_words))}, or drafter.head=full"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed)
        drafter = Redrafter(config)  # on the host: the same weights whatever the device
    coverage = 1.0
    if cut:
        tokens, coverage = frequent_tokens(documents, vocab, cut)
        drafter.set_draft_tokens(torch.from_numpy(tokens))
    matrix = output_matrix(base)
    if how.start.value == "base":
        drafter.start_from(base.embed.weight.cpu(), matrix.cpu())
    drafter.to(base.device)
    drafter.attach(matrix)
    return drafter, coverage


def _documents(option: Option, base: Path, text: Path, ranks: Ranks) -> tuple[list[Document], list[Document]]:
    """(training, held out)"""
    from transformers import AutoTokenizer

    config = decoder_config.read(base)[0]
    documents = read_documents(
        text,
        AutoTokenizer.from_pretrained(base),
        rows=option.train.rows,
        max_length=option.train.max_length,
        predict_n=option.predict_n,
        vocab_size=config.vocab_size,
        progress=lambda rows: tqdm(rows, "read", file=sys.stderr, unit="row", disable=ranks.rank > 0, leave=False),
    )
    longest = max(len(document.ids) for document in documents)
    if longest > config.max_position_embeddings:
        raise InputError(
            f"{text} has a document of {longest} tokens, the base takes {config.max_position_embeddings}; lower "
            f"drafter.train.max_length={option.train.max_length}"
        )
    return split(documents, option.train.held_out, option.train.seed)


@contextlib.contextmanager
def _memory_advice(option: Option) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        how = option.train
        raise ResourceError(
            f"out of GPU memory while training the drafter on {how.batch_rows} rows of up to {how.max_length} tokens; "
            f"lower drafter.train.forward_tok={how.forward_tok}, drafter.train.max_length or drafter.train.batch_rows"
            f"={how.batch_rows} (raising drafter.train.accumulation={how.accumulation} as much)"
        ) from None
