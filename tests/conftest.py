"""Checkpoints small enough for every test: random decoders with a byte-level tokenizer and a ChatML template."""

from __future__ import annotations

import os

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch is imported: tiny products lose more to threads than they win

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("omr", deadline=None)  # a busy machine is slow, not wrong
settings.load_profile("omr")

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = [
    "Solve the following math problem. Make sure to put the answer inside \\boxed{}.",
    "Compute 12 + 30 and 7 * 8 with Python.\n<tool_call>\nprint(12 + 30)\n</tool_call>\n```output\n42\n```\n",
    "So the answer is \\boxed{42}.",
]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a byte-level BPE tokenizer: 320 tokens, ChatML, tool tags as added tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_end|>", "<|im_start|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=318, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    folder = tmp_path_factory.mktemp("tokenizer")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def make_model(tokenizer_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """make_model("qwen2", name="a", hidden_size=96, ...) -> a folder as `save_pretrained` writes it, with tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def build(family: str = "qwen2", name: str = "model", dtype: torch.dtype = torch.bfloat16, **shape: Any) -> Path:
        defaults = {
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "bos_token_id": None,
            "eos_token_id": 0,
            "pad_token_id": None,
        }
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**defaults, **shape}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.15)
        folder = tmp_path / name
        model.to(dtype).save_pretrained(folder)
        shutil.copytree(tokenizer_dir, folder, dirs_exist_ok=True)
        return folder

    return build
