"""`sandbox=local`: sessions are children of this run, forked from a preloaded interpreter and caged by the kernel.

    python -m omr sandbox=local sandbox.isolation=auto

How it works, and what it does not protect against, is told in `_cage.py` (tiers) and `_zygote.py` (processes).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from omr.errors import ConfigError, MissingBackend
from omr.option import option
from omr.sandbox import Sandbox, SandboxClient

if TYPE_CHECKING:
    from omr.sandbox._client import LocalClient

_log = logging.getLogger(__name__)


class Isolation(Enum):
    auto = "auto"
    namespace = "namespace"
    landlock = "landlock"
    process = "process"


@option("sandbox", "local")
@dataclass(kw_only=True)
class Local(Sandbox):
    """Code runs on this machine, in processes of its own."""

    isolation: Isolation = Isolation.auto
    """auto: namespace, else landlock, else refuse. process: limits only, no protection of files or network."""
    scratch_mb: int = 32
    """Files a session may write, in memory; gone with the session."""
    seed: int | None = 0
    """Of `random` and `numpy.random` in every new session; null: different every time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scratch_mb <= 0:
            raise ConfigError(f"sandbox.scratch_mb must be > 0, got {self.scratch_mb}")

    def preflight(self) -> None:
        """Refuse a machine that cannot isolate as asked: a trial session tells, in a quarter of a second."""
        import importlib.util
        import sys

        if sys.platform != "linux":
            raise MissingBackend(
                "Linux",
                fix="sandbox=http with a service on Linux, or sandbox=none",
                why=f"sandbox sessions are built from its kernel's means, not {sys.platform}'s",
            )
        for package in ("numpy", "sympy"):
            if importlib.util.find_spec(package) is None:
                raise MissingBackend(package, why="sandbox sessions preload it")
        from omr.sandbox import _client

        _client.probe(self._tiers())

    def _tiers(self) -> tuple[str, ...]:
        return ("namespace", "landlock") if self.isolation is Isolation.auto else (self.isolation.value,)

    @contextmanager
    def launch(self, log_dir: Path) -> Iterator[SandboxClient]:
        with self.start(log_dir) as client:
            yield client

    @contextmanager
    def start(self, log_dir: Path | None) -> Iterator[LocalClient]:
        """`launch`, with all that a local client can do; without a folder, logs go to stderr."""
        from omr.sandbox import _client

        limits = _client.SessionLimits(
            timeout_s=self.timeout_s,
            output_chars=self.output_chars,
            session_s=self.session_s,
            memory_bytes=self.memory_mb << 20,
            scratch_bytes=self.scratch_mb << 20,
            seed=self.seed,
        )
        if self.isolation is Isolation.process:
            _log.warning("sandbox.isolation=process: model-written code can read this user's files and use the network")
        with _client.start(self._tiers(), limits, log_dir) as client:
            if client.refused:
                _log.warning("sandbox isolation %s only (%s)", client.tier, client.refused)
            _log.info("sandbox isolation: %s (Landlock ABI %d)", client.tier, client.landlock_abi)
            yield client
