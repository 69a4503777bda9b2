"""Sampled drafts and their verification by rejection: the target's law exactly, by enumeration of every coin."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from omr.drafter.draft_model import SmallModel
from omr.drafter.redrafter import Redrafter
from omr.engine import sampled, sampler
from omr.engine.engine import Engine
from omr.engine.request import Request, Sequence
from omr.errors import ConfigError
from omr.nn.loader import load
from omr.nn.transformer import Transformer

from .test_speculation import asked

DATA = Path(__file__).parents[1] / "data" / "redrafter"
# Laws after each token of a vocabulary of three, in quarters; p / q is 0, 1/2, 1, 2 or 4 wherever q > 0.
P = torch.tensor([[1, 1, 2], [4, 0, 0], [2, 2, 0]], dtype=torch.float64) / 4
Q = torch.tensor([[2, 1, 1], [1, 2, 1], [2, 2, 0]], dtype=torch.float64) / 4
GRID = {sampled.DRAFT: 4, sampled.TEST: 2, 0: 4}
"""Values of each uniform that, taken at the middles of as many cells, stand for all of [0, 1) with these laws."""


def law_of(rows: int, **knobs: object) -> sampler.Law:
    request = Request(id="a", prompt_ids=[0], **{"temperature": 1.0, **knobs})  # type: ignore[arg-type]
    law = sampler.Law.of([Sequence(request, 0, 100)], rows, 3, torch.device("cpu"))
    law.seed = torch.arange(rows)
    return law


def every_coin(monkeypatch: pytest.MonkeyPatch, positions: int) -> int:
    """Make `uniform` enumerate: seed s is one combination of all coins of all positions. How many there are."""
    kinds = [(p, kind) for p in range(positions) for kind in GRID if p < positions - 1 or kind == 0]
    combinations = list(itertools.product(*(range(GRID[kind]) for _, kind in kinds)))
    column = {kind: i for i, kind in enumerate(kinds)}
    cells = torch.tensor(combinations, dtype=torch.float64)

    def enumerated(seed: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        kind = position & ~((1 << 40) - 1)
        at = position & ((1 << 40) - 1)
        found = []
        for s, p, k in zip(seed.tolist(), at.tolist(), kind.tolist(), strict=True):
            where = column.get((p, k))
            found.append((cells[s, where] + 0.5) / GRID[k] if where is not None else torch.tensor(0.5))
        return torch.stack(found).double()

    monkeypatch.setattr(sampled, "uniform", enumerated)
    return len(combinations)


def emitted(
    rows: int, n: int, q: torch.Tensor, first: int, draft_tokens: torch.Tensor | None = None
) -> list[list[int]]:
    """One step for every combination of coins: n drafts from `q`, verified against P, cut at the first rejection."""
    starts = torch.zeros(rows, dtype=torch.int64)
    chain = sampled.SampledDrafts(law_of(rows), starts, torch.ones(rows, dtype=torch.bool), n, 3, draft_tokens)
    newest, drafts = torch.full((rows,), first), []
    for step in range(n):
        newest = chain.choose(step, q[newest].log())
        drafts.append(newest)
    drafted = torch.stack(drafts, 1)
    before = torch.cat([torch.full((rows, 1), first), drafted], 1)
    law = law_of(rows * (n + 1))
    law.seed = torch.arange(rows).repeat_interleave(n + 1)
    positions = torch.arange(n + 1).repeat(rows)
    tokens = chain.verify(P[before].log().view(-1, 3).float(), law, positions).view(rows, n + 1)
    agreed = (tokens[:, :-1] == drafted).long().cumprod(1).sum(1)
    return [row[: count + 1] for row, count in zip(tokens.tolist(), agreed.tolist(), strict=True)]


@pytest.mark.parametrize("first", range(3))
def test_every_emitted_token_has_the_targets_law(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = every_coin(monkeypatch, 3)
    texts = emitted(rows, 2, Q, first)
    prefixes: list[tuple[int, ...]] = [()]
    seen = 0
    for prefix in prefixes:
        going = [t for t in texts if tuple(t[: len(prefix)]) == prefix and len(t) > len(prefix)]
        if not going or len(prefix) == 3:
            continue
        counts = torch.bincount(torch.tensor([t[len(prefix)] for t in going]), minlength=3).double()
        expected = P[prefix[-1] if prefix else first]
        torch.testing.assert_close(counts / counts.sum(), expected, atol=1e-6, rtol=0)
        prefixes += [(*prefix, token) for token in range(3)]
        seen += 1
    assert seen >= 3
    accepted = sum(len(t) > 1 for t in texts) / rows
    assert accepted == pytest.approx(float(torch.minimum(P[first], Q[first]).sum()), abs=1e-6)  # 1 - total variation


def test_a_reduced_draft_vocabulary_changes_no_law(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = every_coin(monkeypatch, 2)
    q = torch.tensor([[2.0, 2.0]] * 3) / 4
    texts = emitted(rows, 1, q, 0, torch.tensor([0, 2]))
    counts = torch.bincount(torch.tensor([t[0] for t in texts]), minlength=3) / rows
    torch.testing.assert_close(counts.double(), P[0], atol=1e-6, rtol=0)


def test_equal_laws_accept_everything_and_disjoint_ones_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = every_coin(monkeypatch, 3)
    assert all(len(t) == 3 for t in emitted(rows, 2, P, 0))
    q = torch.tensor([[0.0, 0.5, 0.5]] * 3)
    assert all(t[0] == 0 and len(t) == 1 for t in emitted(rows, 2, q, 1))  # P[1] is token 0 for certain


def test_sequences_that_are_not_to_follow_draw_plainly() -> None:
    law, starts = law_of(50), torch.full((50,), 7)
    chain = sampled.SampledDrafts(law, starts, torch.arange(50) % 2 == 0, 1, 3, None)
    chain.choose(0, Q[torch.zeros(50, dtype=torch.int64)].log())
    logits = P[torch.zeros(100, dtype=torch.int64)].log().float()
    double = law_of(100)
    double.seed = torch.arange(50).repeat_interleave(2)
    positions = torch.tensor([7, 8]).repeat(50)
    got, plain = (
        chain.verify(logits, double, positions).view(50, 2),
        sampler.draw(logits, double, positions).view(50, 2),
    )
    assert torch.equal(got[1::2], plain[1::2]) and torch.equal(got[:, 1], plain[:, 1])
    assert not torch.equal(got[::2, 0], plain[::2, 0])


@pytest.fixture(scope="module")
def model() -> Transformer:
    return load(DATA / "base_lm", device="cpu")


def make(model: Transformer, drafter: str, **knobs: int) -> Engine:
    made = {
        "redrafter": lambda: Redrafter(adaptive=False, sampled=True).load(DATA / "drafter_rnn2", model),
        "itself": lambda: SmallModel(adaptive=False, sampled=True, model=str(DATA / "base_lm")).load(None, model),
    }[drafter]()
    shape = {"max_batch_size": 8, "kv_cache_tokens": 1024, "block_size": 4} | knobs
    return Engine(model, draft=made, **shape)  # type: ignore[arg-type]


KINDS: list[dict[str, object]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 1.2, "top_p": 0.9, "top_k": 20, "min_p": 0.02, "logprobs": 2},
    {"temperature": 0.8, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
]


@pytest.mark.parametrize("knobs", KINDS)
def test_seeds_fix_the_output_alone_or_in_a_batch(knobs: dict[str, object], model: Transformer, run) -> None:
    requests = asked(3, **knobs)
    together, again = run(make(model, "redrafter"), requests), run(make(model, "redrafter"), requests)
    plain = run(Engine(model, max_batch_size=8, kv_cache_tokens=1024, block_size=4), requests)
    for request in requests:
        tokens = together[request.id].tokens
        assert tokens == again[request.id].tokens
        assert tokens == run(make(model, "redrafter", max_batch_size=1), [request])[request.id].tokens
        if knobs["temperature"] == 0:
            assert tokens == plain[request.id].tokens
        assert [x.token_id for x in together[request.id].logprobs] == (tokens if "logprobs" in knobs else [])


def test_a_drafter_equal_to_the_base_is_always_right(model: Transformer, run) -> None:
    engine = make(model, "itself")
    run(engine, asked(5, temperature=1.0, ignore_eos=True))
    assert engine.counts.drafts > 10
    assert engine.counts.accepted_tokens >= engine.counts.draft_tokens - 3  # float32 products of other shapes


def test_requests_that_ask_for_no_speculation_are_plain(model: Transformer, run) -> None:
    requests = asked(4, temperature=1.0)
    plain = run(Engine(model, max_batch_size=8, kv_cache_tokens=1024, block_size=4), requests)
    for i, request in enumerate(requests):
        request.speculate = i % 2 == 0
    got = run(make(model, "redrafter"), requests)
    assert all(got[r.id].tokens == plain[r.id].tokens for r in requests[1::2])
    assert any(got[r.id].tokens != plain[r.id].tokens for r in requests[::2])


def test_knobs_that_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match=r"needs drafter\.adaptive=false"):
        Redrafter(sampled=True)
    with pytest.raises(ConfigError, match=r"needs drafter\.adaptive=false"):
        SmallModel(sampled=True)
    with pytest.raises(ConfigError, match=r"drafter\.num_beams=1"):
        Redrafter(sampled=True, adaptive=False, num_beams=2)
