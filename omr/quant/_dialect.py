"""What a quantised checkpoint says of itself: the two dialects that servers read.

`compressed-tensors` in config.json is read by vLLM, SGLang, transformers and omr. ModelOpt's is read by TensorRT-LLM,
vLLM, SGLang and omr, and only for FP8 with one scale per tensor; transformers does not know it and would load the raw
codes as if they were weights. hf_quant_config.json carries ModelOpt's form beside either; a server that looks for it
takes it first, the others never open it. Readers recognise ModelOpt by the producer's name, so it is written as they
expect it.
"""

from __future__ import annotations

from typing import Any

from omr import __version__

IGNORE = ["lm_head"]
PRODUCER = {"name": "modelopt", "version": __version__}


def compressed_tensors(layout: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    """`quantization_config` in the compressed-tensors dialect, one scheme for every linear layer but lm_head."""
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": list(IGNORE),
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": inputs,
                "output_activations": None,
            }
        },
    }


def arguments(kind: str, bits: int, strategy: str, group_size: int | None = None) -> dict[str, Any]:
    """Arguments of one tensor: symmetric, static, the scale found by range."""
    return {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "strategy": strategy,
        "group_size": group_size,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
    }


def modelopt_file() -> dict[str, Any]:
    """hf_quant_config.json of a static per-tensor FP8 checkpoint."""
    return {
        "producer": dict(PRODUCER),
        "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": list(IGNORE)},
    }


def modelopt_inline() -> dict[str, Any]:
    """`quantization_config` of config.json in ModelOpt's dialect, for the same checkpoint."""
    fp8 = {"dynamic": False, "num_bits": 8, "type": "float"}
    return {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "ignore": list(IGNORE),
        "producer": dict(PRODUCER),
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": dict(fp8), "input_activations": dict(fp8)}},
    }
