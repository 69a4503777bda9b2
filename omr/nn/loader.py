"""From a Hugging Face folder to a Transformer that can run: safetensors only, every tensor accounted for.

A checkpoint that is silently misread still talks, so nothing is guessed: a tensor that is missing, unexpected, of
another shape or kind, a scale that is not finite and positive, an unknown quantisation, each is an InputError that
names it. Pickled weights (*.bin, *.pt) are never opened. Two kinds of tensor may be present and are not used: a tied
lm_head, and the scales of an FP8 KV cache (k_scale, v_scale), since the cache is kept in the model's dtype.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.overrides import TorchFunctionMode

from omr.errors import InputError
from omr.nn import config as decoder_config
from omr.nn.checkpoint import weight_files
from omr.nn.linear import Fp8Linear, GroupLinear, Int8Linear
from omr.nn.quant_format import QuantFormat, quant_format, unpack
from omr.nn.transformer import Transformer

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SMALL_PARAMS = 1_000_000_000
"""Up to here the CPU computes in float32: at batch 1 torch's bf16 products are slower there."""


def load(folder: Path, *, device: str, dtype: torch.dtype | None = None) -> Transformer:
    """The model of `folder` on `device`, without gradients.

    `dtype` defaults to bfloat16 on CUDA, and on CPU to float32 up to a billion parameters, bfloat16 above. Raises
    InputError for anything that is not exactly a checkpoint of a supported family and quantisation.
    """
    folder = Path(folder)
    config, raw = decoder_config.read(folder)
    if dtype is None:
        small = device == "cpu" and config.num_params <= SMALL_PARAMS
        dtype = torch.float32 if small else torch.bfloat16
    quant = quant_format(raw, folder)
    tensors = Tensors(folder, device)
    with torch.device("meta"), _Uninitialised():
        model = Transformer(config)
    for name, module in list(model.named_modules()):
        if name == "lm_head" and config.tie_word_embeddings:
            continue
        prefix = name if name == "lm_head" else f"model.{name}"
        if isinstance(module, nn.Linear):
            if quant is not None and quant.covers(prefix):
                _replace(model, name, _quantised(tensors, prefix, module, quant, dtype))
                continue
            if module.bias is not None:
                module.bias = _parameter(tensors.take(f"{prefix}.bias", module.bias.shape, FLOATS), dtype)
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            module.weight = _parameter(tensors.take(f"{prefix}.weight", module.weight.shape, FLOATS), dtype)
    model.tie()
    tensors.done(unused_ok=_unused_ok)
    return model.requires_grad_(False).eval()


def _unused_ok(name: str) -> bool:
    return name == "lm_head.weight" or name.endswith((".k_scale", ".v_scale", ".rotary_emb.inv_freq"))


class _Uninitialised(TorchFunctionMode):
    """No random weights for modules that are about to get real ones.

    Time is saved, and seconds of it: drawing a normal on the meta device imports torch's compiler.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


class Tensors:
    """The tensors of a checkpoint by name, each taken once."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, safe_open] = {}
        for path in weight_files(folder):
            try:
                reader = safe_open(path, framework="pt", device=device)
            except (SafetensorError, OSError) as error:
                raise InputError(f"{path} is truncated or not safetensors ({error}); fetch the model again") from None
            self._open[path] = reader
            for name in reader.keys():  # noqa: SIM118 - not a dict
                if name in self._file_of:
                    raise InputError(f"{path}: tensor {name} is also in {self._file_of[name].name}")
                self._file_of[name] = path
        self._left = set(self._file_of)

    def take(
        self, name: str, shape: torch.Size | tuple[int, ...] | None, dtypes: tuple[torch.dtype, ...]
    ) -> torch.Tensor:
        """Tensor `name` on the device. Raises InputError unless it is there, of this shape and one of these dtypes."""
        path = self._file_of.get(name)
        if path is None:
            raise InputError(f"{self.folder}: tensor {name} is missing from the checkpoint; fetch or quantise it again")
        try:
            tensor = self._open[path].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: tensor {name} cannot be read ({error})") from None
        if shape is not None and tuple(tensor.shape) != tuple(shape):
            raise InputError(f"{path}: {name} has shape {list(tensor.shape)}, config.json implies {list(shape)}")
        if tensor.dtype not in dtypes:
            wanted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise InputError(f"{path}: {name} is {str(tensor.dtype).removeprefix('torch.')}, expected {wanted}")
        self._left.discard(name)
        return tensor

    def done(self, *, unused_ok: object) -> None:
        left = sorted(name for name in self._left if not unused_ok(name))
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise InputError(
                f"{self.folder}: unexpected tensor {left[0]}{more}; the checkpoint does not fit config.json"
            )


def _parameter(tensor: torch.Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(tensor.to(dtype), requires_grad=False)


def _replace(model: Transformer, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _scale(tensors: Tensors, name: str, shapes: list[tuple[int, ...]]) -> torch.Tensor:
    tensor = tensors.take(name, None, FLOATS)
    if tuple(tensor.shape) not in shapes:
        raise InputError(f"{tensors.folder}: {name} has shape {list(tensor.shape)}, expected {list(shapes[0])}")
    if not bool((torch.isfinite(tensor) & (tensor > 0)).all()):
        raise InputError(f"{tensors.folder}: {name} must be finite and positive; quantise the model again")
    return tensor


def _quantised(
    tensors: Tensors, name: str, linear: nn.Linear, quant: QuantFormat, dtype: torch.dtype
) -> Fp8Linear | Int8Linear | GroupLinear:
    rows, columns = linear.out_features, linear.in_features
    bias = None if linear.bias is None else tensors.take(f"{name}.bias", (rows,), FLOATS)
    if quant.kind == "fp8":
        weight = tensors.take(f"{name}.weight", (rows, columns), (torch.float8_e4m3fn,))
        shapes = [(1,), ()] if quant.strategy == "tensor" else [(rows, 1), (rows,)]
        scale = _scale(tensors, f"{name}.weight_scale", shapes)
        scale = scale.reshape(1) if quant.strategy == "tensor" else scale.reshape(rows, 1)
        input_scale = None
        if quant.static_input:
            input_scale = _scale(tensors, f"{name}.input_scale", [(1,), ()]).reshape(1)
        return Fp8Linear(weight, scale, input_scale, bias, dtype)
    per_word = 32 // quant.bits
    shape = tensors.take(f"{name}.weight_shape", (2,), (torch.int64, torch.int32))
    if shape.tolist() != [rows, columns]:
        raise InputError(
            f"{tensors.folder}: {name}.weight_shape is {shape.tolist()}, config.json implies {[rows, columns]}"
        )
    packed = tensors.take(f"{name}.weight_packed", (rows, -(-columns // per_word)), (torch.int32,))
    values = unpack(packed, quant.bits, columns)
    groups = 1
    if quant.strategy == "group":
        if columns % quant.group_size:
            raise InputError(
                f"{tensors.folder}: {name} has {columns} columns, not a multiple of group {quant.group_size}"
            )
        groups = columns // quant.group_size
    scale = _scale(tensors, f"{name}.weight_scale", [(rows, groups)])
    if quant.bits == 8 and groups == 1:
        return Int8Linear(values, scale, bias, dtype)
    return GroupLinear(values, scale, bias, dtype)
