"""What config.json says about a decoder, checked: everything that changes the numbers is either supported or refused.

One decoder serves three families that differ in a few switches:

    family   bias on q, k, v   bias on o   norm on each q and k head
    llama    attention_bias    same        no
    qwen2    always            never       no
    qwen3    attention_bias    same        yes
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omr.errors import InputError

FAMILIES = ("llama", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(kw_only=True)
class DecoderConfig:
    """Shape and switches of a decoder. Field names are those of config.json where it has one."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope_theta: float = 10000.0
    rope: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default"})
    """Rotary scaling, keys as in transformers' rope_parameters (rope_type, factor, ...)."""
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"config.json: {name} must be a positive integer, got {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"config.json: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise InputError(f"config.json: head_dim must be even for rotary positions, got {self.head_dim}")

    @property
    def num_params(self) -> int:
        """Parameters, tied embeddings counted once; biases and norms left out."""
        heads = self.num_attention_heads + self.num_key_value_heads
        layer = 2 * heads * self.head_dim * self.hidden_size + 3 * self.hidden_size * self.intermediate_size
        return self.num_hidden_layers * layer + (2 - self.tie_word_embeddings) * self.vocab_size * self.hidden_size


def parse(raw: dict[str, Any]) -> DecoderConfig:
    """The DecoderConfig of a config.json. Raises InputError for what this decoder would compute wrongly."""
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise InputError(f"config.json: model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}")
    if raw.get("hidden_act", "silu") != "silu":
        raise InputError(f"config.json: hidden_act {raw['hidden_act']!r} is not supported; supported: silu")
    layer_types = raw.get("layer_types") or []
    if any(kind != "full_attention" for kind in layer_types) or (raw.get("use_sliding_window") and not layer_types):
        raise InputError("config.json: sliding-window attention is not supported; use a model with full attention")
    try:
        heads = raw["num_attention_heads"]
        return DecoderConfig(
            model_type=family,
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_hidden_layers=raw["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            max_position_embeddings=raw.get("max_position_embeddings", 2048),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2" or bool(raw.get("attention_bias", False)),
            o_bias=family != "qwen2" and bool(raw.get("attention_bias", False)),
            mlp_bias=bool(raw.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            rope_theta=_rope_theta(raw),
            rope=_rope(raw),
            eos_token_ids=_ids(raw.get("eos_token_id")),
        )
    except KeyError as missing:
        raise InputError(f"config.json: key {missing} is missing") from None
    except (TypeError, ZeroDivisionError, ValueError) as error:
        raise InputError(f"config.json: not a decoder configuration ({error})") from None


def read(folder: Path) -> tuple[DecoderConfig, dict[str, Any]]:
    """Parse folder/config.json; end-of-text ids of generation_config.json, where present, come first."""
    raw = _json(folder / "config.json")
    config = parse(raw)
    generation = folder / "generation_config.json"
    if generation.exists():
        ids = _ids(_json(generation).get("eos_token_id"))
        config.eos_token_ids = tuple(dict.fromkeys(ids + config.eos_token_ids))
    return config, raw


def _json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; give a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path} holds {type(raw).__name__}, expected a JSON object")
    return raw


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(v) for v in (value if isinstance(value, list) else [value]))


def _rope_theta(raw: dict[str, Any]) -> float:
    parameters = raw.get("rope_parameters") or {}
    return float(parameters.get("rope_theta", raw.get("rope_theta", 10000.0)))


def _rope(raw: dict[str, Any]) -> dict[str, Any]:
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope["rope_type"] = rope.pop("type", rope.get("rope_type", "default"))
    if rope["rope_type"] not in ROPE_TYPES:
        raise InputError(
            f"config.json: rope type {rope['rope_type']!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
    if raw.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)) not in (None, 1, 1.0):
        raise InputError("config.json: partial rotary embeddings are not supported")
    rope.setdefault("original_max_position_embeddings", raw.get("original_max_position_embeddings"))
    return rope
