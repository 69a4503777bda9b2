"""Prompt lookup against a plain-loop oracle."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from omr.drafter import NO_DRAFT
from omr.drafter.ngram import Ngram, lookup, pack
from omr.errors import ConfigError


def oracle(ids: list[int], k: int, longest: int, shortest: int) -> list[int]:
    for n in range(min(longest, len(ids) - 1), shortest - 1, -1):
        for start in range(len(ids) - n - 1, -1, -1):
            if ids[start : start + n] == ids[-n:]:
                text = list(ids)
                for i in range(k):
                    text.append(text[start + n + i])
                return text[len(ids) :]
    return []


@given(
    st.lists(st.sampled_from([0, 1, 2, 256, 65536, 16777216, 150000]), min_size=1, max_size=30),
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(1, 5),
)
@example([0, 256, 0, 1, 0], 3, 4, 1)
@example([1, 1, 1], 4, 4, 1)
def test_lookup_is_the_oracle(ids: list[int], k: int, a: int, b: int) -> None:
    assert lookup(ids, pack(ids), k, max(a, b), min(a, b)) == oracle(ids, k, max(a, b), min(a, b))


def test_model_drafts_each_sequence_by_itself() -> None:
    model = Ngram(draft_tok=3).load(None, None)  # type: ignore[arg-type]
    history = [[5, 6, 7, 8, 5, 6], [9], [3, 4, 3]]
    drafts = model.propose(None, torch.tensor([6, 9, 3]), history)
    assert drafts.tolist() == [[7, 8, 5], [NO_DRAFT] * 3, [4, 3, 4]] and drafts.dtype == torch.int64
    assert not model.needs_hidden and model.num_draft_tok == 3


def test_where_nothing_is_found_nothing_is_drafted() -> None:
    model = Ngram(draft_tok=3).load(None, None)  # type: ignore[arg-type]
    drafts = model.propose(None, torch.tensor([9, 2]), [[9], [1, 2]])
    assert drafts.shape == (2, 0) and drafts.dtype == torch.int64


def test_growing_sequences_are_packed_once_and_forgotten_when_they_leave() -> None:
    rng, model = random.Random(0), Ngram(draft_tok=3).load(None, None)  # type: ignore[arg-type]
    sequences = [[rng.randrange(4)] for _ in range(4)]
    for _ in range(60):
        chosen = rng.sample(sequences, 3)
        drafts = model.propose(None, torch.tensor([ids[-1] for ids in chosen]), chosen).tolist()
        for ids, draft in zip(chosen, drafts, strict=True):
            assert [token for token in draft if token != NO_DRAFT] == oracle(ids, 3, 4, 1)
            ids += [rng.randrange(4) for _ in range(rng.randrange(1, 4))]
        sequences[rng.randrange(4)] = [rng.randrange(4)]  # another one, perhaps at a freed one's address
    assert len(model._packed) == 3


@pytest.mark.parametrize("bad", [{"draft_tok": 0}, {"min_ngram": 0}, {"min_ngram": 5}, {"max_ngram": 0}])
def test_knobs_out_of_range(bad: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Ngram(**bad)
