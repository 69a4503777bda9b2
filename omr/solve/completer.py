"""What solving needs of a server: completions that stream, that can be cancelled, and that a seed makes repeatable.

`omr.client.Client` is one; tests have others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from omr.sampling import Sampling

if TYPE_CHECKING:
    from omr.client import Stream


class Completer(Protocol):
    """Cancelling a stream's `each` cancels the request on the server."""

    def stream_completion(
        self, prompt: str, sampling: Sampling, *, stop: list[str], max_tokens: int, seed: int
    ) -> Stream: ...

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: Sampling,
        *,
        max_tokens: int,
        seed: int,
        tools: Sequence[Mapping[str, Any]] = (),
        tool_choice: str | None = None,
    ) -> Stream: ...


def round_seed(seed: int, round_index: int) -> int:
    """Seed of a generation's requests: its own for the first, others derived: no round replays another's draws."""
    return seed if round_index == 0 else (seed * 1_000_003 + round_index * 7_919_317) % 2**31
