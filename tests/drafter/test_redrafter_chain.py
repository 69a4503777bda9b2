"""The tabulated CPU chain drafts what the module's own chain drafts, alone or in any batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from omr.drafter._redrafter_chain import BeamTree, Chain, TabulatedChain, TabulatedTree, draft_model
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
    fast, slow = draft_model(head, embedding, 4), Chain(head, embedding, 4)
    assert isinstance(fast, TabulatedChain)
    drafts = fast.propose(hidden, tokens, None)
    assert drafts.shape == (64, 4) and drafts.dtype == torch.int64
    assert torch.equal(drafts, slow.propose(hidden, tokens, None))
    alone = torch.cat([fast.propose(hidden[i : i + 1], tokens[i : i + 1], None) for i in range(64)])
    assert torch.equal(drafts, alone)


@pytest.mark.parametrize("beams", [2, 5])
@pytest.mark.parametrize("which", range(4 + len(SHAPES)))
def test_tabulated_tree_is_the_tree(which: int, beams: int) -> None:
    head, golden = heads()[which], load_file(DATA / "beam_rnn2.safetensors")
    embedding, hidden, tokens = golden["embeddings"], torch.randn(64, 32), torch.randint(128, (64,))
    slow, fast = BeamTree(head, embedding, 3, beams), draft_model(head, embedding, 3, num_beams=beams)
    assert isinstance(fast, TabulatedTree)
    wanted, got = slow.propose_tree(hidden, tokens), fast.propose_tree(hidden, tokens)
    for name in ("tokens", "parents", "depths", "sees", "sizes", "unpacker"):
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name
    alone = fast.propose_tree(hidden[7:8], tokens[7:8])
    assert torch.equal(alone.tokens[0], got.tokens[7, : alone.tokens.shape[1]])
    assert torch.equal(fast.propose(hidden, tokens, None), Chain(head, embedding, 3).propose(hidden, tokens, None))


@pytest.mark.parametrize("which", [0, 3, 7])
def test_a_draft_ends_where_it_is_unlikely_to_hold(which: int) -> None:
    """One sequence: after the first token at which the product of the drafter's own probabilities is below the bound.
    A batch: where the mean over its sequences is, of a bound that is nearly twice as high."""
    head, golden = heads()[which], load_file(DATA / "beam_rnn2.safetensors")
    embedding, hidden, tokens = golden["embeddings"], torch.randn(64, 32), torch.randint(128, (64,))
    whole, logits = draft_model(head, embedding, 5), []
    drafts = whole.propose_sampled(hidden, tokens, None, lambda k, y: logits.append(y) or chosen(head, y))
    holds = torch.stack(logits, 1).softmax(-1).amax(-1).cumprod(1)  # (64, 5)
    bound = float(holds[:, 2].median()) * 1.001
    stopped = draft_model(head, embedding, 5, stop_below=bound)

    def length(chances: torch.Tensor, bound: float = bound) -> int:
        below = (chances < bound).nonzero()
        return min(int(below[0]) + 1, 5) if len(below) else 5

    seen = set()
    for i in range(64):
        alone = stopped.propose(hidden[i : i + 1], tokens[i : i + 1], None)
        seen.add(alone.shape[1])
        assert torch.equal(alone, drafts[i : i + 1, : length(holds[i])])
    assert len(seen) > 1, "the bound was meant to cut some drafts and not others"
    assert torch.equal(stopped.propose(hidden, tokens, None), drafts[:, : length(holds.mean(0), bound * 128 / 65)])
    assert torch.equal(whole.propose(hidden, tokens, None), drafts)
    assert draft_model(head, embedding, 5, stop_below=1.0).propose(hidden, tokens, None).shape == (64, 1)


def chosen(head: Redrafter, logits: torch.Tensor) -> torch.Tensor:
    rows = logits.argmax(-1)
    return rows if head.draft_tokens is None else head.draft_tokens[rows]


@pytest.mark.parametrize("which", range(4 + len(SHAPES)))
def test_eight_bit_chains_draft_nearly_the_same(which: int) -> None:
    head, golden = heads()[which], load_file(DATA / "beam_rnn2.safetensors")
    embedding, hidden, tokens = golden["embeddings"], torch.randn(64, 32), torch.randint(128, (64,))
    exact = Chain(head, embedding, 3).propose(hidden, tokens, None)
    fast = draft_model(head, embedding, 3, in_eight_bit=True)
    drafts = fast.propose(hidden, tokens, None)
    assert (drafts[:, 0] == exact[:, 0]).float().mean() > 0.8
    alone = torch.cat([fast.propose(hidden[i : i + 1], tokens[i : i + 1], None) for i in range(64)])
    assert torch.equal(drafts, alone), "a draft depends on its batch mates"
    tree = draft_model(head, embedding, 3, num_beams=2, in_eight_bit=True)
    assert isinstance(tree, TabulatedTree)
    assert (tree.propose(hidden, tokens, None)[:, 0] == drafts[:, 0]).float().mean() > 0.9
    assert tree.propose_tree(hidden, tokens).tokens.shape[0] == 64


def test_a_drafter_of_the_golden_set_drafts_the_golden_chain() -> None:
    golden = load_file(DATA / "beam_rnn2.safetensors")
    model = draft_model(load_redrafter(DATA / "drafter_rnn2"), golden["embeddings"], 3)
    assert isinstance(model, TabulatedChain) and model.needs_hidden
    drafts = model.propose(golden["lm.prompt_state"], golden["lm.init_token"], None)
    assert torch.equal(drafts, golden["lm.1x4.beams"][:, 0, 1:])
