"""Rewrites a checkpoint with its linear layers quantised, one group of layers in memory at a time.

Layers that read the same input and that servers multiply as one (q, k, v and gate, up) are a group: the quantiser sees
them together, because engines that fuse them keep one scale for all. Everything else (embeddings, lm_head, norms,
biases) is copied as it is. Output is cut into shards, so that memory stays bounded by one shard whatever the model's
size.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from omr.errors import InputError
from omr.nn.checkpoint import INDEX, SINGLE, Checkpoint, open_checkpoint
from omr.nn.config import parse

SHARD_BYTES = 4 << 30
FUSED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
NOT_COPIED = ("config.json", INDEX, "hf_quant_config.json", "manifest.json", "ranges.json")

Encoded = dict[str, torch.Tensor]
"""Tensors of one layer by suffix: `weight`, `weight_scale`, ... Suffix `weight` may be absent (packed forms)."""
Encode = Callable[[dict[str, torch.Tensor]], dict[str, tuple[Encoded, float]]]
"""Weights of a group, by layer name -> for each layer its stored tensors and its relative rounding error."""


def open_unquantised(src: Path) -> Checkpoint:
    """The checkpoint of `src`. Raises InputError for one that is quantised already."""
    opened = open_checkpoint(src)
    if "quantization_config" in opened.config or (src / "hf_quant_config.json").exists():
        raise InputError(f"{src} is quantised already; serve it as it is with quant=bf16, or give the original weights")
    return opened


def groups(opened: Checkpoint) -> list[list[str]]:
    """Names of the linear layers to quantise, fused ones together, in the order of the decoder. Raises InputError."""
    found = []
    for layer in range(parse(opened.config).num_hidden_layers):
        for fused in FUSED:
            names = [f"model.layers.{layer}.{name}" for name in fused]
            for name in names:
                if f"{name}.weight" not in opened.tensors:
                    raise InputError(f"{opened.folder} has no {name}.weight; its config.json implies one")
            found.append(names)
    return found


def rewrite(
    opened: Checkpoint, out: Path, encode: Encode, quantization_config: dict[str, Any], device: str
) -> dict[str, float]:
    """Write the checkpoint to `out` with every linear layer encoded; the other files are copied.

    Returns num_layers, rel_error_max, rel_error_mean, bytes_before, bytes_after, seconds. Raises InputError for weights
    that are not finite.
    """
    started = time.monotonic()
    errors: list[float] = []
    linears = groups(opened)
    encoded_names = {f"{name}.weight" for group in linears for name in group}
    with ShardWriter(out) as writer:
        for name in opened.tensors:
            if name not in encoded_names:
                (tensor,) = opened.read(name)
                writer.add(name, tensor)
        for group in _progress(linears):
            weights = dict(zip(group, opened.read(*[f"{name}.weight" for name in group]), strict=True))
            for name, weight in weights.items():
                if not bool(torch.isfinite(weight).all()):
                    raise InputError(f"{opened.folder}: {name}.weight holds NaN or infinite values; fetch it again")
            for name, (tensors, error) in encode({n: w.to(device) for n, w in weights.items()}).items():
                errors.append(error)
                for suffix, tensor in tensors.items():
                    writer.add(f"{name}.{suffix}", tensor)
    for path in sorted(opened.folder.iterdir()):
        if path.is_file() and path.suffix in (".json", ".jinja", ".model", ".txt") and path.name not in NOT_COPIED:
            shutil.copyfile(path, out / path.name)
    write_json(out / "config.json", {**opened.config, "quantization_config": quantization_config})
    return {
        "num_layers": float(len(errors)),
        "rel_error_max": max(errors),
        "rel_error_mean": sum(errors) / len(errors),
        "bytes_before": float(opened.num_bytes),
        "bytes_after": float(writer.total_bytes),
        "seconds": round(time.monotonic() - started, 3),
    }


class ShardWriter:
    """Collects tensors and writes them as safetensors: one file, or several with an index once a shard is full."""

    def __init__(self, out: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.out, self.shard_bytes = out, shard_bytes
        self.total_bytes = 0
        self._waiting: dict[str, torch.Tensor] = {}
        self._waiting_bytes = 0
        self._shards: list[list[str]] = []

    def __enter__(self) -> ShardWriter:
        return self

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._waiting and self._waiting_bytes + size > self.shard_bytes:
            self._flush()
        self._waiting[name] = tensor.detach().cpu().contiguous()
        self._waiting_bytes += size
        self.total_bytes += size

    def _part(self, number: int) -> Path:
        return self.out / f"model-{number:05d}.safetensors"

    def _flush(self) -> None:
        from safetensors.torch import save_file

        self._shards.append(list(self._waiting))
        path = self._part(len(self._shards))
        save_file(self._waiting, path, metadata={"format": "pt"})
        path.chmod(0o644)
        self._waiting, self._waiting_bytes = {}, 0

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is not None:
            return
        if self._waiting:
            self._flush()
        count = len(self._shards)
        if count == 1:
            self._part(1).rename(self.out / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards, 1):
            final = f"model-{number:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self.out / final)
            weight_map |= dict.fromkeys(names, final)
        write_json(self.out / INDEX, {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map})


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _progress(items: list[list[str]]) -> Iterator[list[str]]:
    from tqdm import tqdm

    yield from tqdm(items, desc="quantise", unit="group", mininterval=1.0)
