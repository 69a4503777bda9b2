"""A draft model in the native engine: the base drafting for itself is always right, and the cache stays consistent."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from omr.drafter import NO_DRAFT
from omr.drafter.draft_model import SmallModel
from omr.engine.engine import Engine
from omr.engine.request import Request
from omr.errors import ConfigError, InputError
from omr.nn.loader import load

DATA = Path(__file__).parents[1] / "data" / "redrafter"
BASE = DATA / "base_lm"
GREEDY = json.loads((DATA / "generate_greedy.json").read_text())


@pytest.mark.parametrize("kv_cache_tokens", [4096, 200])
def test_the_base_as_its_own_drafter_accepts_everything(kv_cache_tokens: int) -> None:
    model = load(BASE, device="cpu")
    draft = SmallModel(model=str(BASE), draft_tok=4, kv_cache_tokens=kv_cache_tokens, adaptive=False).load(None, model)
    engine = Engine(model, max_batch_size=2, kv_cache_tokens=2048, draft=draft)
    for i, ids in enumerate(GREEDY["prompts"]):
        engine.add(Request(id=str(i), prompt_ids=ids, max_tokens=60, ignore_eos=True))
    tokens: dict[str, list[int]] = {str(i): [] for i in range(4)}
    while engine.num_unfinished:
        for output in engine.step():
            tokens[output.id] += output.token_ids
    assert list(tokens.values()) == GREEDY["autoregressive_rows"]
    assert engine.counts.accepted_tokens == engine.counts.draft_tokens > 0


def test_drafts_are_the_small_model_s_own_whatever_was_rejected() -> None:
    model = load(BASE, device="cpu")
    draft = SmallModel(model=str(BASE), draft_tok=3, kv_cache_tokens=256).load(None, model)
    rng = random.Random(0)
    sequences = [[rng.randrange(3, 128) for _ in range(rng.randrange(1, 20))] for _ in range(5)]
    for step in range(12):
        chosen = rng.sample(sequences, 3) if step % 2 else sequences[:2]
        found = draft.propose(None, torch.tensor([s[-1] for s in chosen]), chosen)
        for ids, row in zip(chosen, found.tolist(), strict=True):
            text = list(ids)
            for token in row:
                assert token == int(model.lm_head(model.hidden_states(torch.tensor([text]))[0, -1]).argmax())
                text.append(token)
            ids += [*row[: rng.randrange(4)], rng.randrange(3, 128)]
    assert len(draft.free) + sum(len(lane.blocks) for lane in draft.lanes.values()) == 16


def test_a_sequence_that_does_not_fit_has_no_draft() -> None:
    model = load(BASE, device="cpu")
    draft = SmallModel(model=str(BASE), kv_cache_tokens=16).load(None, model)
    long = list(range(3, 60))
    assert draft.propose(None, torch.tensor([59]), [long]).tolist() == [[NO_DRAFT] * 3]
    assert len(draft.free) == 1
    engine = Engine(model, kv_cache_tokens=2048, draft=draft)
    engine.add(Request(id="long", prompt_ids=long, max_tokens=5, ignore_eos=True))
    engine.add(Request(id="short", prompt_ids=[3, 4], max_tokens=5, ignore_eos=True))
    tokens: dict[str, list[int]] = {"long": [], "short": []}
    while engine.num_unfinished:
        for output in engine.step():
            tokens[output.id] += output.token_ids
    for ids, written in ((long, tokens["long"]), ([3, 4], tokens["short"])):
        for end in range(5):
            text = torch.tensor([ids + written[:end]])
            assert written[end] == int(model.lm_head(model.hidden_states(text)[0, -1]).argmax())
    assert (
        0 < engine.counts.accepted_tokens == engine.counts.draft_tokens
    )  # of the short one alone: base and draft agree


def test_refusals(tmp_path: Path) -> None:
    model = load(BASE, device="cpu")
    with pytest.raises(ConfigError, match=r"needs drafter\.model"):
        SmallModel().load(None, model)
    with pytest.raises(InputError, match="is no folder here"):
        SmallModel(model="org/name").load(None, model)
    other = shutil.copytree(BASE, tmp_path / "other")
    model.config.vocab_size = 256
    with pytest.raises(InputError, match="has 128 tokens, the base has 256"):
        SmallModel(model=str(other)).load(None, model)
    with pytest.raises(ConfigError, match="kv_cache_tokens"):
        SmallModel(kv_cache_tokens=0)
