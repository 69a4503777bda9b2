"""Random decoders of every supported family, built with transformers: it is the oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biases-llama3": ("llama", {"attention_bias": True, "mlp_bias": True, "rope_scaling": LLAMA3}),
    "llama-linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-yarn": (
        "qwen2",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    ),
    "qwen3-head-dim": ("qwen3", {"head_dim": 32}),
}


def oracle(family: str, **overrides: Any) -> PreTrainedModel:
    shape = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**shape, **overrides})).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture(params=sorted(VARIANTS))
def variant(request: pytest.FixtureRequest) -> PreTrainedModel:
    family, overrides = VARIANTS[request.param]
    return oracle(family, **overrides)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., tuple[PreTrainedModel, Path]]:
    """saved("qwen2", ...) -> the transformers model and the folder it was saved in."""

    def build(family: str = "qwen2", **overrides: Any) -> tuple[PreTrainedModel, Path]:
        model = oracle(family, **overrides)
        folder = tmp_path / family
        model.save_pretrained(folder)
        return model, folder

    return build
