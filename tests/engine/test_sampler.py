"""The law that tokens are drawn from, against plain loops and by chi-square."""

from __future__ import annotations

import math
import random

import pytest
import torch
from scipy import stats

from omr.engine import sampler
from omr.engine.request import Request, Sequence


def law_of(requests: list[Request], vocab: int, repeat: int = 1) -> sampler.Law:
    seqs = [Sequence(r, r.seed or 0, 10**6) for r in requests]
    return sampler.Law.of(seqs, repeat, vocab, torch.device("cpu"))


def request(**knobs: object) -> Request:
    return Request(**{"id": "a", "prompt_ids": [0], "temperature": 1.0, **knobs})


def plain_law(logits: list[float], r: Request) -> list[float]:
    """Temperature, then min-p, top-k, top-p, written as loops over a ranking; no ties in the input."""
    weights = [math.exp((x - max(logits)) / r.temperature) for x in logits]
    probs = [w / sum(weights) for w in weights]
    ranking = sorted(range(len(probs)), key=lambda t: -probs[t])
    kept = [t for t in ranking if probs[t] >= r.min_p * max(probs)]
    kept = kept[: r.top_k] if r.top_k else kept
    mass, nucleus = sum(probs[t] for t in kept), []
    for token in kept:
        if r.top_p < 1 and sum(probs[t] for t in nucleus) >= r.top_p * mass:
            break
        nucleus.append(token)
    total = sum(probs[t] for t in nucleus)
    return [probs[t] / total if t in nucleus else 0.0 for t in range(len(probs))]


@pytest.mark.parametrize("vocab", [11, 700])
@pytest.mark.parametrize("seed", range(12))
def test_filters_against_plain_loops(seed: int, vocab: int) -> None:
    """A batch of different laws at once; a vocabulary over 256 takes both ways through top-p."""
    rng = random.Random(seed)
    requests = [
        request(
            temperature=rng.choice([0.3, 1.0, 2.0]),
            top_k=rng.choice([0, 0, 1, 4, 300]),
            top_p=rng.choice([1.0, 1.0, 0.05, 0.5, 0.97]),
            min_p=rng.choice([0.0, 0.0, 0.05, 0.5]),
        )
        for _ in range(5)
    ]
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(seed)) * 2
    law = law_of(requests, vocab)
    kept = sampler.filtered((logits / law.temperature).softmax(-1), law)
    kept = kept / kept.sum(-1, keepdim=True)
    for row, r in enumerate(requests):
        expected = torch.tensor(plain_law(logits[row].tolist(), r))
        torch.testing.assert_close(kept[row], expected, atol=2e-6, rtol=1e-4)


def test_equals_of_the_last_kept_token_are_kept() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    for knobs in ({"top_k": 2}, {"top_p": 0.6}):
        law = law_of([request(**knobs)], 5)
        assert (sampler.filtered(logits.softmax(-1), law)[0] > 0).tolist() == [True, True, True, True, False]


@pytest.mark.parametrize(
    "knobs", [{}, {"temperature": 0.6}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 6, "top_p": 0.7}]
)
def test_draws_follow_the_law(knobs: dict) -> None:
    """Chi-square over 40000 draws: half over seeds at one position, half over positions of one seed."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(1, 12, generator=generator)
    r = request(**knobs)
    expected = plain_law(logits[0].tolist(), r)
    count = 20000
    law = law_of([r], 12)
    for varying in ("seed", "position"):
        many = sampler.Law(
            **{**vars(law), "seed": torch.arange(count) if varying == "seed" else torch.full((count,), 9)}
        )
        positions = torch.arange(count) if varying == "position" else torch.full((count,), 3)
        tokens = sampler.draw(logits.expand(count, -1), many, positions)
        observed = torch.bincount(tokens, minlength=12).tolist()
        assert all(o == 0 for o, e in zip(observed, expected, strict=True) if e == 0)
        pairs = [(o, e * count) for o, e in zip(observed, expected, strict=True) if e > 0]
        assert stats.chisquare([o for o, _ in pairs], [e for _, e in pairs]).pvalue > 1e-4


def test_uniforms_are_uniform_and_independent() -> None:
    seeds, positions = torch.meshgrid(torch.arange(-150, 150), torch.arange(200), indexing="ij")
    u = sampler.uniform(seeds.flatten(), positions.flatten()).view(300, 200)
    assert ((u >= 0) & (u < 1)).all()
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-4
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1]), (u[1:, 1:], u[:-1, :-1]), (u[1:, :-1], u[:-1, 1:])):
        assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 4 / math.sqrt(a.numel())
    assert u.unique().numel() == u.numel()


def test_uniform_is_the_plain_integer_hash() -> None:
    def plain(seed: int, position: int) -> float:
        mask = 2**64 - 1
        x = (seed * 0x9E3779B97F4A7C15 + position * 0xC2B2AE3D27D4EB4F) & mask
        for _ in range(2):
            x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
            x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
            x ^= x >> 31
        return (x >> 11) / 2**53

    pairs = [(0, 0), (1, 0), (0, 1), (-5, 17), (2**63 - 1, 10**6), (-(2**63), 3)]
    got = sampler.uniform(torch.tensor([s for s, _ in pairs]), torch.tensor([p for _, p in pairs]))
    assert got.tolist() == [plain(s, p) for s, p in pairs]


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.full((4000, 8), float("-inf"))
    logits[:, 3] = 0.0
    law = sampler.Law(**{**vars(law_of([request()], 8)), "seed": torch.arange(4000)})
    assert sampler.draw(logits, law, torch.zeros(4000, dtype=torch.int64)).unique().tolist() == [3]


def test_logits_that_are_not_numbers_harm_nobody_else() -> None:
    logits = torch.randn(3, 20)
    alone = sampler.draw(logits[2:], law_of([request(seed=5)], 20), torch.tensor([4]))
    logits[:2] = float("nan")
    requests = [request(), request(top_p=0.5, top_k=3, min_p=0.1), request(seed=5)]
    tokens = sampler.draw(logits, law_of(requests, 20), torch.tensor([4, 4, 4]))
    assert ((tokens >= 0) & (tokens < 20)).all() and tokens[2] == alone[0]


def test_greedy_rows_beside_sampled_ones() -> None:
    logits = torch.randn(3, 20)
    law = law_of([request(temperature=0.0), request(temperature=2.0, seed=1), request(temperature=0.0, top_k=3)], 20)
    tokens = sampler.draw(logits, law, torch.zeros(3, dtype=torch.int64))
    assert tokens[0] == logits[0].argmax() and tokens[2] == logits[2].argmax()


def test_the_law_of_some_rows() -> None:
    knobs = [{"temperature": 0.7, "top_k": 5}, {"temperature": 0.0}, {"temperature": 1.4, "top_p": 0.6, "seed": 9}]
    law, rows = law_of([request(**one) for one in knobs], 30, 3), torch.tensor([0, 1, 4, 6, 7, 8])
    logits, positions = torch.randn(9, 30), torch.arange(9) * 7
    drawn = sampler.draw(logits, law, positions)
    assert torch.equal(sampler.draw(logits[rows], law.take(rows), positions[rows]), drawn[rows])
    greedy = law_of([request(temperature=0.0)], 30, 3)
    assert torch.equal(sampler.draw(logits[:2], greedy.take(rows[:2]), positions[:2]), logits[:2].argmax(-1))
