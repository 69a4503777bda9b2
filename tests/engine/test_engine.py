"""The engine against transformers; batch mates, preemption, prefix reuse and aborts change no token."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from omr.engine.engine import Engine
from omr.engine.request import Request
from omr.errors import InputError

VOCAB = 64


def prompts(seed: int, count: int, longest: int = 40) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def mixed(seed: int, count: int) -> list[Request]:
    """Requests of every kind: greedy, tempered, filtered, penalised, seeded."""
    rng = random.Random(seed)
    requests = []
    for index, prompt in enumerate(prompts(seed, count)):
        knobs: dict[str, Any] = {"temperature": rng.choice([0.0, 0.0, 0.6, 1.0, 1.7])}
        knobs["top_p"] = rng.choice([1.0, 1.0, 0.8])
        knobs["top_k"] = rng.choice([0, 0, 5])
        knobs["min_p"] = rng.choice([0.0, 0.0, 0.1])
        if rng.random() < 0.3:
            knobs |= {"repetition_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.1}
        requests.append(
            Request(id=f"r{index}", prompt_ids=prompt, max_tokens=rng.randint(1, 24), seed=rng.randrange(99), **knobs)
        )
    return requests


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("prefill_tokens", [2048, 16])
def test_greedy_equals_transformers(family: str, prefill_tokens: int, pairs, run) -> None:
    engine = Engine(
        pairs[family].ours, max_batch_size=5, kv_cache_tokens=1024, block_size=4, prefill_tokens=prefill_tokens
    )
    asked = [Request(id=str(i), prompt_ids=p, max_tokens=12) for i, p in enumerate(prompts(3, 7))]
    done = run(engine, asked)
    for request in asked:
        assert done[request.id].tokens == pairs[family].greedy(request.prompt_ids, 12)
        assert done[request.id].finish_reason == "length"


@pytest.mark.parametrize("seed", range(4))
def test_no_output_depends_on_batch_mates(seed: int, make_engine, run) -> None:
    asked = mixed(seed, 10)
    together = run(make_engine(), asked)
    for request in asked:
        alone = run(make_engine(max_batch_size=1), [request])[request.id]
        assert alone.tokens == together[request.id].tokens, request


def test_late_arrivals_change_nothing(make_engine, run) -> None:
    asked = mixed(11, 8)
    expected = run(make_engine(), asked)
    engine, got = make_engine(max_batch_size=3), {r.id: [] for r in asked}
    rest = list(asked)
    while rest or engine.num_unfinished:
        if rest:
            engine.add(rest.pop())
        for _ in range(2):
            for output in engine.step():
                got[output.id] += output.token_ids
    assert got == {name: one.tokens for name, one in expected.items()}


@pytest.mark.parametrize("seed", range(3))
def test_preemption_changes_nothing(seed: int, make_engine, run) -> None:
    asked = mixed(seed, 8)
    expected = run(make_engine(), asked)
    engine = make_engine(kv_cache_tokens=72, prefix_caching=bool(seed % 2))
    got = run(engine, asked)
    assert engine.scheduler.num_preempted > 0
    assert {n: d.tokens for n, d in got.items()} == {n: d.tokens for n, d in expected.items()}


def test_a_preempted_request_is_the_next_to_run(make_engine) -> None:
    """First come, first served holds for those sent back too: later arrivals wait behind them."""
    engine = make_engine(kv_cache_tokens=40, max_batch_size=2, prefix_caching=False)
    for name in "abcd":
        engine.add(Request(id=name, prompt_ids=[1, 2, 3], max_tokens=30))
    order: list[str] = []
    while engine.num_unfinished:
        before = engine.scheduler.num_preempted
        order += [output.id for output in engine.step() if output.finish_reason]
        if engine.scheduler.num_preempted > before:
            waiting = [seq.id for seq in engine.scheduler.waiting]
            assert waiting == sorted(waiting)
    assert engine.scheduler.num_preempted and order == list("abcd")


def test_shared_prefixes_are_reused_and_change_nothing(make_engine, run, pair) -> None:
    """Eight samples of one problem, then a second round that continues the first's text."""
    engine = make_engine(kv_cache_tokens=2048)
    prompt = prompts(5, 1)[0] * 2 + [7] * 20
    prompt = prompt[:37]
    first = run(engine, [Request(id="first", prompt_ids=prompt, max_tokens=15)])["first"]
    assert first.num_cached == 0 and first.tokens == pair.greedy(prompt, 15)
    longer = prompt + first.tokens + [3, 4, 5]
    second = run(engine, [Request(id="second", prompt_ids=longer, max_tokens=9)])["second"]
    assert second.num_cached == (len(prompt) + 14) // 4 * 4
    assert second.tokens == pair.greedy(longer, 9)
    again = run(engine, [Request(id=str(i), prompt_ids=prompt, max_tokens=15) for i in range(8)])
    assert all(one.tokens == first.tokens and one.num_cached == 36 for one in again.values())
    other = run(engine, [Request(id="other", prompt_ids=[1, *prompt[1:]], max_tokens=15)])["other"]
    assert other.num_cached == 0 and other.tokens == pair.greedy([1, *prompt[1:]], 15)


