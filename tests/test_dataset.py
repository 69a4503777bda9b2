"""Text data: spans against a per-character oracle, encoding, sources, refusals."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omr import hub
from omr.dataset import TextRow, encode_text, model_spans, read_rows, read_text, source_key, write_text
from omr.errors import InputError
from omr.model import TextSource
from omr.solve.prompt import CODE_TAGS, CodeTags, remaining_notice
from omr.text import load_tokenizer

FENCED = [name for name, tags in CODE_TAGS.items() if tags.style == "fence"]
prose = st.text(alphabet="ab 1\n.é", max_size=12)
printed = st.text(alphabet="xy 2\n-", max_size=12)


def compose(tags: CodeTags, calls: list[tuple[str, str, str, int]], last: str) -> tuple[str, list[bool]]:
    """A solution, and for each character whether the model wrote it, built part by part as the harness does."""
    text, mine = "", []

    def add(part: str, by_model: bool) -> None:
        nonlocal text, mine
        text += part
        mine += [by_model] * len(part)

    for before, code, output, notice in calls:
        add(f"{before}{tags.begin}\n{code}\n{tags.end}", True)
        add(tags.output_block("completed", output, "", remaining_notice(notice) if notice >= 0 else ""), False)
    add(last, True)
    return text, mine


@pytest.mark.parametrize("style", FENCED)
@settings(max_examples=60, deadline=None)
@given(
    calls=st.lists(st.tuples(prose, prose, printed, st.integers(-1, 3)), max_size=3),
    last=prose.map(lambda text: "So " + text),
)
def test_spans_are_what_the_model_wrote(style: str, calls: list[tuple[str, str, str, int]], last: str) -> None:
    text, mine = compose(CODE_TAGS[style], calls, last)
    spans = model_spans(text, CODE_TAGS[style])
    found = [any(a <= i < b for a, b in spans) for i in range(len(text))]
    assert found == mine


def test_spans_of_the_header_style() -> None:
    text, mine = compose(CODE_TAGS["llama3"], [("I call ", "print(1)", "1", -1)], "Done.")
    spans = model_spans(text, CODE_TAGS["llama3"])
    assert [any(a <= i < b for a, b in spans) for i in range(len(text))] == mine


@pytest.mark.parametrize(
    ("solution", "model_part"),
    [
        ("a <tool_call>\n1\n</tool_call>\n```output\n42", "a <tool_call>\n1\n</tool_call>"),  # never closed
        (
            "a <tool_call>\n1\n</tool_call>\n```output\n42```\nb",
            "a <tool_call>\n1\n</tool_call>b",
        ),  # closed on the line
        ("a </tool_call>\n\n```output\n42\n```\nb", "a </tool_call>b"),  # a blank line too many
        ("```output\n42\n```\nb", "b"),  # a block that nobody asked for
        ("a\n```output\n```python\n```\nb", "ab"),  # another fence inside
        ("use ```output``` here", "use ```output``` here"),  # not a block
        ("a </tool_call>\n```output\n42\n```", "a </tool_call>"),
    ],
)
def test_spans_of_untidy_solutions(solution: str, model_part: str) -> None:
    assert "".join(solution[a:b] for a, b in model_spans(solution, CODE_TAGS["openmath"])) == model_part


SOLUTION = "Let me see. <tool_call>\nprint(12 + 30)\n</tool_call>\n```output\n42\n```\nSo \\boxed{42} é."


@pytest.fixture
def written(tokenizer_dir: Path, tmp_path: Path) -> Path:
    out = tmp_path / "text.parquet"
    rows = [(f"Compute {i}.", SOLUTION) for i in range(5)]
    count = write_text(
        rows, tokenizer_dir=tokenizer_dir, prompt="generic/math", code_tags="openmath", out=out, min_rows=5
    )
    assert count == 5
    return out


def test_documents_are_prompt_solution_and_end_of_turn(written: Path) -> None:
    rows = read_text(written)
    assert [row.problem for row in rows] == [f"Compute {i}." for i in range(5)]
    assert rows[3].text.startswith("<|im_start|>user\nSolve the following math problem.")
    assert rows[3].text.endswith(f"Compute 3.<|im_end|>\n<|im_start|>assistant\n{SOLUTION}<|im_end|>")
    mine = "".join(rows[3].text[a:b] for a, b in rows[3].spans)
    assert mine == SOLUTION.replace("\n```output\n42\n```\n", "") + "<|im_end|>"
    assert read_text(written, limit=2) == rows[:2]


def test_tokens_of_prompt_and_output_are_never_targets(written: Path, tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    row = read_text(written)[0]
    ids, is_target = encode_text(row, tokenizer)
    mine = [any(a <= i < b for a, b in row.spans) for i in range(len(row.text))]
    by_byte = [owner for char, owner in zip(row.text, mine, strict=True) for _ in char.encode()]
    at = 0
    for token, target in zip(ids, is_target, strict=True):  # byte-level: a token is some bytes, all of one owner
        size = len(row_bytes(tokenizer, token))
        assert set(by_byte[at : at + size]) == {target}
        at += size
    assert at == len(by_byte)


def row_bytes(tokenizer: Any, token: int) -> bytes:
    """The bytes of one token: GPT-2's byte alphabet, added tokens as they are."""
    from tokenizers.pre_tokenizers import ByteLevel

    piece = tokenizer.convert_ids_to_tokens(token)
    if piece in tokenizer.get_added_vocab():
        return piece.encode()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    table = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    assert set(table) == set(ByteLevel.alphabet())
    return bytes(table[char] for char in piece)


