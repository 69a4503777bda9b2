"""Control messages survive any chunking and nothing else passes for one."""

from __future__ import annotations

import itertools
import json
import os
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omr.sandbox import _frames

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
MESSAGES = st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=4), max_size=5)


@settings(max_examples=40, deadline=None)
@given(messages=MESSAGES, cuts=st.lists(st.integers(0, 200), max_size=20))
def test_chunking_does_not_matter(messages: list[dict[str, Any]], cuts: list[int]) -> None:
    data = b"".join(_frames.pack(message) for message in messages)
    points = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    splitter = _frames.Splitter(1 << 20)
    found = [m for start, end in itertools.pairwise(points) for m in splitter.feed(data[start:end])]
    assert found == messages


@settings(max_examples=40, deadline=None)
@given(messages=MESSAGES)
def test_blocking_ends_agree(messages: list[dict[str, Any]]) -> None:
    read_end, write_end = os.pipe()
    try:
        for message in messages:
            _frames.write(write_end, message)
        os.close(write_end)
        write_end = -1
        assert [_frames.read(read_end) for _ in messages] == messages
        assert _frames.read(read_end) is None
    finally:
        os.close(read_end)
        if write_end >= 0:
            os.close(write_end)


@settings(max_examples=40, deadline=None)
@given(junk=st.binary(max_size=200))
def test_junk_is_refused_or_waits(junk: bytes) -> None:
    splitter = _frames.Splitter(100)
    try:
        messages = splitter.feed(junk)
    except _frames.BadFrame:
        return
    assert all(isinstance(message, dict) for message in messages)


@pytest.mark.parametrize("body", [b"[]", b"1", b"{", b"\xff\xfe", b"[" * 50_000, b"9" * 60_000, b"null", b""])
def test_what_is_not_an_object_is_refused(body: bytes) -> None:
    with pytest.raises(_frames.BadFrame):
        _frames.Splitter(_frames.FROM_SESSION).feed(struct.pack(">I", len(body)) + body)


def test_a_long_message_is_refused_by_its_header() -> None:
    body = json.dumps({"a": "x" * 100}).encode()
    with pytest.raises(_frames.BadFrame, match="bytes"):
        _frames.Splitter(50).feed(struct.pack(">I", len(body)))
