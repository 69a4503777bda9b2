"""What runs inside a session: a small notebook, a script runner, a shell starter.

Everything here is at the mercy of the code it runs; nothing outside relies on it. Its only privilege is the control
socket, over which it can say that a block is done.

Messages in: {"kind", "code", "verbosity", "stdin"}, kind notebook, script or shell. Messages out: {"ready"} once, then
{"status": completed | error | interrupted} per block. Output travels over descriptors 1 and 2, flushed before that.
"""

from __future__ import annotations

import ast
import asyncio
import builtins
import inspect
import io
import linecache
import os
import random
import re
import signal
import site
import subprocess
import sys
import tempfile
import threading
import tokenize
import types
from typing import Any, NoReturn

from omr.sandbox import _display, _frames

_OWN_FILE = __file__
_SPARE_STDOUT, _SPARE_STDERR = 4, 5
"""Copies of 1 and 2: a block that closes those gets them back for the next one."""
_MAGIC = re.compile(r"^[ \t]*([%!][^\n=]*)$", re.MULTILINE)


class _Leave(SystemExit):
    """exit() or quit(): the block ends, quietly."""


class _Interrupt:
    """SIGINT as the owner's time limit: KeyboardInterrupt while a block runs, nothing between blocks."""

    def __init__(self) -> None:
        self.armed = False
        self.fired = False

    def __call__(self, number: int, frame: types.FrameType | None) -> None:
        if self.armed:
            self.fired = True
            raise KeyboardInterrupt

    def arm(self) -> None:
        signal.signal(signal.SIGINT, self)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        self.fired = False
        self.armed = True


def serve(kind: str, control: int, *, scratch: str, seed: int | None, packages: list[str]) -> NoReturn:
    """Run blocks until the owner closes the control socket. Never returns."""
    os.dup2(1, _SPARE_STDOUT, inheritable=False)
    os.dup2(2, _SPARE_STDERR, inheritable=False)
    _fresh_process(scratch, seed)
    if kind == "shell":
        os.environ["PYTHONPATH"] = ":".join(packages)
    interrupt = _Interrupt()
    runs = {"notebook": _Notebook(interrupt).run, "script": _run_script}
    if kind == "shell":
        runs = {"shell": _run_shell}
    _frames.write(control, {"ready": True})
    while True:
        message = _frames.read(control)
        if message is None:
            os._exit(0)
        status = "error"
        try:
            _fresh_streams()
            interrupt.arm()
            status = runs[message["kind"]](message)
        except KeyboardInterrupt:
            status = "interrupted"
        except MemoryError:
            os.write(2, b"MemoryError\n")
        finally:
            interrupt.armed = False
        _flush()  # the owner reads on, after an interrupt too
        _frames.write(control, {"status": "interrupted" if interrupt.fired else status})


def _fresh_process(scratch: str, seed: int | None) -> None:
    for name in ("HOME", "TMPDIR", "MPLCONFIGDIR"):
        os.environ[name] = scratch
    tempfile.tempdir = None
    random.seed(seed)  # fork had it seeded anew
    if seed is None:
        seed_numpy(None)


def seed_numpy(seed: int | None) -> None:
    """Set the state of numpy's global generator: once in the zygote for a fixed seed, else in every session."""
    import numpy

    numpy.random.seed(seed)


def _fresh_streams() -> None:
    """sys.stdout and sys.stderr anew: the last block may have replaced or closed them."""
    for fd, spare, name in ((1, _SPARE_STDOUT, "stdout"), (2, _SPARE_STDERR, "stderr")):
        os.dup2(spare, fd)
        old = getattr(sys, name)
        if isinstance(old, io.TextIOWrapper) and getattr(old, "_omr_session", False) and not old.closed:
            continue
        raw = io.BufferedWriter(io.FileIO(fd, "wb", closefd=False))
        stream = io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", line_buffering=True)
        stream._omr_session = True  # type: ignore[attr-defined]
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError, AttributeError):
            continue


def warm() -> None:
    """Touch, in the zygote, what the first block of every session would otherwise pay for."""
    site.setcopyright()
    site.sethelper()
    _display.pretty([list(range(100))])
    notebook = _Notebook(_Interrupt())
    for source in ("a = 1\na", "1 / 0", "a = 2\n b = 3"):
        try:
            notebook.execute(source)
        except (ZeroDivisionError, SyntaxError) as error:
            _display.format_exception(error, "Plain", own_file=_OWN_FILE)
    asyncio.new_event_loop().close()
    for name in [n for n in sys.modules if n == "omr" or n.startswith("omr.")]:
        del sys.modules[name]  # not importable in sessions; what runs here holds on to what it needs