@settings(max_examples=40, deadline=None)
@given(
    parts=st.lists(st.tuples(st.text(alphabet="ab1 \n", min_size=1, max_size=8), st.booleans()), min_size=1, max_size=5)
)
def test_pieces_encode_as_they_would_alone(tokenizer_dir: Path, parts: list[tuple[str, bool]]) -> None:
    tokenizer = _tokenizer(tokenizer_dir)
    spans: list[tuple[int, int]] = []
    at = 0
    for text, mine in parts:
        if mine and spans and spans[-1][1] == at:
            spans[-1] = (spans[-1][0], at + len(text))
        elif mine:
            spans.append((at, at + len(text)))
        at += len(text)
    row = TextRow(text="".join(text for text, _ in parts), spans=spans)
    ids, is_target = encode_text(row, tokenizer)
    assert tokenizer.decode(ids) == row.text
    alone = [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece, _ in row.pieces()]
    assert ids == [token for piece in alone for token in piece]
    assert sum(is_target) == sum(len(a) for a, (_, mine) in zip(alone, row.pieces(), strict=True) if mine)


_loaded: dict[Path, Any] = {}


def _tokenizer(folder: Path) -> Any:
    if folder not in _loaded:
        _loaded[folder] = load_tokenizer(folder)
    return _loaded[folder]


def test_spans_that_do_not_fit_are_refused() -> None:
    for spans in ([(0, 4)], [(2, 1)], [(0, 1), (1, 2)], [(1, 2), (0, 1)], [(-1, 1)]):
        with pytest.raises(InputError, match="spans"):
            TextRow(text="abc", spans=spans)


def test_too_few_rows_leave_no_file(tokenizer_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "text.parquet"
    rows = [("p", "s"), ("", "s"), ("p", "  "), ("p", "s")]
    with pytest.raises(
        InputError,
        match=r"found 2 of the 3 rows of text wanted, with a problem and a solution that are not empty, in the source",
    ):
        write_text(rows, tokenizer_dir=tokenizer_dir, prompt="plain", code_tags="openmath", out=out, min_rows=3)
    assert list(out.parent.iterdir()) == []


def test_a_failure_midway_leaves_the_old_file(written: Path, tokenizer_dir: Path) -> None:
    before = written.read_bytes()

    def rows() -> Any:
        yield "p", "s"
        raise InputError("the source ends here")

    with pytest.raises(InputError, match="ends here"):
        write_text(rows(), tokenizer_dir=tokenizer_dir, prompt="plain", code_tags="openmath", out=written, min_rows=1)
    assert written.read_bytes() == before
    assert [p.name for p in written.parent.iterdir()] == [written.name]


ROWS = [{"question": f"q{i}", "answer": f"a{i}", "level": i} for i in range(7)]


def source(path: Path) -> TextSource:
    return TextSource(path=str(path), problem_key="question", solution_key="answer")


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
def test_rows_come_in_order_from_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    lines = "".join(json.dumps(row) + "\n\n" for row in ROWS)
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif suffix == "jsonl":
        path.write_text(lines)
    else:
        path.write_bytes(gzip.compress(lines.encode()))
    assert list(read_rows(source(path), 4)) == [(f"q{i}", f"a{i}") for i in range(4)]
    assert len(list(read_rows(source(path), 100))) == 7


def test_halves_of_surrogate_pairs_become_a_replacement_character(tmp_path: Path, tokenizer_dir: Path) -> None:
    path, out = tmp_path / "x.jsonl", tmp_path / "text.parquet"
    path.write_text('{"question": "a \\ud800 b", "answer": "\\ud83d\\ude00 \\udfff"}\n')
    rows = list(read_rows(source(path), 1))
    assert rows == [("a \N{REPLACEMENT CHARACTER} b", "\N{GRINNING FACE} \N{REPLACEMENT CHARACTER}")]
    assert write_text(rows, tokenizer_dir=tokenizer_dir, prompt="plain", code_tags="openmath", out=out, min_rows=1) == 1
    assert read_text(out)[0].problem == rows[0][0]


def test_the_key_of_a_file_follows_its_content_and_not_its_path(tmp_path: Path) -> None:
    one, two = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    one.write_text('{"question": "q", "answer": "a"}\n')
    two.write_text(one.read_text())
    assert source_key(source(one)) == source_key(source(two))
    two.write_text(one.read_text() * 2)
    assert source_key(source(one)) != source_key(source(two))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"question": "q"}\n', "line 1 has no 'answer'.*problem_key"),
        ("x.jsonl", b'{"question": "q", "answer": 3}\n', "'answer' must be text, got int"),
        ("x.jsonl", b'{"question": "q", "answer": "a"}\n{"que', "line 2: not JSON"),
        ("x.jsonl", b'{"question": "q", "answer": "a"}\n\xff\xfe\n', "line 2: not JSON"),
        ("x.jsonl", b"[1, 2]\n", "line 1: expected a JSON object"),
        ("x.jsonl.gz", gzip.compress(b'{"question": "q", "answer": "a"}\n' * 99)[:-20], "cannot be read after line"),
        ("x.jsonl.gz", b"not gzip at all", "cannot be read after line 0"),
        ("x.parquet", b"PAR1 but not really PAR1", "cannot be read as parquet"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as refused:
        list(read_rows(source(path), 10))
    assert "\n" not in str(refused.value)


def test_missing_files_and_columns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"does not exist; set model\.text\.path"):
        list(read_rows(source(tmp_path / "no.jsonl"), 1))
    with pytest.raises(InputError, match="does not exist"):
        source_key(source(tmp_path / "no.jsonl"))
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"a": "b"}]), path)
    with pytest.raises(InputError, match=r"row 1 has no 'question' \(it has a\)"):
        list(read_rows(source(path), 1))


