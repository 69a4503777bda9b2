"""The HTTP service speaks NeMo-Skills' sandbox API, and the http option lives with either server."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from omr.errors import ConfigError, ResourceError
from omr.sandbox import Outcome
from omr.sandbox._client import LocalClient
from omr.sandbox._service import MAX_BODY_BYTES, Service
from omr.sandbox.http import Http, HttpClient, HttpSession

from .host import ROOT, gone, running

Ask = Callable[..., Awaitable[dict[str, Any]]]


@asynccontextmanager
async def served(client: LocalClient, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    service = Service(client, max_sessions=options.get("max_sessions", 50), idle_s=options.get("idle_s", 0.0))
    app = service.app()
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://sandbox") as http,
    ):
        yield http


async def ask(http: httpx.AsyncClient, code: str, session: str | None = None, **fields: Any) -> dict[str, Any]:
    """POST /execute, the reply's JSON."""
    headers = {} if session is None else {"X-Session-ID": session}
    body = {"generated_code": code, "timeout": 10, **fields}
    reply = await http.post("/execute", json=body, headers=headers)
    assert reply.status_code == 200, reply.text
    data: dict[str, Any] = reply.json()
    return data


def serve(client: LocalClient, body: Callable[[httpx.AsyncClient], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        async with served(client, **options) as http:
            await body(http)

    asyncio.run(run())
    assert client.live_sessions == 0


def test_ipython_sessions(client: LocalClient) -> None:
    async def body(http: httpx.AsyncClient) -> None:
        assert await ask(http, "a = 1\na", "s") == {
            "process_status": "completed",
            "stdout": "1\n",
            "stderr": "",
            "new_session_created": True,
        }
        second = await ask(http, "a + 5", "s", language="ipython")
        assert (second["stdout"], second["new_session_created"]) == ("6\n", False)
        other = await ask(http, "a", "other")
        assert other["process_status"] == "error" and other["new_session_created"]
        listed = (await http.get("/sessions")).json()
        assert listed["backend"] == "ipython"
        assert set(listed["sessions"]) == {"s", "other"}
        entry = listed["sessions"]["s"]
        assert entry["backend"] == "ipython" and entry["alive"] is True
        assert entry["created"] <= entry["last_used"] <= time.time()
        assert (await http.delete("/sessions/s", headers={"X-Session-ID": "s"})).status_code == 200
        assert (await http.delete("/sessions/s")).status_code == 404
        assert "error" in (await http.delete("/sessions/s")).json()
        again = await ask(http, "'a' in globals()", "s")
        assert (again["stdout"], again["new_session_created"]) == ("False\n", True)
        assert (await http.delete("/sessions/other%2Fx")).status_code == 404

    serve(client, body)


def test_a_lost_session_is_new_twice(client: LocalClient) -> None:
    """Once in the answer of the block that killed it, once in the next: so the client's replay is never missed."""

    async def body(http: httpx.AsyncClient) -> None:
        crash = "import ctypes; ctypes.string_at(0)"
        stubborn = "import signal; signal.signal(2, signal.SIG_IGN)\nwhile True: pass"
        replies = [
            await ask(http, "a = 1", "s"),
            await ask(http, crash, "s"),
            await ask(http, "a", "s"),
            await ask(http, "a = 2", "s"),
            await ask(http, stubborn, "s", timeout=0.2),
            await ask(http, "a", "s"),
            await ask(http, "b = 1", "s"),
        ]
        assert [r["new_session_created"] for r in replies] == [True, True, True, False, True, True, False]
        assert (replies[1]["process_status"], replies[1]["stderr"]) == ("error", "connection closed\n")
        assert (replies[4]["process_status"], replies[4]["stderr"]) == (
            "timeout",
            "Execution timed out after 0.2 seconds\n",
        )

    serve(client, body)


def test_a_soft_timeout_keeps_the_session(client: LocalClient) -> None:
    async def body(http: httpx.AsyncClient) -> None:
        await ask(http, "a = 1", "s")
        late = await ask(http, "print('on')\nimport time\ntime.sleep(9)", "s", timeout=1)
        assert late == {
            "process_status": "timeout",
            "stdout": "on\n",
            "stderr": "Execution timed out after 1 seconds\n",
            "new_session_created": False,
        }
        assert (await ask(http, "a", "s"))["stdout"] == "1\n"

    serve(client, body)


def test_languages_of_one_process(client: LocalClient) -> None:
    async def body(http: httpx.AsyncClient) -> None:
        for language in ("python", "python3"):
            reply = await ask(http, "print(input('something '))", language=language, std_input="new")
            assert reply == {"process_status": "completed", "stdout": "something new\n", "stderr": ""}
        failed = await ask(http, "1 / 0", language="python")
        assert failed["process_status"] == "completed"
        assert failed["stderr"].endswith('File "<string>", line 1, in <module>\nZeroDivisionError: division by zero\n')
        late = await ask(http, "import time\ntime.sleep(3)", language="python", timeout=0.2)
        assert late == {"process_status": "timeout", "stdout": "", "stderr": "Execution timed out after 0.2 seconds\n"}
        shell = await ask(http, "echo hi; exit 3", language="shell")
        assert (shell["process_status"], shell["stdout"]) == ("error", "hi\n")
        lean = await ask(http, "#eval 1", language="lean4")
        assert lean["process_status"] == "error" and "lake" in lean["stderr"]
        for language in ("pypy3", "cobol"):
            reply = await http.post("/execute", json={"generated_code": "1", "timeout": 1, "language": language})
            assert reply.status_code == 500
            assert reply.headers["content-type"].startswith("text/html")
            with pytest.raises(json.JSONDecodeError):
                reply.json()

    serve(client, body)


def test_limits_and_verbosity_travel_with_the_request(client: LocalClient) -> None:
    async def body(http: httpx.AsyncClient) -> None:
        cut = await ask(http, "print('x' * 100)", "s", max_output_characters=10)
        assert cut["stdout"] == "x" * 10 + "<output cut>"
        script = await ask(http, "print('x' * 100)", language="python", max_output_characters=10)
        assert script["stdout"] == "x" * 10 + "<output cut>"
        minimal = await ask(http, "1 / 0", "s", traceback_verbosity="Minimal")
        assert minimal["stdout"] == "ZeroDivisionError: division by zero\n"
        context = await ask(http, "1 / 0", "s", traceback_verbosity="Context")
        assert "\x1b[" in context["stdout"]

    serve(client, body)


BAD = [
    (b"{", {}, 400),
    (b"[]", {}, 400),
    (b"\xff", {}, 400),
    ({"timeout": 1}, {"X-Session-ID": "s"}, 500),
    ({"generated_code": "1"}, {"X-Session-ID": "s"}, 500),
    ({"generated_code": "1", "timeout": 1}, {}, 400),
    ({"generated_code": 1, "timeout": 1}, {"X-Session-ID": "s"}, 400),
    ({"generated_code": "1", "timeout": "1"}, {"X-Session-ID": "s"}, 400),
    ({"generated_code": "1", "timeout": -1}, {"X-Session-ID": "s"}, 400),
    ({"generated_code": "1", "timeout": True}, {"X-Session-ID": "s"}, 400),
    ({"generated_code": "1", "timeout": 1, "language": None}, {"X-Session-ID": "s"}, 400),
    ({"generated_code": "1", "timeout": 1, "max_output_characters": -1}, {"X-Session-ID": "s"}, 400),
    ({"generated_code": "1", "timeout": 1, "traceback_verbosity": "Loud"}, {"X-Session-ID": "s"}, 400),
    (b"[" * 100_000, {}, 400),
    (b'{"generated_code": "1", "timeout": NaN}', {"X-Session-ID": "s"}, 400),
    (b'{"generated_code": "' + b"x" * MAX_BODY_BYTES + b'", "timeout": 1}', {}, 413),
]


@pytest.mark.parametrize(("content", "headers", "status"), BAD)
def test_bad_requests(content: Any, headers: dict[str, str], status: int, client: LocalClient) -> None:
    async def body(http: httpx.AsyncClient) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        reply = await http.post("/execute", content=data, headers=headers)
        assert reply.status_code == status, reply.text
        if status != 500:
            assert "error" in reply.json()
        assert (await http.get("/health")).json()["status"] == "healthy"

    serve(client, body)


def test_a_full_service_says_so(client: LocalClient) -> None:
    async def body(http: httpx.AsyncClient) -> None:
        await ask(http, "1", "a")
        await ask(http, "1", "b")
        full = {"generated_code": "1", "timeout": 1}
        for headers, language in (({"X-Session-ID": "c"}, "ipython"), ({}, "python")):
            reply = await http.post("/execute", json={**full, "language": language}, headers=headers)
            assert reply.status_code == 503
            assert reply.json()["process_status"] == "error"
        await http.delete("/sessions/a")
        await ask(http, "1", "c")

    serve(client, body, max_sessions=2)


def test_idle_sessions_expire_when_asked(client: LocalClient) -> None:
    async def body(http: httpx.AsyncClient) -> None:
        await ask(http, "a = 1", "s")
        busy = asyncio.create_task(ask(http, "import time; time.sleep(0.6)", "busy"))
        await asyncio.sleep(0.5)
        assert set((await http.get("/sessions")).json()["sessions"]) == {"busy"}
        assert (await busy)["process_status"] == "completed"

    serve(client, body, idle_s=0.2)


def test_deleting_a_running_session_ends_its_block(client: LocalClient) -> None:
    async def body(http: httpx.AsyncClient) -> None:
        running = asyncio.create_task(ask(http, "import time; time.sleep(9)", "s"))
        while not (await http.get("/sessions")).json()["sessions"]:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        started = time.monotonic()
        assert (await http.delete("/sessions/s")).status_code == 200
        assert (await running)["process_status"] == "error"
        assert time.monotonic() - started < 2.0

    serve(client, body)


# --------------------------------------------------------------------------------------------- the http option


def http_session(app: Starlette, **settings: Any) -> HttpSession:
    """A session of the http option, wired to an application instead of a port."""
    session = HttpSession(HttpClient("http://sandbox", Http(**settings)))
    session._http = httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://sandbox", headers={"X-Session-ID": session._id}
    )
    return session


def test_the_http_option_keeps_the_contract(client: LocalClient) -> None:
    async def body() -> list[Outcome]:
        app = Service(client, max_sessions=10, idle_s=0).app()
        session = http_session(app, output_chars=20, timeout_s=0.3)
        try:
            blocks = ("x = 1", "x", "print('y' * 30)", "while True: pass", "x", "import os; os._exit(1)", "x")
            return [await session.execute(block) for block in blocks]
        finally:
            await session.close()

    outcomes = asyncio.run(body())
    assert [o.status for o in outcomes] == [*["completed"] * 3, "timeout", "completed", "error", "error"]
    assert [o.state_lost for o in outcomes] == [False] * 5 + [True, False]
    assert outcomes[1].stdout == outcomes[4].stdout == "1\n"
    assert outcomes[2].stdout == "y" * 20 + "<output cut>"
    assert outcomes[6].stdout == "Traceback (most recent call last)"[:20] + "<output cut>"
    assert client.live_sessions == 0


def test_a_session_lost_by_the_server_is_rebuilt(client: LocalClient) -> None:
    async def body() -> list[Outcome]:
        service = Service(client, max_sessions=10, idle_s=0)
        session = http_session(service.app())
        try:
            outcomes = [await session.execute("x = 41"), await session.execute("x = 0; 1 / 0")]
            await service._entries.pop(session._id).session.close()  # as a restart of the server would
            outcomes.append(await session.execute("x += 1; print(x)"))
            outcomes.append(await session.execute("x"))
            return outcomes
        finally:
            await session.close()

    outcomes = asyncio.run(body())
    assert [o.stdout for o in outcomes[2:]] == ["42\n", "42\n"]  # only the completed block was replayed
    assert not any(o.state_lost for o in outcomes)


def test_a_foreign_server_is_understood() -> None:
    """NeMo-Skills' own server has no header for lost state: it shows in status, stderr and new_session_created."""
    replies = iter(
        [
            {"process_status": "completed", "stdout": "", "stderr": "", "new_session_created": True},
            {"process_status": "error", "stdout": "", "stderr": "connection closed\n", "new_session_created": True},
            {"process_status": "completed", "stdout": "1\n", "stderr": "", "new_session_created": True},
            {"process_status": "timeout", "stdout": "", "stderr": "late\n", "new_session_created": False},
            {"process_status": "timeout", "stdout": "", "stderr": "late\n", "new_session_created": True},
        ]
    )

    async def execute(request: Request) -> Response:
        return JSONResponse(next(replies))

    app = Starlette(routes=[Route("/execute", execute, methods=["POST"])])

    async def body() -> list[Outcome]:
        session = http_session(app)
        outcomes = [await session.execute("x") for _ in range(5)]
        await session.close()
        return outcomes

    outcomes = asyncio.run(body())
    assert [o.status for o in outcomes] == ["completed", "error", "completed", "timeout", "timeout"]
    assert [o.state_lost for o in outcomes] == [False, True, False, False, True]


def test_nobody_there_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        with pytest.raises(ResourceError, match=re.escape(url)) as caught, Http(url=url).launch(tmp_path):
            pass
    assert "omr sandbox" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="http"):
        Http(url="127.0.0.1:6000")


