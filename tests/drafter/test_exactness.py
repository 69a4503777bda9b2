"""Speculation changes the speed and nothing else: the engine with every kind of drafter against plain decoding.

Greedy output must be plain decoding's token for token (float32, CPU). A sampled token is a function of logits, seed and
position, so sampled output must be plain decoding's as well, and its law must be the model's own: the joint law of
tokens 1 and 2 against tests/data/redrafter/sampling.safetensors, that of tokens 2 and 3 (the third is drawn at the end
of an accepted draft) against enumeration. Drafts that are right, wrong, trained, untrained or made of one token must
not matter.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from torch import Tensor

from omr.drafter import DraftModel
from omr.drafter.ngram import Ngram
from omr.drafter.redrafter import Redrafter
from omr.engine.engine import Engine
from omr.engine.pace import Pace
from omr.engine.request import Request
from omr.nn.decoder import Batch
from omr.nn.draft_tree import Tree
from omr.nn.loader import load
from omr.nn.transformer import Transformer

DATA = Path(__file__).parents[1] / "data" / "redrafter"
GREEDY = json.loads((DATA / "generate_greedy.json").read_text())
ENUMERATED: dict[tuple[int, float, int], Tensor] = {}
CHAINS = ("none", "rnn2", "rnn2-sampled", "rnn1", "sum2", "proj", "ngram", "oracle", "contrary", "constant")
TREES = ("rnn2-4x4", "rnn2-10x5", "rnn1-4x4", "sum2-10x5", "proj-4x4", "rnn2-2x2")


class Oracle:
    """Drafts what the base itself would say: every draft must be accepted."""

    needs_hidden = False
    num_draft_tok = 3

    def __init__(self, model: Transformer, *, contrary: bool = False) -> None:
        self.model, self.contrary = model, contrary

    def propose(self, hidden: Tensor | None, tokens: Tensor, history: Sequence[Sequence[int]] | None) -> Tensor:
        assert history is not None
        rows = []
        for ids in history:
            text = list(ids)
            for _ in range(self.num_draft_tok):
                best = int(self.model.lm_head(self.model.hidden_states(torch.tensor([text]))[0, -1]).argmax())
                text.append((best + 1) % 128 if self.contrary else best)
            rows.append(text[len(ids) :])
        return torch.tensor(rows)


class Constant:
    """Drafts one token for ever."""

    needs_hidden = True
    num_draft_tok = 5

    def propose(self, hidden: Tensor | None, tokens: Tensor, history: Sequence[Sequence[int]] | None) -> Tensor:
        assert hidden is not None and hidden.shape == (len(tokens), 32) and history is None
        return torch.full((len(tokens), self.num_draft_tok), 88)


@pytest.fixture(scope="module")
def model() -> Iterator[Transformer]:
    with torch.inference_mode():
        yield load(DATA / "base_lm", device="cpu")


def drafter(name: str, model: Transformer) -> DraftModel | None:
    if name == "none":
        return None
    if name == "ngram":
        return Ngram(adaptive=False).load(None, model)
    if name in ("oracle", "contrary"):
        return Oracle(model, contrary=name == "contrary")
    if name == "constant":
        return Constant()
    name, _, shape = name.partition("-")
    if shape == "sampled":
        return Redrafter(sampled=True, adaptive=False).load(DATA / f"drafter_{name}", model)
    beams, _, length = (shape or "1x4").partition("x")  # the newest token counts, as in the reference
    option = Redrafter(predict_n=int(length) - 1, num_beams=int(beams), adaptive=False, stop_below=0.0)
    return option.load(DATA / f"drafter_{name}", model)


def engine(model: Transformer, name: str, **knobs: int) -> Engine:
    settings = {"max_batch_size": 4, "kv_cache_tokens": 2048, "block_size": 16} | knobs
    return Engine(model, draft=drafter(name, model), **settings)  # type: ignore[arg-type]


def generate(engine: Engine, requests: list[Request]) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Tokens of each request, and how many each step gave it."""
    for request in requests:
        engine.add(request)
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    lengths: dict[str, list[int]] = {request.id: [] for request in requests}
    while engine.num_unfinished:
        for output in engine.step():
            tokens[output.id] += output.token_ids
            lengths[output.id].append(len(output.token_ids))
    assert engine.pool.num_free == engine.pool.capacity
    return tokens, lengths


def prompts(**knobs: object) -> list[Request]:
    return [
        Request(id=str(i), prompt_ids=ids, max_tokens=60, ignore_eos=True, **knobs)  # type: ignore[arg-type]
        for i, ids in enumerate(GREEDY["prompts"])
    ]


