"""The sandbox as an HTTP service, with the API of NeMo-Skills' code-execution server: its client needs no change.

    POST   /execute         generated_code, timeout (both required); language, std_input, max_output_characters,
                            traceback_verbosity; header X-Session-ID names the session for language `ipython`
    GET    /sessions        the live ones
    DELETE /sessions/ID
    GET    /health

Languages: `ipython` keeps state per session id; `python`, `python3` and `shell` are one process per request, caged like
any session; `pypy3` and unknown names get the server error that a missing interpreter gives there, `lean4` its error
reply. An answer says `new_session_created` when its session started empty, at this block or since the last answer: the
client then replays. A header, X-State-Lost, tells our own client that this very block ended the session's process.
"""

from __future__ import annotations

import asyncio
import html
import json
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from omr.errors import OmrError
from omr.sandbox import Outcome
from omr.sandbox._client import LocalClient
from omr.sandbox._session import Kind, LocalSession

_STATE_LOST = "X-State-Lost"
MAX_BODY_BYTES = 10 << 20
_ONE_SHOT: dict[str, Kind] = {"python": "script", "python3": "script", "shell": "shell"}
_VERBOSITIES = ("Plain", "Context", "Verbose", "Minimal")
_SWEEP_S = 1.0


@dataclass
class _Entry:
    """A session that a client named."""

    session: LocalSession
    created: float = field(default_factory=time.time)
    last_used: float = field(default_factory=time.time)
    running: int = 0
    emptied: bool = True
    """Its next answer tells the client that it started from nothing."""


class _Refused(Exception):
    """A request that gets no execution; carries its response."""

    def __init__(self, response: Response) -> None:
        super().__init__()
        self.response = response


class Service:
    """Sessions by name, over one LocalClient."""

    def __init__(self, client: LocalClient, *, max_sessions: int, idle_s: float) -> None:
        self._client = client
        self._max_sessions = max_sessions
        self._idle_s = idle_s
        self._entries: dict[str, _Entry] = {}

    def app(self) -> Starlette:
        routes = [
            Route("/execute", self._execute, methods=["POST"]),
            Route("/sessions", self._list, methods=["GET"]),
            Route("/sessions/{session_id:path}", self._delete, methods=["DELETE"]),
            Route("/health", self._health, methods=["GET"]),
        ]
        return Starlette(routes=routes, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        sweeper = asyncio.create_task(self._sweep()) if self._idle_s else None
        yield
        if sweeper is not None:
            sweeper.cancel()
            with suppress(asyncio.CancelledError):
                await sweeper
        for session_id in list(self._entries):
            await self._entries.pop(session_id).session.close()

    async def _sweep(self) -> None:
        """Close sessions that nobody used for a while."""
        while True:
            await asyncio.sleep(min(_SWEEP_S, self._idle_s))
            oldest = time.time() - self._idle_s
            for session_id, entry in list(self._entries.items()):
                if not entry.running and entry.last_used < oldest:
                    del self._entries[session_id]
                    await entry.session.close()

    async def _execute(self, request: Request) -> Response:
        try:
            job = _Job(await _body(request))
            if job.language == "ipython":
                session_id = request.headers.get("X-Session-ID")
                if session_id is None:
                    raise _refuse(400, "X-Session-ID header required for ipython sessions")
                return await self._run_named(session_id, job)
            return JSONResponse(await self._run_once(job))
        except _Refused as refused:
            return refused.response
        except OmrError as error:  # the sandbox itself: no session to be had
            return JSONResponse(_failed(str(error).splitlines()[0]), status_code=503)

    async def _run_named(self, session_id: str, job: _Job) -> Response:
        entry = self._entries.get(session_id)
        if entry is None:
            self._check_room()
            entry = self._entries[session_id] = _Entry(self._client.session())
        entry.running += 1
        try:
            outcome = await entry.session.execute(
                job.code, job.timeout_s, output_chars=job.output_chars, verbosity=job.verbosity
            )
        finally:
            entry.running -= 1
            entry.last_used = time.time()
        new, entry.emptied = entry.emptied or outcome.state_lost, outcome.state_lost
        headers = {_STATE_LOST: "true" if outcome.state_lost else "false"}
        return JSONResponse({**_reply(outcome), "new_session_created": new}, headers=headers)

    async def _run_once(self, job: _Job) -> dict[str, Any]:
        if job.language == "lean4":
            return _failed("[Errno 2] No such file or directory: 'lake'")
        if job.language not in _ONE_SHOT:
            raise _server_error(f"language {job.language!r}: no such interpreter here")
        self._check_room()
        session = self._client.session(_ONE_SHOT[job.language])
        try:
            return _reply(
                await session.execute(job.code, job.timeout_s, output_chars=job.output_chars, stdin=job.std_input)
            )
        finally:
            await session.close()

    def _check_room(self) -> None:
        if self._client.live_sessions >= self._max_sessions:
            message = f"{self._max_sessions} sessions are open: delete some, or start omr sandbox with --max-sessions"
            raise _Refused(JSONResponse(_failed(message), status_code=503))

    async def _list(self, request: Request) -> Response:
        sessions = {
            session_id: {"backend": "ipython", "created": e.created, "last_used": e.last_used, "alive": True}
            for session_id, e in self._entries.items()
        }
        return JSONResponse({"sessions": sessions, "backend": "ipython"})

    async def _delete(self, request: Request) -> Response:
        session_id = request.path_params["session_id"]
        entry = self._entries.pop(session_id, None)
        if entry is None:
            return JSONResponse({"error": f"IPython session {session_id} not found"}, status_code=404)
        await entry.session.close()
        return JSONResponse({"message": f"IPython session {session_id} deleted successfully"})

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "healthy", "worker": "0", "isolation": self._client.tier})


