"""EAGLE-3: a one-layer head over hidden states of several depths (arXiv 2503.01840), trained with other tools."""

from __future__ import annotations

from dataclasses import dataclass

from omr.drafter._elsewhere import ModelDrafter
from omr.option import option


@option("drafter", "eagle3")
@dataclass(kw_only=True)
class Eagle3(ModelDrafter):
    """Served by vLLM, SGLang and TensorRT-LLM, as one chain of `draft_tok` tokens."""
