"""Host side of drafter training: counts, order, split."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from omr.drafter._documents import Document, frequent_tokens, plan, split
from omr.nn.draft_loss import target_mask


@given(st.lists(st.booleans(), min_size=1, max_size=20), st.integers(1, 5))
def test_counts_are_those_of_the_mask(marks: list[bool], n: int) -> None:
    document = Document.of(list(range(len(marks))), marks, n)
    mask = target_mask(torch.tensor([marks]), torch.tensor([len(marks)]), n)
    assert document.counts == tuple(mask.sum((1, 2)).tolist())


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=300),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 2),
)
def test_every_epoch_reads_every_row_once(
    lengths: list[int], rows: int, accumulation: int, epochs: int, seed: int
) -> None:
    knobs = {"batch_rows": rows, "accumulation": accumulation, "epochs": epochs, "seed": seed}
    steps = plan(lengths, **knobs)
    per_epoch = -(-len(lengths) // (rows * accumulation))
    assert len(steps) == epochs * per_epoch and steps == plan(lengths, **knobs)
    for epoch in range(epochs):
        of_epoch = steps[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(row for step in of_epoch for batch in step for row in batch) == list(range(len(lengths)))
    assert all(0 < len(batch) <= rows for step in steps for batch in step)
    assert all(0 < len(step) <= accumulation for step in steps)


def test_batches_hold_rows_of_similar_length() -> None:
    lengths = np.random.default_rng(0).integers(10, 500, 4000).tolist()
    steps = plan(lengths, batch_rows=8, accumulation=1, epochs=1, seed=0)
    padded = sum(len(batch) * max(lengths[row] for row in batch) for step in steps for batch in step)
    assert padded < 1.05 * sum(lengths)
    firsts = [lengths[step[0][0]] for step in steps[:100]]
    assert abs(np.corrcoef(firsts, range(100))[0, 1]) < 0.4  # and steps are not in order of length


def test_split_is_disjoint_whole_and_small() -> None:
    documents = [Document.of([i, i, i], [True] * 3, 1) for i in range(50)]
    kept, held = split(documents, 200, seed=3)
    assert len(held) == 5 and len(kept) == 45
    assert {int(d.ids[0]) for d in kept} | {int(d.ids[0]) for d in held} == set(range(50))
    assert [d.ids[0] for d in held] == [d.ids[0] for d in split(documents, 200, seed=3)[1]]
    assert [d.ids[0] for d in held] != [d.ids[0] for d in split(documents, 200, seed=4)[1]]
    assert len(split(documents[:2], 0, seed=0)[1]) == 1


def test_frequent_tokens_counts_what_the_model_writes() -> None:
    documents = [
        Document.of([9, 1, 1, 2], [False, True, True, True], 1),
        Document.of([9, 9, 4, 2], [False, False, True, True], 1),
    ]
    tokens, share = frequent_tokens(documents, 12, 2)
    assert tokens.tolist() == [1, 2] and share == 0.8
    assert frequent_tokens(documents, 12, 4)[0].tolist() == [0, 1, 2, 4]
