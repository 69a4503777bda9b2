"""The plain and the fused decoder against transformers, for every family and rope rule."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from omr.errors import InputError
from omr.nn import config
from omr.nn.decoder import Decoder
from omr.nn.loader import load
from omr.nn.paged import KVCache, Padded, Part, Ragged

BLOCK = 8


def test_hidden_states_equal_transformers(variant: PreTrainedModel, tmp_path: Path) -> None:
    variant.save_pretrained(tmp_path)
    model = load(tmp_path, device="cpu")
    ids = torch.randint(0, 96, (3, 120), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([120, 70, 1])
    with torch.no_grad():
        expected = variant(ids).logits
        states = model.hidden_states(ids, lengths)
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(model.lm_head(states[row, :length]), expected[row, :length], atol=1e-4, rtol=1e-4)
        assert not states[row, length:].any()


def test_hidden_states_carry_gradients(variant: PreTrainedModel, tmp_path: Path) -> None:
    variant.save_pretrained(tmp_path)
    model = load(tmp_path, device="cpu").requires_grad_(True)
    model.hidden_states(torch.tensor([[1, 2, 3]])).square().sum().backward()
    assert all(p.grad is not None for p in model.layers.parameters())


def test_module_names_are_those_of_the_checkpoint(variant: PreTrainedModel, tmp_path: Path) -> None:
    variant.save_pretrained(tmp_path)
    ours = {
        name for name, module in load(tmp_path, device="cpu").named_modules() if isinstance(module, torch.nn.Linear)
    }
    theirs = {n.removeprefix("model.") for n, m in variant.named_modules() if isinstance(m, torch.nn.Linear)}
    assert ours == theirs


def test_paged_steps_equal_transformers(variant: PreTrainedModel, tmp_path: Path) -> None:
    """A prompt in two chunks beside a whole one, then steps of 1, 3 and 4 tokens, over shuffled blocks."""
    variant.save_pretrained(tmp_path)
    model = load(tmp_path, device="cpu")
    decoder = Decoder(model, 256)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 96, (2, 100), generator=generator)
    tables = (torch.randperm(30, generator=generator) + 1)[:26].view(2, 13)
    cache = KVCache(model.config, 31, BLOCK, model.device, torch.float32)

    def slots(row: int, positions: torch.Tensor) -> torch.Tensor:
        return tables[row, positions // BLOCK] * BLOCK + positions % BLOCK

    def steps(start: int, end: int) -> torch.Tensor:
        return torch.arange(start, end)

    with torch.inference_mode():
        expected = variant(ids).logits
        lists = [slots(row, steps(0, 100)).tolist() for row in range(2)]
        first = Ragged(cache, [Part(length=33, slots=lists[0][:33]), Part(length=61, slots=lists[1][:61])])
        out = decoder.forward(torch.cat([ids[0, :33], ids[1, :61]]), torch.cat([steps(0, 33), steps(0, 61)]), first)
        torch.testing.assert_close(decoder.logits(out[:33]), expected[0, :33], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(decoder.logits(out[33:]), expected[1, :61], atol=1e-4, rtol=1e-4)
        second = Ragged(cache, [Part(length=17, slots=lists[0][:50])])
        out = decoder.forward(ids[0, 33:50], steps(33, 50), second)
        torch.testing.assert_close(decoder.logits(out), expected[0, 33:50], atol=1e-4, rtol=1e-4)
        starts = torch.tensor([50, 61])
        for new in (1, 3, 4):
            positions = starts[:, None] + steps(0, new)
            where = torch.cat([slots(0, positions[0]), slots(1, positions[1])])
            tokens = torch.stack([ids[0, positions[0]], ids[1, positions[1]]])
            batch = Padded(cache, tables, positions, where, int(positions.max()))
            got = decoder.logits(decoder.forward(tokens.flatten(), positions.flatten(), batch)).view(2, new, -1)
            for row in range(2):
                torch.testing.assert_close(got[row], expected[row, positions[row]], atol=1e-4, rtol=1e-4)
            starts += new


def test_paged_steps_in_bf16_are_close_to_float32(variant: PreTrainedModel, tmp_path: Path) -> None:
    variant.save_pretrained(tmp_path)
    ids = torch.randint(0, 96, (40,), generator=torch.Generator().manual_seed(3))
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        model = load(tmp_path, device="cpu", dtype=dtype)
        decoder = Decoder(model, 64)
        cache = KVCache(model.config, 8, BLOCK, model.device, dtype)
        with torch.inference_mode():
            prompt = torch.arange(36)
            parts = [Part(length=36, slots=(prompt + BLOCK).tolist())]
            decoder.forward(ids[:36], prompt, Ragged(cache, parts))
            positions = torch.arange(36, 40)[None]
            batch = Padded(cache, torch.arange(1, 7)[None], positions, positions[0] + BLOCK, 39)
            rows.append(decoder.logits(decoder.forward(ids[36:], positions[0], batch)))
    assert rows[1].dtype == torch.float32
    assert 0 < (rows[1] - rows[0]).norm() / rows[0].norm() < 0.05


def test_fusing_keeps_the_modules_and_one_copy_of_the_weights(variant: PreTrainedModel, tmp_path: Path) -> None:
    variant.save_pretrained(tmp_path)
    model = load(tmp_path, device="cpu")
    ids = torch.arange(20)[None]
    before = model.hidden_states(ids)
    decoder = Decoder(model, 32)
    assert torch.equal(model.hidden_states(ids), before)
    fused = decoder.layers[0].qkv.weight
    assert model.layers[0].self_attn.q_proj.weight.untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()
    assert Decoder(model, 32).layers[0].qkv.weight.shape == fused.shape


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"use_sliding_window": True, "layer_types": None}, "sliding"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "sliding"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"hidden_size": -64}, "hidden_size"),
        ({"hidden_size": "64"}, "not a decoder"),
        ({"head_dim": 15}, "even"),
    ],
)
def test_config_refuses_what_it_would_compute_wrongly(change: dict, word: str, saved) -> None:
    _, folder = saved()
    raw = json.loads((folder / "config.json").read_text())
    with pytest.raises(InputError, match=word):
        from omr.nn import rope

        rope.frequencies(config.parse({**raw, **change}))


def test_end_of_text_ids_come_from_both_files(saved) -> None:
    _, folder = saved(eos_token_id=5)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5]}))
    assert config.read(folder)[0].eos_token_ids == (7, 5)
