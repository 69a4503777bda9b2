"""Values and tracebacks as a notebook shows them."""

from __future__ import annotations

import ast
import pprint
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omr.sandbox._display import WIDTH, format_exception, pretty

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=30),
    lambda inner: (
        st.lists(inner, max_size=8)
        | st.tuples(inner, inner)
        | st.tuples(inner)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=5)
        | st.sets(st.integers() | st.text(max_size=9), max_size=20)
    ),
    max_leaves=40,
)


@settings(max_examples=150, deadline=None)
@given(value=VALUES)
def test_what_is_shown_is_the_value(value: Any) -> None:
    shown = pretty(value)
    if "set()" not in shown:
        assert ast.literal_eval(shown) == value
    if len(repr(value)) <= WIDTH:
        assert "\n" not in shown


@settings(max_examples=50, deadline=None)
@given(value=st.lists(st.integers(), min_size=1, max_size=100) | st.tuples(*[st.integers()] * 40))
def test_flat_containers_look_as_pprint_has_them(value: Any) -> None:
    assert pretty(value) == pprint.pformat(value, width=WIDTH)


def test_long_containers_are_cut() -> None:
    shown = pretty(list(range(5000)))
    assert shown.endswith(" 999,\n ...]")


def test_sets_do_not_depend_on_hashes() -> None:
    assert pretty({"b", "a", "c"}) == "{'a', 'b', 'c'}"
    assert pretty(frozenset({2, 1})) == "frozenset({1, 2})"
    assert sorted(pretty({"b", 1})) == sorted("{'b', 1}")


def test_loops_in_values_end() -> None:
    value: list[Any] = []
    value.append(value)
    assert "..." in pretty(value)
    deep: list[Any] = []
    for _ in range(200):
        deep = [deep, "x" * 50]
    assert pretty(deep).count("x" * 50) == 200


def caught(code: str, name: str = "<ipython-input-1>") -> BaseException:
    try:
        exec(compile(code, name, "exec"), {})
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def test_recursion_is_counted_not_listed() -> None:
    error = caught("def f(): f()\nf()")
    shown = format_exception(error, "Plain", own_file=__file__)
    assert len(shown) < 500
    assert shown.endswith("RecursionError: maximum recursion depth exceeded\n")


def test_chains_are_shown_oldest_first() -> None:
    error = caught("try:\n    1 / 0\nexcept ZeroDivisionError:\n    {}['k']")
    shown = format_exception(error, "Plain", own_file=__file__)
    assert shown.index("ZeroDivisionError") < shown.index("During handling") < shown.index("KeyError: 'k'")
    silent = caught("try:\n    1 / 0\nexcept ZeroDivisionError:\n    raise ValueError('v') from None")
    assert "ZeroDivisionError" not in format_exception(silent, "Plain", own_file=__file__)


def test_a_chain_that_bites_its_tail_ends() -> None:
    error = caught("raise ValueError(1)")
    other = caught("raise ValueError(2)")
    error.__context__, other.__context__ = other, error
    assert format_exception(error, "Plain", own_file=__file__).count("ValueError") == 2


@pytest.mark.parametrize("verbosity", ["Plain", "Minimal", "Context", "Verbose"])
def test_hostile_exceptions_are_shown(verbosity: str) -> None:
    error = caught("class E(Exception):\n    def __str__(self): raise KeyError('no')\nraise E")
    assert "E: <exception str() failed>" in format_exception(error, verbosity, own_file=__file__).replace("\x1b[0m", "")
