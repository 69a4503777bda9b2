"""`sandbox=none`: no code runs. A solver that asks anyway gets an error to show the model, and carries on.

python -m omr sandbox=none
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from omr.option import option
from omr.sandbox import Outcome, Sandbox, SandboxClient


@option("sandbox", "none")
@dataclass(kw_only=True)
class NoSandbox(Sandbox):
    """Tools off."""

    @contextmanager
    def launch(self, log_dir: Path) -> Iterator[SandboxClient]:
        yield _Nobody()


class _Nobody:
    tier = "none"

    def session(self) -> _Refusal:
        return _Refusal()


class _Refusal:
    async def execute(self, code: str, timeout_s: float | None = None) -> Outcome:
        return Outcome(status="error", stderr="Code execution is off (sandbox=none)\n")

    async def close(self) -> None:
        """Nothing to close."""
