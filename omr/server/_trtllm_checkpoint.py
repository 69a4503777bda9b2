"""A Hugging Face folder (bf16, omr's fp8 or int8_wo) and a ReDrafter as a TensorRT-LLM checkpoint for `trtllm-build`.

    python -m omr.server._trtllm_checkpoint SPEC.json        in a child: a 14B model takes its size in memory

Written: config.json and rank{r}.safetensors for every tensor-parallel rank, in the layout that TensorRT-LLM's own
converters and ModelOpt write (names, shapes, dtypes were compared with theirs; no engine was built from these files).
What is easy to get wrong: q, k and v are split over the ranks first and joined then; `fc` is the gate projection and
`gate` the up projection; the scales of q, k, v are one number, which omr's fp8 already made equal; the embedding is
split by rows, its vocabulary padded to a multiple of the ranks. int8_wo goes out as bf16 with quant_algo W8A16, because
TensorRT-LLM packs int8 itself when it builds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omr.errors import ConfigError, InputError, OmrError

if TYPE_CHECKING:
    import torch

    from omr.nn.config import DecoderConfig
    from omr.nn.loader import Tensors
    from omr.nn.quant_format import QuantFormat

ARCHITECTURES = {
    "qwen2": ("Qwen2ForCausalLM", "ReDrafterForQWenLM"),
    "llama": ("LlamaForCausalLM", "ReDrafterForLLaMALM"),
}
"""Base architecture, and its name with a ReDrafter joined to it (TensorRT-LLM 1.0 and later)."""
JOINED = {"qkv": ("q_proj", "k_proj", "v_proj")}


@dataclass(kw_only=True)
class ExportSpec:
    """Content of SPEC.json."""

    checkpoint: str
    out: str
    tp: int = 1
    drafter: str | None = None
    num_beams: int = 1
    draft_tok: int = 3
    greedy: bool = False
    """Draft and verify by arg-max only: the engine then ignores a request's temperature."""


