"""Checkpoints of every format load to the right weights; each defect is refused in one line that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from omr.errors import InputError
from omr.nn.linear import Fp8Linear, GroupLinear, Int8Linear
from omr.nn.loader import load

FORMATS = ("fp8", "fp8-channel", "fp8-modelopt", "int8", "int4", "int8-group")
QUANTISED = "model.layers.0.self_attn.q_proj"


def pack(values: list[list[int]], bits: int) -> torch.Tensor:
    """Plain-loop packing: value + 2^(bits-1) into 32-bit words, first value in the low bits."""
    per_word = 32 // bits
    rows = []
    for row in values:
        words = []
        for start in range(0, len(row), per_word):
            word = sum((v + 2 ** (bits - 1)) << (bits * i) for i, v in enumerate(row[start : start + per_word]))
            words.append(word - 2**32 if word >= 2**31 else word)
        rows.append(words)
    return torch.tensor(rows, dtype=torch.int32)


def quantise(folder: Path, layout: str) -> dict[str, torch.Tensor]:
    """Rewrite a saved float checkpoint in `layout`; the weights it stands for, by layer name."""
    tensors = load_file(folder / "model.safetensors")
    dense = {}
    for name in [n.removesuffix(".weight") for n in tensors if n.endswith("_proj.weight")]:
        weight = tensors.pop(f"{name}.weight").float()
        rows, columns = weight.shape
        if layout.startswith("fp8"):
            amax = weight.abs().amax(1, keepdim=True) if layout == "fp8-channel" else weight.abs().max().view(1)
            scale = amax / 448
            stored = (weight / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}.weight"] = stored
            tensors[f"{name}.weight_scale"] = scale.reshape(()) if layout == "fp8-modelopt" else scale
            tensors[f"{name}.input_scale"] = torch.tensor([0.02])
            dense[name] = stored.float() * scale
        else:
            bits, group = {"int8": (8, columns), "int8-group": (8, 16), "int4": (4, 16)}[layout]
            grouped = weight.view(rows, -1, group)
            scale = (grouped.abs().amax(-1) / (2 ** (bits - 1) - 1)).bfloat16()
            codes = (grouped / scale.float()[..., None]).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).int()
            tensors[f"{name}.weight_packed"] = pack(codes.view(rows, columns).tolist(), bits)
            tensors[f"{name}.weight_scale"] = scale
            tensors[f"{name}.weight_shape"] = torch.tensor([rows, columns])
            dense[name] = (codes * scale.float()[..., None]).view(rows, columns)
    save_file(tensors, folder / "model.safetensors")
    edit_config(folder, quantization_config=declaration(layout))
    return dense


def declaration(layout: str) -> dict:
    if layout == "fp8-modelopt":
        return {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    strategy = {"fp8": "tensor", "fp8-channel": "channel", "int8": "channel"}.get(layout, "group")
    weights = {"num_bits": 4 if layout == "int4" else 8, "strategy": strategy, "symmetric": True, "dynamic": False}
    weights |= {"type": "float" if layout.startswith("fp8") else "int"}
    weights |= {"group_size": 16 if strategy == "group" else None}
    inputs = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if layout.startswith("fp8") else "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": inputs if layout.startswith("fp8") else None,
            }
        },
    }


def edit_config(folder: Path, **changes: object) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("layout", FORMATS)
def test_quantised_weights_are_those_written(layout: str, saved) -> None:
    _, folder = saved()
    dense = quantise(folder, layout)
    model = load(folder, device="cpu")
    kinds = {"fp8": Fp8Linear, "int8": Int8Linear}
    for name, weight in dense.items():
        layer = model.get_submodule(name.removeprefix("model."))
        assert isinstance(layer, kinds.get(layout.removesuffix("-channel").removesuffix("-modelopt"), GroupLinear))
        torch.testing.assert_close(layer.dense(torch.float32), weight)
    assert isinstance(model.lm_head, torch.nn.Linear)


@pytest.mark.parametrize("layout", FORMATS)
def test_quantised_model_equals_transformers_with_the_same_weights(layout: str, saved) -> None:
    """The oracle gets the dequantised weights, and for FP8 torch's own cast in front of every quantised layer."""
    reference, folder = saved()
    for name, weight in quantise(folder, layout).items():
        layer = reference.get_submodule(name)
        layer.weight.data = weight
        if layout.startswith("fp8"):
            layer.register_forward_pre_hook(
                lambda _, args: ((args[0] / 0.02).clamp(-448, 448).to(torch.float8_e4m3fn).float() * 0.02,)
            )
    model = load(folder, device="cpu")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = reference(ids).logits
        got = model.lm_head(model.hidden_states(ids))
    # A value on the edge between two E4M3 codes may fall to either side, so FP8 is close and not equal.
    assert (got - expected).norm() / expected.norm() < (1e-2 if layout.startswith("fp8") else 1e-5)


