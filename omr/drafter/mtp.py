"""Multi-token prediction (arXiv 2404.19737, 2412.19437): layers that a model was trained with to see tokens ahead."""

from __future__ import annotations

from dataclasses import dataclass

from omr.drafter._elsewhere import ElsewhereDrafter
from omr.option import option


@option("drafter", "mtp")
@dataclass(kw_only=True)
class Mtp(ElsewhereDrafter):
    """Served by vLLM, SGLang and TensorRT-LLM, as one chain. The layers are the served checkpoint's own.

    MiMo, Qwen3-Next, Qwen3.5 and DeepSeek-V3 have such; Llama, Qwen2 and Qwen3 have none, and the server says so.
    """

    draft_tok: int = 1
    """Tokens drafted per step; more than the checkpoint has such layers runs the last one again."""
