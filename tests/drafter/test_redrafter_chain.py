"""The tabulated CPU chain drafts what the module's own chain drafts, alone or in any batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from omr.drafter._redrafter_chain import Chain, TabulatedChain, draft_model
from omr.nn.redrafter import Redrafter, RedrafterConfig, load_redrafter

DATA = Path(__file__).parents[1] / "data" / "redrafter"
SHAPES: list[dict[str, object]] = [
    {"num_draft_layers": 0},
    {"num_draft_layers": 0, "exit_dim": 20},
    {"num_draft_layers": 3, "rnn": False, "head": "base"},
    {"head": "low_rank", "head_rank": 9, "draft_vocab_size": 31},
]


def heads() -> list[Redrafter]:
    torch.manual_seed(0)
    made = [load_redrafter(DATA / f"drafter_{name}") for name in ("rnn2", "rnn1", "sum2", "proj")]
    for shape in SHAPES:
        known = {"vocab_size": 128, "hidden_size": 32, "exit_dim": 64, "num_draft_layers": 2, "rnn": True}
        head = Redrafter(RedrafterConfig(**{**known, **shape}))  # type: ignore[arg-type]
        if head.config.draft_vocab_size:
            head.set_draft_tokens(torch.randperm(128)[:31])
        head.attach(torch.randn(128, 32))
        made.append(head.eval().requires_grad_(False))
    return made


@pytest.mark.parametrize("which", range(4 + len(SHAPES)))
def test_tabulated_chain_is_the_chain(which: int) -> None:
    head, golden = heads()[which], load_file(DATA / "beam_rnn2.safetensors")
    embedding, hidden, tokens = golden["embeddings"], torch.randn(64, 32), torch.randint(128, (64,))
    fast, slow = TabulatedChain(head, embedding, 4), Chain(head, embedding, 4)
    drafts = fast.propose(hidden, tokens, None)
    assert drafts.shape == (64, 4) and drafts.dtype == torch.int64
    assert torch.equal(drafts, slow.propose(hidden, tokens, None))
    alone = torch.cat([fast.propose(hidden[i : i + 1], tokens[i : i + 1], None) for i in range(64)])
    assert torch.equal(drafts, alone)


def test_a_drafter_of_the_golden_set_drafts_the_golden_chain() -> None:
    golden = load_file(DATA / "beam_rnn2.safetensors")
    model = draft_model(load_redrafter(DATA / "drafter_rnn2"), golden["embeddings"], 3)
    assert isinstance(model, TabulatedChain) and model.needs_hidden
    drafts = model.propose(golden["lm.prompt_state"], golden["lm.init_token"], None)
    assert torch.equal(drafts, golden["lm.1x4.beams"][:, 0, 1:])