def test_modelopt_description_beside_the_config_is_read(saved) -> None:
    _, folder = saved()
    quantise(folder, "fp8")
    edit_config(folder, quantization_config=None)
    beside = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (folder / "hf_quant_config.json").write_text(json.dumps(beside))
    assert isinstance(load(folder, device="cpu").layers[0].mlp.up_proj, Fp8Linear)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [None, torch.bfloat16])
def test_float_checkpoints_of_any_kind(stored: torch.dtype, wanted: torch.dtype | None, saved) -> None:
    _, folder = saved()
    edit_tensors(folder, lambda t: t.update({n: x.to(stored) for n, x in t.items()}))
    model = load(folder, device="cpu", dtype=wanted)
    assert {p.dtype for p in model.parameters()} == {wanted or torch.float32}
    assert not any(p.requires_grad for p in model.parameters())


def test_sharded_checkpoint_equals_the_single_file(saved, tmp_path: Path) -> None:
    reference, folder = saved()
    reference.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    one, many = load(folder, device="cpu").state_dict(), load(tmp_path / "sharded", device="cpu").state_dict()
    assert one.keys() == many.keys() and all(torch.equal(one[n], many[n]) for n in one)


def test_tied_head_shares_the_embedding_even_when_stored(saved) -> None:
    _, folder = saved(tie_word_embeddings=True)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": torch.zeros(96, 64)}))
    model = load(folder, device="cpu")
    assert model.lm_head.weight is model.embed.weight


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("layout", FORMATS)
def test_quantised_layers_on_cuda_are_those_of_the_cpu(layout: str, saved) -> None:
    """Layer by layer: over a random model the roundings to E4M3 that fall to the other side would add up."""
    _, folder = saved()
    quantise(folder, layout)
    ours, cpu = load(folder, device="cuda"), load(folder, device="cpu")
    assert ours.dtype == torch.bfloat16
    for name, layer in ours.named_modules():
        if name.endswith("_proj"):
            for rows in (1, 7, 80):
                x = torch.randn(rows, layer.in_features).bfloat16()
                expected = cpu.get_submodule(name)(x.float())
                error = (layer(x.cuda()).cpu().float() - expected).norm() / expected.norm()
                assert error < 1e-2, f"{name}: {error:.1e}"
    assert ours.hidden_states(torch.arange(48, device="cuda")[None]).isfinite().all()


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x80\x04pickle" * 100)


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def _shard_gone(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001.safetensors"}}))


def _index_outside(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))


def _index_of_numbers(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": 1, "b": "c"}}))


def _set(name: str, value: torch.Tensor) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda t: t.update({name: value}))


def _drop(name: str) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda t: t.pop(name))