def test_reuse_survives_eviction(make_engine, run) -> None:
    """A cache that holds two sequences, twenty prompts with common prefixes: blocks are evicted and named again."""
    rng = random.Random(0)
    stems = [[rng.randrange(VOCAB) for _ in range(20)] for _ in range(3)]
    asked = [
        Request(id=str(i), prompt_ids=rng.choice(stems) + [rng.randrange(VOCAB)] * rng.randint(0, 6), max_tokens=8)
        for i in range(20)
    ]
    expected = run(make_engine(prefix_caching=False), asked)
    got = run(make_engine(kv_cache_tokens=80), asked)
    assert any(one.num_cached for one in got.values())
    assert {n: d.tokens for n, d in got.items()} == {n: d.tokens for n, d in expected.items()}


@pytest.mark.parametrize("seed", range(6))
def test_blocks_are_conserved_whatever_happens(seed: int, make_engine) -> None:
    rng = random.Random(seed)
    engine = make_engine(kv_cache_tokens=rng.choice([72, 120, 400]), max_batch_size=rng.randint(1, 6))
    waiting, live = mixed(seed + 50, 25), set()
    while waiting or live:
        action = rng.random()
        if waiting and action < 0.3:
            live.add(waiting[-1].id)
            engine.add(waiting.pop())
        elif live and action < 0.4:
            victim = rng.choice(sorted(live))
            output = engine.abort(victim)
            assert output is not None and output.finish_reason == "abort"
            assert engine.abort(victim) is None
            live.discard(victim)
        else:
            for output in engine.step():
                assert output.id in live
                if output.finish_reason:
                    live.discard(output.id)
        engine.pool.check(seq.blocks for seq in engine.scheduler.running)
        rows = [seq.row for seq in engine.scheduler.running]
        assert len(set(rows)) == len(rows) <= engine.num_running + engine.num_waiting == len(live)
    assert engine.pool.num_free == engine.pool.capacity and engine.kv_usage == 0


def test_seeds_reproduce_and_differ(make_engine, run) -> None:
    def texts(seed: int | None) -> list[int]:
        request = Request(id="a", prompt_ids=[5, 6], max_tokens=20, temperature=1.0, seed=seed)
        return run(make_engine(), [request])["a"].tokens

    assert texts(1) == texts(1) != texts(2)
    assert texts(None) != texts(None)
    assert texts(2**64 + 1) == texts(1) and texts(-1) == texts(2**64 - 1)


def test_stop_tokens_and_end_of_text(make_engine, run, pair) -> None:
    prompt = [9, 8, 7]
    text = pair.greedy(prompt, 30)
    stop = text[10]
    cut = text[: text.index(stop) + 1]
    engine = make_engine()
    one = run(engine, [Request(id="a", prompt_ids=prompt, max_tokens=30, stop_token_ids=[stop])])["a"]
    assert (one.tokens, one.finish_reason, one.stop_token_id) == (cut, "stop", stop)
    engine.eos_token_ids = frozenset([stop])
    one = run(engine, [Request(id="a", prompt_ids=prompt, max_tokens=30)])["a"]
    assert (one.tokens, one.finish_reason, one.stop_token_id) == (cut, "stop", stop)
    one = run(engine, [Request(id="a", prompt_ids=prompt, max_tokens=30, ignore_eos=True)])["a"]
    assert (one.tokens, one.finish_reason, one.stop_token_id) == (text, "length", None)


def test_the_context_ends_a_request(make_engine, run) -> None:
    engine = make_engine(context_tokens=20)
    one = run(engine, [Request(id="a", prompt_ids=[1] * 13, max_tokens=100)])["a"]
    assert len(one.tokens) == 7 and one.finish_reason == "length"
    engine = make_engine(kv_cache_tokens=24)
    assert engine.context_tokens == 24
    assert len(run(engine, [Request(id="a", prompt_ids=[1] * 23, max_tokens=100)])["a"].tokens) == 1


