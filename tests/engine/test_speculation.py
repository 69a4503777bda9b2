"""Speculation changes how many tokens a step adds, never which."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from omr.drafter import NO_DRAFT, filled_up
from omr.engine.engine import Engine
from omr.engine.pace import Pace
from omr.engine.request import Request
from omr.nn.transformer import Transformer

VOCAB = 64


class Oracle:
    """Proposes each sequence's known continuation, every token wrong with probability `spoil`."""

    needs_hidden = False

    def __init__(self, num_draft_tok: int, texts: list[list[int]], spoil: float) -> None:
        self.num_draft_tok, self.texts, self.spoil = num_draft_tok, texts, spoil
        self.rng = random.Random(0)

    def propose(
        self, hidden: torch.Tensor | None, tokens: torch.Tensor, history: Sequence[Sequence[int]] | None
    ) -> torch.Tensor:
        assert hidden is None and history is not None
        assert tokens.tolist() == [text[-1] for text in history]
        return torch.tensor([self._one(list(text)) for text in history])

    def _one(self, text: list[int]) -> list[int]:
        whole = next((t for t in self.texts if t[: len(text)] == text), text)
        draft = (whole[len(text) :] + [0] * self.num_draft_tok)[: self.num_draft_tok]
        return [(t + 1) % VOCAB if self.rng.random() < self.spoil else t for t in draft]


class Sometimes(Oracle):
    """Knows the texts of some sequences only, and of those only as many tokens as chance has it, often none."""

    def __init__(self, num_draft_tok: int, texts: list[list[int]], spoil: float) -> None:
        super().__init__(num_draft_tok, texts, spoil)
        self.proposed: list[int] = []
        """Length of every chain."""
        self.columns: list[int] = []

    def propose(
        self, hidden: torch.Tensor | None, tokens: torch.Tensor, history: Sequence[Sequence[int]] | None
    ) -> torch.Tensor:
        assert history is not None
        chains = []
        for text in map(list, history):
            known = any(whole[: len(text)] == text for whole in self.texts)
            keep = self.rng.choice([0, 0, 0, 1, self.num_draft_tok]) if known else 0
            chains.append(self._one(text)[:keep])
        self.proposed += map(len, chains)
        self.columns.append(max(map(len, chains)))
        return filled_up(chains)


class HiddenSpy:
    """A drafter on hidden states that checks each against a forward without cache."""

    needs_hidden = True
    num_draft_tok = 2

    def __init__(self, model: Transformer) -> None:
        self.model, self.seen = model, []

    def propose(self, hidden: torch.Tensor, tokens: torch.Tensor, history: None) -> torch.Tensor:
        assert history is None
        self.seen.append((hidden.clone(), tokens.clone()))
        logits = self.model.lm_head(hidden)
        assert torch.equal(logits.argmax(-1), tokens), "the state is not the one that predicted the newest token"
        return torch.stack([tokens, (tokens + 1) % VOCAB], 1)[:, : self.num_draft_tok]


def asked(seed: int, count: int = 9, **knobs: object) -> list[Request]:
    rng = random.Random(seed)
    return [
        Request(
            id=f"r{i}",
            prompt_ids=[rng.randrange(VOCAB) for _ in range(rng.randint(1, 30))],
            max_tokens=rng.randint(1, 25),
            seed=rng.randrange(1000),
            **{"temperature": 0.0, **knobs},
        )
        for i in range(count)
    ]