def _declare(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        raw = json.loads((folder / "config.json").read_text())["quantization_config"]
        group = raw["config_groups"]["group_0"]
        for key, value in changes.items():
            place = raw if key in raw else group if key in group else group["weights"]
            place[key] = value
        edit_config(folder, quantization_config=raw)

    return edit


DEFECTS: dict[str, tuple[str | None, Callable[[Path], object], str]] = {
    "no config": (None, lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "config is not JSON": (None, lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    "no weights": (None, lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "pickled weights": (None, _pickled, "pickled weights run code"),
    "truncated": (None, _truncate, "truncated"),
    "not safetensors": (None, _garbage, "truncated or not safetensors"),
    "a shard is gone": (None, _shard_gone, "model-00001.safetensors is listed in .* but missing"),
    "index leaves the folder": (None, _index_outside, "outside the folder"),
    "index of numbers": (None, _index_of_numbers, "no weight_map from tensors to files"),
    "missing tensor": (None, _drop("model.norm.weight"), "model.norm.weight is missing"),
    "missing bias": (None, _drop(f"{QUANTISED}.bias"), f"{QUANTISED}.bias is missing"),
    "unexpected tensor": (None, _set("model.layers.2.extra", torch.zeros(1)), "unexpected tensor model.layers.2.extra"),
    "wrong shape": (None, _set("model.norm.weight", torch.ones(65)), r"shape \[65\]"),
    "wrong kind": (None, _set("model.norm.weight", torch.ones(64).int()), "int32, expected float32"),
    "quantised without saying so": ("fp8", lambda f: edit_config(f, quantization_config=None), "float8"),
    "saying so without being": (
        None,
        lambda f: edit_config(f, quantization_config=declaration("fp8")),
        "expected float8",
    ),
    "unknown method": (None, lambda f: edit_config(f, quantization_config={"quant_method": "awq"}), "'awq'"),
    "modelopt but not fp8": (
        None,
        lambda f: edit_config(f, quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4"}),
        "'NVFP4'",
    ),
    "missing weight scale": ("fp8", _drop(f"{QUANTISED}.weight_scale"), "weight_scale is missing"),
    "missing input scale": ("fp8", _drop(f"{QUANTISED}.input_scale"), "input_scale is missing"),
    "scale not finite": ("fp8", _set(f"{QUANTISED}.weight_scale", torch.tensor([float("nan")])), "finite and positive"),
    "scale zero": ("fp8", _set(f"{QUANTISED}.input_scale", torch.zeros(1)), "finite and positive"),
    "scale shape": ("fp8", _set(f"{QUANTISED}.weight_scale", torch.ones(2)), r"shape \[2\]"),
    "scale per row where one is declared": ("fp8-channel", _declare(strategy="tensor"), r"shape \[64, 1\]"),
    "dynamic activations": ("fp8", _declare(input_activations={"dynamic": True}), "static per-tensor"),
    "other targets": ("fp8", _declare(targets=["re:.*mlp.*"]), "targets"),
    "no groups": ("fp8", _declare(config_groups={}), "0 config_groups"),
    "zero points": ("int4", _declare(symmetric=False), "asymmetric"),
    "integer activations": ("int8", _declare(input_activations={"num_bits": 8}), "integer activations"),
    "2-bit": ("int4", _declare(num_bits=2), "2-bit"),
    "group does not divide": ("int4", _declare(group_size=48), "not a multiple of group 48"),
    "missing shape": ("int8", _drop(f"{QUANTISED}.weight_shape"), "weight_shape is missing"),
    "wrong stored shape": ("int8", _set(f"{QUANTISED}.weight_shape", torch.tensor([64, 32])), "weight_shape is"),
    "packed too narrow": (
        "int8",
        _set(f"{QUANTISED}.weight_packed", torch.zeros(64, 8, dtype=torch.int32)),
        r"shape \[64, 8\]",
    ),
}


@pytest.mark.parametrize("defect", sorted(DEFECTS))
def test_defects_are_refused_in_one_line(defect: str, saved) -> None:
    layout, spoil, message = DEFECTS[defect]
    _, folder = saved()
    if layout is not None:
        quantise(folder, layout)
    spoil(folder)
    with pytest.raises(InputError, match=message) as caught:
        load(folder, device="cpu")
    assert "\n" not in str(caught.value)
