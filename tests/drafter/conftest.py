"""A base small enough to train a drafter on in seconds: the reference's Llama, a tokenizer of words, its own text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from omr.nn.loader import load

DATA = Path(__file__).parents[1] / "data" / "redrafter"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/data/redrafter/base_lm (H 32, V 128) with a tokenizer: word `wN` is token N."""
    folder = tmp_path_factory.mktemp("base") / "base_lm"
    shutil.copytree(DATA / "base_lm", folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


@pytest.fixture(scope="session")
def text(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 rows that the base wrote itself, 16 to 40 tokens after a prompt of 4."""
    model = load(base, device="cpu")
    torch.manual_seed(7)
    ids = torch.randint(3, 128, (300, 4))
    with torch.inference_mode():
        for _ in range(40):
            logits = model.lm_head(model.hidden_states(ids)[:, -1])
            ids = torch.cat([ids, torch.softmax(logits / 0.5, -1).multinomial(1)], dim=1)
    rows = []
    for i, row in enumerate(ids.tolist()):
        words = [f"w{token}" for token in row[: 20 + i % 25]]
        prompt = " ".join(words[:4])
        whole = " ".join(words)
        rows.append({"problem": str(i), "text": whole, "spans": [[len(prompt), len(whole)]]})
    path = tmp_path_factory.mktemp("text") / "text.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path