def test_logprobs_are_those_of_the_model(make_engine, run, pair) -> None:
    asked = [
        Request(id="greedy", prompt_ids=[3, 1], max_tokens=6, logprobs=4),
        Request(id="sampled", prompt_ids=[3, 1, 4], max_tokens=6, logprobs=0, temperature=1.5, top_k=9, seed=3),
        Request(id="plain", prompt_ids=[3, 1, 4, 1], max_tokens=6),
    ]
    done = run(make_engine(), asked)
    assert done["plain"].logprobs == []
    for request in asked[:2]:
        one = done[request.id]
        assert [entry.token_id for entry in one.logprobs] == one.tokens
        scores = pair.logits(request.prompt_ids + one.tokens).log_softmax(-1)[len(request.prompt_ids) - 1 :]
        for step, entry in enumerate(one.logprobs):
            assert math.isclose(entry.logprob, float(scores[step, entry.token_id]), abs_tol=1e-4)
            best = scores[step].topk(request.logprobs)
            assert [token for token, _ in entry.top] == best.indices.tolist()
            torch.testing.assert_close(torch.tensor([x for _, x in entry.top]), best.values, atol=1e-4, rtol=1e-4)


def test_penalties_against_a_plain_loop(make_engine, run, pair) -> None:
    prompt = [2, 3, 5, 7, 11]
    request = Request(
        id="a",
        prompt_ids=prompt,
        max_tokens=25,
        repetition_penalty=1.4,
        presence_penalty=0.3,
        frequency_penalty=0.5,
    )
    tokens = list(prompt)
    for _ in range(25):
        logits = pair.logits(tokens)[-1].tolist()
        output = tokens[len(prompt) :]
        for token in set(tokens):
            logits[token] = logits[token] / 1.4 if logits[token] > 0 else logits[token] * 1.4
        for token in set(output):
            logits[token] -= 0.3 + 0.5 * output.count(token)
        tokens.append(max(range(VOCAB), key=lambda t: logits[t]))
    got = run(make_engine(), [request])["a"].tokens
    assert got == tokens[len(prompt) :] != pair.greedy(prompt, 25)


def test_running_requests_decode_while_prompts_queue(make_engine) -> None:
    """Prefill goes first but never twice in a row: a running request gets a token every second step at least."""
    engine = make_engine(prefill_tokens=8)
    engine.add(Request(id="runs", prompt_ids=[1, 2], max_tokens=30))
    engine.step()
    for i in range(6):
        engine.add(Request(id=str(i), prompt_ids=[i] * 40, max_tokens=2))
    for _ in range(8):
        names = {output.id for _ in range(2) for output in engine.step()}
        assert "runs" in names


@pytest.mark.parametrize(("joining", "waits"), [(1, 4), (2, 0)])
def test_few_prompts_wait_for_company(joining: int, waits: int, make_engine) -> None:
    """One prompt beside nine decoding sequences waits `patience` decode steps, two are an eighth of the batch."""
    engine = make_engine(max_batch_size=16, kv_cache_tokens=2048)
    engine.scheduler.patience = 4
    for i in range(9):
        engine.add(Request(id=str(i), prompt_ids=[i, 1], max_tokens=40))
    engine.step()
    engine.step()
    for i in range(joining):
        engine.add(Request(id=f"new{i}", prompt_ids=[i, 2, 3], max_tokens=4))
    steps = [[output.id for output in engine.step()] for _ in range(8)]
    first = next(i for i, names in enumerate(steps) if "new0" in names)
    assert first == max(0, waits - 1)  # a decode step had passed
    assert len(steps[first]) == joining and all(len(names) == 9 for names in steps[:first])


@pytest.mark.parametrize(
    ("knobs", "word"),
    [
        ({"prompt_ids": []}, "prompt_ids"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.0}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"logprobs": -1}, "logprobs"),
    ],
)
def test_requests_out_of_range_are_refused(knobs: dict, word: str) -> None:
    with pytest.raises(InputError, match=word):
        Request(**{"id": "a", "prompt_ids": [1], **knobs})


def test_the_engine_refuses_what_can_never_run(make_engine) -> None:
    engine = make_engine(context_tokens=20)
    with pytest.raises(InputError, match="20 leaves no room"):
        engine.add(Request(id="a", prompt_ids=[1] * 20))
    with pytest.raises(InputError, match=r"0\.\.63"):
        engine.add(Request(id="a", prompt_ids=[64]))
    engine.add(Request(id="a", prompt_ids=[1]))
    with pytest.raises(InputError, match="already in use"):
        engine.add(Request(id="a", prompt_ids=[1]))
    with pytest.raises(InputError, match="context_tokens 500"):
        make_engine(context_tokens=500)
    with pytest.raises(InputError, match="kv_cache_tokens"):
        make_engine(kv_cache_tokens=3)
