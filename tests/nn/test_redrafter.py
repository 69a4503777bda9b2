"""The drafter against numbers of Apple's package (tests/data/redrafter/README.md) and against plain formulas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from omr.errors import ConfigError, InputError
from omr.nn.draft_loss import Targets, draft_loss, linear_cross_entropy, target_mask
from omr.nn.redrafter import Redrafter, RedrafterConfig, fingerprint, load_redrafter, parameter_count

DATA = Path(__file__).parents[1] / "data" / "redrafter"
TRAINED = ("rnn2", "rnn1", "sum2")
ALL = (*TRAINED, "proj")
LOSSES = json.loads((DATA / "loss.json").read_text())


def load(name: str) -> Redrafter:
    return load_redrafter(DATA / f"drafter_{name}")


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    return load_file(DATA / "loss.safetensors")


@pytest.fixture(scope="module")
def embeddings() -> Tensor:
    return load_file(DATA / "beam_rnn2.safetensors")["embeddings"]


@pytest.mark.parametrize("name", ALL)
def test_shapes_and_parameter_count_of_the_reference_checkpoints(name: str) -> None:
    known = json.loads((DATA / "checkpoints.json").read_text())[name]
    drafter = load(name)
    assert {k: list(v.shape) for k, v in drafter.state_dict().items()} == known["parameters"]
    assert parameter_count(drafter.config) == known["n_parameters"]
    assert {k: getattr(drafter.config, k) for k in known["config"]} == known["config"]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("inputs", ["lm", "rand"])
def test_first_step(name: str, inputs: str) -> None:
    golden = load_file(DATA / f"beam_{name}.safetensors")
    drafter, context = load(name), golden[f"{inputs}.prompt_state"]
    newest = golden["embeddings"][golden[f"{inputs}.init_token"]]
    state = drafter.advance(drafter.first_state(context), drafter.embed_term(newest))
    torch.testing.assert_close(state, golden[f"{inputs}.step1.state"], atol=1e-4, rtol=1e-4)
    logits = drafter.logits(context, state)
    torch.testing.assert_close(logits, golden[f"{inputs}.step1.raw_logits"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("inputs", ["lm", "rand"])
def test_greedy_chain_is_the_one_beam_search(name: str, inputs: str) -> None:
    golden = load_file(DATA / f"beam_{name}.safetensors")
    chain = load(name).draft_chain(
        golden[f"{inputs}.prompt_state"], golden[f"{inputs}.init_token"], golden["embeddings"], 3
    )
    assert torch.equal(chain, golden[f"{inputs}.1x4.beams"][:, 0, 1:])


def reference_mask(batch: dict[str, Tensor], labels: str, n: int) -> Tensor:
    marks = batch[f"labels_{labels}"] != -100
    return target_mask(marks, batch["attention_mask"].sum(1), n, contiguous=False)


@pytest.mark.parametrize("labels", ["all", "completion"])
@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize("name", TRAINED)
def test_loss_accuracy_and_gradients(
    name: str, n: int, labels: str, batch: dict[str, Tensor], embeddings: Tensor
) -> None:
    known = LOSSES[f"{name}.n{n}.{labels}"]
    drafter = load(name).requires_grad_(True)
    targets = Targets.of(batch["input_ids"], reference_mask(batch, labels, n))
    assert targets.counts == known["n_targets"]
    out = draft_loss(
        drafter,
        batch["hidden_states"],
        embeddings[batch["input_ids"]],
        targets,
        targets.counts,
        want_ranks=True,
        chunk=16,
    )
    assert out.total.item() == pytest.approx(known["loss"], rel=1e-5)
    assert out.ranks is not None
    for i in range(n):
        assert out.losses[i].mean().item() == pytest.approx(known["metrics"][f"redrafter{i}_loss"], rel=1e-5)
        for k in range(1, 6):
            share = (out.ranks[i] < k).float().mean().item()
            assert share == pytest.approx(known["metrics"][f"redrafter{i}_top{k}"], abs=1e-6), (i, k)
    out.total.backward()
    grads = {k: p.grad for k, p in drafter.named_parameters()}
    for key, norm in known["grad_norms"].items():
        assert grads[key].norm().item() == pytest.approx(norm, rel=1e-4)
    if labels == "all":
        for key, grad in grads.items():
            torch.testing.assert_close(grad, batch[f"{name}.n{n}.grad.{key}"], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", TRAINED)
def test_adamw_trajectory(name: str, batch: dict[str, Tensor], embeddings: Tensor) -> None:
    drafter = load(name).requires_grad_(True)
    optimiser = torch.optim.AdamW(drafter.parameters(), lr=1e-3, weight_decay=0.0)
    targets = Targets.of(batch["input_ids"], reference_mask(batch, "all", 3))
    embedded, losses = embeddings[batch["input_ids"]], []
    for _ in range(10):
        out = draft_loss(drafter, batch["hidden_states"], embedded, targets, targets.counts, want_ranks=False)
        losses.append(out.total.item())
        optimiser.zero_grad()
        out.total.backward()
        optimiser.step()
    assert losses == pytest.approx(LOSSES[f"{name}.trajectory"]["losses"], rel=1e-3)


def test_micro_batches_add_up_to_the_whole_step(batch: dict[str, Tensor], embeddings: Tensor) -> None:
    """Accumulation over rows of unequal length gives the gradient of one big batch, empty positions included."""
    n, ids, lengths = 3, batch["input_ids"], batch["attention_mask"].sum(1)
    marks = torch.arange(24) < lengths[:, None]
    lengths = torch.tensor([24, 17, 4, 2])  # the last row has no target at any position
    whole = Targets.of(ids, target_mask(marks, lengths, n))
    drafters = [load("rnn2").requires_grad_(True) for _ in range(2)]
    total = draft_loss(
        drafters[0], batch["hidden_states"], embeddings[ids], whole, whole.counts, want_ranks=False
    ).total
    total.backward()
    parts = 0.0
    for row in range(4):
        r = slice(row, row + 1)
        part = Targets.of(ids[r], target_mask(marks[r], lengths[r], n))
        out = draft_loss(
            drafters[1], batch["hidden_states"][r], embeddings[ids[r]], part, whole.counts, want_ranks=False
        )
        out.total.backward()
        parts += out.total.item()
    assert parts == pytest.approx(total.item(), rel=1e-5)
    for a, b in zip(drafters[0].parameters(), drafters[1].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4)


def test_no_target_at_all_is_zero_loss_and_zero_gradient(batch: dict[str, Tensor], embeddings: Tensor) -> None:
    drafter = load("rnn2").requires_grad_(True)
    nothing = Targets.of(batch["input_ids"], target_mask(torch.zeros(4, 24, dtype=torch.bool), torch.full((4,), 24), 3))
    out = draft_loss(
        drafter, batch["hidden_states"], embeddings[batch["input_ids"]], nothing, nothing.counts, want_ranks=True
    )
    out.total.backward()
    assert out.total.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in drafter.parameters())


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_target_mask_against_its_definition(data: st.DataObject) -> None:
    b, t, n = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4))
    marks = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=t, max_size=t), min_size=b, max_size=b)))
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, t), min_size=b, max_size=b)))
    for contiguous in (True, False):
        mask = target_mask(marks, lengths, n, contiguous=contiguous)
        for i in range(n):
            for row in range(b):
                for at in range(t):
                    needed = range(at + 1, at + i + 3) if contiguous else [at + i + 2]
                    expected = all(k < lengths[row] and marks[row, k] for k in needed)
                    assert mask[i, row, at] == expected, (contiguous, i, row, at)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_chunked_cross_entropy_against_autograd(chunk: int, share: float) -> None:
    torch.manual_seed(0)
    z, matrix = torch.randn(23, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    words, weights = torch.randint(11, (23,)), torch.rand(23)
    hidden, base = torch.randn(23, 4), torch.randn(11, 4)
    logits = z @ matrix.T
    target = (1 - share) * F.one_hot(words, 11) + share * torch.softmax(hidden @ base.T, -1)
    expected = (-(target * logits.log_softmax(-1)).sum(-1) * weights).sum()
    expected_grads = torch.autograd.grad(expected * 3, (z, matrix))
    teacher = (hidden, base, share) if share else None
    total, losses, ranks = linear_cross_entropy(
        z, matrix, words, weights, want_ranks=True, teacher=teacher, chunk=chunk
    )
    grads = torch.autograd.grad(total * 3, (z, matrix))
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(losses, F.cross_entropy(logits, words, reduction="none").detach())
    order = torch.argsort(logits, dim=-1, descending=True, stable=True)
    assert torch.equal(ranks, (order == words[:, None]).nonzero()[:, 1])
    for a, b in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b)


def test_ties_count_for_the_lower_token() -> None:
    matrix, z = torch.tensor([[1.0], [1.0], [0.0]]), torch.ones(3, 1)
    _, _, ranks = linear_cross_entropy(z, matrix, torch.tensor([0, 1, 2]), torch.ones(3), want_ranks=True)
    assert ranks.tolist() == [0, 1, 2]


def test_reduced_vocabulary_drafts_and_trains_only_its_tokens(batch: dict[str, Tensor], embeddings: Tensor) -> None:
    torch.manual_seed(0)
    config = RedrafterConfig(
        vocab_size=128, hidden_size=32, exit_dim=64, num_draft_layers=1, rnn=True, draft_vocab_size=40
    )
    full = Redrafter(RedrafterConfig(vocab_size=128, hidden_size=32, exit_dim=64, num_draft_layers=1, rnn=True))
    cut, tokens = Redrafter(config), torch.randperm(128)[:40].sort().values
    cut.load_state_dict(full.state_dict() | {"lm_head.1.weight": full.head.weight[tokens]}, strict=False)
    cut.set_draft_tokens(tokens.flip(0))
    assert torch.equal(cut.draft_tokens, tokens)
    ids = batch["input_ids"]
    chain = cut.draft_chain(batch["hidden_states"][:, 3], ids[:, 4], embeddings, 3)
    assert torch.isin(chain, tokens).all()
    logits = full.logits(
        batch["hidden_states"][:, 3],
        full.advance(full.first_state(batch["hidden_states"][:, 3]), full.embed_term(embeddings[ids[:, 4]])),
    )
    outside = torch.ones(128, dtype=torch.bool).index_fill(0, tokens, False)
    assert torch.equal(chain[:, 0], logits.masked_fill(outside, -torch.inf).argmax(-1))
    targets = Targets.of(ids, reference_mask(batch, "all", 3))
    out = draft_loss(cut, batch["hidden_states"], embeddings[ids], targets, targets.counts, want_ranks=True)
    inside = torch.isin(targets.tokens, tokens)
    assert torch.equal(torch.cat(out.drafted), inside)
    assert (torch.cat(out.losses)[~inside] == 0).all() and (torch.cat(out.losses)[inside] > 0).all()
    assert (torch.cat(out.ranks)[~inside] == 128).all() and (torch.cat(out.ranks)[inside] < 40).all()


@pytest.mark.parametrize(
    "change",
    [
        {"head": "full", "exit_dim": 48},
        {"head": "low_rank", "head_rank": 8},
        {"head": "base"},
        {"head": "base", "draft_vocab_size": 17, "exit_dim": 32},
        {"head": "low_rank", "head_rank": 5, "draft_vocab_size": 64, "rnn": False},
    ],
)
def test_every_head_saves_loads_counts_and_learns(
    change: dict[str, object], tmp_path: Path, batch: dict[str, Tensor], embeddings: Tensor
) -> None:
    torch.manual_seed(1)
    shape = {"vocab_size": 128, "hidden_size": 32, "exit_dim": 64, "num_draft_layers": 2, "rnn": True, "predict_n": 3}
    drafter = Redrafter(RedrafterConfig(**{**shape, **change}))  # type: ignore[arg-type]
    if drafter.config.draft_vocab_size:
        drafter.set_draft_tokens(torch.arange(drafter.config.draft_vocab_size) * 2 % 128)
    base_matrix = torch.randn(128, 32)
    drafter.attach(base_matrix)
    assert sum(p.numel() for p in drafter.parameters()) == parameter_count(drafter.config)
    targets = Targets.of(batch["input_ids"], reference_mask(batch, "all", 3))
    optimiser, losses = torch.optim.AdamW(drafter.parameters(), lr=3e-3, weight_decay=0.0), []
    for _ in range(8):
        out = draft_loss(
            drafter, batch["hidden_states"], embeddings[batch["input_ids"]], targets, targets.counts,
            want_ranks=False, distil=0.3, base_matrix=base_matrix,
        )  # fmt: skip
        losses.append(out.total.item())
        optimiser.zero_grad()
        out.total.backward()
        optimiser.step()
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and p.grad.any() for p in drafter.parameters())
    drafter.save(tmp_path)
    again = load_redrafter(tmp_path)
    again.attach(base_matrix)
    assert again.config == drafter.config
    hidden, newest = batch["hidden_states"][:, 5], batch["input_ids"][:, 6]
    assert torch.equal(
        again.draft_chain(hidden, newest, embeddings, 3), drafter.draft_chain(hidden, newest, embeddings, 3)
    )


def test_plain_drafter_writes_only_the_keys_of_the_reference(tmp_path: Path) -> None:
    drafter = load("proj")
    drafter.save(tmp_path)
    reference = json.loads((DATA / "drafter_proj" / "config.json").read_text())
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == {k: v for k, v in reference.items() if k not in ("torch_dtype", "transformers_version")}
    known, mine = load_file(DATA / "drafter_proj" / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert known.keys() == mine.keys() and all(torch.equal(known[k], mine[k]) for k in known)


def test_loader_refuses_what_its_config_does_not_imply(tmp_path: Path) -> None:
    source = DATA / "drafter_rnn2"
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")

    def attempt(match: str, *, cfg: object = config, weights: dict[str, Tensor] | bytes = tensors) -> None:
        (tmp_path / "config.json").write_text(json.dumps(cfg))
        if isinstance(weights, bytes):
            (tmp_path / "model.safetensors").write_bytes(weights)
        else:
            save_file(weights, tmp_path / "model.safetensors")
        with pytest.raises(InputError, match=match) as caught:
            load_redrafter(tmp_path)
        assert "\n" not in str(caught.value)

    with pytest.raises(InputError, match="missing"):
        load_redrafter(tmp_path / "nowhere")
    attempt("lacks 'rnn_w.weight'", weights={k: v for k, v in tensors.items() if k != "rnn_w.weight"})
    attempt("has 'extra'", weights=tensors | {"extra": torch.zeros(1)})
    attempt("shape", weights=tensors | {"rnn_w.weight": torch.zeros(3, 3)})
    attempt("truncated", weights=(source / "model.safetensors").read_bytes()[:1000])
    attempt("lm_head.1.weight", cfg=config | {"num_draft_layers": 1})
    attempt("shape", cfg=config | {"vocab_size": 129})
    attempt("hidden_size", cfg={k: v for k, v in config.items() if k != "hidden_size"})
    attempt("must be int", cfg=config | {"exit_dim": "64"})
    attempt("not a drafter", cfg=config | {"model_type": "llama"})
    attempt("JSON object", cfg=[1])
    attempt("head must be one of", cfg=config | {"head": "mlp"})
    attempt(">= 1", cfg=config | {"vocab_size": 0})
    reduced = {"d2t": torch.full((128,), 200), "t2d": torch.zeros(128, dtype=torch.bool)}
    attempt("d2t", cfg=config | {"draft_vocab_size": 128}, weights=tensors | reduced)


def test_config_refuses_bad_shapes() -> None:
    with pytest.raises(ConfigError, match="exceeds"):
        RedrafterConfig(vocab_size=8, hidden_size=4, exit_dim=8, num_draft_layers=1, draft_vocab_size=9)
    with pytest.raises(ConfigError, match="head_rank"):
        RedrafterConfig(vocab_size=8, hidden_size=4, exit_dim=8, num_draft_layers=1, head="low_rank")


def test_fingerprint_survives_the_dtype_and_tells_tables_apart() -> None:
    table = torch.randn(100, 8).to(torch.bfloat16)
    assert fingerprint(table) == fingerprint(table.float()) == fingerprint(table.double())
    other = table.clone()
    other[3, 3] += 1
    assert fingerprint(other) != fingerprint(table) != fingerprint(table[:99])


@pytest.mark.parametrize(
    ("shape", "rank"),
    [
        ({"exit_dim": 64}, 32),
        ({"exit_dim": 40}, 32),
        ({"exit_dim": 12}, 12),
        ({"exit_dim": 12, "draft_vocab_size": 60}, 12),
        ({"exit_dim": 64, "head": "low_rank", "head_rank": 7}, 7),
        ({"exit_dim": 20, "head": "low_rank", "head_rank": 64}, 20),
        ({"exit_dim": 24, "head": "base"}, 24),
    ],
)
def test_a_head_starts_as_the_base_s_output_as_far_as_its_rank_goes(shape: dict[str, Any], rank: int) -> None:
    torch.manual_seed(0)
    known = {"vocab_size": 128, "hidden_size": 32, "exit_dim": 64, "num_draft_layers": 0, "rnn": True}
    head = Redrafter(RedrafterConfig(**{**known, **shape})).double()
    if head.config.draft_vocab_size:
        head.set_draft_tokens(torch.arange(60) * 2)
    matrix = torch.randn(128, 32) @ torch.diag(torch.logspace(0, -2, 32))
    head.start_from(torch.randn(128, 32), matrix)
    head.attach(matrix)
    if head.draft_tokens is not None:
        matrix = matrix[head.draft_tokens]
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    nearest = left[:, :rank] @ torch.diag(values[:rank]) @ right[:rank]
    context, state = torch.randn(9, 32).double(), torch.randn(9, 32).double()
    torch.testing.assert_close(head.logits(context, state), state @ nearest.T, atol=1e-4, rtol=1e-4)