def test_text_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_text(tmp_path / "no.parquet")
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"a": "b"}]), path)
    with pytest.raises(InputError, match="has columns a; a column text is needed"):
        read_text(path)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "abc", "spans": [[0, 9]]}]), path)
    with pytest.raises(InputError, match="do not lie in order"):
        read_text(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be read as parquet"):
        read_text(path)


def test_a_text_column_alone_is_all_target(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "abc"}]), path)
    assert read_text(path) == [TextRow(text="abc", spans=[(0, 3)])]


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A dataset of two splits in parts; the list returned fills with the names of the files that are fetched."""
    fetched: list[str] = []
    names = [
        "README.md",
        "data/cot-00000-of-00001.parquet",
        "data/tir-00000-of-00002.parquet",
        "data/tir-00001-of-00002.parquet",
    ]

    def file(repo: str, commit: str, name: str, repo_type: str) -> Path:
        assert (repo, commit, repo_type) == ("owner/set", COMMIT, "dataset")
        fetched.append(name)
        path = tmp_path / name.replace("/", "_")
        rows = [{"problem": f"{name} {i}", "generated_solution": "s"} for i in range(3)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path

    monkeypatch.setattr(hub, "resolve_revision", lambda repo, revision, repo_type: COMMIT)
    monkeypatch.setattr(hub, "list_files", lambda repo, commit, repo_type: names)
    monkeypatch.setattr(hub, "file", file)
    return fetched


def test_a_hub_split_is_read_in_order_and_only_as_far_as_needed(fake_hub: list[str]) -> None:
    text = TextSource(hub="owner/set", split="tir", solution_key="generated_solution")
    assert list(read_rows(text, 2)) == [(f"data/tir-00000-of-00002.parquet {i}", "s") for i in range(2)]
    assert fake_hub == ["data/tir-00000-of-00002.parquet"]
    assert len(list(read_rows(text, 100))) == 6
    assert source_key(text)["revision"] == COMMIT


def test_an_unknown_split_names_those_there_are(fake_hub: list[str]) -> None:
    text = TextSource(hub="owner/set", split="test", solution_key="generated_solution")
    with pytest.raises(InputError, match=r"no parquet or jsonl file of split 'test'; splits there: cot, tir"):
        list(read_rows(text, 2))


def test_a_cache_that_lacks_the_first_part_is_not_read_from_the_second(
    fake_hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "list_files", lambda repo, commit, repo_type: ["data/tir-00001-of-00002.parquet"])
    with pytest.raises(InputError, match="part 0 of owner/set split tir is not in the hub cache"):
        list(read_rows(TextSource(hub="owner/set", split="tir", solution_key="generated_solution"), 2))
