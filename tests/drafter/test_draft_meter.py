"""The replay of held-out text against the engine that serves it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from omr.drafter._documents import Document
from omr.drafter._draft_meter import walk
from omr.drafter._ranks import Ranks
from omr.drafter._training import Training
from omr.drafter.redrafter import Redrafter, Train
from omr.engine.engine import Engine
from omr.engine.request import Request
from omr.nn.loader import load
from omr.nn.redrafter import load_redrafter

DATA = Path(__file__).parents[1] / "data" / "redrafter"


def test_a_step_begins_where_the_last_one_ended() -> None:
    assert list(walk([3, 4, 5, 6, 9], [0, 2, 1, 0, 1])) == [0, 2, 1]
    assert list(walk([], [])) == [] and list(walk([7], [3])) == [3]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_replay_of_the_bases_own_text_is_what_serving_counted(base: Path, temperature: float) -> None:
    """Step by step: the engine writes 12 texts with a drafter, the replay of those texts counts the same steps."""
    model, drafter = load(base, device="cpu"), Redrafter(adaptive=False, stop_below=0.0)
    engine = Engine(model, max_batch_size=4, kv_cache_tokens=2048, draft=drafter.load(DATA / "drafter_rnn2", model))
    torch.manual_seed(1)
    prompts = torch.randint(3, 128, (12, 6)).tolist()
    texts: dict[str, list[int]] = {str(i): [] for i in range(12)}
    for i, prompt in enumerate(prompts):
        engine.add(
            Request(id=str(i), prompt_ids=prompt, max_tokens=40, ignore_eos=True, temperature=temperature, seed=i)
        )
    while engine.num_unfinished:
        for output in engine.step():
            texts[output.id] += output.token_ids
    documents = [
        Document.of(prompt + text, [False] * len(prompt) + [True] * len(text), 3)
        for prompt, text in zip(prompts, texts.values(), strict=True)
    ]
    head = load_redrafter(DATA / "drafter_rnn2")
    option = replace(drafter, train=Train(rows=12))
    metrics = Training(option, model, head, documents, documents, Ranks(0, 1, torch.device("cpu"))).measure()
    counts = engine.counts
    served = 1 + counts.accepted_tokens / counts.drafts
    # The engine drafts at the last token too, and counts drafts behind the end: at most one step a text.
    assert counts.accepted_tokens > 20
    assert metrics["replayed_len_mean_tok"] == pytest.approx(served, abs=12 * 4 / counts.drafts)
    np.testing.assert_allclose(
        [metrics[f"redrafter{i}_replay"] for i in range(3)],
        np.array(counts.accepted_per_pos) / counts.drafts,
        atol=12 / counts.drafts,
    )
