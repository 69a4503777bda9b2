"""Hidden states kept on disk: the same training, the base run once, a killed filling taken up again."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from omr.drafter._documents import Document
from omr.drafter._ranks import Ranks
from omr.drafter._state_cache import StateCache, forward, groups
from omr.drafter.redrafter import Redrafter, Train
from omr.errors import ResourceError
from omr.nn.loader import load
from omr.nn.transformer import Transformer

HOW = Train(rows=120, lr=3e-3, held_out=12, batch_rows=4, epochs=3, eval_every=20, forward_tok=512)
ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def model(base: Path) -> Transformer:
    return load(base, device="cpu")


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    torch.manual_seed(0)
    return [Document.of(torch.randint(0, 128, (n,)).tolist(), [True] * n, 2) for n in (5, 40, 7, 40, 3, 21, 22)]


def test_groups_fill_a_forward_and_hold_every_row_once(documents: list[Document]) -> None:
    made = groups(documents, range(7), 64)
    assert made == [[4, 0, 2], [5, 6], [1], [3]]
    assert groups(documents, [3, 1, 3], 80) == [[1, 3]] and groups(documents, [1], 8) == [[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_is_what_the_base_computed(
    base: Path, documents: list[Document], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = load(base, device="cpu", dtype=dtype)
    cache = StateCache(model, documents, tmp_path / "states", 64).fill(ALONE, "test")
    for rows in groups(documents, range(7), 64):
        for row, state in forward(model, documents, rows).items():
            assert torch.equal(cache.read(row), state) and state.dtype == dtype
    assert (tmp_path / "states" / "states.bin").stat().st_size == cache.num_bytes == 138 * 32 * dtype.itemsize


def test_a_killed_filling_goes_on(
    model: Transformer, documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = 0, Transformer.hidden_states

    def counted(self: Transformer, ids: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(self, ids)

    monkeypatch.setattr(Transformer, "hidden_states", counted)
    with pytest.raises(KeyboardInterrupt):
        StateCache(model, documents, tmp_path, 64).fill(ALONE, "test")
    again = StateCache(model, documents, tmp_path, 64).fill(ALONE, "test")
    assert calls == 5, "two groups were done, the third is computed anew, the fourth for the first time"
    monkeypatch.setattr(Transformer, "hidden_states", real)
    whole = StateCache(model, documents, tmp_path / "whole", 64).fill(ALONE, "test")
    assert all(torch.equal(again.read(row), whole.read(row)) for row in range(7))


def test_cached_training_is_the_same_training_with_one_pass_of_the_base(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, real = 0, Transformer.hidden_states

    def counted(self: Transformer, ids: Tensor) -> Tensor:
        nonlocal tokens
        tokens += ids.numel()
        return real(self, ids)

    monkeypatch.setattr(Transformer, "hidden_states", counted)
    got = {}
    for name, cached in (("plain", False), ("cached", True), ("again", True)):
        (tmp_path / name).mkdir()
        before = tokens
        metrics = Redrafter(train=replace(HOW, cache_states=cached)).fit(base, text, tmp_path / name, "cpu")
        got[name] = metrics, tokens - before
    assert got["plain"][1] > 3 * got["cached"][1]
    plain, cached = got["plain"][0], got["cached"][0]
    assert cached["steps"] == plain["steps"] and cached == pytest.approx(plain, rel=1e-3)
    for name in ("model.safetensors", "curve.jsonl"):
        assert (tmp_path / "cached" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    curve = [json.loads(line) for line in (tmp_path / "cached" / "curve.jsonl").read_text().splitlines()]
    assert [row["step"] for row in curve if "drafter/held_out_redrafter0_loss" in row][:2] == [20, 40]


def test_a_disk_that_is_too_small_is_refused(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**10, 9 * 10**9, 10**9))
    with pytest.raises(ResourceError, match=r"cache_states=true needs 0\.0 GB in .*1\.0 GB are free; free some"):
        Redrafter(train=replace(HOW, cache_states=True)).fit(base, text, tmp_path, "cpu")