KINDS = {
    "greedy": {},
    "sampled": {"temperature": 1.0},
    "filtered": {"temperature": 1.3, "top_p": 0.9, "top_k": 20, "min_p": 0.02},
    "penalised": {"temperature": 0.8, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    "logprobs": {"temperature": 0.9, "logprobs": 3},
}


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize(("depth", "spoil"), [(3, 0.0), (3, 0.4), (1, 0.5), (7, 0.1), (2, 1.0)])
def test_tokens_are_those_of_plain_decoding(kind: str, depth: int, spoil: float, make_engine, run) -> None:
    requests = asked(depth, **KINDS[kind])
    plain = run(make_engine(), requests)
    texts = [r.prompt_ids + plain[r.id].tokens for r in requests]
    engine = make_engine(draft=Oracle(depth, texts, spoil))
    spec = run(engine, requests)
    for request in requests:
        assert spec[request.id].tokens == plain[request.id].tokens
        assert spec[request.id].finish_reason == plain[request.id].finish_reason
        ours, theirs = spec[request.id].logprobs, plain[request.id].logprobs
        assert [x.token_id for x in ours] == [x.token_id for x in theirs]
        assert all(abs(a.logprob - b.logprob) < 1e-4 for a, b in zip(ours, theirs, strict=True))
    counts = engine.counts
    assert counts.draft_tokens == counts.drafts * depth
    assert counts.accepted_tokens == sum(counts.accepted_per_pos)
    assert counts.accepted_per_pos == sorted(counts.accepted_per_pos, reverse=True)
    if spoil == 1:
        assert counts.accepted_tokens == 0


def test_a_perfect_drafter_saves_the_steps_it_should(make_engine, run) -> None:
    request = Request(id="a", prompt_ids=[1, 2, 3], max_tokens=41)
    plain = run(make_engine(), [request])["a"]
    engine = make_engine(draft=Oracle(3, [request.prompt_ids + plain.tokens + [0] * 4], 0.0))
    spec = run(engine, [request])["a"]
    assert spec.steps == 1 + 40 // 4
    assert (engine.counts.drafts, engine.counts.accepted_per_pos) == (10, [10, 10, 10])


@pytest.mark.parametrize("seed", range(3))
def test_with_preemption_and_a_small_cache(seed: int, make_engine, run) -> None:
    requests = asked(seed, temperature=0.7)
    plain = run(make_engine(), requests)
    texts = [r.prompt_ids + plain[r.id].tokens for r in requests]
    engine = make_engine(draft=Oracle(3, texts, 0.3), kv_cache_tokens=64)
    spec = run(engine, requests)
    assert engine.scheduler.num_preempted > 0
    assert {n: d.tokens for n, d in spec.items()} == {n: d.tokens for n, d in plain.items()}


def test_switched_off_per_request(make_engine, run) -> None:
    requests = asked(4)
    plain = run(make_engine(), requests)
    texts = [r.prompt_ids + plain[r.id].tokens for r in requests]
    for request in requests[::2]:
        request.speculate = False
    engine = make_engine(draft=Oracle(3, texts, 0.0))
    spec = run(engine, requests)
    assert {n: d.tokens for n, d in spec.items()} == {n: d.tokens for n, d in plain.items()}
    for request in requests[::2]:
        assert spec[request.id].steps == len(spec[request.id].tokens)
        request.speculate = True
    for request in requests:
        request.speculate = False
    engine = make_engine(draft=Oracle(3, texts, 0.0))
    run(engine, requests)
    assert engine.counts.drafts == 0


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_drafts_for_some_sequences_and_in_some_steps(kind: str, adaptive: bool, make_engine, run) -> None:
    """Output is plain decoding's, and only what was proposed is counted."""
    requests = asked(6, 12, **KINDS[kind])
    plain = run(make_engine(), requests)
    draft = Sometimes(4, [r.prompt_ids + plain[r.id].tokens for r in requests[::2]], 0.2)
    engine = make_engine(draft=draft)
    if adaptive:
        rng, pace = random.Random(1), Pace(4)
        engine.pace, pace.done = pace, lambda results: None
        pace.drafts = lambda batch: rng.choice(pace.lengths)
    spec = run(engine, requests)
    assert {n: (d.tokens, d.finish_reason) for n, d in spec.items()} == {
        n: (d.tokens, d.finish_reason) for n, d in plain.items()
    }
    chains = [length for length in draft.proposed if length]
    counts = engine.counts
    assert (counts.drafts, counts.draft_tokens) == (len(chains), sum(chains))
    assert counts.drafted_per_pos == [sum(length > i for length in chains) for i in range(4)]
    assert 0 < counts.accepted_tokens == sum(counts.accepted_per_pos)
    assert all(a <= d for a, d in zip(counts.accepted_per_pos, counts.drafted_per_pos, strict=True))
    assert 0 in draft.columns and max(draft.columns) == 4 and 0 in draft.proposed
    for request in requests[1::2]:
        assert spec[request.id].steps == len(spec[request.id].tokens)


def test_a_step_without_a_draft_verifies_nothing(make_engine, run) -> None:
    """Rows are those of the longest chain that is followed: a request that wants none does not make any."""
    requests = asked(2, 4, ignore_eos=True)
    plain = run(make_engine(), requests)
    draft = Sometimes(3, [r.prompt_ids + plain[r.id].tokens for r in requests[:1]], 0.0)
    for speculate in (True, False):
        requests[0].speculate = speculate
        engine, rows = make_engine(draft=draft), []
        forward = engine.runner.decoder.forward

        def counted(tokens: torch.Tensor, *rest: object, rows=rows, forward=forward) -> torch.Tensor:
            rows.append(len(tokens))
            return forward(tokens, *rest)

        decode = engine.runner.decode

        def decoded(seqs: list, engine=engine, rows=rows, counted=counted, decode=decode) -> list:
            draft.columns.clear()
            rows.clear()
            engine.runner.decoder.forward = counted
            drawn = decode(seqs)
            followed = max(one.drafted for one in drawn)
            assert rows == [len(seqs) * (1 + followed)]
            assert followed == (draft.columns[0] if seqs[0].request.speculate and draft.columns else 0)
            return drawn

        engine.runner.decode = decoded
        spec = run(engine, requests)
        assert {n: d.tokens for n, d in spec.items()} == {n: d.tokens for n, d in plain.items()}
        assert (engine.counts.accepted_tokens > 0) == speculate


def test_what_fills_up_a_proposal() -> None:
    assert filled_up([[5], [], [6, 7]]).tolist() == [[5, NO_DRAFT], [NO_DRAFT, NO_DRAFT], [6, 7]]
    empty = filled_up([[], []])
    assert empty.shape == (2, 0) and empty.dtype == torch.int64


def test_what_follows_a_stop_is_cut(make_engine, run) -> None:
    prompt = [4, 4, 2]
    text = run(make_engine(), [Request(id="a", prompt_ids=prompt, max_tokens=40)])["a"].tokens
    for stop in sorted(set(text)):
        request = Request(id="a", prompt_ids=prompt, max_tokens=40, stop_token_ids=[stop], logprobs=0)
        engine = make_engine(draft=Oracle(7, [prompt + text], 0.0))
        one = run(engine, [request])["a"]
        assert one.tokens == text[: text.index(stop) + 1] and len(one.logprobs) == len(one.tokens)
        assert (one.finish_reason, one.stop_token_id) == ("stop", stop)
    for limit in range(1, 12):
        request = Request(id="a", prompt_ids=prompt, max_tokens=limit)
        one = run(make_engine(draft=Oracle(5, [prompt + text], 0.0)), [request])["a"]
        assert one.tokens == text[:limit] and one.finish_reason == "length"


def test_drafts_may_run_past_the_context(make_engine, run) -> None:
    prompt = [4, 4, 2]
    text = run(make_engine(context_tokens=21), [Request(id="a", prompt_ids=prompt, max_tokens=99)])["a"].tokens
    assert len(text) == 18
    for spoil in (0.0, 0.5, 1.0):
        engine = make_engine(context_tokens=21, kv_cache_tokens=24, draft=Oracle(7, [prompt + text], spoil))
        assert run(engine, [Request(id="a", prompt_ids=prompt, max_tokens=99)])["a"].tokens == text


@pytest.mark.parametrize("switched", [False, True])
def test_the_drafter_gets_the_state_that_predicted_the_newest_token(switched: bool, make_engine, run, pair) -> None:
    """Also after plain steps, preemption and rows that changed hands."""
    spy = HiddenSpy(pair.ours)
    engine = make_engine(draft=spy, prefill_tokens=16, max_batch_size=3, kv_cache_tokens=80)
    if switched:
        engine.pace = Pace(spy.num_draft_tok, clock=random.Random(1).random)
    requests = asked(8)
    spec = run(engine, requests)
    plain = run(make_engine(), requests)
    assert {n: d.tokens for n, d in spec.items()} == {n: d.tokens for n, d in plain.items()}
    assert spy.seen and engine.scheduler.num_preempted > 0


def test_abort_while_speculating_frees_everything(pair) -> None:
    engine = Engine(
        pair.ours, max_batch_size=4, kv_cache_tokens=256, block_size=4, draft=Oracle(3, [], 0.0), prefix_caching=False
    )
    for request in asked(1, 6):
        request.max_tokens = 60
        engine.add(request)
    for step in range(12):
        engine.step()
        if step % 2:
            engine.abort(f"r{step // 2}")
        engine.pool.check(seq.blocks for seq in engine.scheduler.running)
    assert engine.num_unfinished == 0 and engine.pool.num_free == engine.pool.capacity