class _Job:
    """The checked body of /execute."""

    def __init__(self, body: dict[str, Any]) -> None:
        for name in ("generated_code", "timeout"):
            if name not in body:
                raise _server_error(f"{name} is missing")
        self.code: str = _typed(body, "generated_code", str, "")
        self.language: str = _typed(body, "language", str, "ipython")
        self.std_input: str = _typed(body, "std_input", str, "")
        self.output_chars: int = _typed(body, "max_output_characters", int, 1000)
        self.verbosity: str = _typed(body, "traceback_verbosity", str, "Plain").capitalize()
        self.timeout_s: int | float = body["timeout"]  # kept as sent: it is quoted in the answer
        if isinstance(self.timeout_s, bool) or not isinstance(self.timeout_s, int | float):
            raise _refuse(400, "timeout must be a number of seconds")
        if not (self.timeout_s > 0 and math.isfinite(self.timeout_s)):
            raise _refuse(400, f"timeout must be > 0 seconds, got {self.timeout_s}")
        if self.output_chars < 0:
            raise _refuse(400, f"max_output_characters must be >= 0, got {self.output_chars}")
        if self.verbosity not in _VERBOSITIES:
            raise _refuse(400, f"traceback_verbosity must be one of {', '.join(_VERBOSITIES)}, got {self.verbosity!r}")


def _typed(body: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    value = body.get(name, default)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _refuse(400, f"{name} must be of type {kind.__name__}")
    return value


async def _body(request: Request) -> dict[str, Any]:
    data = bytearray()
    try:
        async for chunk in request.stream():
            data += chunk
            if len(data) > MAX_BODY_BYTES:
                raise _refuse(413, f"the body is longer than {MAX_BODY_BYTES} bytes")
        body = json.loads(bytes(data))
    except ClientDisconnect:
        raise _refuse(400, "the client went away") from None
    except (ValueError, RecursionError):
        raise _refuse(400, "the body is not JSON") from None
    if not isinstance(body, dict):
        raise _refuse(400, "the body is not a JSON object")
    return body


def _refuse(status: int, message: str) -> _Refused:
    return _Refused(JSONResponse({"error": message}, status_code=status))


def _server_error(message: str) -> _Refused:
    """As the reference server answers when an interpreter or a field is missing: a page, not JSON."""
    page = f"<!doctype html>\n<title>500 Internal Server Error</title>\n<p>{html.escape(message)}</p>\n"
    return _Refused(HTMLResponse(page, status_code=500))


def _failed(message: str) -> dict[str, Any]:
    return {"process_status": "error", "stdout": "", "stderr": f"{message}\n"}


def _reply(outcome: Outcome) -> dict[str, Any]:
    return {"process_status": outcome.status, "stdout": outcome.stdout, "stderr": outcome.stderr}
