"""The engine on CUDA, steps replayed as graphs, against the engine on CPU: in float32 the tokens are the same."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from omr.drafter import filled_up
from omr.drafter._redrafter_chain import draft_model, tree_of
from omr.engine.engine import Engine
from omr.engine.pace import Pace
from omr.engine.request import Request
from omr.nn.config import DecoderConfig
from omr.nn.draft_tree import Tree
from omr.nn.loader import load
from omr.nn.paged import KVCache, Part, Ragged
from omr.nn.redrafter import Redrafter, RedrafterConfig
from omr.nn.transformer import Transformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
VOCAB = 64


class Hidden:
    """A drafter on states, fit for a graph: the likeliest token, then the newest one again."""

    needs_hidden = True
    num_draft_tok = 2

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def propose(self, hidden: torch.Tensor, tokens: torch.Tensor, history: None) -> torch.Tensor:
        likeliest = self.model.lm_head(hidden + self.model.embed(tokens)).argmax(-1)
        return torch.stack([likeliest, tokens], 1)


class Known:
    """A drafter on the host that knows the texts; a fifth of its tokens are spoilt."""

    needs_hidden = False
    num_draft_tok = 3

    def __init__(self, texts: list[list[int]]) -> None:
        self.texts, self.rng = texts, random.Random(0)

    def propose(self, hidden: None, tokens: torch.Tensor, history: Sequence[Sequence[int]]) -> torch.Tensor:
        drafts = []
        for text in map(list, history):
            whole = next((t for t in self.texts if t[: len(text)] == text), text)
            draft = (whole[len(text) :] + [0] * 3)[:3]
            drafts.append([(t + 1) % VOCAB if self.rng.random() < 0.2 else t for t in draft])
        return torch.tensor(drafts, device=tokens.device)


class Bigrams:
    """A drafter of trees, fit for a graph: the two tokens seen most often after the newest, each with its successor."""

    needs_hidden = True
    num_draft_tok = 3

    def __init__(self, texts: list[list[int]], device: str) -> None:
        counts = torch.zeros(VOCAB, VOCAB)
        for text in texts:
            for pair in pairwise(text):
                counts[pair] += 1
        self.next = counts.topk(2).indices.to(device)

    def propose(self, hidden: torch.Tensor, tokens: torch.Tensor, history: None) -> torch.Tensor:
        return self._beams(tokens)[:, 0, 1:]

    def propose_tree(self, hidden: torch.Tensor, tokens: torch.Tensor) -> Tree:
        return tree_of(self._beams(tokens))

    def _beams(self, tokens: torch.Tensor) -> torch.Tensor:
        beams = [tokens[:, None].expand(-1, 2), self.next[tokens]]
        while len(beams) <= self.num_draft_tok:
            beams.append(self.next[beams[-1], 0])
        return torch.stack(beams, -1)


class Sometimes(Known):
    """Knows every other text, and of those only as many tokens as chance has it, often none."""

    num_draft_tok = 5

    def __init__(self, texts: list[list[int]], adaptive: bool = False) -> None:
        super().__init__(texts[::2])
        self.adaptive = adaptive
        self.proposed: list[int] = []
        """Length of every chain."""

    def propose(self, hidden: None, tokens: torch.Tensor, history: Sequence[Sequence[int]]) -> torch.Tensor:
        chains = []
        for text in map(list, history):
            whole = next((t for t in self.texts if t[: len(text)] == text), text)
            chains.append(whole[len(text) :][: min(self.rng.choice([0, 0, 0, 1, 3, 5]), self.num_draft_tok)])
        self.proposed += map(len, chains)
        return filled_up(chains)


def requests(count: int) -> list[Request]:
    rng = random.Random(1)
    made = []
    for i in range(count):
        knobs = {"temperature": rng.choice([0.0, 0.0, 0.8, 1.2]), "top_k": rng.choice([0, 0, 7])}
        knobs |= {"top_p": rng.choice([1.0, 0.85]), "min_p": rng.choice([0.0, 0.0, 0.05]), "seed": i}
        if i % 7 == 3:
            knobs |= {"repetition_penalty": 1.2, "presence_penalty": 0.2}
        if i % 5 == 4:
            knobs |= {"logprobs": 2}
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 50))]
        made.append(Request(id=f"r{i}", prompt_ids=prompt, max_tokens=rng.randint(1, 30), **knobs))
    return made


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("drafter", ["none", "hidden", "known"])
def test_tokens_are_those_of_the_cpu(family: str, drafter: str, pairs, run) -> None:
    asked = requests(20)
    shape = {"max_batch_size": 6, "kv_cache_tokens": 320, "block_size": 4, "prefill_tokens": 64}
    expected = run(Engine(pairs[family].ours, **shape), asked)
    model = load(pairs[family].folder, device="cuda", dtype=torch.float32)
    texts = [r.prompt_ids + expected[r.id].tokens for r in asked]
    draft = {"none": None, "hidden": Hidden(model), "known": Known(texts)}[drafter]
    engine = Engine(model, draft=draft, **shape)
    got = run(engine, asked)
    assert {n: d.tokens for n, d in got.items()} == {n: d.tokens for n, d in expected.items()}
    if drafter == "known":
        assert engine.counts.accepted_tokens > engine.counts.draft_tokens / 3
    assert len(engine.runner._graphs) > 1


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("spread", [1, 3])
def test_trees_give_the_tokens_of_plain_decoding(family: str, spread: int, pairs, run) -> None:
    """Some requests do not speculate, some run beside the graph; some end at the last position that has a slot."""
    asked = [replace(r, speculate=i % 6 != 2) for i, r in enumerate(requests(24))]
    shape = {"max_batch_size": 6, "kv_cache_tokens": 320, "block_size": 4, "prefill_tokens": 64, "context_tokens": 80}
    plain = Engine(pairs[family].ours, **shape)
    expected = run(plain, asked)
    texts = [r.prompt_ids[-1:] + expected[r.id].tokens for r in asked[::spread]]
    counts = []
    for device in ("cpu", "cuda"):
        model = load(pairs[family].folder, device=device, dtype=torch.float32)
        engine = Engine(model, draft=Bigrams(texts, device), **shape)
        engine.warm_up()
        got = run(engine, asked)
        assert {n: d.tokens for n, d in got.items()} == {n: d.tokens for n, d in expected.items()}
        assert engine.pool.num_free == plain.pool.num_free
        clear = [replace(r, repetition_penalty=1.0, presence_penalty=0.0, logprobs=None) for r in asked]
        engine = Engine(model, draft=Bigrams(texts, device), **shape)
        run(engine, clear)
        counts.append((engine.counts.drafts, engine.counts.accepted_per_pos))
        assert engine.counts.accepted_per_pos[0] > 20 and engine.counts.accepted_per_pos[2] > 0
    assert len(engine.runner._graphs) > 1
    assert counts[0] == counts[1]


@pytest.mark.parametrize("adaptive", [False, True])
def test_drafts_for_some_sequences_and_in_some_steps(adaptive: bool, pair, run) -> None:
    """Steps in which nothing is proposed replay the plain graph, others one of few lengths, all captured before."""
    knobs = [{"seed": i, "temperature": i % 3 / 2, "max_tokens": 40} for i in range(9)]
    asked = [Request(id=str(i), prompt_ids=[i + 1, 2, 3], **k) for i, k in enumerate(knobs)]
    shape = {"max_batch_size": 4, "kv_cache_tokens": 1024, "block_size": 4}
    expected = run(Engine(pair.ours, **shape), asked)
    draft = Sometimes([r.prompt_ids + expected[r.id].tokens for r in asked], adaptive)
    engine = Engine(load(pair.folder, device="cuda", dtype=torch.float32), draft=draft, **shape)
    if adaptive:
        rng, pace = random.Random(1), Pace(5)
        engine.pace, pace.done = pace, lambda results: None
        pace.drafts = lambda batch: rng.choice(pace.lengths)
    engine.warm_up()
    captured = dict(engine.runner._graphs)
    lengths = {0, 1, 2, 5} if adaptive else {0, 5}
    assert set(captured) == {(b, k, 1 + n) for b in (1, 2, 4) for k in ("greedy", "tempered") for n in lengths}
    replayed, find = [], engine.runner._graph
    engine.runner._graph = lambda *key: replayed.append(key[2] - 1) or find(*key)
    got = run(engine, asked)
    assert {n: d.tokens for n, d in got.items()} == {n: d.tokens for n, d in expected.items()}
    assert engine.runner._graphs == captured and set(replayed) == lengths
    chains, counts = [length for length in draft.proposed if length], engine.counts
    assert (counts.drafts, counts.draft_tokens) == (len(chains), sum(chains))
    assert counts.drafted_per_pos == [sum(length > i for length in chains) for i in range(5)]
    assert counts.accepted_tokens == counts.draft_tokens > 0  # what it knows is right


def test_sampled_drafts_are_those_of_the_cpu(pair, run) -> None:
    torch.manual_seed(3)
    known = {"vocab_size": VOCAB, "hidden_size": 32, "exit_dim": 64, "num_draft_layers": 1, "rnn": True}
    head = Redrafter(RedrafterConfig(**known, draft_vocab_size=48)).requires_grad_(False).eval()
    head.set_draft_tokens(torch.arange(48) + 8)
    shape = {"max_batch_size": 20, "kv_cache_tokens": 4096, "block_size": 4}
    tokens = []
    for device in ("cpu", "cuda"):
        model = load(pair.folder, device=device, dtype=torch.float32)
        draft = draft_model(head.to(device), model.embed.weight, 3)
        draft.sampled = True
        engine = Engine(model, draft=draft, **shape)
        tokens.append({name: done.tokens for name, done in run(engine, requests(20)).items()})
        assert engine.counts.accepted_tokens > 0
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 16), (9, 3, 64), (8, 2, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prompts_share_one_attention_call(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    """Prompts, chunks that follow cached tokens and single tokens in one batch, against one exact call for each."""
    torch.manual_seed(5)
    width = 2 * kv_heads * dim
    config = DecoderConfig(
        model_type="llama", vocab_size=8, hidden_size=heads * dim, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=dim, rms_norm_eps=1e-6,
        max_position_embeddings=512, tie_word_embeddings=False, qkv_bias=False, o_bias=False, mlp_bias=False,
        qk_norm=False,
    )  # fmt: skip
    cache = KVCache(config, 64, 16, torch.device("cuda"), dtype)
    cache.data.normal_()
    order = torch.randperm(63 * 16).add_(16).tolist()
    for lengths in ([(37, 0), (1, 0), (64, 0)], [(20, 0), (9, 133), (1, 40), (70, 65)]):
        slots = iter(order)
        parts = [Part(length=new, slots=[next(slots) for _ in range(new + context)]) for new, context in lengths]
        batch = Ragged(cache, parts)
        qkv = torch.randn(sum(new for new, _ in lengths), (heads + 2 * kv_heads) * dim, device="cuda").to(dtype)
        cache.store(0, batch.slots, qkv)
        assert batch.in_one
        got, row = batch.attend(0, qkv), 0
        for part in parts:
            q = qkv[row : row + part.length, : heads * dim].double().view(part.length, heads, dim).transpose(0, 1)
            kv = cache.data[0, torch.tensor(part.slots, device="cuda")].double()
            k, v = kv.view(-1, 2, kv_heads, dim).permute(1, 2, 0, 3).repeat_interleave(heads // kv_heads, 1)
            hidden = torch.ones(part.length, len(part.slots), device="cuda").triu(part.context + 1) > 0
            weights = (q @ k.transpose(1, 2) / dim**0.5).masked_fill(hidden, float("-inf")).softmax(-1)
            expected = (weights @ v).transpose(0, 1).flatten(1)
            error = (got[row : row + part.length].double() - expected).norm() / expected.norm()
            assert error < 1e-2, f"{part.length} after {part.context}: {error:.1e}"
            row += part.length
    eight = batch.attend(0, qkv, torch.tensor([0.01], device="cuda"))
    assert eight.dtype == torch.float8_e4m3fn and eight.shape == got.shape and width == cache.width


def test_warming_up_disturbs_nothing(pair, run) -> None:
    asked = [Request(id=str(i), prompt_ids=[i + 1, 2, 3], max_tokens=20, seed=i, temperature=i / 4) for i in range(5)]
    expected = run(Engine(pair.ours, max_batch_size=5, kv_cache_tokens=320, block_size=4), asked)
    model = load(pair.folder, device="cuda", dtype=torch.float32)
    engine = Engine(model, max_batch_size=5, kv_cache_tokens=320, block_size=4)
    engine.add(asked[0])
    head = engine.step()[0].token_ids
    engine.warm_up()
    captured = len(engine.runner._graphs)
    assert captured == 2 * 4
    while engine.num_unfinished:
        head += engine.step()[0].token_ids
    assert head == expected["0"].tokens
    got = run(engine, asked)
    assert {n: d.tokens for n, d in got.items()} == {n: d.tokens for n, d in expected.items()}
    assert len(engine.runner._graphs) == captured
