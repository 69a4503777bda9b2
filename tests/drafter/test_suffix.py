"""Suffix lookup against a plain search over everything it was shown."""

from __future__ import annotations

import random

import pytest
import torch

from omr.drafter import NO_DRAFT
from omr.drafter.suffix import Suffix, SuffixLookup
from omr.errors import ConfigError


def propose(model: SuffixLookup, *sequences: list[int]) -> list[list[int]]:
    """What is drafted for each, and nothing more."""
    drafts = model.propose(None, torch.tensor([s[-1] for s in sequences]), sequences)
    assert drafts.dtype == torch.int64 and drafts.shape[1] <= model.num_draft_tok
    chains = [[token for token in row if token != NO_DRAFT] for row in drafts.tolist()]
    assert all(chain == row[: len(chain)] for chain, row in zip(chains, drafts.tolist(), strict=True))
    assert max(map(len, chains)) == drafts.shape[1]
    return chains


@pytest.mark.parametrize("seed", range(20))
def test_draft_is_how_a_longest_match_went_on(seed: int) -> None:
    rng = random.Random(seed)
    model = SuffixLookup(Suffix(draft_tok=1, max_tree_depth=5))
    texts = [[rng.randrange(3)] for _ in range(3)]
    for _ in range(9):
        for ids in texts:
            ids.append(rng.randrange(3))
            draft = propose(model, ids)[0]
            longest, after = 0, []
            for text in texts:
                shown = text if text is ids else text[:]
                for end in range(2, len(shown)):
                    n = 0
                    while n < min(5, end, len(ids)) and shown[end - 1 - n] == ids[-1 - n]:
                        n += 1
                    if n > longest:
                        longest, after = n, []
                    if n == longest:
                        after.append(shown[end])
            if longest < 2:
                assert draft == []
            else:
                assert len(draft) == 1 and after.count(draft[0]) == max(map(after.count, after))


def test_it_remembers_other_requests() -> None:
    model = SuffixLookup(Suffix(draft_tok=3, max_spec_factor=2.0))
    propose(model, [1, 2, 3, 4, 5, 9])
    assert propose(model, [7, 7, 2, 3]) == [[4, 5, 9]]
    assert propose(model, [7, 8]) == [[]]
    assert propose(model, [7, 8, 6], [6, 7, 2, 3]) == [[], [4, 5, 9]]


def test_longer_matches_win_then_the_majority_then_the_most_recent() -> None:
    model = SuffixLookup(Suffix(draft_tok=1))
    propose(model, [1, 2, 3, 50, 0], [9, 2, 3, 60, 0], [8, 2, 3, 70, 0])
    assert propose(model, [4, 1, 2, 3]) == [[50]]
    assert propose(model, [4, 2, 3]) == [[70]]
    propose(model, [5, 2, 3, 60, 0])
    assert propose(model, [6, 2, 3]) == [[60]]


def test_the_draft_ends_where_the_places_disagree() -> None:
    option = Suffix(draft_tok=4, min_token_prob=0.5, max_spec_factor=4.0)
    model = SuffixLookup(option)
    propose(model, [1, 2, 3, 4, 5, 6, 0], [9, 2, 3, 4, 7, 7, 0], [8, 2, 3, 4, 8, 8, 0])
    assert propose(model, [5, 2, 3]) == [[4]]
    assert propose(model, [5, 1, 2, 3]) == [[4, 5, 6, 0]]
    short = SuffixLookup(Suffix(draft_tok=4))
    propose(short, [1, 2, 3, 4, 5, 6, 0])
    assert propose(short, [9, 2, 3]) == [[4, 5]]  # two tokens matched, two drafted


def test_a_growing_sequence_is_indexed_once() -> None:
    model = SuffixLookup(Suffix(draft_tok=2))
    ids = [5, 6, 7]
    propose(model, ids)
    for token in (5, 6):
        ids.append(token)
        draft = propose(model, ids)
    assert draft == [[7, 5]] and model.num_remembered == len(ids)


def test_memory_is_bounded_and_forgets_the_oldest() -> None:
    model = SuffixLookup(Suffix(), remembered_tok=100)
    for i in range(50):
        propose(model, list(range(i * 20, i * 20 + 20)))
    assert model.num_remembered <= 100 and len(model._places) <= 100 and len(model._live) <= 5
    assert propose(model, [0, 1]) == [[]]


@pytest.mark.parametrize(
    "bad", [{"draft_tok": 0}, {"max_tree_depth": 1}, {"max_spec_factor": 0.0}, {"min_token_prob": 1.5}]
)
def test_knobs_out_of_range(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Suffix(**bad)  # type: ignore[arg-type]