class _Notebook:
    """Blocks share one namespace."""

    def __init__(self, interrupt: _Interrupt) -> None:
        self._interrupt = interrupt
        self._count = 0
        self._module = types.ModuleType("__main__")
        self._names = self._module.__dict__
        self._names.update(__builtins__=builtins, __doc__=None, exit=_leave, quit=_leave, display=_show)

    def run(self, message: dict[str, Any]) -> str:
        sys.modules["__main__"] = self._module
        verbosity = message.get("verbosity", "Plain")
        try:
            value = self.execute(message["code"])
            if value is not None:
                _show(value)
                self._names["_"] = value
        except _Leave:
            return "completed"
        except KeyboardInterrupt as error:
            if self._interrupt.fired:
                raise
            self._report(error, verbosity)
            return "error"
        except BaseException as error:
            self._report(error, verbosity)
            return "error"
        return "completed"

    def execute(self, source: str) -> object:
        """Run `source`; the value of its last expression, None without one."""
        self._count += 1
        name = _display.block_name(self._count)
        source = _dedent(source)
        source, tree = _parse_block(source, name)
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        if tree.body:
            self._evaluate(compile(tree, name, "exec", _AWAIT, True))
        if not isinstance(last, ast.Expr):
            return None
        value = self._evaluate(compile(ast.Expression(last.value), name, "eval", _AWAIT, True))
        return None if _ends_with_semicolon(source) else value

    def _evaluate(self, code: types.CodeType) -> object:
        result = eval(code, self._names)
        if code.co_flags & inspect.CO_COROUTINE:
            return asyncio.run(result)
        return result

    def _report(self, error: BaseException, verbosity: str) -> None:
        parsing = isinstance(error, SyntaxError) and all(
            frame.f_code.co_filename in (_OWN_FILE, ast.__file__) for frame in _frames_of(error)
        )
        if isinstance(error, SystemExit):
            sys.stdout.write(f"SystemExit: {error}".rstrip(" :") + "\n")
            return
        text = _display.format_exception(error, verbosity, own_file=_OWN_FILE, parsing=parsing)
        error.__traceback__ = None  # what its frames hold may be most of the memory
        sys.stdout.write(text)


_AWAIT = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT


def _leave(code: object = None) -> NoReturn:
    raise _Leave(code)


def _show(*values: object, **_: object) -> None:
    for value in values:
        sys.stdout.write(_display.pretty(value) + "\n")


def _frames_of(error: BaseException) -> list[types.FrameType]:
    frames, tb = [], error.__traceback__
    while tb is not None:
        frames.append(tb.tb_frame)
        tb = tb.tb_next
    return frames


def _dedent(source: str) -> str:
    """Without leading blank lines, and without the first line's indentation on every line."""
    lines = source.splitlines(keepends=True)
    while lines and not lines[0].strip():
        lines.pop(0)
    if not lines:
        return ""
    margin = lines[0][: len(lines[0]) - len(lines[0].lstrip(" \t"))]
    if not margin:
        return "".join(lines)
    return "".join(line.removeprefix(margin) for line in lines)


def _parse(source: str, name: str) -> ast.Module:
    tree = compile(source, name, "exec", ast.PyCF_ONLY_AST | _AWAIT, True)
    assert isinstance(tree, ast.Module)
    return tree


def _parse_block(source: str, name: str) -> tuple[str, ast.Module]:
    """The block as Python. Notebook magics and shell escapes become a message on stderr, if that makes it Python."""

    def message(match: re.Match[str]) -> str:
        line = match[1].strip()
        indent = match[0][: len(match[0]) - len(match[0].lstrip())]
        if line.startswith(("%matplotlib", "%config")):
            return f"{indent}pass"
        return (
            f"{indent}__import__('sys').stderr.write({line + ': not available in this sandbox'!r} + chr(10)) and None"
        )

    try:
        return source, _parse(source, name)
    except SyntaxError as error:
        refused = error
    replaced = _MAGIC.sub(message, source)
    try:
        return replaced, _parse(replaced, name)
    except SyntaxError:
        raise refused from None


def _ends_with_semicolon(source: str) -> bool:
    last = ""
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER, tokenize.DEDENT):
                last = token.string
    except (tokenize.TokenError, SyntaxError):
        return False
    return last == ";"


def _take_stdin(text: str) -> None:
    """Make `text` what descriptor 0 reads."""
    fd, path = tempfile.mkstemp()
    os.unlink(path)
    with open(fd, "w+b", buffering=0) as file:
        data = memoryview(text.encode("utf-8", "surrogatepass"))
        while data:
            data = data[file.write(data) :]
        file.seek(0)
        os.dup2(file.fileno(), 0)
    raw = io.BufferedReader(io.FileIO(0, "rb", closefd=False))
    sys.stdin = io.TextIOWrapper(raw, encoding="utf-8", errors="surrogateescape")


def _run_script(message: dict[str, Any]) -> str:
    """`python -c CODE` without the exec: __main__ of its own, uncaught exceptions to stderr, threads waited for."""
    _take_stdin(message.get("stdin", ""))
    module = types.ModuleType("__main__")
    module.__dict__.update(__builtins__=builtins, exit=sys.exit, quit=sys.exit)
    sys.modules["__main__"] = module
    sys.argv = ["-c"]
    try:
        exec(compile(message["code"], "<string>", "exec", dont_inherit=True), module.__dict__)
    except SystemExit as error:
        if error.code is not None and not isinstance(error.code, int):
            sys.stderr.write(f"{error.code}\n")
    except BaseException as error:
        own = error.__traceback__
        sys.__excepthook__(
            type(error), error.with_traceback(own.tb_next if own else None), own.tb_next if own else None
        )
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    return "completed"


def _run_shell(message: dict[str, Any]) -> str:
    """Run the code as a bash script, in this session's namespaces."""
    _take_stdin(message.get("stdin", ""))
    with open("script.sh", "w", encoding="utf-8", errors="surrogatepass") as script:
        script.write(message["code"])
    shell = "/bin/bash" if os.path.exists("/bin/bash") else "/bin/sh"
    return "completed" if subprocess.call([shell, script.name], close_fds=True) == 0 else "error"
