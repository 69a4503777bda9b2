"""A Hugging Face checkpoint folder on disk, looked at without loading it: names, shapes and dtypes of its tensors.

A safetensors file is an 8-byte little-endian header length, a JSON header and the data. The header says which bytes
belong to which tensor, so a truncated or padded file shows before anything is allocated: the last tensor must end
exactly where the file does. Only safetensors is read: the older `.bin` files are pickles, which run code when loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omr.errors import InputError

if TYPE_CHECKING:
    import torch

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 8),
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is."""

    file: Path
    dtype: str
    """As safetensors writes it: BF16, F8_E4M3, ..."""
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: headers read, data not."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @property
    def num_bytes(self) -> int:
        return sum(info.num_bytes for info in self.tensors.values())

    @property
    def num_params(self) -> int:
        return sum(math.prod(info.shape) for info in self.tensors.values())

    def read(self, *names: str) -> Iterator[torch.Tensor]:
        """The named tensors, on CPU, one at a time; memory is mapped, not copied, until it is used."""
        from safetensors import SafetensorError, safe_open

        for name in names:
            info = self.tensors[name]
            try:
                with safe_open(info.file, framework="pt") as file:
                    yield file.get_tensor(name)
            except SafetensorError as error:
                raise InputError(f"{info.file}: tensor {name} cannot be read ({error}); fetch the file again") from None


def open_checkpoint(folder: Path, *, any_family: bool = False) -> Checkpoint:
    """Read config.json and every safetensors header of `folder`.

    Raises InputError when the folder is not a checkpoint of a supported architecture (unless `any_family`) or has no
    safetensors, and when a file is truncated, tampered with or missing from the index.
    """
    if not folder.is_dir():
        raise InputError(f"model folder {folder} does not exist; set model.path to a Hugging Face folder")
    config = read_json(folder / "config.json")
    architectures = config.get("architectures") or []
    if not any_family and not set(architectures) & set(ARCHITECTURES):
        raise InputError(
            f"{folder / 'config.json'} says architectures {architectures}; omr runs {', '.join(ARCHITECTURES)}; others "
            "go to a server of another program as they are, with quant=bf16 and a drafter that omr does not train"
        )
    tensors: dict[str, TensorInfo] = {}
    for path in weight_files(folder):
        for name, info in read_header(path).items():
            if name in tensors:
                raise InputError(f"tensor {name} is in both {tensors[name].file.name} and {path.name} of {folder}")
            tensors[name] = info
    if (folder / INDEX).is_file():
        listed = read_json(folder / INDEX).get("weight_map", {})
        if missing := sorted(set(listed) - set(tensors)):
            raise InputError(f"{folder / INDEX} lists {missing[0]}, which no file holds; fetch the checkpoint again")
    if not tensors:
        raise InputError(f"{folder} holds no tensors; fetch the checkpoint again")
    return Checkpoint(folder, config, tensors)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those of the index, else model.safetensors. Raises InputError."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(n, str) for n in weight_map.values())
        ):
            raise InputError(f"{folder / INDEX} has no weight_map from tensors to files; fetch it again")
        files = [folder / name for name in sorted(set(weight_map.values()))]
    elif (folder / SINGLE).is_file():
        files = [folder / SINGLE]
    elif pickles := sorted(p.name for p in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]):
        raise InputError(
            f"{folder} has {pickles[0]} but no safetensors: pickled weights run code when loaded and are refused; "
            "convert them with transformers save_pretrained on a machine that trusts them"
        )
    else:
        raise InputError(f"{folder} has neither {SINGLE} nor {INDEX}; give a Hugging Face folder with safetensors")
    for path in files:
        if path.parent != folder:
            raise InputError(f"{folder / INDEX} points outside the folder: {path.name}")
        if not path.is_file():
            raise InputError(f"{path} is listed in {INDEX} but missing; fetch the checkpoint again")
    return files


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensor name -> info, checked against the file's size. Raises InputError."""
    size = path.stat().st_size
    again = "the file is truncated or damaged: fetch it again"
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise InputError(f"{path} ({size} bytes) is not a whole safetensors file; {again}")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            tensors = {}
            spans = []
            for name, entry in header.items():
                info = TensorInfo(path, str(entry["dtype"]), tuple(int(n) for n in entry["shape"]))
                start, end = entry["data_offsets"]
                if end - start != info.num_bytes:
                    raise InputError(f"{path}: {name} {info.dtype}{list(info.shape)} has {end - start} bytes; {again}")
                tensors[name] = info
                spans.append((start, end))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: header cannot be read ({error!r}); {again}") from None
    at = 0
    for start, end in sorted(spans):
        if start != at:
            raise InputError(f"{path}: a gap or overlap at byte {at} of the data; {again}")
        at = end
    if 8 + length + at != size:
        raise InputError(f"{path} should have {8 + length + at} bytes and has {size}; {again}")
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; give a whole Hugging Face folder")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not JSON ({error}); fetch it again") from None
    if not isinstance(data, dict):
        raise InputError(f"{path} should hold a JSON object, has {type(data).__name__}")
    return data
