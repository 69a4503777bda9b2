"""Beam search, packing and the tree walk against the reference's numbers and plain loops."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import fields
from fractions import Fraction
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from omr.nn.draft_tree import Tree, beam_search, best_tokens, follow, pack, walk
from omr.nn.redrafter import load_redrafter

DATA = Path(__file__).parents[1] / "data" / "redrafter"
CASES = list(json.loads((DATA / "tree.json").read_text()))
SHAPES = [(1, 4), (4, 4), (10, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("inputs", ["lm", "rand"])
@pytest.mark.parametrize("name", ["rnn2", "rnn1", "sum2", "proj"])
def test_beams_are_the_reference_s(name: str, inputs: str, shape: tuple[int, int]) -> None:
    golden = load_file(DATA / f"beam_{name}.safetensors")
    key = f"{inputs}.{shape[0]}x{shape[1]}"
    drafter = load_redrafter(DATA / f"drafter_{name}")
    found = beam_search(
        drafter, golden[f"{inputs}.prompt_state"], golden[f"{inputs}.init_token"], golden["embeddings"], *shape
    )
    assert torch.equal(found.tokens, golden[f"{key}.beams"])
    torch.testing.assert_close(found.log_prob, golden[f"{key}.beam_log_prob"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.token_log_probs, golden[f"{key}.token_log_probs"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["rnn2", "proj"])
def test_log_probabilities_of_the_tokens_kept(name: str) -> None:
    golden = load_file(DATA / f"beam_{name}.safetensors")
    values, indices = best_tokens(golden["rand.step1.raw_logits"])
    known = golden["rand.step1.log_probs"]
    assert torch.equal((known > -1000).sum(-1), torch.full((3,), 50)) and values.shape == (3, 50)
    torch.testing.assert_close(values, known.gather(1, indices), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_packing_is_the_reference_s(case: str) -> None:
    golden = load_file(DATA / "tree.safetensors")
    beams, sizes = golden[f"{case}.beams"], golden[f"{case}.n_nodes"]
    tree = pack(beams)
    assert torch.equal(tree.sizes, sizes)
    assert torch.equal(tree.unpacker, golden[f"{case}.unpacker"])
    past = golden[f"{case}.padding_mask"].shape[1]
    for b, n in enumerate(sizes.tolist()):
        assert torch.equal(tree.tokens[b, :n], golden[f"{case}.packed_beams"][b, :n])
        assert torch.equal(tree.depths[b, :n], golden[f"{case}.position_offsets"][b, :n])
        mask = golden[f"{case}.causal_mask"][b, :n, past : past + n].bool()
        assert torch.equal(tree.sees[b, :n, :n], mask)


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_tree_holds_its_beams_and_nothing_twice(
    batch: int, width: int, length: int, seed: int, bounded: bool
) -> None:
    g = torch.Generator().manual_seed(seed)
    beams = torch.randint(3, (batch, width, length), generator=g)
    beams[:, :, 0] = beams[:, :1, 0]
    bound = max(1, width * (length - 1) // 2) if bounded else None
    tree = pack(beams, bound)
    for b in range(batch):
        n = int(tree.sizes[b])
        paths = [path_of(tree.parents[b], tree.tokens[b], node) for node in range(n)]
        assert len(set(paths)) == n, "a prefix is stored twice"
        prefixes = {tuple(beams[b, w, : k + 1].tolist()) for w in range(width) for k in range(length)}
        assert set(paths) <= prefixes and (bounded or set(paths) == prefixes)
        for node in range(n):
            assert tree.parents[b, node] < node and tree.depths[b, node] == len(paths[node]) - 1
            seen = [k for k in range(n) if tree.sees[b, node, k]]
            assert {paths[k] for k in seen} == {paths[node][: k + 1] for k in range(len(paths[node]))}
            assert not tree.sees[b, node, n:].any()
        for w in range(width):
            for k in range(length):
                node = int(tree.unpacker[b, w, k])
                assert (node == -1 and bounded) or paths[node] == tuple(beams[b, w, : k + 1].tolist())


def path_of(parents: Tensor, tokens: Tensor, node: int) -> tuple[int, ...]:
    path: list[int] = []
    while node >= 0:
        path.append(int(tokens[node]))
        node = int(parents[node])
    return tuple(reversed(path))


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_walk_follows_the_draws(width: int, length: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    beams = torch.randint(3, (2, width, length), generator=g)
    beams[:, :, 0] = 0
    tree = pack(beams)
    drawn = torch.randint(3, tree.tokens.shape, generator=g)
    paths = walk(tree, drawn.tolist())
    path, accepted = follow(tree, drawn, length - 1)
    assert accepted.tolist() == [len(p) - 1 for p in paths]
    assert path.tolist() == [p + p[-1:] * (length - len(p)) for p in paths]
    for b in range(2):
        node, expected = 0, [0]
        while True:
            children = [
                k
                for k in range(1, int(tree.sizes[b]))
                if tree.parents[b, k] == node and tree.tokens[b, k] == drawn[b, node]
            ]
            if not children:
                break
            node = children[0]
            expected.append(node)
        assert paths[b] == expected


TOY = 3  # tokens of the toy vocabulary


def toy_law(seed: int) -> dict[tuple[int, ...], list[int]]:
    """p(token | prefix) in eighths for every prefix of up to 4 tokens after the root; some tokens impossible."""
    g = torch.Generator().manual_seed(seed)
    laws: dict[tuple[int, ...], list[int]] = {}
    for n in range(5):
        for number in range(TOY**n):
            prefix = tuple(number // TOY**k % TOY for k in range(n))
            cuts = sorted(torch.randint(9, (TOY - 1,), generator=g).tolist())
            laws[prefix] = [b - a for a, b in zip([0, *cuts], [*cuts, 8], strict=True)]
    return laws


@pytest.mark.parametrize("coins", ["one per node", "one per position"])
@pytest.mark.parametrize("seed", range(6))
def test_law_of_a_step_by_enumeration(seed: int, coins: str) -> None:
    """Over all coin outcomes, what a tree step emits (and plain decoding adds) has exactly the target's law.

    The coins are either independent at every node, or, as in the engine, one uniform for each position, shared by all
    nodes of a depth. Either way every sequence of 3 tokens must come out with the product of its conditional laws.
    """
    laws, depth = toy_law(seed), 3
    g = torch.Generator().manual_seed(seed + 100)
    width = 2 + seed % 2 if coins == "one per position" else 2
    beams = torch.cat([torch.zeros(1, width, 1, dtype=torch.int64), torch.randint(TOY, (1, width, 2), generator=g)], 2)
    tree = pack(beams)
    n = int(tree.sizes[0])
    paths = [path_of(tree.parents[0], tree.tokens[0], node)[1:] for node in range(n)]
    per = n if coins == "one per node" else int(tree.depths[0, :n].max()) + 1
    outcomes = torch.cartesian_prod(*[torch.arange(8)] * per).view(-1, per)
    drawn = torch.zeros(len(outcomes), tree.tokens.shape[1], dtype=torch.int64)
    for node in range(n):
        coin = outcomes[:, node if coins == "one per node" else int(tree.depths[0, node])]
        drawn[:, node] = torch.searchsorted(torch.tensor(laws[paths[node]]).cumsum(0), coin.contiguous(), right=True)
    every = Tree(
        *(getattr(tree, f.name).expand(len(outcomes), *[-1] * (getattr(tree, f.name).dim() - 1)) for f in fields(tree))
    )
    rows = zip(drawn.tolist(), walk(every, drawn.tolist()), strict=True)
    steps = Counter(tuple(row[node] for node in path) for row, path in rows)
    emitted = {tokens: Fraction(times, len(outcomes)) for tokens, times in steps.items()}
    for sequence in product(range(TOY), repeat=depth):
        wanted, found = Fraction(1), Fraction(0)
        for k in range(depth):
            wanted *= Fraction(laws[sequence[:k]][sequence[k]], 8)
        for tokens, weight in emitted.items():
            if tokens == sequence[: len(tokens)]:
                for k in range(len(tokens), depth):
                    weight *= Fraction(laws[sequence[:k]][sequence[k]], 8)
                found += weight
        assert found == wanted, (sequence, found, wanted)


def test_verification_pass_of_the_reference() -> None:
    """Logits at packed nodes equal those of ordinary forwards over each beam (the golden 10x5 verification)."""
    from omr.nn.loader import load

    golden = load_file(DATA / "verify.safetensors")
    model = load(DATA / "base_lm", device="cpu")
    tree = pack(golden["beams"])
    for b in range(4):
        prompt = golden["input_ids"][b][golden["input_ids"][b] != 0]
        for node in range(int(tree.sizes[b])):
            path = path_of(tree.parents[b], tree.tokens[b], node)
            w, k = (tree.unpacker[b] == node).nonzero()[0].tolist()
            hidden = model.hidden_states(torch.cat([prompt, torch.tensor(path)])[None])[0, -1]
            torch.testing.assert_close(hidden, golden["hidden_states"][b, w, k], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(model.lm_head(hidden), golden["logits_plain"][b, w, k], atol=1e-3, rtol=1e-3)
