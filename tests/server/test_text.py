"""Tokens to text: whatever the chunking, the stream is the whole text, cut at the first complete stop string."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from omr.server._text import StopStrings, Vocabulary

from .conftest import SPECIAL, byte_level_tokenizer


def metaspace_tokenizer() -> Tokenizer:
    """Llama 2's kind: a leading space that decoding strips, and byte fallback for what is not in the vocabulary."""
    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *"abcdehlorw▁", "▁h", "el", "lo", "▁w", "▁hello"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "h"), ("e", "l"), ("l", "o"), ("▁", "w")]
    tokenizer = Tokenizer(models.BPE({**vocab}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


VOCABULARIES = {"bytes": Vocabulary(byte_level_tokenizer()), "metaspace": Vocabulary(metaspace_tokenizer())}


def stream(vocabulary: Vocabulary, ids: list[int], prompt: list[int], *, skip_special: bool = True) -> list[str]:
    detokeniser = vocabulary.detokeniser(prompt, skip_special=skip_special)
    return [detokeniser.push(i) for i in ids]


@pytest.mark.parametrize("kind", VOCABULARIES)
@pytest.mark.parametrize(
    "text", ["hello world", "naïve café, 数学 👩‍👩‍👧‍👦 ok", "\n\n  x\t", "e\u0301 ÿ \U0001f600\U0001f600"]
)
def test_encoded_text_comes_back_and_characters_stay_whole(kind: str, text: str) -> None:
    vocabulary = VOCABULARIES[kind]
    prompt = vocabulary.tokenizer.encode("hello").ids
    ids = vocabulary.tokenizer.encode("hello" + text).ids[len(prompt) :]
    pieces = stream(vocabulary, ids, prompt)
    assert "\ufffd" not in "".join(pieces)
    whole = vocabulary.decode(prompt + ids)
    assert vocabulary.decode(prompt) + "".join(pieces) == whole


@pytest.mark.parametrize("skip_special", [True, False])
def test_random_bytes_decode_as_the_tokenizer_decodes_them(skip_special: bool) -> None:
    """Any ids at all: equal to decoding in one go, but for an unfinished character at the end, which is left out."""
    vocabulary = VOCABULARIES["bytes"]
    rng = random.Random(3)
    for _ in range(300):
        ids = [rng.randrange(vocabulary.size + 3) for _ in range(rng.randrange(1, 12))]
        got = "".join(stream(vocabulary, ids, [], skip_special=skip_special))
        want = vocabulary.decode(ids, skip_special=skip_special)
        assert want.startswith(got) and set(want[len(got) :]) <= {"\ufffd"}, ids


def test_special_tokens_are_text_only_when_asked_for() -> None:
    vocabulary = VOCABULARIES["bytes"]
    ids = vocabulary.tokenizer.encode("a<|im_end|><tool_call>").ids
    assert "".join(stream(vocabulary, ids, [])) == "a<tool_call>"
    assert "".join(stream(vocabulary, ids, [], skip_special=False)) == "a<|im_end|><tool_call>"
    assert {vocabulary.token_text(i) for i in vocabulary.special} == set(SPECIAL)


def test_no_decoder_is_mistaken_for_bytes() -> None:
    plain = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    assert "".join(stream(Vocabulary(plain), [0, 1, 1], [])) == plain.decode([0, 1, 1])


def first_stop(text: str, stops: list[str]) -> tuple[int, int, str] | None:
    """The oracle: (end, start, stop) of the stop string that is complete first, the longest of equals."""
    found = [(i + len(s), i, s) for s in stops for i in range(len(text)) if text.startswith(s, i)]
    return min(found, default=None)


@settings(max_examples=400, deadline=None)
@given(
    text=st.text("abc", max_size=24),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=4, unique=True),
    cuts=st.lists(st.integers(0, 24), max_size=10),
    include=st.booleans(),
)
def test_stop_strings_cut_at_the_first_complete_one_however_the_text_is_split(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    matcher = StopStrings(stops, include=include)
    edges = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    want = first_stop(text, stops)
    shown, stopped = "", None
    for start, end in itertools.pairwise(edges):
        part, stopped = matcher.push(text[start:end])
        shown += part
        if stopped is not None:
            break
        # nothing shown may be the beginning of a stop string that the rest of the text completes
        if want is not None:
            assert len(shown) <= (want[0] if include else want[1])
    if want is None:
        assert stopped is None
        assert shown + matcher.flush() == text
    else:
        assert stopped == want[2]
        assert shown == text[: want[0] if include else want[1]]


def test_text_that_cannot_become_a_stop_string_is_shown_at_once() -> None:
    matcher = StopStrings(["</tool_call>", "\n\n"])
    assert matcher.push("x = 3 < 5") == ("x = 3 < 5", None)
    assert matcher.push(" <") == (" ", None)
    assert matcher.push("/tool") == ("", None)
    assert matcher.push("box>\n") == ("</toolbox>", None)
    assert matcher.push("y") == ("\ny", None)
