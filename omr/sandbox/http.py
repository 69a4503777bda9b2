"""`sandbox=http`: sessions in a sandbox service, ours (`omr sandbox --port 6000`) or NeMo-Skills'.

    python -m omr sandbox=http sandbox.url=http://127.0.0.1:6000

The service may lose a session behind our back (a restart of the server). It then says so in its next answer, and the
session is rebuilt as NeMo-Skills' client does: blocks that completed are run again in order, then the new one.
Time and memory limits are the server's, but for the time limit of a block, which travels with it.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omr.errors import ConfigError, ResourceError
from omr.option import option
from omr.sandbox import Outcome, Sandbox, SandboxClient

if TYPE_CHECKING:
    import httpx

_STATE_LOST = "X-State-Lost"
_HEALTH_TIMEOUT_S = 5.0
_MARGIN_S = 10.0
"""How much longer than the block's own limit an answer may take."""
_CONNECT_PAUSES_S = (0.1, 0.5, 2.0)
"""Between attempts to reach a service that was there before."""


@option("sandbox", "http")
@dataclass(kw_only=True)
class Http(Sandbox):
    """Code runs wherever the service at `url` runs it."""

    url: str = "http://127.0.0.1:6000"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"sandbox.url must start with http:// or https://, got {self.url!r}")

    @contextmanager
    def launch(self, log_dir: Path) -> Iterator[SandboxClient]:
        import httpx

        base = self.url.rstrip("/")
        try:
            healthy = httpx.get(f"{base}/health", timeout=_HEALTH_TIMEOUT_S, trust_env=False).status_code == 200
        except httpx.HTTPError as error:
            raise ResourceError(f"no sandbox at {base} ({error}). Start one: omr sandbox --port PORT") from None
        if not healthy:
            raise ResourceError(f"{base}/health does not answer as a sandbox does. Start one: omr sandbox --port PORT")
        yield HttpClient(base, self)


class HttpClient:
    """Sessions of one service."""

    tier = "remote"

    def __init__(self, base: str, settings: Sandbox) -> None:
        self.base = base
        self.settings = settings

    def session(self) -> HttpSession:
        return HttpSession(self)


class HttpSession:
    """One session id. See the contract in omr.sandbox."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client
        self._id = uuid.uuid4().hex
        self._history: list[str] = []
        self._begun = False
        self._used_s = 0.0
        self._http: httpx.AsyncClient | None = None
        self._lock = asyncio.Lock()

    async def execute(self, code: str, timeout_s: float | None = None) -> Outcome:
        """Run one block. Raises ResourceError when the service cannot be reached."""
        settings = self._client.settings
        timeout_s = settings.timeout_s if timeout_s is None else timeout_s
        async with self._lock:
            if settings.session_s:
                if self._used_s >= settings.session_s:
                    return Outcome(
                        status="timeout",
                        stderr=f"The session's {settings.session_s:g} seconds of execution are used up\n",
                    )
                timeout_s = min(timeout_s, settings.session_s - self._used_s)
            started = time.monotonic()
            reply = await self._post(code, timeout_s)
            if self._lost_before(reply):
                reply = await self._restore(code, timeout_s)
            outcome = _outcome(reply)
            outcome.seconds = time.monotonic() - started
            self._used_s += outcome.seconds
            self._begun = not outcome.state_lost
            if outcome.state_lost:
                self._history.clear()
            elif outcome.status == "completed":
                self._history.append(code)
            return outcome

    def _lost_before(self, reply: dict[str, Any]) -> bool:
        """Whether this block ran in an empty session although it should have had state."""
        new = bool(reply.get("new_session_created")) and not _lost_by(reply)
        return new and self._begun and reply.get("process_status") != "timeout"

    async def _restore(self, code: str, timeout_s: float) -> dict[str, Any]:
        await self._delete()
        for block in self._history:
            reply = await self._post(block, timeout_s)
            if reply.get("process_status") != "completed":
                await self._delete()
                stderr = "The session was lost and could not be rebuilt: define what you need again\n"
                return {"process_status": "error", "stdout": "", "stderr": stderr, "state_lost": True}
        return await self._post(code, timeout_s)

    async def _post(self, code: str, timeout_s: float) -> dict[str, Any]:
        import httpx

        body = {
            "generated_code": code,
            "timeout": timeout_s,
            "language": "ipython",
            "max_output_characters": self._client.settings.output_chars,
        }
        for pause_s in (*_CONNECT_PAUSES_S, None):
            try:
                answer = await self._open_http().post(
                    "/execute", json=body, timeout=httpx.Timeout(timeout_s + _MARGIN_S, connect=_HEALTH_TIMEOUT_S)
                )
                reply = answer.json()
                if isinstance(reply, dict) and "process_status" in reply:
                    lost = answer.headers.get(_STATE_LOST)
                    return reply if lost is None else {**reply, "state_lost": lost == "true"}
                raise ResourceError(f"the sandbox at {self._client.base} answered {answer.status_code}: {reply!r:.200}")
            except ValueError:
                raise ResourceError(f"the sandbox at {self._client.base} answered {answer.status_code}") from None
            except httpx.TimeoutException:
                return {"process_status": "timeout", "stderr": "Client timed out\n", "state_lost": True}
            except httpx.TransportError as error:  # a server that comes back says whether the session is still there
                if pause_s is None:
                    raise ResourceError(f"no sandbox at {self._client.base} ({error})") from None
                await asyncio.sleep(pause_s)
        raise AssertionError("the last pass returns or raises")

    def _open_http(self) -> httpx.AsyncClient:
        import httpx

        if self._http is None:
            transport = None if self._client.base.startswith("https") else httpx.AsyncHTTPTransport(verify=False)
            self._http = httpx.AsyncClient(
                base_url=self._client.base, headers={"X-Session-ID": self._id}, transport=transport, trust_env=False
            )
        return self._http

    async def _delete(self) -> None:
        import httpx

        try:
            await self._open_http().delete(f"/sessions/{self._id}", timeout=_MARGIN_S)
        except httpx.HTTPError as error:
            raise ResourceError(f"no sandbox at {self._client.base} ({error})") from None

    async def close(self) -> None:
        """Delete the session at the service, if it can still be reached, and even if cancelled. Idempotent."""
        if self._http is not None:
            await asyncio.shield(self._end(self._http))

    async def _end(self, http: httpx.AsyncClient) -> None:
        began, self._begun = self._begun, False
        try:
            if began:
                await self._delete()
        except ResourceError:
            pass  # the service is gone, and its sessions with it
        finally:
            self._http = None
            await http.aclose()


def _lost_by(reply: dict[str, Any]) -> bool:
    """Whether this very block killed the session's process: our service says so, NeMo-Skills' lets it be seen."""
    if "state_lost" in reply:
        return bool(reply["state_lost"])
    status, new = reply.get("process_status"), bool(reply.get("new_session_created"))
    return new and (status == "timeout" or str(reply.get("stderr", "")).endswith("connection closed\n"))


def _outcome(reply: dict[str, Any]) -> Outcome:
    status = reply.get("process_status")
    return Outcome(
        status=status if status in ("completed", "timeout") else "error",
        stdout=str(reply.get("stdout", "")),
        stderr=str(reply.get("stderr", "")),
        state_lost=_lost_by(reply),
    )
