"""Written checkpoints: read back by omr's loader and, as the oracle, by transformers with compressed-tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from omr.artifact import Store, content
from omr.errors import ConfigError, InputError
from omr.nn.checkpoint import open_checkpoint
from omr.nn.loader import load
from omr.process import run_verb
from omr.quant import Quantiser
from omr.quant._rewrite import ShardWriter
from omr.quant.bf16 import Bf16
from omr.quant.fp8 import Export, Fp8, Granularity
from omr.quant.int4 import Clip, Int4, fitting_group
from omr.quant.int8_wo import Int8Wo

Make = Callable[..., Path]
ROOT = Path(__file__).parents[2]
SCHEMES: dict[str, Quantiser] = {
    "fp8": Fp8(calib_samples=8),
    "fp8-channel": Fp8(calib_samples=8, granularity=Granularity.channel),
    "int8_wo": Int8Wo(),
    "int4": Int4(),
    "int4-mse": Int4(clip=Clip.mse, group_size=16),
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 96, "head_dim": 24},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
}


def quantise(option: Quantiser, src: Path, out: Path, calibration: Path) -> dict[str, float]:
    out.mkdir()
    return option.quantise(src, out, calibration if option.calib_samples else None, "cpu")


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = load(folder, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        return model.lm_head(model.hidden_states(ids))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("scheme", sorted(SCHEMES))
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_transformers_reads_what_the_loader_reads(
    family: str, scheme: str, make_model: Make, calibration: Path, tmp_path: Path
) -> None:
    src = make_model(family, **FAMILIES[family])
    out = tmp_path / "out"
    metrics = quantise(SCHEMES[scheme], src, out, calibration)
    assert metrics["num_layers"] == 14
    bound = {"fp8": 0.03, "fp8-channel": 0.03, "int8_wo": 0.01, "int4": 0.13, "int4-mse": 0.11}[scheme]
    assert 0 < metrics["rel_error_mean"] <= metrics["rel_error_max"] < bound
    assert metrics["bytes_after"] < metrics["bytes_before"]
    assert metrics["bytes_after"] == open_checkpoint(out).num_bytes

    ids = torch.arange(2, 34)[None]
    ours = logits(out, ids)
    oracle = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = oracle(ids).logits
    assert (ours - theirs).norm() / theirs.norm() < 1e-5
    plain = logits(src, ids)
    assert (ours - plain).norm() / plain.norm() < bound * 8
    assert not torch.equal(ours, plain)


@pytest.mark.parametrize("export", list(Export))
def test_the_tensors_of_fp8_are_one_set_for_both_dialects(
    export: Export, make_model: Make, calibration: Path, tmp_path: Path
) -> None:
    src, out = make_model(), tmp_path / "out"
    quantise(Fp8(calib_samples=8, export=export), src, out, calibration)
    tensors = load_file(out / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    assert tensors[f"{name}.weight"].dtype == torch.float8_e4m3fn
    for scale in (tensors[f"{name}.weight_scale"], tensors[f"{name}.input_scale"]):
        assert scale.dtype == torch.float32 and scale.shape == (1,)
    assert tensors["lm_head.weight"].dtype == tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == export.name.replace("_", "-")
    assert config["ignore"] == ["lm_head"]
    beside = json.loads((out / "hf_quant_config.json").read_text())
    assert beside["producer"]["name"] == "modelopt"
    assert beside["quantization"] == {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    ids = torch.arange(9)[None]
    other = tmp_path / "other"
    quantise(Fp8(calib_samples=8), src, other, calibration)
    assert torch.equal(logits(out, ids), logits(other, ids))


def test_fused_layers_share_the_largest_scale(make_model: Make, calibration: Path, tmp_path: Path) -> None:
    src = make_model()
    weights = load_file(src / "model.safetensors")
    quantise(Fp8(calib_samples=8), src, tmp_path / "out", calibration)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for layer in range(2):
        for block, parts in (("self_attn", "qkv"), ("mlp", ("gate", "up")), ("mlp", ("down",))):
            names = [f"model.layers.{layer}.{block}.{part}_proj" for part in parts]
            largest = max(weights[f"{name}.weight"].abs().max().float() for name in names)
            inputs = {float(stored[f"{name}.input_scale"]) for name in names}
            assert len(inputs) == 1
            for name in names:
                assert torch.equal(stored[f"{name}.weight_scale"], largest.reshape(1) / 448)


def test_channel_scales_are_those_of_each_row(make_model: Make, calibration: Path, tmp_path: Path) -> None:
    src = make_model()
    quantise(Fp8(calib_samples=8, granularity=Granularity.channel), src, tmp_path / "out", calibration)
    stored, name = load_file(tmp_path / "out" / "model.safetensors"), "model.layers.0.self_attn.k_proj"
    rows = load_file(src / "model.safetensors")[f"{name}.weight"].float().abs().amax(-1, keepdim=True)
    assert torch.equal(stored[f"{name}.weight_scale"], rows / 448)
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["strategy"] == "channel"
    assert config["config_groups"]["group_0"]["input_activations"]["dynamic"] is False


def test_tokenizer_and_generation_config_travel_along(make_model: Make, calibration: Path, tmp_path: Path) -> None:
    src, out = make_model(), tmp_path / "out"
    quantise(Fp8(calib_samples=24), src, out, calibration)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (src / name).read_bytes()
    assert (out / "model.safetensors").stat().st_mode & 0o777 == 0o644
    curve = [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]
    assert [point["step"] for point in curve] == sorted(point["step"] for point in curve)
    assert curve[-1] == {"step": 24, "calibration/range_share_mean": 1.0, "calibration/range_share_min": 1.0}
    assert len(curve) >= 12
    ranges = json.loads((out / "ranges.json").read_text())
    assert ranges["rows"] == 24 and len(ranges["layers"]) == 14


def test_bf16_is_the_source_itself() -> None:
    assert Bf16.identity and Bf16().calib_samples == 0


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("option", [Int8Wo(), Int4()], ids=["int8_wo", "int4"])
def test_broken_weights_are_refused(option: Quantiser, poison: float, make_model: Make, tmp_path: Path) -> None:
    src = make_model()
    tensors = load_file(src / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = poison
    save_file(tensors, src / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinite"):
        quantise(option, src, tmp_path / "out", tmp_path)


def test_a_quantised_source_is_refused(make_model: Make, tmp_path: Path) -> None:
    quantise(Int8Wo(), make_model(), tmp_path / "once", tmp_path)
    with pytest.raises(InputError, match="quantised already; serve it as it is with quant=bf16"):
        quantise(Int4(), tmp_path / "once", tmp_path / "twice", tmp_path)


def test_a_missing_layer_is_refused(make_model: Make, tmp_path: Path) -> None:
    src = make_model()
    tensors = load_file(src / "model.safetensors")
    del tensors["model.layers.0.self_attn.o_proj.weight"]
    save_file(tensors, src / "model.safetensors")
    with pytest.raises(InputError, match=r"no model\.layers\.0\.self_attn\.o_proj\.weight"):
        quantise(Int8Wo(), src, tmp_path / "out", tmp_path)


@pytest.mark.parametrize(
    ("columns", "wanted", "size"),
    [
        ({5120, 13824}, 128, 128),
        ({576, 1536}, 128, 64),
        ({1536, 8960}, 128, 128),
        ({96, 160}, 128, 32),
        ({88, 176}, 128, 88),
        ({24, 40}, 128, 8),
        ({4096}, 32, 32),
        ({4096}, 96, 64),
    ],
)
def test_one_group_size_fits_every_layer(columns: set[int], wanted: int, size: int) -> None:
    assert fitting_group(columns, wanted) == size


def test_no_group_size_at_all_is_refused() -> None:
    with pytest.raises(InputError, match="use quant=int8_wo"):
        fitting_group({100, 64}, 128)


@pytest.mark.parametrize(
    ("option", "fields", "message"),
    [
        (Fp8, {"calib_samples": 0}, "calib_samples must be >= 1"),
        (Fp8, {"calib_tokens": 0}, "calib_tokens must be >= 1"),
        (Fp8, {"percentile": 101.0}, r"percentile must be in \[50, 100\]"),
        (Fp8, {"export": Export.modelopt, "granularity": Granularity.channel}, "no static per-channel FP8"),
        (Int8Wo, {"calib_samples": 8}, "quant=int8_wo reads weights alone.*leave quant.calib_samples at 0, got 8"),
        (Int4, {"calib_samples": 8}, "quant=int4 reads weights alone"),
        (Bf16, {"calib_samples": 8}, "quant=bf16 reads weights alone"),
        (Int4, {"group_size": 0}, "multiple of 8"),
        (Int4, {"group_size": 100}, "multiple of 8"),
    ],
)
def test_bad_settings_are_refused(option: type[Quantiser], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        option(**fields)


def test_the_key_knows_every_field() -> None:
    keys = [content(option) for option in SCHEMES.values()]
    assert len({json.dumps(key, sort_keys=True) for key in keys}) == len(keys)


def test_shards_are_cut_by_size_and_read_back(tmp_path: Path, make_model: Make) -> None:
    src = make_model()
    tensors = load_file(src / "model.safetensors")
    out = tmp_path / "sharded"
    out.mkdir()
    with ShardWriter(out, shard_bytes=20_000) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    for name in ("config.json", "tokenizer.json"):
        (out / name).write_bytes((src / name).read_bytes())
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 3 and all(f.name.endswith(f"-of-{len(files):05d}.safetensors") for f in files)
    largest = max(t.numel() * t.element_size() for t in tensors.values())
    assert all(f.stat().st_size < max(20_000, largest) + 4096 for f in files)
    opened = open_checkpoint(out)
    assert opened.num_bytes == writer.total_bytes == sum(t.numel() * t.element_size() for t in tensors.values())
    for name, read in zip(tensors, opened.read(*tensors), strict=True):
        assert torch.equal(read, tensors[name])
    ids = torch.arange(8)[None]
    assert torch.equal(logits(out, ids), logits(src, ids))


@pytest.mark.slow
def test_a_child_quantises_and_its_refusals_come_back(make_model: Make, calibration: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "artifacts")
    src = make_model()
    option = Fp8(calib_samples=8)

    def make(out: Path) -> Any:
        kwargs = {"src": src, "out": out, "calibration": calibration, "device": "cpu"}
        return run_verb(option, "quantise", kwargs, log=tmp_path / "log")

    made = store.get("checkpoint", content(option), {"weights": "w"}, make, revision=option.REVISION)
    assert made.built and made.metrics["num_layers"] == 14
    (src / "model.safetensors").write_bytes((src / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(InputError, match="should have"):
        store.get("checkpoint", content(option), {"weights": "other"}, make, revision=option.REVISION)
    assert len(list(store.all())) == 1


MEASURE = """
import re, sys
from pathlib import Path
from omr.quant import _rewrite
from omr.quant.int8_wo import Int8Wo
_rewrite.ShardWriter.__init__.__defaults__ = (32 << 20,)
import safetensors.torch, tqdm, omr.quant._scales
def peak():  # of this program; getrusage would count its parent's, from before exec
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
Int8Wo().quantise(Path(sys.argv[1]), Path(sys.argv[2]), None, "cpu")
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(make_model: Make, tmp_path: Path) -> None:
    size, grown = [], []
    for layers in (8, 32):
        out = tmp_path / f"out{layers}"
        out.mkdir()
        src = make_model(name=f"{layers}", hidden_size=512, intermediate_size=4096, num_hidden_layers=layers)
        command = [sys.executable, "-c", MEASURE, str(src), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        assert len(list(out.glob("*.safetensors"))) >= layers // 8
        size.append(open_checkpoint(src).num_bytes)
        grown.append(int(done.stdout.splitlines()[-1]) * 1024)
    # The peak counts mapped pages of the source too, which the kernel drops when it likes: hence no tighter bound.
    assert grown[1] - grown[0] < (size[1] - size[0]) / 3, (grown, size)
