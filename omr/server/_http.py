"""The native server's process: `python -m omr.server._http --spec SPEC.json`.

It binds its port first, so that a port in use is known before a model is loaded; then HTTP answers (503 on /health)
while the engine thread loads weights and drafter; then /health turns 200. A load that fails ends the process: with
status 2 and one line for what the user can mend, with 1 and a traceback otherwise. SIGTERM and SIGINT close the port,
end every open request with finish_reason `abort`, and end the process within seconds, whatever the engine is doing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omr.errors import ConfigError, InputError, OmrError, UserError
from omr.interrupt import in_loop
from omr.option import discover, from_fields

if TYPE_CHECKING:
    from omr.server._app import Loaded

STOP_GRACE_S = 2
"""Seconds that open connections get to send what they have when the process is told to stop."""
KEEP_ALIVE_S = 75


@dataclass(kw_only=True)
class NativeSpec:
    """Content of SPEC.json."""

    model_name: str
    checkpoint: str
    drafter: str = "none"
    drafter_fields: dict[str, Any] | None = None
    drafter_path: str | None = None
    context_tokens: int = 2048
    device: str = "cpu"
    seed: int = 0
    host: str = "127.0.0.1"
    port: int = 0
    max_batch_size: int = 16
    kv_cache_tokens: int = 0
    kv_cache_fraction: float = 0.85
    block_size: int = 16
    dtype: str = "auto"
    num_threads: int = 0


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def load(spec: NativeSpec) -> Loaded:
    """Model, tokenizer, drafter, engine. Runs in the engine thread; raises OmrError for what the user can mend."""
    import torch
    from transformers import AutoTokenizer

    from omr.engine.engine import Engine
    from omr.nn import loader
    from omr.server._app import Loaded
    from omr.server._text import Vocabulary

    torch.set_num_threads(spec.num_threads or default_threads(spec.device))
    torch.manual_seed(spec.seed)
    say(f"loading {spec.checkpoint} on {spec.device}, {torch.get_num_threads()} threads")
    folder = Path(spec.checkpoint)
    dtype = None if spec.dtype == "auto" else getattr(torch, spec.dtype)
    model = loader.load(folder, device=spec.device, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.vocab_size > model.config.vocab_size:  # fewer is usual: tables are padded
        raise InputError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the weights have {model.config.vocab_size}; "
            "they do not belong together, copy the tokenizer files of the model's own"
        )
    longest = model.config.max_position_embeddings
    if spec.context_tokens > longest:
        raise ConfigError(
            f"model.context_tokens={spec.context_tokens} is more than the model's max_position_embeddings={longest}"
        )
    drafter = from_fields(discover()["drafter", spec.drafter], spec.drafter_fields or {})
    draft = drafter.load(Path(spec.drafter_path) if spec.drafter_path else None, model)
    say(f"drafter {spec.drafter}" + (f", {draft.num_draft_tok} tokens a step" if draft else ""))
    tokens = spec.kv_cache_tokens or kv_capacity(spec, model)
    if tokens < spec.context_tokens:
        raise ConfigError(
            f"the KV cache holds {tokens} tokens, one sequence may take model.context_tokens={spec.context_tokens}; "
            "raise server.kv_cache_tokens or lower the context"
        )
    require_kv_room(tokens, model)
    engine = Engine(
        model,
        max_batch_size=spec.max_batch_size,
        kv_cache_tokens=tokens,
        block_size=spec.block_size,
        draft=draft,
        context_tokens=spec.context_tokens,
    )
    engine.warm_up()
    say(f"KV cache of {tokens} tokens, batch of at most {spec.max_batch_size}")
    return Loaded(
        engine=engine,
        tokenizer=tokenizer,
        vocabulary=Vocabulary(tokenizer.backend_tokenizer),
        vocab_size=model.config.vocab_size,
        speculates=draft is not None,
        load=lambda: (engine.num_running, engine.num_waiting, engine.kv_usage),
    )


def kv_capacity(spec: NativeSpec, model: Any) -> int:
    """Tokens of KV cache: a full batch of full contexts, on CUDA as much again three times over for prefixes worth
    keeping, and no more than a share of the memory that the weights leave free.
    """
    wanted = spec.max_batch_size * spec.context_tokens * (4 if spec.device == "cuda" else 1)
    return min(wanted, int(free_bytes(model) * spec.kv_cache_fraction) // kv_bytes(model))


def kv_bytes(model: Any) -> int:
    """Bytes of keys and values of one token in all layers."""
    config = model.config
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize)


def free_bytes(model: Any) -> int:
    """Memory that is free where the model is."""
    import psutil
    import torch

    return int(torch.cuda.mem_get_info()[0] if model.device.type == "cuda" else psutil.virtual_memory().available)


def require_kv_room(tokens: int, model: Any) -> None:
    """Raise ConfigError for a KV cache larger than the memory that is free."""
    needed, free = tokens * kv_bytes(model), free_bytes(model)
    if needed > free:
        raise ConfigError(
            f"a KV cache of {tokens} tokens takes {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; lower "
            "server.kv_cache_tokens, server.max_batch_size or model.context_tokens"
        )


def default_threads(device: str) -> int:
    """All cores this process may use but one, which is left to HTTP and clients; one is enough beside a GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if device == "cuda" else max(1, cores - 1)


