"""The comparison: a line for each run, and a column for what tells the runs apart."""

from __future__ import annotations

from pathlib import Path

from omr import table
from omr.compose import plan
from omr.run import choices, run_name

METRICS = {
    "accuracy/pass_at_1": 0.5,
    "accuracy/pass_at_1_low": 0.4,
    "accuracy/pass_at_1_high": 0.6,
    "accuracy/maj_at_2": 0.55,
    "accuracy/maj_at_4": 0.6,
    "throughput/output_tok_s": 123.4,
}


def row(status: str = "FINISHED", **chosen: str) -> dict[str, object]:
    return {"run_id": "0123456789abcdef", "status": status, "choices": chosen, "metrics": METRICS}


def test_columns_are_what_differs_and_intervals_are_shown() -> None:
    header, _, first, second = table.table(
        [row(quant="bf16", server="native"), row("SKIPPED", quant="fp8", server="native")]
    ).splitlines()
    assert header.startswith("| quant | pass@1 % [95 % CI] | maj@4 % |") and "server" not in header
    assert first.startswith("| bf16 | 50.0 [40.0, 60.0] | 60.0 | 123 | - |") and first.endswith("| 01234567 |")
    assert second.endswith("| 01234567 (finished before) |")


def test_presets_and_swept_keys_tell_runs_apart() -> None:
    rows = []
    for quant, seed in (("fp8", "0"), ("fp8_channel", "0"), ("fp8", "1")):
        overrides = [f"quant={quant}", f"sampling.seed={seed}"]
        cfg = plan(overrides, multirun=False).cells[0].cfg
        chosen = choices(cfg, overrides, {"quant": quant, "sampling": "default"})
        assert run_name(chosen) == f"tiny {quant} none native"
        rows.append(row(**chosen))
    assert table.differing(rows) == ["quant", "sampling.seed"]
    assert [line.split(" | ")[:2] for line in table.table(rows).splitlines()[2:]] == [
        ["| fp8", "0"],
        ["| fp8_channel", "0"],
        ["| fp8", "1"],
    ]


def test_a_key_that_only_one_run_sets_shows_as_its_own_column() -> None:
    assert table.differing([row(quant="fp8"), row(**{"quant": "fp8", "job.tools": "false"})]) == ["job.tools"]


def test_files(tmp_path: Path) -> None:
    assert table.write([row(quant="a"), row(quant="b")], tmp_path) == [
        tmp_path / "table.md",
        tmp_path / "comparison.png",
    ]
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    unmeasured = {**row("FAILED", quant="a"), "metrics": {}}
    assert table.write([unmeasured], tmp_path / "..") == [tmp_path / ".." / "table.md"]