# ------------------------------------------------------------------------------------------------- the command


@contextmanager
def command(port: int = 0, **options: Any) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`omr sandbox` running, and its URL."""
    argv = [sys.executable, "-m", "omr", "sandbox", "--port", str(port)]
    child = subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert child.stderr is not None
    try:
        line = child.stderr.readline()
        found = re.search(r"http://\S+", line)
        assert found is not None, line + child.stderr.read()
        yield child, found[0]
    finally:
        child.kill()
        child.wait()
        child.stderr.close()


def post(url: str, code: str, session: str = "s", **fields: Any) -> dict[str, Any]:
    body = {"generated_code": code, "timeout": 30, **fields}
    reply = httpx.post(f"{url}/execute", json=body, headers={"X-Session-ID": session}, timeout=60, trust_env=False)
    data: dict[str, Any] = reply.json()
    return data


@pytest.mark.slow
def test_the_command_serves_ends_and_starts_again() -> None:
    with command() as (child, url):
        port = int(url.rpartition(":")[2])
        assert post(url, "x = 1")["process_status"] == "completed"
        taken = subprocess.run(
            [sys.executable, "-m", "omr", "sandbox", "--port", str(port)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert taken.returncode == 1
        assert taken.stderr.count("\n") == 1 and str(port) in taken.stderr and "in use" in taken.stderr
        pids = running(child.pid)
        child.terminate()
        assert child.wait(10) == 0
        assert gone(pids)
        with command(port) as (_, again):
            assert post(again, "'x' in globals()")["stdout"] == "False\n"


@pytest.mark.slow
def test_the_command_killed_leaves_nothing_and_frees_its_port() -> None:
    with command() as (child, url):
        post(url, "x = 1")
        post(url, "import threading\nthreading.Thread(target=lambda: [None for _ in iter(int, 1)]).start()", "t")
        pids = running(child.pid)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        with command(int(url.rpartition(":")[2])) as (_, again):
            assert post(again, "1")["stdout"] == "1\n"
        assert gone(pids)


@pytest.mark.slow
def test_answers_are_not_delayed() -> None:
    """Small packets must not wait for the peer's delayed acknowledgement (40 ms)."""
    with command() as (_, url), httpx.Client(base_url=url, trust_env=False) as http:
        post(url, "1")
        seconds = []
        for _ in range(20):
            started = time.monotonic()
            body = {"generated_code": "1", "timeout": 10}
            http.post("/execute", json=body, headers={"X-Session-ID": "s"}).raise_for_status()
            seconds.append(time.monotonic() - started)
    assert min(seconds) < 0.03


@pytest.mark.slow
def test_the_http_option_survives_a_restart(tmp_path: Path) -> None:
    async def body(url: str, session: HttpSession, restart: Callable[[], None]) -> list[Outcome]:
        try:
            before = await session.execute("x = 41", 30.0)
            restart()
            return [before, await session.execute("x + 1", 30.0)]
        finally:
            await session.close()

    with command() as (child, url):

        def restart() -> None:
            child.kill()
            child.wait()
            manager = command(int(url.rpartition(":")[2]))
            manager.__enter__()
            managers.append(manager)

        managers: list[Any] = []
        with Http(url=url).launch(tmp_path) as remote:
            assert remote.tier == "remote"
            session = remote.session()
            assert isinstance(session, HttpSession)
            outcomes = asyncio.run(body(url, session, restart))
        for manager in managers:
            manager.__exit__(None, None, None)
    assert [o.status for o in outcomes] == ["completed", "completed"]
    assert outcomes[1].stdout == "42\n"