def export(spec: ExportSpec) -> None:
    """Write the checkpoint. Raises InputError for a folder that cannot be said in TensorRT-LLM's terms."""
    from safetensors.torch import save_file

    from omr.nn import config as decoder_config
    from omr.nn.loader import Tensors
    from omr.nn.quant_format import quant_format

    folder, out = Path(spec.checkpoint), Path(spec.out)
    config, raw = decoder_config.read(folder)
    quant = quant_format(raw, folder)
    algorithm = quant_algo(quant)
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InputError(f"{folder}: TensorRT-LLM engines are written for {known}, not {config.model_type}")
    for name in ("num_attention_heads", "intermediate_size"):
        if getattr(config, name) % spec.tp:
            raise ConfigError(f"model.tp={spec.tp} does not divide {name}={getattr(config, name)}")
    if config.num_key_value_heads % spec.tp and spec.tp % config.num_key_value_heads:
        raise ConfigError(f"model.tp={spec.tp} does not go into num_key_value_heads={config.num_key_value_heads}")
    out.mkdir(parents=True, exist_ok=True)
    drafter = read_drafter(Path(spec.drafter), config, spec.tp) if spec.drafter else None
    described = describe(config, algorithm, spec)
    if drafter:
        described |= describe_drafter(drafter[0], described, spec)
    (out / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    for rank in range(spec.tp):
        tensors = Tensors(folder, "cpu")
        ours = {name: t.contiguous() for name, t in base_tensors(tensors, config, quant, rank, spec.tp)}
        if drafter:
            ours |= {name: _part(t, 0, rank, spec.tp) for name, t in drafter[1].items()}
        save_file(ours, out / f"rank{rank}.safetensors", metadata={"format": "pt"})
        print(f"rank {rank} of {spec.tp}: {len(ours)} tensors", flush=True)


def quant_algo(quant: QuantFormat | None) -> str | None:
    """TensorRT-LLM's name of a checkpoint's quantisation. Raises InputError when its engines have none for it."""
    if quant is None:
        return None
    if quant.kind == "fp8" and quant.strategy == "tensor" and quant.static_input:
        return "FP8"
    if quant.kind == "packed" and quant.bits == 8 and quant.strategy == "channel":
        return "W8A16"
    raise InputError(
        f"a {quant.kind} checkpoint of {quant.bits} bits with scales per {quant.strategy} has no TensorRT-LLM engine; "
        "use quant=fp8 with quant.granularity=tensor, quant=int8_wo or quant=bf16"
    )


def describe(config: DecoderConfig, algorithm: str | None, spec: ExportSpec) -> dict[str, Any]:
    """config.json of the base."""
    quantization: dict[str, Any] = {"quant_algo": algorithm, "kv_cache_quant_algo": None}
    if algorithm == "FP8":
        quantization["exclude_modules"] = ["lm_head"]
    elif algorithm and spec.drafter:  # with null, TensorRT-LLM's own list applies, and the drafter would be quantised
        quantization["exclude_modules"] = ["*lm_head", "*vocab_embedding"]
    kind = config.rope.get("rope_type", "default")
    scaling = None if kind == "default" else {**config.rope, "type": kind}
    return {
        "architecture": ARCHITECTURES[config.model_type][0],
        "dtype": "bfloat16",
        "logits_dtype": "float16",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_size": config.head_dim,
        "hidden_act": "silu",
        "norm_epsilon": config.rms_norm_eps,
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": config.max_position_embeddings,
        "rotary_base": config.rope_theta,
        "rotary_scaling": scaling,
        "attn_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        **({"qwen_type": "qwen2", "seq_length": 8192} if config.model_type == "qwen2" else {}),
        "tie_word_embeddings": False,
        "use_parallel_embedding": True,
        "embedding_sharding_dim": 0,
        "mapping": {"world_size": spec.tp, "tp_size": spec.tp, "pp_size": 1},
        "quantization": quantization,
    }


def base_tensors(
    tensors: Tensors, config: DecoderConfig, quant: QuantFormat | None, rank: int, tp: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything of one rank but the drafter."""
    import torch

    wide = torch.bfloat16

    def plain(name: str, dim: int | None = None) -> torch.Tensor:
        tensor = tensors.take(name, None, (torch.bfloat16, torch.float16, torch.float32)).to(wide)
        return tensor if dim is None else _part(tensor, dim, rank, tp)

    def linear(to: str, sources: list[str], dim: int) -> Iterator[tuple[str, torch.Tensor]]:
        """A product split over the ranks along `dim` of its weight; several sources are joined after the split."""
        heads = {"k_proj", "v_proj"}
        weights, biases, scales = [], [], []
        for source in sources:
            repeat = config.head_dim if source.rsplit(".", 1)[-1] in heads else 0
            weight, scale = _weight(tensors, source, quant, wide)
            weights.append(_part(_spread(weight, repeat, config, tp), dim, rank, tp))
            if scale is not None:
                scales.append(scale)
            if _has_bias(source, config):
                bias = plain(f"{source}.bias")
                biases.append(_part(_spread(bias, repeat, config, tp), 0, rank, tp) if dim == 0 else bias)
        yield f"{to}.weight", _cat(weights)
        if biases:
            yield f"{to}.bias", _cat(biases)
        if scales:
            if any(not torch.equal(s[0], scales[0][0]) or not torch.equal(s[1], scales[0][1]) for s in scales):
                raise InputError(f"{tensors.folder}: {', '.join(sources)} must share their scales; quantise again")
            yield f"{to}.weights_scaling_factor", scales[0][0]
            yield f"{to}.activation_scaling_factor", scales[0][1]

    yield "transformer.vocab_embedding.weight", _part(_padded(plain("model.embed_tokens.weight"), tp), 0, rank, tp)
    for i in range(config.num_hidden_layers):
        here, there = f"model.layers.{i}", f"transformer.layers.{i}"
        yield f"{there}.input_layernorm.weight", plain(f"{here}.input_layernorm.weight")
        yield f"{there}.post_layernorm.weight", plain(f"{here}.post_attention_layernorm.weight")
        yield from linear(f"{there}.attention.qkv", [f"{here}.self_attn.{n}" for n in JOINED["qkv"]], 0)
        yield from linear(f"{there}.attention.dense", [f"{here}.self_attn.o_proj"], 1)
        yield from linear(f"{there}.mlp.fc", [f"{here}.mlp.gate_proj"], 0)
        yield from linear(f"{there}.mlp.gate", [f"{here}.mlp.up_proj"], 0)
        yield from linear(f"{there}.mlp.proj", [f"{here}.mlp.down_proj"], 1)
    yield "transformer.ln_f.weight", plain("model.norm.weight")
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    yield "lm_head.weight", _part(_padded(plain(head), tp), 0, rank, tp)


def _weight(
    tensors: Tensors, source: str, quant: QuantFormat | None, wide: torch.dtype
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """(weight, (weight scale, input scale) of fp8): E4M3 codes for fp8, bf16 otherwise."""
    import torch

    from omr.nn.quant_format import unpack

    floats = (torch.bfloat16, torch.float16, torch.float32)
    if quant is None or not quant.covers(source):
        return tensors.take(f"{source}.weight", None, floats).to(wide), None
    if quant.kind == "fp8":
        codes = tensors.take(f"{source}.weight", None, (torch.float8_e4m3fn,))
        scales = [
            tensors.take(f"{source}.{n}", None, floats).float().reshape(1) for n in ("weight_scale", "input_scale")
        ]
        return codes, (scales[0], scales[1])
    shape = tensors.take(f"{source}.weight_shape", (2,), (torch.int64, torch.int32)).tolist()
    packed = tensors.take(f"{source}.weight_packed", None, (torch.int32,))
    scale = tensors.take(f"{source}.weight_scale", (shape[0], 1), floats).float()
    return (unpack(packed, quant.bits, shape[1]).float() * scale).to(wide), None


def _has_bias(source: str, config: DecoderConfig) -> bool:
    leaf = source.rsplit(".", 1)[-1]
    if leaf == "o_proj":
        return config.o_bias
    return config.qkv_bias if leaf in JOINED["qkv"] else config.mlp_bias


def _spread(tensor: torch.Tensor, head_dim: int, config: DecoderConfig, tp: int) -> torch.Tensor:
    """Repeat key and value heads when there are fewer than ranks, so that each rank has one."""
    if not head_dim or config.num_key_value_heads >= tp:
        return tensor
    heads = tensor.reshape(config.num_key_value_heads, head_dim, *tensor.shape[1:])
    return heads.repeat_interleave(tp // config.num_key_value_heads, 0).reshape(-1, *tensor.shape[1:])


def _padded(tensor: torch.Tensor, tp: int) -> torch.Tensor:
    import torch

    missing = -len(tensor) % tp
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor


def _part(tensor: torch.Tensor, dim: int, rank: int, tp: int) -> torch.Tensor:
    return tensor.chunk(tp, dim)[rank].contiguous()


def _cat(parts: list[torch.Tensor]) -> torch.Tensor:
    import torch

    if len(parts) == 1:
        return parts[0]
    if parts[0].dtype is torch.float8_e4m3fn:  # torch.cat has no E4M3 on every build; the bytes are the same
        return torch.cat([p.view(torch.uint8) for p in parts]).view(torch.float8_e4m3fn)
    return torch.cat(parts)


def read_drafter(folder: Path, config: DecoderConfig, tp: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(the drafter's config, its tensors under TensorRT-LLM's names, whole). Raises InputError for another kind."""
    import torch

    from omr.nn.redrafter import load_redrafter

    drafter = load_redrafter(folder, dtype=torch.bfloat16)
    shape = drafter.config
    if not shape.plain:
        raise InputError(
            f"{folder}: TensorRT-LLM knows full heads only; train with drafter.head=full and no draft vocabulary"
        )
    if (shape.hidden_size, shape.vocab_size) != (config.hidden_size, config.vocab_size):
        raise InputError(
            f"{folder}: the drafter is for hidden size {shape.hidden_size} and {shape.vocab_size} tokens, "
            f"the model has {config.hidden_size} and {config.vocab_size}"
        )
    for name, size in (
        ("vocab_size", shape.vocab_size),
        ("exit_dim", shape.exit_dim),
        ("hidden_size", shape.hidden_size),
    ):
        if size % tp:
            raise ConfigError(f"model.tp={tp} does not divide the drafter's {name}={size}, and TensorRT-LLM pads none")
    names = {}
    for name, tensor in drafter.state_dict().items():
        parts = name.split(".")
        if parts[0] != "lm_head":
            names[f"drafter.{name}"] = tensor
        elif int(parts[1]) == shape.num_draft_layers:
            names["drafter.lm_head.weight"] = tensor
        else:
            names[f"drafter.layers.{'.'.join(parts[1:])}"] = tensor
    return asdict(shape), names


def describe_drafter(shape: dict[str, Any], base: dict[str, Any], spec: ExportSpec) -> dict[str, Any]:
    """What a ReDrafter changes in config.json."""
    quantization = dict(base["quantization"])
    if quantization.get("exclude_modules") is not None:
        layers = [f"drafter.layers.{j}{part}" for j in range(shape["num_draft_layers"]) for part in ("", ".linear")]
        recurrent = ["drafter.rnn_u", "drafter.rnn_w"] if shape["rnn"] else []
        projection = ["drafter.input_proj"] if shape["exit_dim"] != 2 * shape["hidden_size"] else []
        quantization["exclude_modules"] = [
            *quantization["exclude_modules"],
            *("drafter", "drafter.layers", "drafter.lm_head"),
            *(recurrent + projection + layers),
        ]
    joined = dict(ARCHITECTURES.values())
    return {
        "architecture": joined[base["architecture"]],
        "base_model_architecture": base["architecture"],
        "redrafter_num_layers": shape["num_draft_layers"],
        "redrafter_hidden_size": shape["hidden_size"],
        "redrafter_exit_dim": shape["exit_dim"],
        "redrafter_is_rnn": shape["rnn"],
        "redrafter_num_beams": spec.num_beams,
        "redrafter_draft_len_per_beam": spec.draft_tok,
        "redrafter_greedy_search": spec.greedy,
        "quantization": quantization,
    }


def main(path: Path) -> int:
    try:
        export(ExportSpec(**json.loads(path.read_text())))
    except OmrError as error:
        print(f"error: {type(error).__name__}: {error}", flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
