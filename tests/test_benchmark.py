"""Benchmarks: every format gives the same problems, every bad file one line that says where."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from omr import hub
from omr.benchmark import Benchmark, Problem
from omr.errors import ConfigError, InputError

ROWS = [
    {"id": "a", "problem": "1+1?", "expected_answer": "2"},
    {"id": "b", "problem": 'Zeile\nzwei, "quoted" $\\frac{1}{2}$', "expected_answer": "\\frac{1}{2}"},
]


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> Benchmark:
    file = folder / name
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if name.endswith(".gz"):
        file.write_bytes(gzip.compress(text.encode()))
    elif name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif name.endswith(".csv"):
        import csv

        with file.open("w", newline="") as out:
            table = csv.DictWriter(out, rows[0])
            table.writeheader()
            table.writerows(rows)
    else:
        file.write_text(text)
    return Benchmark(name="x", path=str(file))


@pytest.mark.parametrize("name", ["f.jsonl", "f.jsonl.gz", "f.parquet", "f.csv"])
def test_every_format_gives_the_same_problems(tmp_path: Path, name: str) -> None:
    problems = write(tmp_path, name, ROWS).load()
    assert [(p.id, p.text, p.expected_answer) for p in problems] == [tuple(row.values()) for row in ROWS]
    assert problems[0].row == ROWS[0]


def test_the_contests_csv_and_its_test_set_without_answers(tmp_path: Path) -> None:
    reference = tmp_path / "reference.csv"
    reference.write_text('\ufeffid,problem,answer\n0e644e,"Let $x=1$,\nfind $x$.",052\n')
    assert Benchmark(path=str(reference)).load() == [
        Problem(
            id="0e644e",
            text="Let $x=1$,\nfind $x$.",
            expected_answer="052",
            row={"id": "0e644e", "problem": "Let $x=1$,\nfind $x$.", "answer": "052"},
        )
    ]
    reference.write_text("id,problem\n0e644e,1+1?\n")
    assert Benchmark(path=str(reference)).load()[0].expected_answer is None


def test_other_column_names_numbers_and_missing_ids(tmp_path: Path) -> None:
    rows = [{"question": "1+1?", "answer": 2.0}, {"question": "1/4?", "answer": 0.25}, {"question": "?", "answer": 7}]
    problems = write(tmp_path, "f.parquet", rows).load()
    assert [(p.id, p.expected_answer) for p in problems] == [("x-0", "2"), ("x-1", "0.25"), ("x-2", "7")]
    odd = write(tmp_path, "g.jsonl", [{"q": "1?", "a": "1", "n": 5}])
    odd.problem_key, odd.answer_key, odd.id_key = "q", "a", "n"
    assert [(p.id, p.text, p.expected_answer) for p in odd.load()] == [("5", "1?", "1")]


def test_half_a_surrogate_pair_is_replaced_and_two_are_joined(tmp_path: Path) -> None:
    file = tmp_path / "junk.jsonl"
    file.write_text('{"problem": "a\\ud800b \\ud83d\\ude00 \\udc80", "expected_answer": "\\ud800"}\n')
    (problem,) = Benchmark(path=str(file)).load()
    assert problem.text == "a\ufffdb \U0001f600 \ufffd"


def test_limit(tmp_path: Path) -> None:
    benchmark = write(tmp_path, "f.jsonl", ROWS)
    benchmark.limit = 1
    assert len(benchmark.load()) == 1
    with pytest.raises(ConfigError, match="limit"):
        Benchmark(packaged="gsm8k.jsonl", limit=0)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("f.jsonl", b'{"problem": "1"}\n{"problem": \n', "line 2: not JSON"),
        ("f.jsonl", b'{"problem": "1"}\n[1]\n', "line 2: expected a JSON object, got list"),
        ("f.jsonl", b'{"problem": "1"}\n{"text": "1"}\n', "line 2: no problem under 'problem' \\(it has text\\)"),
        ("f.jsonl", b'{"problem": "  "}\n', "line 1: no problem"),
        ("f.jsonl", b'{"problem": "1", "answer": [1]}\n', "line 1: expected_answer must be text or a number, got list"),
        ("f.jsonl", b'{"id": 1, "problem": "1"}\n{"id": 1, "problem": "2"}\n', "line 2: id '1' was used at .*line 1"),
        ("f.jsonl", b'{"problem": "\xff"}\n', "line 1: not JSON"),
        ("f.jsonl", b"\n\n", "holds no problem"),
        ("f.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("f.jsonl.gz", b"not gzip", "cannot be read after line 0"),
        ("f.jsonl.gz", gzip.compress(b'{"problem": "1"}\n' * 3000)[:-20], "cannot be read after line"),
        ("f.parquet", b"PAR1 not really", "cannot be read as parquet"),
        ("f.csv", b"id,problem,answer\n1,two\n", "line 2: expected 3 columns"),
        ("f.txt", b"1+1?", "unknown kind"),
    ],
)
def test_a_bad_file_is_one_line_that_says_where(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        Benchmark(path=str(tmp_path / name)).load()
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused_by_preflight(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"does not exist; check benchmark\.path"):
        Benchmark(path=str(tmp_path / "none.jsonl")).preflight()
    with pytest.raises(InputError, match=r"takes one of aime24\.jsonl"):
        Benchmark(packaged="nope.jsonl").preflight()
    with pytest.raises(ConfigError, match="no source"):
        Benchmark(name="x")


def test_a_path_over_a_shipped_benchmark_takes_its_own_name() -> None:
    assert Benchmark(name="tiny_math", packaged="tiny_math.jsonl", path="/data/mine.csv").name == "mine"
    assert Benchmark(name="chosen", packaged="tiny_math.jsonl", path="/data/mine.csv").name == "chosen"


@pytest.mark.parametrize(("name", "count"), [("gsm8k", 500), ("aime24", 30), ("aime25", 30)])
def test_shipped_benchmarks(name: str, count: int) -> None:
    problems = Benchmark(name=name, packaged=f"{name}.jsonl").load()
    assert len(problems) == count and all(p.expected_answer for p in problems)


def test_a_hub_dataset_by_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "test-00000-of-00001.parquet", ROWS)
    files = ["README.md", "data/test-00000-of-00001.parquet", "data/train-00000-of-00001.parquet"]
    monkeypatch.setattr(hub, "resolve_revision", lambda repo, revision, kind: "c" * 40)
    monkeypatch.setattr(hub, "list_files", lambda repo, commit, kind: files)
    monkeypatch.setattr(hub, "file", lambda repo, commit, name, kind: tmp_path / Path(name).name)
    assert len(Benchmark(name="h", hub="a/b").load()) == 2
    with pytest.raises(InputError, match=r"no file of split 'dev' .*set benchmark\.hub_split"):
        Benchmark(name="h", hub="a/b", hub_split="dev").load()
