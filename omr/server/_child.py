"""A server as a child process: port, start, readiness, endpoint, certain end. Every option that launches comes here."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omr.errors import ChildError, OmrError, UserError
from omr.process import check_port, free_port, rebuild_error, spawn, wait_ready
from omr.server import Endpoint, Server

_LAST_WORD = re.compile(r"^error: (\w+): (.*)$")


@contextlib.contextmanager
def serve(
    server: Server,
    argv: Callable[[int], list[str]],
    *,
    model: str,
    log: Path,
    env: Mapping[str, str] | None = None,
    health: str = "/health",
) -> Iterator[Endpoint]:
    """Run the program `argv(port)` until the block ends; enter the block once GET `health` answers 200.

    Raises ResourceError for a port in use, ChildError with the last log lines for a child that dies or does not get
    ready in time, and what the child itself named in its last line if it is one of ours (`error: InputError: ...`).
    """
    if server.port:
        check_port(server.host, server.port)
    port = server.port or free_port(server.host)
    host = reachable(server.host)
    with spawn(argv(port), log=log, env=env) as child:
        try:
            wait_ready(
                child,
                lambda: answers(host, port, health),
                server.start_timeout_s,
                f"server={server.option_name}",
            )
        except ChildError as error:
            raise last_word(child.log_tail(1)) or error from None
        shown = f"[{host}]" if ":" in host else host
        yield Endpoint(base_url=f"http://{shown}:{port}", model=model, server=server, log=log, pid=child.pid)


def last_word(line: str) -> OmrError | None:
    """The user's mistake that a child of ours named as it died; None for any other death."""
    match = _LAST_WORD.match(line)
    error = rebuild_error(match[1], match[2]) if match else None
    return error if isinstance(error, UserError) else None


def reachable(host: str) -> str:
    """Where a client on this machine reaches a server that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)


def answers(host: str, port: int, path: str, timeout_s: float = 2.0) -> bool:
    """Whether GET `path` gives 200."""
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def write_json(path: Path, data: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")
    return path
