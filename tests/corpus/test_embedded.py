"""The embedded model's folder: its tokenizer, its size, and that the whole house can read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import omr
from omr.corpus import example
from omr.corpus.encoded import encode_corpus
from omr.corpus.layout import Layout
from omr.corpus.vocabulary import train_tokenizer
from omr.solve.prompt import PROMPTS, render
from omr.text import encode_text

TINY = Path(omr.__file__).parent / "assets" / "tiny"
SOME = [example("train", 6, index) for index in range(200)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY)


def test_it_is_small_enough_to_ship() -> None:
    assert (TINY / "model.safetensors").stat().st_size <= 6_000_000
    config = json.loads((TINY / "config.json").read_text())
    assert config["model_type"] == "qwen2" and config["vocab_size"] == 1024 and config["tie_word_embeddings"]


def test_the_tokenizer_ends_a_turn_and_keeps_the_code_tags(tokenizer: Any) -> None:
    assert len(tokenizer) == 1024
    assert tokenizer.eos_token == "<|im_end|>"
    for tag in ("<tool_call>", "</tool_call>"):
        ids = tokenizer(tag, add_special_tokens=False)["input_ids"]
        assert len(ids) == 1 and tokenizer.decode(ids, skip_special_tokens=True) == tag
    config = json.loads((TINY / "config.json").read_text())
    generation = json.loads((TINY / "generation_config.json").read_text())
    assert config["eos_token_id"] == generation["eos_token_id"] == tokenizer.eos_token_id


def test_pieces_encoded_apart_equal_the_whole(tokenizer: Any) -> None:
    layout = Layout(tokenizer)
    for e in SOME:
        row = layout.row(e)
        ids, is_target = encode_text(row, tokenizer)
        assert ids == tokenizer(row.text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == row.text
        written = "".join(piece.text for piece in e.pieces if piece.by_model) + "<|im_end|>"
        assert tokenizer.decode([i for i, target in zip(ids, is_target, strict=True) if target]) == written


def test_the_layout_is_the_chat_template(tokenizer: Any) -> None:
    e = next(e for e in SOME if e.instruction == "generic/math")
    prompt = render(tokenizer, PROMPTS["generic/math"].messages(e.problem))
    assert Layout(tokenizer).row(e).text == f"{prompt}{e.solution}<|im_end|>"


def test_any_text_survives(tokenizer: Any) -> None:
    text = "Ünïcode — 数学, tabs\tand 12345\n\n  spaces 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_corpus_encodes_the_same_in_blocks() -> None:
    made = encode_corpus(TINY, 60, seed=6)
    again = encode_corpus(TINY, 60, seed=6, max_length=40)
    assert made.digest() == encode_corpus(TINY, 60, seed=6).digest()
    assert int(again.lengths.max()) == 40 and 40 < len(made.lengths) <= 60


def test_a_tokenizer_can_be_learned_again(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    texts = (piece.text for e in SOME for piece in e.pieces)
    train_tokenizer(texts, tmp_path, size=400)
    made = AutoTokenizer.from_pretrained(tmp_path)
    assert len(made) == 400 and made.decode(made("print(12)")["input_ids"]) == "print(12)"
    assert made("907", add_special_tokens=False)["input_ids"].__len__() == 3, "digits stand alone"
