"""What a notebook shows: the value of a block's last expression, and tracebacks in IPython's forms.

Tracebacks come in the four verbosities of the reference API. `Plain` (the default) has no `File` line for the block's
own frames, because models read it and the numbers mean nothing to them; frames of libraries keep theirs, with the path
cut down to the package. `Minimal` is the last line alone; `Context` shows source around each frame and `Verbose` also
values, both with ANSI colours.

Values are laid out as IPython does: on one line if they fit in 80 columns, else one element per line; at most 1000
elements of a container.
"""

from __future__ import annotations

import linecache
import re
import traceback
from collections.abc import Iterable, Iterator
from types import FrameType, TracebackType
from typing import Any

WIDTH = 79
_MAX_ELEMENTS = 1000
_MAX_DEPTH = 50
_RED, _GREEN, _CYAN, _RESET = "\x1b[0;31m", "\x1b[0;32m", "\x1b[0;36m", "\x1b[0m"
_REPEATED = 3  # frames of a recursion shown before the rest is counted

_BRACKETS = {
    "list": ("[", "]"),
    "tuple": ("(", ")"),
    "set": ("{", "}"),
    "frozenset": ("frozenset({", "})"),
    "dict": ("{", "}"),
}
BLOCK_PREFIX = "<ipython-input-"


def block_name(number: int) -> str:
    """The file name under which block `number` is compiled."""
    return f"{BLOCK_PREFIX}{number}>"


def pretty(value: object) -> str:
    """`repr`, broken into lines when it is a long builtin container."""
    return _pretty(value, 0, 0)


def _pretty(value: object, indent: int, depth: int) -> str:
    if type(value) not in (list, tuple, set, frozenset, dict) or depth > _MAX_DEPTH or not value:
        return repr(value)
    assert isinstance(value, list | tuple | set | frozenset | dict)
    items: Iterable[object] = _sorted(value) if isinstance(value, set | frozenset) else value
    if len(value) <= _MAX_ELEMENTS:
        line = repr(value)
        if isinstance(value, set | frozenset):
            line = ", ".join(map(repr, items)).join(_BRACKETS[type(value).__name__])
        if len(line) + indent <= WIDTH and "\n" not in line:
            return line
    opening, closing = _BRACKETS[type(value).__name__]
    indent += len(opening)
    parts: list[str] = []
    for number, item in enumerate(items):
        if number == _MAX_ELEMENTS:
            parts.append("...")
            break
        if isinstance(value, dict):
            key = f"{item!r}: "
            parts.append(key + _pretty(value[item], indent + len(key), depth + 1))
        else:
            parts.append(_pretty(item, indent, depth + 1))
    if isinstance(value, tuple) and len(parts) == 1:
        closing = ",)"
    return opening + (",\n" + " " * indent).join(parts) + closing


def _sorted(items: Iterable[Any]) -> list[Any]:
    """Elements of a set in an order that does not depend on hashes, where they have one."""
    try:
        return sorted(items)
    except TypeError:
        return list(items)


def format_exception(error: BaseException, verbosity: str, *, own_file: str, parsing: bool = False) -> str:
    """The text shown for `error`. Frames of this file and of `own_file` (the runner) are left out; `parsing`: the block
    never ran."""
    if verbosity == "Minimal":
        return _last_line(error)
    if verbosity in ("Context", "Verbose"):
        return "\n".join(_context(e, verbosity, own_file, parsing and e is error) for e in _chain(error))
    parts: list[str] = []
    for link in _chain(error):
        if parts:
            parts.append(_joint(link))
        if not (parsing and link is error):
            parts.append("Traceback (most recent call last):\n")
            parts.extend(_plain_frames(link.__traceback__, own_file))
        parts.append(_syntax_lines(link) + _last_line(link))
    return "".join(parts)


