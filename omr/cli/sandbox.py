"""serve the code sandbox over HTTP, with NeMo-Skills' API (--host --port)"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from omr.errors import ConfigError, ResourceError
from omr.sandbox.local import Isolation, Local

_GRACE_S = 2


def main(argv: list[str]) -> int:
    """`omr sandbox`: serve until SIGINT or SIGTERM, then end every session and return 0."""
    parser = argparse.ArgumentParser(prog="omr sandbox", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=6000, help="default 6000; 0: any free one")
    parser.add_argument("--isolation", choices=[i.value for i in Isolation], default="auto")
    parser.add_argument("--memory-mb", type=int, default=1024, help="what one session may allocate")
    parser.add_argument("--scratch-mb", type=int, default=32, help="what one session may write")
    parser.add_argument("--max-sessions", type=int, default=1024)
    parser.add_argument("--session-timeout", type=float, default=0, help="seconds unused before a session is closed")
    parser.add_argument("--seed", type=int, default=None, help="of random and numpy.random in every new session")
    parser.add_argument("--log-dir", type=Path, default=None, help="where sandbox.log goes (default: stderr)")
    args = parser.parse_args(argv)
    for name in ("max_sessions", "session_timeout"):
        if getattr(args, name) < 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be >= 0, got {getattr(args, name)}")
    local = Local(
        isolation=Isolation(args.isolation),
        memory_mb=args.memory_mb,
        scratch_mb=args.scratch_mb,
        session_s=0,
        seed=args.seed,
    )
    local.preflight()
    if args.host not in ("127.0.0.1", "localhost", "::1"):
        print(
            f"omr sandbox: whoever reaches {args.host} can run code here: no one is asked who they are", file=sys.stderr
        )
    with _listen(args.host, args.port) as listener:
        asyncio.run(_serve(local, listener, args))
    return 0


@contextlib.contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket. Raises ResourceError when the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:  # asyncio turns Nagle off only if it says TCP
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # restart at once
            listener.bind(address)
            listener.listen(1024)
            yield listener
    except OSError as error:
        reason = error.strerror or str(error)
        raise ResourceError(f"cannot listen on {host} port {port}: {reason}. Choose another --port") from None
    except OverflowError:
        raise ConfigError(f"--port must be 0-65535, got {port}") from None


async def _serve(local: Local, listener: socket.socket, args: argparse.Namespace) -> None:
    import uvicorn

    from omr.sandbox._service import Service

    with local.start(args.log_dir) as client:
        service = Service(client, max_sessions=args.max_sessions, idle_s=args.session_timeout)
        config = uvicorn.Config(
            service.app(), log_level="warning", access_log=False, timeout_graceful_shutdown=_GRACE_S, lifespan="on"
        )
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext  # it would raise them again after its shutdown, before ours
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, setattr, server, "should_exit", True)
        host, port = listener.getsockname()[:2]
        print(f"omr sandbox: http://{host}:{port} (isolation: {client.tier})", file=sys.stderr, flush=True)
        await server.serve(sockets=[listener])