def bind(host: str, port: int) -> socket.socket:
    """A bound socket. Raises OSError when the port is taken.

    The protocol is spelled out because asyncio switches Nagle's algorithm off only where it is: with it, every second
    write of a response waits 40 ms for the client's delayed acknowledgement.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError:
        sock.close()
        raise
    return sock


async def serve(spec: NativeSpec, sock: socket.socket) -> int:
    """Serve until told to stop; the exit status."""
    import uvicorn

    from omr.server._app import Service
    from omr.server._engine_thread import EngineThread

    status = 0
    thread = EngineThread(lambda: load(spec), lambda loaded: loaded.engine)
    service = Service(thread, model=spec.model_name, context_tokens=spec.context_tokens, seed=spec.seed)
    server = uvicorn.Server(
        uvicorn.Config(
            service.app(),
            log_level="warning",
            access_log=False,
            date_header=False,
            server_header=False,
            lifespan="off",
            ws="none",
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=STOP_GRACE_S,
            backlog=2048,
        )
    )

    server.capture_signals = contextlib.nullcontext  # ours are used: uvicorn's raise the signal again after the stop

    def stop() -> None:
        service.stop()
        server.should_exit = True

    def load_failed(error: BaseException) -> None:
        nonlocal status
        status = 2 if isinstance(error, UserError) else 1
        if isinstance(error, OmrError):
            print(f"error: {type(error).__name__}: {error}", flush=True)
        else:
            traceback.print_exception(error)
        stop()

    thread.on_load_error = load_failed
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    thread.start()
    announce = asyncio.create_task(_announce(thread.ready, spec))
    await server.serve(sockets=[sock])
    announce.cancel()
    await asyncio.to_thread(thread.stop, STOP_GRACE_S)
    return status


async def _announce(ready: asyncio.Event, spec: NativeSpec) -> None:
    await ready.wait()
    say(f"ready: {spec.model_name} at http://{spec.host}:{spec.port}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m omr.server._http")
    parser.add_argument("--spec", type=Path, required=True, help="JSON file with the fields of NativeSpec")
    spec = NativeSpec(**json.loads(parser.parse_args(argv).spec.read_text()))
    try:
        sock = bind(spec.host, spec.port)
    except OSError as error:
        print(f"error: ResourceError: port {spec.port} on {spec.host} cannot be used ({error.strerror})", flush=True)
        return 1
    spec.port = sock.getsockname()[1]
    return in_loop(serve(spec, sock))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the engine thread may be deep in a step; nothing is left that needs an orderly exit
