"""Small random models with their transformers oracle, and a way to run requests to the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from omr.engine.engine import Engine
from omr.engine.request import Request, TokenLogprob
from omr.nn.loader import load
from omr.nn.transformer import Transformer

VOCAB = 64
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
}


@dataclass
class Pair:
    """One set of weights, theirs and ours."""

    theirs: PreTrainedModel
    ours: Transformer
    folder: Path

    def logits(self, tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return self.theirs(torch.tensor([tokens])).logits[0]

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    built = {}
    for family, overrides in FAMILIES.items():
        shape = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
        shape |= {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**shape, **overrides})).eval().float()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.25)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        folder: Path = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        built[family] = Pair(model, load(folder, device="cpu"), folder)
    return built


@pytest.fixture(scope="session")
def pair(pairs: dict[str, Pair]) -> Pair:
    return pairs["qwen2"]


@dataclass
class Done:
    """All that one request got."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_token_id: int | None = None
    num_cached: int = 0
    steps: int = 0


def run_all(engine: Engine, requests: Iterable[Request]) -> dict[str, Done]:
    """Add all requests, step until every one has finished, check that nothing is held afterwards."""
    done: dict[str, Done] = {}
    for request in requests:
        engine.add(request)
        done[request.id] = Done()
    while engine.num_unfinished:
        for output in engine.step():
            one = done[output.id]
            assert one.finish_reason is None and output.token_ids
            one.tokens += output.token_ids
            one.logprobs += output.logprobs or []
            one.finish_reason, one.stop_token_id = output.finish_reason, output.stop_token_id
            one.num_cached = output.num_cached_tokens
            one.steps += 1
        engine.pool.check(seq.blocks for seq in engine.scheduler.running)
    assert engine.pool.num_free == engine.pool.capacity
    assert engine.step() == []
    return done


@pytest.fixture(scope="session")
def run() -> Callable[[Engine, Iterable[Request]], dict[str, Done]]:
    return run_all


@pytest.fixture
def make_engine(pair: Pair) -> Callable[..., Engine]:
    def make(**knobs: Any) -> Engine:
        shape = {"max_batch_size": 8, "kv_cache_tokens": 1024, "block_size": 4}
        return Engine(pair.ours, **{**shape, **knobs})

    return make
