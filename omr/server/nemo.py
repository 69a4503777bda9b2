"""NeMo-Skills (https://github.com/NVIDIA/NeMo-Skills): `ns start_server` as a child.

It wraps one of the other servers (`server_type`), so requests, readiness and metrics are that server's. Its port cannot
be chosen from outside but for 5000 (or a random one that it only prints), hence the default here.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import ClassVar

from omr.errors import ConfigError
from omr.option import option
from omr.server import Endpoint, Server, ServeSpec, SpecCounts, _backend, _child
from omr.server.sglang import Sglang
from omr.server.trtllm import Trtllm
from omr.server.vllm import Vllm

PORT = 5000
_CONTEXT_FLAG = {"vllm": "--max-model-len", "sglang": "--context-length", "trtllm": "--max_seq_len"}
_BATCH_FLAG = {"vllm": "--max-num-seqs", "sglang": "--max-running-requests", "trtllm": "--max_batch_size"}


class ServerType(Enum):
    vllm = "vllm"
    sglang = "sglang"
    trtllm = "trtllm"


_SERVERS: dict[ServerType, type[Server]] = {
    ServerType.vllm: Vllm,
    ServerType.sglang: Sglang,
    ServerType.trtllm: Trtllm,
}


@option("server", "nemo")
@dataclass(kw_only=True)
class Nemo(Server):
    """Names of the knobs are those of `ns start_server`."""

    runs_quant: ClassVar[frozenset[str]] = Vllm.runs_quant
    runs_drafter: ClassVar[frozenset[str]] = frozenset({"none"})

    port: int = field(default=PORT, metadata={"content": False})
    start_timeout_s: float = field(default=1800.0, metadata={"content": False})
    python: str | None = None
    """Interpreter of the environment that has NeMo-Skills; null is this one."""
    server_type: ServerType = ServerType.vllm
    server_nodes: int = 1
    cluster: str | None = None
    """Name of a NeMo-Skills cluster config; null runs bare processes on this machine."""
    max_batch_size: int = 16
    with_sandbox: bool = False
    """Start NeMo-Skills' own sandbox beside the server."""
    server_args: list[str] = field(default_factory=list)
    """Flags for the server inside, after those that omr sets."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.port != PORT:
            raise ConfigError(
                f"server=nemo listens on port {PORT} only (`ns start_server` has no flag), got {self.port}"
            )
        if self.server_nodes < 1 or self.max_batch_size < 1:
            raise ConfigError("server.server_nodes and server.max_batch_size must be >= 1")

    def _inner(self) -> Server:
        return _SERVERS[self.server_type]()

    def preflight(self, spec: ServeSpec) -> None:
        self.require_choices(spec.quant, spec.drafter.option_name)
        inner = self._inner()
        if spec.quant not in inner.runs_quant:
            raise ConfigError(f"server.server_type={self.server_type.name} cannot run quant={spec.quant}")
        _backend.require_script("ns", package="nemo_skills", extra="nemo", python=self.python)
        _backend.require_gpu("nemo", spec.device)
        _backend.require_memory(spec.params_b, spec.quant, spec.device, spec.tp)

    @contextlib.contextmanager
    def launch(self, spec: ServeSpec, log_dir: Path) -> Iterator[Endpoint]:
        script = _backend.require_script("ns", package="nemo_skills", extra="nemo", python=self.python)
        name = spec.checkpoint.name if self.server_type is ServerType.trtllm else str(spec.checkpoint)
        with _child.serve(
            self,
            lambda port: [str(script), *self.arguments(spec)],
            model=name,
            log=log_dir / "nemo.log",
            env=dict(os.environ),
        ) as endpoint:
            yield endpoint

    def arguments(self, spec: ServeSpec) -> list[str]:
        """The command line after `ns`."""
        kind = self.server_type.name
        inner = [_CONTEXT_FLAG[kind], str(spec.context_tokens), _BATCH_FLAG[kind], str(self.max_batch_size)]
        if kind == "vllm":
            inner += ["--generation-config", "vllm"]
        elif kind == "sglang":
            inner += ["--sampling-defaults", "openai", "--enable-metrics"]
        args = ["start_server", "--model", str(spec.checkpoint), "--server_type", kind]
        args += ["--server_gpus", str(spec.tp), "--server_nodes", str(self.server_nodes)]
        args += ["--server_args", shlex.join([*inner, *self.server_args])]
        if self.cluster:
            args += ["--cluster", self.cluster]
        if self.with_sandbox:
            args.append("--with_sandbox")
        return args

    def spec_counts(self, metrics_text: str) -> SpecCounts | None:
        return self._inner().spec_counts(metrics_text)
