"""A session behaves like a notebook, keeps its limits, and reports what happened as a value."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from omr.errors import ResourceError
from omr.sandbox import Outcome
from omr.sandbox._client import LocalClient
from omr.sandbox._memory import tree
from omr.sandbox._session import CUT

from .host import limits

Run = Callable[..., list[Outcome]]


def test_state_persists_from_block_to_block(run: Run) -> None:
    blocks = ("import math\nx = 40", "def f(): return x + 2", "f()", "x = 1", "f(), math.pi > 3")
    assert [o.stdout for o in run(*blocks)] == ["", "", "42\n", "", "(3, True)\n"]


SHOWN = {
    "print('p');5": "p\n5\n",
    "5;": "",
    "5; # note": "",
    "x = 5": "",
    "None": "",
    "'a'": "'a'\n",
    "'#;'": "'#;'\n",
    "if True:\n    7": "",
    "\n\n    a = 1\n    a\n    ": "1\n",
    "": "",
    "# nothing": "",
    "import sympy; sympy.sqrt(8)": "2*sqrt(2)\n",
    "import numpy; numpy.arange(3)": "array([0, 1, 2])\n",
    "print('x', end='')": "x\n",
    "print('\\n\\nx\\n\\n')": "x\n",
    "print('\\x1b[31mred\\x1b[0m')": "red\n",
    "display(3)": "3\n",
    "_ = 1\n[_, __name__]": "[1, '__main__']\n",
    "import asyncio\nawait asyncio.sleep(0, 9)": "9\n",
    "exit()": "",
    "%matplotlib inline\n3": "3\n",
    "{'b': 1, 'a': [1, 2]}": "{'b': 1, 'a': [1, 2]}\n",
    "list(range(40))": "[" + ",\n ".join(map(str, range(40))) + "]\n",
    "import os; x = os.write(1, b'raw\\n')": "raw\n",
    "print('é∑🎈')": "é∑🎈\n",
}


@pytest.mark.parametrize("code", SHOWN)
def test_what_a_block_shows(code: str, run: Run) -> None:
    (outcome,) = run(code)
    assert (outcome.status, outcome.stdout, outcome.stderr) == ("completed", SHOWN[code], "")


FAILS = {
    "1 / 0": "Traceback (most recent call last):\n    1 / 0\nZeroDivisionError: division by zero\n",
    "def f():\n    return [][1]\nf()": (
        "Traceback (most recent call last):\n    f()\n    return [][1]\nIndexError: list index out of range\n"
    ),
    "a = 2\n b = 3": "    b = 3\n    ^\nIndentationError: unexpected indent\n",
    "x = (1": "    x = (1\n        ^\nSyntaxError: '(' was never closed\n",
    "print('before')\nnope": (
        "before\nTraceback (most recent call last):\n    nope\nNameError: name 'nope' is not defined\n"
    ),
    "input('> ')": "> Traceback (most recent call last):\n    input('> ')\nEOFError: EOF when reading a line\n",
    "import sys\nsys.exit(3)": "SystemExit: 3\n",
    "raise KeyboardInterrupt": "Traceback (most recent call last):\n    raise KeyboardInterrupt\nKeyboardInterrupt\n",
    "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise ValueError('v') from e": (
        "Traceback (most recent call last):\n    1 / 0\nZeroDivisionError: division by zero\n\n"
        "The above exception was the direct cause of the following exception:\n\n"
        "Traceback (most recent call last):\n    raise ValueError('v') from e\nValueError: v\n"
    ),
}


@pytest.mark.parametrize("code", FAILS)
def test_errors_go_to_stdout_in_the_plain_form(code: str, run: Run) -> None:
    failed, after = run(code, "6 * 7")
    assert (failed.status, failed.stdout, failed.stderr) == ("error", FAILS[code], "")
    assert not failed.state_lost
    assert after.stdout == "42\n"


@pytest.mark.parametrize("code", ["\x00", "x = '\ud800'", "print('\ud800')", "(" * 5000 + ")" * 5000, "=" * 100_000])
def test_junk_is_an_error_and_no_more(code: str, run: Run) -> None:
    junk, after = run(code, "1")
    assert junk.status in ("error", "completed")
    assert after.stdout == "1\n"


def test_a_library_frame_keeps_its_file_without_the_path(run: Run) -> None:
    (outcome,) = run("import json\njson.loads('{')")
    assert "  File json/__init__.py:" in outcome.stdout
    assert "/" not in outcome.stdout.partition("json/__init__.py")[0]


def test_functions_of_earlier_blocks_show_their_source(run: Run) -> None:
    outcome = run("def f(n):\n    return 1 // n", "f(0)")[1]
    assert "    f(0)\n    return 1 // n\n" in outcome.stdout


def test_time_limit_keeps_output_and_state(run: Run) -> None:
    first, second, third = run("x = 1", "print('so far'); x = 2\nwhile True: pass", "x", timeout_s=0.3)
    assert first.status == "completed"
    assert (second.status, second.stdout) == ("timeout", "so far\n")
    assert second.stderr == "Execution timed out after 0.3 seconds\n"
    assert not second.state_lost
    assert 0.3 <= second.seconds < 1.5
    assert third.stdout == "2\n"


def test_a_block_that_cannot_be_interrupted_loses_its_state(run: Run) -> None:
    stubborn = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('on', flush=True)\nwhile True: pass"
    lost, after = run(stubborn, "'x' in globals()", timeout_s=0.2)
    assert (lost.status, lost.stdout, lost.state_lost) == ("timeout", "on\n", True)
    assert (after.status, after.stdout) == ("completed", "False\n")


def test_a_crash_loses_state_and_says_so(run: Run) -> None:
    _, crash, after = run("x = 1", "print('last words')\nimport ctypes\nctypes.string_at(0)", "x")
    assert (crash.status, crash.stderr, crash.state_lost) == ("error", "connection closed\n", True)
    assert crash.stdout == "last words\n"
    assert "NameError" in after.stdout


def test_memory_error_is_survived(run: Run) -> None:
    (full, after) = run("x = 1\ny = [bytes(50 << 20) for _ in range(100)]", "x")
    assert full.status == "error"
    assert full.stdout.endswith("MemoryError\n")
    assert after.stdout == "1\n"


@pytest.mark.parametrize("chars", [1, 999, 1000, 1001, 5000])
def test_output_is_cut_by_characters(chars: int, run: Run) -> None:
    (outcome,) = run(f"print('é' * {chars}, end='')")
    assert outcome.stdout == ("é" * chars + "\n" if chars < 1000 else "é" * 1000 + CUT)


def test_ten_megabytes_of_output(run: Run) -> None:
    big, after = run("print('ab\\n' * (10 << 20))\nprint('end')\nx = 1", "x")
    assert (big.status, big.stdout) == ("completed", ("ab\n" * 334)[:1000] + CUT)
    assert after.stdout == "1\n"


def test_output_dropped_unseen_is_marked_too(run: Run) -> None:
    (outcome,) = run("print('\\x1b[0m' * 100_000)")
    assert outcome.stdout == CUT


def test_output_that_is_not_text(run: Run) -> None:
    zero, invalid = run("print('a\\0b')", "import os\nn = os.write(1, bytes(range(128, 256)))\nprint('ok')")
    assert zero.stdout == "a\0b\n"
    assert invalid.status == "completed"
    assert invalid.stdout.endswith("ok\n")
    assert "\ufffd" in invalid.stdout


def test_stderr_is_separate_and_cut_too(run: Run) -> None:
    (outcome,) = run("import sys, os\nprint('e' * 2000, file=sys.stderr)\nprint('out')\nn = os.write(2, b'raw')")
    assert outcome.stdout == "out\n"
    assert outcome.stderr == "e" * 1000 + CUT


def test_streams_are_new_for_every_block(run: Run) -> None:
    breaks = "import sys, io, os\nsys.stdout = io.StringIO()\nos.close(1)"
    assert run(breaks, "print(1)", "sys.stdout.close()", "print(2)")[1::2] == [
        Outcome(status="completed", stdout="1\n", seconds=pytest.approx(0, abs=5)),
        Outcome(status="completed", stdout="2\n", seconds=pytest.approx(0, abs=5)),
    ]


def test_sessions_repeat_themselves(run: Run) -> None:
    code = "import random, numpy\n[random.random(), numpy.random.rand(), list({'a', 'b', 'c', 'd'})]"
    assert run(code)[0].stdout == run(code)[0].stdout


def test_threads_left_behind_rest_between_blocks(client: LocalClient) -> None:
    async def body() -> tuple[float, str]:
        session = client.session()
        try:
            spin = "import threading, time\ndef spin():\n    while True: pass\n"
            await session.execute(spin + "threading.Thread(target=spin, daemon=True).start()")
            before = float((await session.execute("time.process_time()")).stdout)
            await asyncio.sleep(0.5)
            after = float((await session.execute("time.process_time()")).stdout)
            return after - before, (await session.execute("threading.active_count()")).stdout
        finally:
            await session.close()

    cpu_s, threads = asyncio.run(body())
    assert cpu_s < 0.25
    assert threads == "2\n"


def test_cancelling_a_block_kills_its_process(client: LocalClient) -> None:
    async def body() -> tuple[float, str]:
        session = client.session()
        try:
            await session.execute("x = 1")
            task = asyncio.create_task(session.execute("while True: pass"))
            await asyncio.sleep(0.1)
            started = time.monotonic()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            seconds = time.monotonic() - started
            return seconds, (await session.execute("'x' in globals()")).stdout
        finally:
            await session.close()

    live = client.live_sessions
    seconds, shown = asyncio.run(body())
    assert seconds < 0.5
    assert shown == "False\n"
    assert client.live_sessions == live


def test_blocks_of_one_session_wait_for_each_other(client: LocalClient) -> None:
    async def body() -> list[str]:
        session = client.session()
        try:
            blocks = [session.execute(f"import time; time.sleep(0.05); x = {n}; print(x)") for n in range(4)]
            return [outcome.stdout for outcome in await asyncio.gather(*blocks)]
        finally:
            await session.close()

    assert asyncio.run(body()) == ["0\n", "1\n", "2\n", "3\n"]


def test_closing_ends_a_running_block(client: LocalClient) -> None:
    async def body() -> tuple[Outcome, float]:
        session = client.session()
        await session.execute("1")
        running = asyncio.create_task(session.execute("while True: pass"))
        waiting = asyncio.create_task(session.execute("1"))
        await asyncio.sleep(0.1)
        started = time.monotonic()
        await asyncio.gather(session.close(), session.close())
        seconds = time.monotonic() - started
        with pytest.raises(ResourceError, match="closed"):
            await waiting
        return await running, seconds

    outcome, seconds = asyncio.run(body())
    assert (outcome.status, outcome.state_lost) == ("error", True)
    assert seconds < 2.0
    assert client.live_sessions == 0


def test_closing_is_idempotent_and_final(client: LocalClient) -> None:
    async def body() -> None:
        session = client.session()
        await session.close()
        await session.close()
        with pytest.raises(ResourceError, match="closed"):
            await session.execute("1")

    asyncio.run(body())


def test_one_client_serves_loop_after_loop(run: Run) -> None:
    assert [run("1")[0].stdout for _ in range(3)] == ["1\n"] * 3


def test_nothing_stays_open(client: LocalClient, run: Run) -> None:
    run("1")
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(5):
        run("1", "import os; os._exit(1)", "2")
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert client.live_sessions == 0


@pytest.mark.parametrize(
    ("verbosity", "shown"),
    [
        ("Minimal", "ZeroDivisionError: division by zero\n"),
        ("Plain", "Traceback (most recent call last):\n    y = 1 / x\nZeroDivisionError: division by zero\n"),
    ],
)
def test_short_tracebacks(verbosity: str, shown: str, run: Run) -> None:
    assert run("x = 0\ny = 1 / x", verbosity=verbosity)[0].stdout == shown


def test_long_tracebacks_have_context_values_and_colour(run: Run) -> None:
    context = run("x = 0\ny = 1 / x", verbosity="Context")[0].stdout
    verbose = run("x = 0\ny = 1 / x", verbosity="Verbose")[0].stdout
    assert "\x1b[" in context
    assert "----> 2" in context and "x = 0" in context
    assert len(verbose) > len(context)


def test_execution_time_of_a_session_is_limited(client: LocalClient, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> list[Outcome]:
        session = client.session()
        try:
            return [await session.execute(code, 5.0) for code in ("x = 1", "while True: pass", "x")]
        finally:
            await session.close()

    monkeypatch.setattr(client, "limits", limits(session_s=0.3))
    first, second, third = asyncio.run(body())
    assert first.status == "completed"
    assert second.status == "timeout" and second.seconds < 2.0
    assert (third.status, third.seconds) == ("timeout", 0.0)
    assert "used up" in third.stderr


HONEST = {
    "threads": "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(8) as pool:\n"
    "    print(sum(pool.map(lambda n: n * n, range(100))))",
    "files": "import csv, json, tempfile, shutil, os\nos.makedirs('a/b')\nopen('a/b/c', 'w').write('1')\n"
    "shutil.copy('a/b/c', 'd')\nshutil.rmtree('a')\nprint(open('d').read(), os.listdir('.'))\n"
    "with tempfile.NamedTemporaryFile('w+') as f:\n    f.write('x')",
    "algebra": "from sympy import *\nx = symbols('x')\n"
    "print(solve(x**2 - 5*x + 6), integrate(exp(-x**2), (x, -oo, oo)))",
    "numbers": "from sympy.ntheory import factorint\nfrom math import comb\nprint(factorint(10**18 + 9), comb(50, 25))",
    "frames": "import pandas\nprint(pandas.DataFrame({'a': [1, 2]}).sum().to_dict())",
    "graphs": "import networkx\nprint(networkx.shortest_path_length(networkx.cycle_graph(10), 0, 5))",
    "linear": "import numpy as np\nprint(np.linalg.det(np.array([[2.0, 0], [0, 3]])), np.random.rand(3).shape)",
    "dates": "import datetime, zoneinfo\nprint(datetime.date(2024, 2, 29).strftime('%A'))",
    "classes": "import dataclasses, pickle\n@dataclasses.dataclass\nclass P:\n    x: int\n"
    "print(pickle.loads(pickle.dumps(P(3))))",
    "clock": "import time, os, platform\ntime.sleep(0.01)\nprint(os.cpu_count() > 0, platform.system())",
    "asyncio": "import asyncio\nasync def f():\n    await asyncio.sleep(0.001)\n    return 5\nprint(asyncio.run(f()))",
}
HONEST_OUTPUT = {
    "threads": "328350\n",
    "files": "1 ['d']\n",
    "algebra": "[2, 3] sqrt(pi)\n",
    "numbers": "{1000000000000000009: 1} 126410606437752\n",
    "frames": "{'a': 3}\n",
    "graphs": "5\n",
    "linear": "6.0 (3,)\n",
    "dates": "Thursday\n",
    "classes": "P(x=3)\n",
    "clock": "True Linux\n",
    "asyncio": "5\n",
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_programs_work(name: str, run: Run) -> None:
    (outcome,) = run(HONEST[name])
    assert (outcome.status, outcome.stdout) == ("completed", HONEST_OUTPUT[name]), outcome


@pytest.mark.slow
def test_matplotlib_is_harmless(run: Run) -> None:
    code = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.savefig('a.png')\nplt.show()\nprint('ok')"
    (outcome,) = run(code, timeout_s=60.0)
    assert (outcome.status, outcome.stdout) == ("completed", "ok\n"), outcome


def test_scripts_run_as_python_does(run: Run) -> None:
    def script(code: str, stdin: str = "") -> tuple[str, str, str]:
        (outcome,) = run(code, kind="script", stdin=stdin)
        return outcome.status, outcome.stdout, outcome.stderr

    assert script("print(input('something '))", "new") == ("completed", "something new\n", "")
    trace = 'Traceback (most recent call last):\n  File "<string>", line 1, in <module>\n'
    assert script("1 / 0") == ("completed", "", trace + "ZeroDivisionError: division by zero\n")
    status, shown, error = script("a = 2\n b = 3")
    assert (status, shown) == ("completed", "")
    assert error.startswith('  File "<string>", line 2\n    b = 3\n') and error.endswith("unexpected indent\n")
    assert script("if __name__ == '__main__': print(1)\nimport sys; sys.exit('bye')") == ("completed", "1\n", "bye\n")
    assert script("import sys; print(sys.stdin.read() == 'x' * 100000)", "x" * 100000)[1] == "True\n"


def test_shell_scripts_run_inside(run: Run) -> None:
    def shell(code: str) -> Outcome:
        return run(code, kind="shell")[0]

    hello = shell('echo "Hello, World!"; seq 3 | wc -l; echo "$0 $HOME" >&2')
    assert (hello.status, hello.stdout) == ("completed", "Hello, World!\n3\n")
    assert shell("exit 3").status == "error"
    assert "unexpected EOF" in shell("echo 'Hello").stderr
    assert shell("cat /etc/passwd").status == "error"


@pytest.mark.slow
def test_shell_scripts_find_the_packages(run: Run) -> None:
    (outcome,) = run("python3 -c 'import sympy; print(sympy.Integer(2) ** 10)'", kind="shell", timeout_s=60.0)
    assert outcome.stdout == "1024\n"


@pytest.mark.slow
def test_a_shell_is_killed_with_all_it_started(client: LocalClient, run: Run) -> None:
    (late,) = run("sleep 1000 & (sleep 1001 &) ; setsid sleep 1002 & wait; sleep 1003", kind="shell", timeout_s=0.5)
    assert late.status == "timeout" and late.state_lost
    deadline = time.monotonic() + 10  # the kernel has killed them; a busy machine has not yet taken them away
    while (left := [pid for pid in tree(os.getpid()) if b"sleep" in _command(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


@pytest.mark.slow
def test_a_shell_cannot_add_up_memory(run: Run) -> None:
    hog = "x=$(python3 -c 'import time; x = b\"x\" * (150 << 20); time.sleep(60)')"
    (outcome,) = run("\n".join(f"{hog} &" for _ in range(8)) + "\nwait", kind="shell", timeout_s=30.0)
    assert outcome.status == "error" and outcome.state_lost
    assert outcome.seconds < 25


SHARED = """
cat > hog.py <<'END'
import mmap, os, sys, time
memory = mmap.mmap(os.open('/dev/zero', os.O_RDWR) if sys.argv[1] == 'zero' else -1, 150 << 20)
for page in range(0, len(memory), 4096):
    memory[page] = 1
