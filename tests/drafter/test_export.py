"""Export to Apple's layout: the same logits through a full head, or a refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from omr.cli.export_drafter import main
from omr.errors import InputError
from omr.nn.loader import load
from omr.nn.redrafter import Redrafter, RedrafterConfig, fingerprint, load_redrafter

DATA = Path(__file__).parents[1] / "data" / "redrafter"
BASE = DATA / "base_lm"


def made(folder: Path, **change: object) -> Path:
    torch.manual_seed(0)
    shape = {"vocab_size": 128, "hidden_size": 32, "exit_dim": 48, "num_draft_layers": 1, "rnn": True, "predict_n": 3}
    drafter = Redrafter(RedrafterConfig(**{**shape, **change}))  # type: ignore[arg-type]
    folder.mkdir()
    drafter.save(folder)
    return folder


@pytest.mark.parametrize(
    "change", [{"head": "full"}, {"head": "low_rank", "head_rank": 7}, {"head": "base", "exit_dim": 64}]
)
def test_exported_head_gives_the_same_logits(
    change: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = load(BASE, device="cpu")
    folder = made(tmp_path / "in", base=fingerprint(base.embed.weight), **change)
    assert main([str(folder), str(tmp_path / "out"), "--base", str(BASE)]) == 0
    source, plain = load_redrafter(folder), load_redrafter(tmp_path / "out")
    source.attach(base.lm_head.weight)
    context, state = torch.randn(5, 32), torch.randn(5, 32)
    torch.testing.assert_close(plain.logits(context, state), source.logits(context, state), atol=1e-5, rtol=1e-4)
    reference = json.loads((DATA / "drafter_proj" / "config.json").read_text())
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written.keys() == reference.keys() - {"torch_dtype", "transformers_version"}
    names = load_file(DATA / "drafter_proj" / "model.safetensors").keys()
    assert load_file(tmp_path / "out" / "model.safetensors").keys() <= names | {"lm_head.1.weight"}
    assert "M parameters" in capsys.readouterr().out


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    reduced = tmp_path / "reduced"
    torch.manual_seed(0)
    config = RedrafterConfig(vocab_size=128, hidden_size=32, exit_dim=64, num_draft_layers=1, draft_vocab_size=20)
    drafter = Redrafter(config)
    drafter.set_draft_tokens(torch.arange(20))
    reduced.mkdir()
    drafter.save(reduced)
    with pytest.raises(InputError, match="drafts 20 of 128 tokens"):
        main([str(reduced), str(tmp_path / "out")])
    folder = made(tmp_path / "in", head="base", base="0123456789abcdef")
    with pytest.raises(InputError, match="give --base"):
        main([str(folder), str(tmp_path / "out")])
    with pytest.raises(InputError, match="another base model"):
        main([str(folder), str(tmp_path / "out"), "--base", str(BASE)])
    with pytest.raises(InputError, match="not an empty folder"):
        main([str(folder), str(folder)])
    assert not (tmp_path / "out").exists()