def test_a_batch_of_trees_verifies_its_real_nodes_only(model: Transformer) -> None:
    made, sizes, rows = engine(model, "rnn2-4x4"), [], []
    runner = made.runner
    propose, forward = runner.draft.propose_tree, runner.decoder.forward

    def proposed(hidden: Tensor, tokens: Tensor) -> Tree:
        tree = propose(hidden, tokens)
        sizes.append(tree.sizes.tolist())
        return tree

    def ran(tokens: Tensor, positions: Tensor, batch: Batch) -> Tensor:
        rows.append(len(tokens))
        return forward(tokens, positions, batch)

    runner.draft.propose_tree, runner.decoder.forward = proposed, ran
    generate(made, prompts())
    assert rows[-len(sizes) :] == [sum(step) for step in sizes]
    assert any(len(set(step)) > 1 for step in sizes), "trees of different sizes were meant to share a step"


@pytest.mark.parametrize("name", (*CHAINS, *TREES))
def test_greedy_output_is_the_reference_model_s(name: str, model: Transformer) -> None:
    made = engine(model, name)
    tokens, lengths = generate(made, prompts())
    assert list(tokens.values()) == GREEDY["autoregressive_rows"]
    counts = made.counts
    if name == "oracle":
        assert all(set(steps[1:-1]) == {4} for steps in lengths.values())
        assert counts.accepted_tokens == counts.draft_tokens > 0
    if name in ("contrary", "none"):
        assert counts.accepted_tokens == 0 and all(set(steps) == {1} for steps in lengths.values())
    if name in ("rnn2", "rnn1", "sum2"):
        assert 0.5 < counts.accepted_tokens / counts.drafts < 1.5


@pytest.mark.parametrize("shape", ["1x4", "4x4", "10x5"])
@pytest.mark.parametrize("name", ["rnn2", "rnn1", "sum2", "proj"])
def test_every_step_accepts_what_the_reference_accepts(name: str, shape: str, model: Transformer) -> None:
    _, lengths = generate(engine(model, f"{name}-{shape}"), prompts())
    known = GREEDY["runs"][f"{name}.{shape}.all"]["steps"]
    for row, steps in enumerate(lengths.values()):
        accepted = [n - 1 for n in steps[1:]]  # the first token comes from the prompt
        reference = [step["accepted"][row] for step in known]
        shared = min(len(accepted) - 1, len(reference) - 1)  # either side may cut its last step
        assert shared > 5 and accepted[:shared] == reference[:shared]


LAWS_OF_REQUESTS: list[dict[str, object]] = [
    {"temperature": 1.0, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 0.7, "repetition_penalty": 1.3, "frequency_penalty": 0.2, "logprobs": 1},
    {"temperature": 0.8},
    {"temperature": 1.3, "top_k": 20},
    {"temperature": 0.0, "presence_penalty": 0.5, "logprobs": 2},
]
QUICK = [(name, law) for name in ("rnn2", "rnn2-4x4") for law in LAWS_OF_REQUESTS[:2]]
REST = [
    (name, law)
    for name in ("rnn2", "proj", "ngram", "constant", "rnn2-4x4", "proj-10x5")
    for law in LAWS_OF_REQUESTS
    if (name, law) not in QUICK
]


@pytest.mark.parametrize(("name", "knobs"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)])
def test_sampled_output_is_plain_decoding_s(name: str, knobs: dict[str, object], model: Transformer) -> None:
    plain, _ = generate(engine(model, "none"), prompts(seed=5, **knobs))
    for sizes in ({}, {"max_batch_size": 2, "kv_cache_tokens": 160, "block_size": 4}):  # the second one preempts
        drafted, _ = generate(engine(model, name, **sizes), prompts(seed=5, **knobs))
        assert drafted == plain


@pytest.mark.parametrize("name", ["rnn2", "ngram", "rnn2-4x4"])
def test_output_is_the_same_whenever_drafting_is_switched(name: str, model: Transformer) -> None:
    """Speculative and plain steps alternate at random: as `adaptive` may do, or requests that ask for none."""
    rng = random.Random(3)
    made = engine(model, name)
    made.runner.draft.adaptive = True  # type: ignore[union-attr]
    pace = made.pace = Pace(made.runner.draft.num_draft_tok)  # type: ignore[union-attr]
    pace.drafts = lambda batch: rng.choice(pace.lengths)  # type: ignore[method-assign]
    pace.done = lambda results: None  # type: ignore[method-assign]
    quiet = [
        Request(id=f"q{i}", prompt_ids=ids, max_tokens=60, ignore_eos=True, speculate=False)
        for i, ids in enumerate(GREEDY["prompts"][:2])
    ]
    tokens, lengths = generate(made, prompts() + quiet)
    rows = GREEDY["autoregressive_rows"]
    assert list(tokens.values()) == rows + rows[:2]
    assert all(set(lengths[r.id]) == {1} for r in quiet)
    steps = [n for i in range(4) for n in lengths[str(i)]]
    assert made.counts.drafts < len(steps) and max(steps) > 1