memory.madvise(mmap.MADV_DONTNEED)  # no longer among the process's pages, and still the machine's
print('BREACHED')
END
python3 hog.py zero; python3 hog.py anonymous
"""


@pytest.mark.slow
def test_a_shell_cannot_hold_memory_that_no_process_is_charged_for(run: Run, tmp_path: Path) -> None:
    bare = subprocess.run(["/bin/sh", "-c", SHARED], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert bare.stdout.count("BREACHED") == 2, bare.stderr
    (outcome,) = run(SHARED, kind="shell", timeout_s=30.0)
    assert "BREACHED" not in outcome.stdout and "Operation not permitted" in outcome.stderr


@pytest.mark.slow
def test_a_shell_cannot_bomb(run: Run) -> None:
    (outcome,) = run("b() { b | b & }; b; sleep 1; echo done", kind="shell", timeout_s=3.0)
    assert outcome.status in ("completed", "error", "timeout")
    assert len(tree(os.getpid())) < 60


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.slow
def test_many_sessions_live_at_once(client: LocalClient) -> None:
    async def body() -> list[str]:
        sessions = [client.session() for _ in range(100)]
        try:
            await asyncio.gather(*(s.execute(f"x = {n}", 60.0) for n, s in enumerate(sessions)))
            outcomes = await asyncio.gather(*(s.execute("x", 60.0) for s in sessions))
            return [outcome.stdout for outcome in outcomes]
        finally:
            await asyncio.gather(*(s.close() for s in sessions))

    assert asyncio.run(body()) == [f"{n}\n" for n in range(100)]