def _chain(error: BaseException) -> list[BaseException]:
    """`error` and what led to it, oldest first."""
    links: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in links and len(links) < 20:
        links.append(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return links[::-1]


def _joint(error: BaseException) -> str:
    if error.__cause__ is not None:
        return "\nThe above exception was the direct cause of the following exception:\n\n"
    return "\nDuring handling of the above exception, another exception occurred:\n\n"


def _last_line(error: BaseException) -> str:
    """`ZeroDivisionError: division by zero`, notes included."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg}\n"
    return "".join(traceback.format_exception_only(type(error), error))


def _syntax_lines(error: BaseException) -> str:
    """The offending source line and a caret below it."""
    if not isinstance(error, SyntaxError) or error.text is None:
        return ""
    text = error.text.rstrip("\n")
    start = len(text) - len(text.lstrip())
    lines = f"    {text.strip()}\n"
    if error.offset is not None:
        pad = "".join(c if c.isspace() else " " for c in text[start : error.offset - 1])
        lines += f"    {pad}^\n"
    return lines


def _walk(tb: TracebackType | None, own_file: str) -> Iterator[tuple[FrameType, int]]:
    while tb is not None:
        if tb.tb_frame.f_code.co_filename not in (own_file, __file__):
            yield tb.tb_frame, tb.tb_lineno or 0
        tb = tb.tb_next


def _plain_frames(tb: TracebackType | None, own_file: str) -> Iterator[str]:
    previous, repeats = "", 0
    for frame, line_number in _walk(tb, own_file):
        shown = _plain_frame(frame, line_number)
        repeats = repeats + 1 if shown == previous else 0
        if repeats < _REPEATED:
            yield shown
        elif repeats == _REPEATED:
            yield "    [previous frame repeated]\n"
        previous = shown


def _plain_frame(frame: FrameType, line_number: int) -> str:
    name = frame.f_code.co_filename
    source = linecache.getline(name, line_number, frame.f_globals).strip()
    text = f"    {source}\n" if source else ""
    if name.startswith(BLOCK_PREFIX):
        return text
    function = "" if frame.f_code.co_name == "<module>" else f" in {frame.f_code.co_name}"
    return f"  File {_short(name)}:{line_number}{function}\n{text}"


def _short(path: str) -> str:
    """A library's path from its package on."""
    for marker in ("site-packages/", "dist-packages/"):
        if marker in path:
            return path.rpartition(marker)[2]
    return re.sub(r"^.*/lib/python3\.\d+/", "", path)


def _context(error: BaseException, verbosity: str, own_file: str, parsing: bool) -> str:
    name = type(error).__name__
    head = f"{_RED}{'-' * 75}{_RESET}\n{_RED}{name}{_RESET}"
    head += " " * max(1, 75 - len(name) - 33) + "Traceback (most recent call last)\n"
    frames = [] if parsing else [_context_frame(f, n, verbosity) for f, n in _walk(error.__traceback__, own_file)]
    if len(frames) > 12:
        frames = [*frames[:6], f"    ({len(frames) - 12} frames left out)\n", *frames[-6:]]
    last = _last_line(error).rstrip("\n")
    kind, colon, message = last.partition(":")
    return head + "\n".join(frames) + "\n" + _syntax_lines(error) + f"{_RED}{kind}{_RESET}{colon}{message}\n"


def _context_frame(frame: FrameType, line_number: int, verbosity: str) -> str:
    name = frame.f_code.co_filename
    if name.startswith(BLOCK_PREFIX):
        where = f"Cell {_GREEN}In[{name[len(BLOCK_PREFIX) : -1]}]{_RESET}, line {_GREEN}{line_number}{_RESET}"
    else:
        where = f"File {_GREEN}{_short(name)}:{line_number}{_RESET}"
    if frame.f_code.co_name != "<module>":
        where += f", in {_CYAN}{frame.f_code.co_name}{_RESET}"
    lines = [where]
    for number in range(max(1, line_number - 2), line_number + 3):
        source = linecache.getline(name, number, frame.f_globals).rstrip("\n")
        if source or number == line_number:
            arrow = f"{_GREEN}----> {number}{_RESET}" if number == line_number else f"{_GREEN}{number:>7}{_RESET}"
            lines.append(f"{arrow} {source}")
    if verbosity == "Verbose":
        used = dict.fromkeys(re.findall(r"[A-Za-z_]\w*", linecache.getline(name, line_number, frame.f_globals)))
        for variable in used:
            if variable in frame.f_locals:
                lines.append(f"{_CYAN}{variable}{_RESET} = {repr(frame.f_locals[variable])[:200]}")
    return "\n".join(lines) + "\n"
