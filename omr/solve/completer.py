"""What solving needs of a server: completions that stream, that can be cancelled, and that a seed makes repeatable.

`omr.client.Client` is one; tests have others.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Protocol

from omr.sampling import Sampling

if TYPE_CHECKING:
    from omr.client import Chunk


class Completer(Protocol):
    """Closing the generator cancels the request on the server."""

    def stream_completion(
        self, prompt: str, sampling: Sampling, *, stop: list[str], max_tokens: int, seed: int
    ) -> AsyncGenerator[Chunk, None]: ...


def round_seed(seed: int, round_index: int) -> int:
    """Seed of a generation's requests: its own for the first, others derived: no round replays another's draws."""
    return seed if round_index == 0 else (seed * 1_000_003 + round_index * 7_919_317) % 2**31
