"""Calibration text for the small checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from omr.dataset import write_text


@pytest.fixture(scope="session")
def calibration(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 documents of different lengths."""
    out = tmp_path_factory.mktemp("calibration") / "text.parquet"
    rows = [(f"Compute {i} + {i * i}.", "Let me see. " * (1 + i % 5) + f"\\boxed{{{i + i * i}}}") for i in range(24)]
    write_text(rows, tokenizer_dir=tokenizer_dir, prompt="plain", code_tags="openmath", out=out, min_rows=24)
    return out
