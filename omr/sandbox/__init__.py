"""Sandboxes: where model-written code runs. One module per option.

What the code did is a value (`Outcome`), never an exception. An exception from here means the sandbox itself broke.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from omr.errors import ConfigError


@dataclass(kw_only=True)
class Outcome:
    """What one code block did."""

    status: Literal["completed", "error", "timeout"]
    stdout: str = ""
    """Everything written, the value of the last expression and the traceback included; cut at the limit."""
    stderr: str = ""
    seconds: float = 0.0
    state_lost: bool = False
    """The session's process died with this block; the next block starts from an empty namespace."""


class Session(Protocol):
    """One generation's interpreter: variables survive from block to block."""

    async def execute(self, code: str, timeout_s: float | None = None) -> Outcome: ...

    async def close(self) -> None:
        """Kill the session's processes, even if it is itself cancelled. Idempotent."""
        ...


class SandboxClient(Protocol):
    """A running sandbox."""

    tier: str
    """The isolation in force (namespace, landlock, process, remote); logged with every run."""

    def session(self) -> Session:
        """A new, empty session. Its process starts at the first block."""
        ...


@dataclass(kw_only=True)
class Sandbox:
    """Contract."""

    option_group: ClassVar[str]
    option_name: ClassVar[str]

    timeout_s: float = 10.0
    """Per code block."""
    session_s: float = 600.0
    """Execution time of one session, summed over its blocks; 0: no limit."""
    memory_mb: int = 1024
    """What one session may allocate, the preloaded interpreter not counted."""
    output_chars: int = 1000
    """Output kept per block; the rest is dropped and marked."""

    def __post_init__(self) -> None:
        for name in ("timeout_s", "memory_mb", "output_chars"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"sandbox.{name} must be > 0, got {getattr(self, name)}")
        if self.session_s < 0:
            raise ConfigError(f"sandbox.session_s must be >= 0, got {self.session_s}")

    def preflight(self) -> None:
        """Refuse what this machine cannot isolate. Raises MissingBackend or ConfigError."""

    def launch(self, log_dir: Path) -> AbstractContextManager[SandboxClient]:
        """Start the sandbox; on exit every session is dead."""
        raise TypeError(f"{type(self).__name__} cannot be launched")