def joint(
    model: Transformer, name: str, prompt: list[int], n: int, temperature: float, top_k: int
) -> tuple[Tensor, Tensor]:
    """Counts (V, V) of the new tokens 1 and 2, and of 2 and 3, in the same n samples."""
    made = engine(model, name, max_batch_size=64, kv_cache_tokens=8192)
    asked = [
        Request(
            id=str(i), prompt_ids=prompt, max_tokens=3, temperature=temperature, top_k=top_k, seed=i, ignore_eos=True
        )
        for i in range(n)
    ]
    tokens, _ = generate(made, asked)
    drawn = torch.tensor(list(tokens.values()))
    pairs = (drawn[:, 0] * 128 + drawn[:, 1], drawn[:, 1] * 128 + drawn[:, 2])
    first, second = (torch.bincount(cells, minlength=128 * 128).view(128, 128) for cells in pairs)
    return first, second


def assert_drawn_from(counts: Tensor, law: Tensor, *, alpha: float = 1e-4) -> None:
    """Chi-square over cells pooled to at least 8 expected, and total variation within an exact sampler's noise."""
    n, flat, seen = int(counts.sum()), law.flatten().double().numpy(), counts.flatten().numpy()
    flat = flat / flat.sum()
    assert seen[flat == 0].sum() == 0, "a token that cannot be drawn was drawn"
    order = np.argsort(-flat)
    big = order[flat[order] * n >= 8]
    expected = np.append(flat[big], 1 - flat[big].sum()) * n
    observed = np.append(seen[big], n - seen[big].sum())
    if expected[-1] < 8:
        expected, observed = expected[:-1], observed[:-1]
        expected = expected * observed.sum() / expected.sum()
    p = stats.chisquare(observed, expected).pvalue
    assert p > alpha, f"chi-square p = {p:.2g} over {len(expected)} cells"
    rng = np.random.default_rng(0)
    exact = [np.abs(rng.multinomial(n, flat) / n - flat).sum() / 2 for _ in range(20)]
    distance = np.abs(seen / n - flat).sum() / 2
    assert distance < np.mean(exact) + 5 * np.std(exact), (distance, np.mean(exact), np.std(exact))


def check_laws(model: Transformer, name: str, n: int, temperature: float, top_k: int, prompt_number: int) -> None:
    golden = load_file(DATA / "sampling.safetensors")
    key = f"p{prompt_number}.T{temperature}.top{top_k}.p12"
    first, second = joint(model, name, golden[f"p{prompt_number}.prompt"].tolist(), n, temperature, top_k)
    assert_drawn_from(first, golden[key])
    assert_drawn_from(second, second_pair_law(model, prompt_number, temperature, top_k))


def second_pair_law(model: Transformer, prompt_number: int, temperature: float, top_k: int) -> Tensor:
    """Law (V, V) of tokens 2 and 3, by enumerating the first two: sum over t1 of p(t1, t2) p(t3 | t1, t2)."""
    key = (prompt_number, temperature, top_k)
    if key in ENUMERATED:
        return ENUMERATED[key]
    golden = load_file(DATA / "sampling.safetensors")
    prompt = golden[f"p{prompt_number}.prompt"]
    pairs = torch.cartesian_prod(torch.arange(128), torch.arange(128))
    weight = golden[f"p{prompt_number}.T{temperature}.top{top_k}.p12"].double().flatten()
    kept = weight > 1e-9
    ids = torch.cat([prompt.expand(int(kept.sum()), -1), pairs[kept]], dim=1)
    law = torch.zeros(128, 128, dtype=torch.float64)
    for rows, w, second in zip(ids.split(2048), weight[kept].split(2048), pairs[kept, 1].split(2048), strict=True):
        logits = model.lm_head(model.hidden_states(rows)[:, -1])
        if top_k:
            logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
        law.index_add_(0, second, torch.softmax(logits.double() / temperature, -1) * w[:, None])
    ENUMERATED[key] = law
    return law


@pytest.mark.parametrize("name", ["rnn2", "rnn2-sampled"])
def test_joint_law_of_sampled_output(name: str, model: Transformer) -> None:
    check_laws(model, name, 3000, 1.0, 50, 0)


LAWS = [("rnn2", t, k, p) for t, p in ((0.7, 0), (1.0, 1)) for k in (0, 50)]
LAWS += [(name, 1.0, 0, 1) for name in ("none", "proj", "ngram", "constant", "rnn2-4x4", "sum2-10x5")]
LAWS += [("rnn2-sampled", 0.7, 0, 0), ("rnn2-sampled", 1.0, 50, 1), ("proj-sampled", 1.0, 0, 0)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "temperature", "top_k", "prompt_number"), LAWS)
def test_joint_laws_of_sampled_output(
    name: str, temperature: float, top_k: int, prompt_number: int, model: Transformer
) -> None:
    check_laws(model, name, 6000, temperature, top_k, prompt_number)


def test_the_law_check_can_fail(model: Transformer) -> None:
    golden = load_file(DATA / "sampling.safetensors")
    counts, _ = joint(model, "none", golden["p0.prompt"].tolist(), 3000, 1.0, 0)
    with pytest.raises(AssertionError):
        assert_drawn_from(counts, golden["p0.T0.7.top0.p12"])
