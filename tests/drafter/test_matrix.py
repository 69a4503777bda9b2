"""Every drafter on every kind of base, with everything a request can ask for in one batch: plain decoding's text.

The rows of the matrix are DRAFTERS, its columns BASES; each cell runs REQUESTS twice, with room and with a cache so
small that sequences are preempted, and compares tokens, reasons and log-probabilities with plain decoding of that base.
Sampled drafts, whose text is not plain decoding's, are in tests/engine/test_sampled.py. docs/drafters.md has the table.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from omr.drafter import Drafter, DraftModel
from omr.drafter._redrafter_chain import draft_model
from omr.drafter.draft_model import SmallModel
from omr.drafter.ngram import Ngram
from omr.drafter.redrafter import Redrafter
from omr.drafter.suffix import Suffix
from omr.engine.engine import Engine
from omr.engine.request import Request
from omr.nn.loader import load
from omr.nn.redrafter import Redrafter as Head
from omr.nn.redrafter import RedrafterConfig
from omr.nn.transformer import Transformer
from omr.quant import Quantiser
from omr.quant.fp8 import Fp8, Granularity
from omr.quant.int4 import Int4
from omr.quant.int8_wo import Int8Wo

DATA = Path(__file__).parents[1] / "data" / "redrafter"
PROMPTS: list[list[int]] = json.loads((DATA / "generate_greedy.json").read_text())["prompts"]

BASES: dict[str, Quantiser | None] = {
    "float32": None,
    "fp8": Fp8(calib_samples=20),
    "fp8, scale per row": Fp8(calib_samples=20, granularity=Granularity.channel),
    "int8": Int8Wo(),
    "int4": Int4(group_size=16),
}


def trained(name: str, **knobs: Any) -> Callable[[Transformer], DraftModel]:
    option = Redrafter(**{"adaptive": False, "stop_below": 0.0, **knobs})
    return lambda base: option.load(DATA / f"drafter_{name}", base)


def untrained(*, beams: int = 1, eight_bit: bool = False, **shape: Any) -> Callable[[Transformer], DraftModel]:
    """A head of some shape that starts from what the base knows, so that some drafts are right."""

    def make(base: Transformer) -> DraftModel:
        torch.manual_seed(0)
        known = {"vocab_size": 128, "hidden_size": 32, "exit_dim": 64, "num_draft_layers": 2, "rnn": True}
        head = Head(RedrafterConfig(**{**known, **shape})).requires_grad_(False).eval()
        if head.config.draft_vocab_size:
            head.set_draft_tokens(torch.arange(head.config.draft_vocab_size) + 60)
        head.start_from(base.embed.weight, base.lm_head.weight)
        head.attach(base.lm_head.weight)
        return draft_model(head, base.embed.weight, 3, num_beams=beams, in_eight_bit=eight_bit)

    return make


def option(made: Drafter) -> Callable[[Transformer], DraftModel | None]:
    return lambda base: made.load(None, base)


DRAFTERS: dict[str, Callable[[Transformer], DraftModel | None]] = {
    "redrafter, full head": trained("rnn2"),
    "redrafter, one block": trained("rnn1", draft_tok=2),
    "redrafter, drafts of any length": trained("rnn2", stop_below=0.02),
    "redrafter, no rnn": trained("sum2", predict_n=5),
    "redrafter, exit_dim": trained("proj"),
    "redrafter, reduced vocabulary": untrained(draft_vocab_size=60),
    "redrafter, low rank": untrained(head="low_rank", head_rank=16),
    "redrafter, base's lm_head": untrained(head="base"),
    "redrafter, 8 bits": trained("rnn2", eight_bit=True),
    "redrafter, 4 beams": trained("rnn2", num_beams=4),
    "redrafter, 10 beams": trained("sum2", num_beams=10, predict_n=4),
    "redrafter, 3 beams in 8 bits, reduced": untrained(beams=3, eight_bit=True, draft_vocab_size=60),
    "ngram": option(Ngram(adaptive=False)),
    "suffix": option(Suffix(adaptive=False)),
    "draft_model": option(SmallModel(adaptive=False, model=str(DATA / "base_lm"))),
}
QUICK = {("redrafter, full head", "fp8"), ("redrafter, 4 beams", "int8"), ("redrafter, reduced vocabulary", "float32")}


def ask(name: str, prompt: list[int], **knobs: Any) -> Request:
    return Request(id=name, prompt_ids=prompt, **{"max_tokens": 24, "seed": 11, **knobs})


REQUESTS = [
    ask("greedy", PROMPTS[0]),
    ask("greedy, the same prompt", PROMPTS[0], max_tokens=17),
    *(ask(f"one of n, {i}", PROMPTS[1], temperature=1.0, seed=20 + i) for i in range(3)),
    ask("prefix of another", PROMPTS[1][:-1], temperature=0.7),
    ask("filters", PROMPTS[2], temperature=1.3, top_k=20, top_p=0.9, min_p=0.02),
    ask("penalties", PROMPTS[3], temperature=0.8, repetition_penalty=1.3, frequency_penalty=0.2, presence_penalty=0.1),
    ask("greedy with penalties", PROMPTS[0], presence_penalty=0.5, logprobs=1),
    ask("log-probabilities", PROMPTS[2], temperature=0.9, logprobs=3),
    ask("stop tokens", PROMPTS[3], temperature=1.0, stop_token_ids=list(range(3, 128, 9))),
    ask("no drafts", PROMPTS[1], speculate=False, temperature=1.0),
    ask("one token", PROMPTS[2], max_tokens=1),
    ask("past the end of text", PROMPTS[0], ignore_eos=True, temperature=1.2),
]
ROOM = {"max_batch_size": 6, "kv_cache_tokens": 2048, "block_size": 16}
SMALL = {"max_batch_size": 6, "kv_cache_tokens": 112, "block_size": 4, "prefill_tokens": 24}


@pytest.fixture(scope="module")
def checkpoints(base: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, quantiser in BASES.items():
        folders[name] = base
        if quantiser is not None:
            folders[name] = tmp_path_factory.mktemp("base") / "quantised"
            folders[name].mkdir()
            quantiser.quantise(base, folders[name], text if quantiser.calib_samples else None, "cpu")
    return folders


@pytest.fixture(scope="module")
def plain() -> dict[str, dict[str, tuple[Any, ...]]]:
    return {}


def outcome(engine: Engine) -> dict[str, tuple[Any, ...]]:
    """By request: tokens, reason, stop token, log-probabilities."""
    tokens: dict[str, list[int]] = {r.id: [] for r in REQUESTS}
    logprobs: dict[str, list[float]] = {r.id: [] for r in REQUESTS}
    ends: dict[str, tuple[Any, ...]] = {}
    for request in REQUESTS:
        engine.add(replace(request))
    while engine.num_unfinished:
        for output in engine.step():
            tokens[output.id] += output.token_ids
            logprobs[output.id] += [one.logprob for one in output.logprobs or []]
            ends[output.id] = (output.finish_reason, output.stop_token_id)
        engine.pool.check(seq.blocks for seq in engine.scheduler.running)
    assert engine.pool.num_free == engine.pool.capacity
    for request in REQUESTS:
        assert len(logprobs[request.id]) == (len(tokens[request.id]) if request.logprobs is not None else 0)
    return {n: (tokens[n], *ends[n], torch.tensor(logprobs[n])) for n in tokens}


CELLS = [
    pytest.param(drafter, base, marks=[] if (drafter, base) in QUICK else pytest.mark.slow)
    for drafter in DRAFTERS
    for base in BASES
]


@pytest.mark.parametrize(("drafter", "base_kind"), CELLS)
def test_output_is_plain_decoding_s(
    drafter: str, base_kind: str, checkpoints: dict[str, Path], plain: dict[str, dict[str, tuple[Any, ...]]]
) -> None:
    model = load(checkpoints[base_kind], device="cpu", dtype=torch.float32)
    if base_kind not in plain:
        plain[base_kind] = outcome(Engine(model, prefix_caching=False, **ROOM))  # type: ignore[arg-type]
        reasons = {end[1] for end in plain[base_kind].values()}
        assert reasons == {"stop", "length"}
    for shape in (ROOM, SMALL):
        engine = Engine(model, draft=DRAFTERS[drafter](model), **shape)  # type: ignore[arg-type]
        got = outcome(engine)
        for name, (tokens, reason, stop, logprobs) in plain[base_kind].items():
            assert got[name][:3] == (tokens, reason, stop), name
            torch.testing.assert_close(got[name][3], logprobs, atol=1e-3, rtol=0)
        assert engine.counts.drafts > 20
        if drafter in ("redrafter, full head", "redrafter, 4 beams", "draft_model"):
            assert engine.counts.accepted_tokens > 0
        if shape is SMALL:
            assert engine.scheduler.num_preempted > 0
