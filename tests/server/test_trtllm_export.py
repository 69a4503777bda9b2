"""The TensorRT-LLM checkpoint: tensor tables as recorded, contents put together again, and the build around it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from omr.drafter.none import NoDrafter
from omr.drafter.redrafter import Redrafter as RedrafterOption
from omr.errors import ChildError, ConfigError, InputError
from omr.nn.redrafter import Redrafter, RedrafterConfig
from omr.server import ServeSpec
from omr.server._trtllm_checkpoint import ExportSpec, export
from omr.server.trtllm import Trtllm

from .test_backends import Fake, fake

RECORDED = json.loads((Path(__file__).parent.parent / "data" / "flags" / "trtllm_checkpoint.json").read_text())
BASE = RECORDED["base_config"]
DTYPES = {torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32"}
__all__ = ["fake"]


def linear_shapes(kv_heads: int) -> dict[str, tuple[int, int]]:
    h, i, q = BASE["hidden_size"], BASE["intermediate_size"], BASE["num_attention_heads"] * BASE["head_size"]
    kv = kv_heads * BASE["head_size"]
    attention = {"q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, q)}
    mlp = {"gate_proj": (i, h), "up_proj": (i, h), "down_proj": (h, i)}
    return {f"self_attn.{n}": s for n, s in attention.items()} | {f"mlp.{n}": s for n, s in mlp.items()}


def folder(out: Path, quant: str, *, kv_heads: int = 2, vocab: int = 256, tied: bool = False, **config: Any) -> Path:
    """A Qwen2 of the recorded shape, as omr's quantisers would leave it."""
    out.mkdir()
    torch.manual_seed(3)
    raw = {
        "model_type": "qwen2",
        "vocab_size": vocab,
        "hidden_size": BASE["hidden_size"],
        "intermediate_size": BASE["intermediate_size"],
        "num_hidden_layers": BASE["num_hidden_layers"],
        "num_attention_heads": BASE["num_attention_heads"],
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
    } | config
    weights = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    scheme: dict[str, Any] = {"targets": ["Linear"], "weights": weights, "input_activations": dict(weights)}
    if quant == "int8_wo":
        scheme = {"targets": ["Linear"], "weights": {**weights, "type": "int", "strategy": "channel"}}
    if quant != "bf16":
        layout = "float-quantized" if quant == "fp8" else "pack-quantized"
        raw["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": layout,
            "ignore": ["lm_head"],
            "config_groups": {"group_0": scheme},
        }
    (out / "config.json").write_text(json.dumps(raw))
    (out / "tokenizer.json").write_text("{}")
    bf16 = torch.bfloat16
    tensors = {"model.embed_tokens.weight": torch.randn(vocab, BASE["hidden_size"], dtype=bf16)}
    tensors["model.norm.weight"] = torch.randn(BASE["hidden_size"], dtype=bf16)
    if not tied:
        tensors["lm_head.weight"] = torch.randn(vocab, BASE["hidden_size"], dtype=bf16)
    for i in range(BASE["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = torch.randn(BASE["hidden_size"], dtype=bf16)
        for name, (rows, columns) in linear_shapes(kv_heads).items():
            at = f"model.layers.{i}.{name}"
            if name.split(".")[1] in ("q_proj", "k_proj", "v_proj"):
                tensors[f"{at}.bias"] = torch.randn(rows, dtype=bf16)
            if quant == "bf16":
                tensors[f"{at}.weight"] = torch.randn(rows, columns, dtype=bf16)
            elif quant == "fp8":
                tensors[f"{at}.weight"] = torch.randn(rows, columns).to(torch.float8_e4m3fn)
                group = 0.01 * (1 + i) if name.startswith("self_attn") and "o_proj" not in name else 0.02
                tensors[f"{at}.weight_scale"] = torch.tensor([group])
                tensors[f"{at}.input_scale"] = torch.tensor([group * 2])
            else:
                tensors[f"{at}.weight_packed"] = torch.randint(-(2**31), 2**31, (rows, columns // 4), dtype=torch.int32)
                tensors[f"{at}.weight_scale"] = torch.rand(rows, 1).to(bf16) + 0.5
                tensors[f"{at}.weight_shape"] = torch.tensor([rows, columns])
    save_file(tensors, out / "model.safetensors")
    return out


def redrafter(out: Path, **config: Any) -> Path:
    out.mkdir()
    shape = {"vocab_size": 256, "hidden_size": BASE["hidden_size"], **RECORDED["drafter_config"], **config}
    drafter = Redrafter(RedrafterConfig(**shape))
    if drafter.config.draft_vocab_size:
        drafter.set_draft_tokens(torch.arange(drafter.config.draft_vocab_size))
    drafter.save(out)
    return out


def ranks(out: Path, tp: int) -> list[dict[str, torch.Tensor]]:
    assert len(list(out.glob("rank*.safetensors"))) == tp
    return [load_file(out / f"rank{r}.safetensors") for r in range(tp)]


TABLES = {"bf16": "bf16_modelopt_full_prec", "fp8": "fp8_modelopt", "int8_wo": "int8_wo_modelopt"}


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("quant", TABLES)
def test_tensors_are_those_of_the_recorded_tables(quant: str, tp: int, tmp_path: Path) -> None:
    source, drafter = folder(tmp_path / "src", quant), redrafter(tmp_path / "drafter")
    export(ExportSpec(checkpoint=str(source), out=str(tmp_path / "out"), tp=tp, drafter=str(drafter)))
    want = RECORDED[f"tp{tp}"][TABLES[quant]] | RECORDED[f"tp{tp}"]["drafter"]
    for tensors in ranks(tmp_path / "out", tp):
        assert {n: [DTYPES[t.dtype], list(t.shape)] for n, t in tensors.items()} == want


def test_ranks_put_together_are_the_source(tmp_path: Path) -> None:
    tp, source = 2, folder(tmp_path / "src", "fp8")
    export(ExportSpec(checkpoint=str(source), out=str(tmp_path / "out"), tp=tp))
    theirs = load_file(source / "model.safetensors")
    ours = ranks(tmp_path / "out", tp)

    def whole(name: str, dim: int) -> torch.Tensor:
        return torch.cat([r[name].float() for r in ours], dim)

    q, kv = (BASE[n] * BASE["head_size"] // tp for n in ("num_attention_heads", "num_key_value_heads"))
    for i in range(BASE["num_hidden_layers"]):
        here, there = f"model.layers.{i}", f"transformer.layers.{i}"
        for part in ("weight", "bias"):
            pieces = [r[f"{there}.attention.qkv.{part}"].float().split([q, kv, kv]) for r in ours]
            for k, name in enumerate(("q_proj", "k_proj", "v_proj")):
                got = torch.cat([p[k] for p in pieces])
                assert torch.equal(got, theirs[f"{here}.self_attn.{name}.{part}"].float())
        for to, name, dim in (
            ("attention.dense", "self_attn.o_proj", 1),
            ("mlp.fc", "mlp.gate_proj", 0),
            ("mlp.gate", "mlp.up_proj", 0),
            ("mlp.proj", "mlp.down_proj", 1),
        ):
            assert torch.equal(whole(f"{there}.{to}.weight", dim), theirs[f"{here}.{name}.weight"].float())
            for r in ours:
                assert torch.equal(r[f"{there}.{to}.weights_scaling_factor"], theirs[f"{here}.{name}.weight_scale"])
                assert torch.equal(r[f"{there}.{to}.activation_scaling_factor"], theirs[f"{here}.{name}.input_scale"])
        scale = theirs[f"{here}.self_attn.q_proj.weight_scale"]
        assert torch.equal(ours[1][f"{there}.attention.qkv.weights_scaling_factor"], scale)
        post = theirs[f"{here}.post_attention_layernorm.weight"]
        assert torch.equal(ours[0][f"{there}.post_layernorm.weight"], post)
    assert torch.equal(whole("transformer.vocab_embedding.weight", 0), theirs["model.embed_tokens.weight"].float())
    assert torch.equal(whole("lm_head.weight", 0), theirs["lm_head.weight"].float())
    assert torch.equal(ours[1]["transformer.ln_f.weight"], theirs["model.norm.weight"])


def test_int8_goes_out_as_what_it_stands_for(tmp_path: Path) -> None:
    source = folder(tmp_path / "src", "int8_wo")
    export(ExportSpec(checkpoint=str(source), out=str(tmp_path / "out")))
    from omr.nn import loader

    model = loader.load(source, device="cpu", dtype=torch.float32)
    [ours] = ranks(tmp_path / "out", 1)
    got = ours["transformer.layers.1.mlp.proj.weight"].float()
    want = model.layers[1].mlp.down_proj.weight
    assert (got - want).abs().max() <= want.abs().max() / 256  # rounding to bf16
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"] == {"quant_algo": "W8A16", "kv_cache_quant_algo": None}


def test_fewer_key_heads_than_ranks_and_padded_vocabulary_and_tied_head(tmp_path: Path) -> None:
    source = folder(tmp_path / "src", "bf16", kv_heads=1, vocab=255, tied=True)
    export(ExportSpec(checkpoint=str(source), out=str(tmp_path / "out"), tp=2))
    ours = ranks(tmp_path / "out", 2)
    d, q = BASE["head_size"], BASE["num_attention_heads"] * BASE["head_size"] // 2
    keys = [r["transformer.layers.0.attention.qkv.weight"][q : q + d] for r in ours]
    assert torch.equal(keys[0], keys[1])
    head = torch.cat([r["lm_head.weight"] for r in ours])
    embedding = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    assert len(head) == 256 and torch.equal(head[:255], embedding) and not head[255].any()


def test_config_keys_are_known_and_complete(tmp_path: Path) -> None:
    for quant in TABLES:
        source, drafter = folder(tmp_path / quant, quant), redrafter(tmp_path / f"{quant}-drafter")
        out = tmp_path / f"{quant}-out"
        export(ExportSpec(checkpoint=str(source), out=str(out), tp=2, drafter=str(drafter), draft_tok=2, num_beams=4))
        config = json.loads((out / "config.json").read_text())
        assert set(RECORDED["required_keys"]) <= set(config)
        assert set(config) <= set(RECORDED["known_keys"]) | set(RECORDED["redrafter_keys"])
        assert set(config["mapping"]) <= set(RECORDED["mapping_keys"])
        assert set(config["quantization"]) <= set(RECORDED["quantization_keys"])
        assert config["architecture"] == "ReDrafterForQWenLM"
        assert config["base_model_architecture"] == "Qwen2ForCausalLM"
        assert (config["redrafter_num_beams"], config["redrafter_draft_len_per_beam"]) == (4, 2)
        assert config["redrafter_greedy_search"] is False
        excluded = config["quantization"].get("exclude_modules")
        assert (excluded is None) == (quant == "bf16")
        if excluded:  # nothing of the drafter may be quantised: it has no scales
            assert {"drafter.lm_head", "drafter.rnn_u", "drafter.layers.1.linear"} <= set(excluded)


def test_the_drafter_is_split_by_rows_and_keeps_its_values(tmp_path: Path) -> None:
    source, drafter = folder(tmp_path / "src", "bf16"), redrafter(tmp_path / "drafter", exit_dim=64)
    export(ExportSpec(checkpoint=str(source), out=str(tmp_path / "out"), tp=2, drafter=str(drafter)))
    ours = ranks(tmp_path / "out", 2)
    names = {
        "drafter.input_proj.weight": "input_proj.weight",
        "drafter.layers.0.linear.bias": "lm_head.0.linear.bias",
        "drafter.layers.1.linear.weight": "lm_head.1.linear.weight",
        "drafter.lm_head.weight": "lm_head.2.weight",
        "drafter.rnn_w.weight": "rnn_w.weight",
    }
    theirs = load_file(drafter / "model.safetensors")
    for name, source_name in names.items():
        got = torch.cat([r[name] for r in ours])
        assert torch.equal(got, theirs[source_name].to(torch.bfloat16)), name


def test_what_cannot_be_an_engine_is_refused(tmp_path: Path) -> None:
    source = folder(tmp_path / "src", "fp8")
    one = ExportSpec(checkpoint=str(source), out=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"model\.tp=3"):
        export(dataclasses.replace(one, tp=3))
    with pytest.raises(InputError, match=r"drafter\.head=full"):
        export(dataclasses.replace(one, drafter=str(redrafter(tmp_path / "cut", draft_vocab_size=32))))
    with pytest.raises(InputError, match="hidden size 32"):
        export(dataclasses.replace(one, drafter=str(redrafter(tmp_path / "other", hidden_size=32, exit_dim=64))))
    qwen3 = folder(tmp_path / "qwen3", "bf16", model_type="qwen3", head_dim=16)
    with pytest.raises(InputError, match="not qwen3"):
        export(dataclasses.replace(one, checkpoint=str(qwen3)))
    uneven = folder(tmp_path / "uneven", "fp8")
    tensors = load_file(uneven / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.weight_scale"] *= 2
    save_file(tensors, uneven / "model.safetensors")
    with pytest.raises(InputError, match="share their scales"):
        export(dataclasses.replace(one, checkpoint=str(uneven)))
    channel = json.loads((source / "config.json").read_text())
    channel["quantization_config"]["config_groups"]["group_0"]["weights"]["strategy"] = "channel"
    (source / "config.json").write_text(json.dumps(channel))
    with pytest.raises(InputError, match=r"quant\.granularity=tensor"):
        export(one)


def serve_spec(tmp_path: Path, **fields: Any) -> ServeSpec:
    values = {
        "model_name": "tiny",
        "checkpoint": folder(tmp_path / "src", "fp8"),
        "drafter": RedrafterOption(predict_n=3),
        "drafter_path": redrafter(tmp_path / "drafter"),
        "device": "cuda",
        "quant": "fp8",
        "tp": 2,
    }
    return ServeSpec(**(values | fields))


@pytest.mark.slow
def test_build_exports_builds_and_brings_the_tokenizer(fake: Fake, tmp_path: Path) -> None:
    fake.script("trtllm-build")
    fake.mode("build")
    out = tmp_path / "store" / "engine"
    out.mkdir(parents=True)
    seconds = Trtllm().build(serve_spec(tmp_path), out)
    assert set(seconds) == {"export_seconds", "build_seconds"}
    assert (out / "rank0.engine").exists() and (out / "tokenizer.json").exists()
    [call] = fake.calls()
    assert call[0] == "trtllm-build" and call[call.index("--gemm_plugin") + 1] == "fp8"
    assert "explicit_draft_tokens" in call
    assert "rank 1 of 2" in (out / "build.log").read_text()
    assert [p.name for p in out.parent.iterdir()] == ["engine"]  # the exported checkpoint is gone


@pytest.mark.slow
def test_a_failed_build_says_why(fake: Fake, tmp_path: Path) -> None:
    fake.script("trtllm-build")
    fake.mode("die")
    out = tmp_path / "store" / "engine"
    out.mkdir(parents=True)
    one = serve_spec(tmp_path)
    with pytest.raises(ChildError, match=r"(?s)trtllm-build failed with exit status 3.*no kernel image"):
        Trtllm().build(one, out)
    one.drafter_path = None
    one.drafter, one.tp = NoDrafter(), 3
    with pytest.raises(ConfigError, match=r"model\.tp=3"):
        Trtllm().build(one, out)
    assert [p.name for p in out.parent.iterdir()] == ["engine"]


def test_engine_keys_hold_what_the_bytes_depend_on(tmp_path: Path) -> None:
    one = serve_spec(tmp_path)
    recipe = Trtllm().engine_recipe(one)
    assert recipe["draft"] == (1, 3) and {"tensorrt_llm", "gpu"} <= set(recipe)
    one.drafter = RedrafterOption(predict_n=3, draft_tok=2, num_beams=4)
    assert Trtllm().engine_recipe(one)["draft"] == (4, 2)
    exported = Trtllm().export_spec(one, tmp_path)
    assert (exported.num_beams, exported.draft_tok) == (4, 2)
    from omr.artifact import content

    serving = Trtllm(port=1234, max_batch_size=3, kv_cache_free_gpu_memory_fraction=0.5, mpirun=False)
    assert content(serving) == content(Trtllm())
    assert content(Trtllm(engine_max_batch_size=64)) != content(Trtllm())


def test_written_files_are_plain_safetensors(tmp_path: Path) -> None:
    export(ExportSpec(checkpoint=str(folder(tmp_path / "src", "bf16")), out=str(tmp_path / "out")))
    with safe_open(tmp_path / "out" / "rank0.safetensors", framework="pt") as file:
        assert "transformer.ln_f.weight" in file.keys()  # noqa: SIM118 - not a dict
