"""Servers: what turns a checkpoint into an OpenAI-compatible endpoint. One module per option."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from omr.errors import ConfigError
from omr.option import discover

if TYPE_CHECKING:
    from omr.drafter import Drafter


@dataclass(kw_only=True)
class ServeSpec:
    """What is to be served: all paths exist."""

    model_name: str
    checkpoint: Path
    """Hugging Face folder, quantised or not (for a server with an engine build, see `engine`)."""
    drafter: Drafter
    drafter_path: Path | None = None
    engine: Path | None = None
    """Built engine folder, for servers with `builds_engine`."""
    context_tokens: int = 2048
    tp: int = 1
    device: str = "cpu"
    seed: int = 0
    quant: str = "bf16"
    """Name of the quant option that wrote `checkpoint`."""
    params_b: float = 0.0
    """Parameters in billions, for memory estimates; 0 when unknown."""


@dataclass(kw_only=True)
class Endpoint:
    """A server that answers."""

    base_url: str
    """Without the trailing /v1."""
    model: str
    server: Server
    log: Path | None = None
    pid: int | None = None
    api_key: str = "EMPTY"


@dataclass(kw_only=True)
class SpecCounts:
    """Raw speculative-decoding counters since the server started. Derived rates are made in tracker.py."""

    drafts: int = 0
    """Verification steps of a sequence that had a draft; where the drafter found nothing there is none."""
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_per_pos: list[int] = field(default_factory=list)
    """Draft tokens accepted at position i."""
    drafted_per_pos: list[int] = field(default_factory=list)
    """Drafts that had a token at position i, the denominator of its marginal rate; empty where every draft has one
    at every position. An adaptive drafter makes them as long as pays, one that looks them up as long as it found."""
    by_context: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    """(drafts, draft tokens, accepted) of steps whose sequence was up to so many tokens long and over half as many;
    see `context_bucket`. Empty where the server does not tell."""

    def __sub__(self, before: SpecCounts) -> SpecCounts:
        was = before.accepted_per_pos + [0] * (len(self.accepted_per_pos) - len(before.accepted_per_pos))
        return SpecCounts(
            drafts=self.drafts - before.drafts,
            draft_tokens=self.draft_tokens - before.draft_tokens,
            accepted_tokens=self.accepted_tokens - before.accepted_tokens,
            accepted_per_pos=[now - then for now, then in zip(self.accepted_per_pos, was, strict=True)],
            drafted_per_pos=[
                now - then for now, then in zip_longest(self.drafted_per_pos, before.drafted_per_pos, fillvalue=0)
            ],
            by_context={
                size: (now[0] - then[0], now[1] - then[1], now[2] - then[2])
                for size, now in self.by_context.items()
                if (then := before.by_context.get(size, (0, 0, 0))) != now
            },
        )

    @property
    def drafted(self) -> list[int]:
        """The denominators of `accepted_per_pos`."""
        return self.drafted_per_pos or [self.drafts] * len(self.accepted_per_pos)

    def count(self, context_tok: int, drafted: int, accepted: int) -> None:
        """Add one step of a sequence of `context_tok` tokens."""
        self.drafts += 1
        self.draft_tokens += drafted
        self.accepted_tokens += accepted
        for position in range(accepted):
            self.accepted_per_pos[position] += 1
        for position in range(min(drafted, len(self.drafted_per_pos))):
            self.drafted_per_pos[position] += 1
        size = context_bucket(context_tok)
        drafts, draft_tok, accepted_tok = self.by_context.get(size, (0, 0, 0))
        self.by_context[size] = drafts + 1, draft_tok + drafted, accepted_tok + accepted


SMALLEST_BUCKET_TOK = 256


def context_bucket(context_tok: int) -> int:
    """The power of two, at least 256, that a context of so many tokens fits in."""
    return max(SMALLEST_BUCKET_TOK, 1 << (context_tok - 1).bit_length())


@dataclass(kw_only=True)
class Server:
    """Contract. `launch` owns a child process; a remote endpoint owns none."""

    option_group: ClassVar[str]
    option_name: ClassVar[str]
    REVISION: ClassVar[int] = 1
    runs_quant: ClassVar[frozenset[str]] = frozenset()
    """Names of the quant options whose checkpoints it serves."""
    runs_drafter: ClassVar[frozenset[str]] = frozenset()
    needs_weights: ClassVar[bool] = True
    """False for a remote endpoint: no weights are fetched or quantised."""

    host: str = field(default="127.0.0.1", metadata={"content": False})
    port: int = field(default=0, metadata={"content": False})
    """0 takes a free port."""
    start_timeout_s: float = field(default=600.0, metadata={"content": False})
    """How long the server may take to answer /health."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"server.port must be 0 (any free port) to 65535, got {self.port}")
        if self.start_timeout_s <= 0:
            raise ConfigError(f"server.start_timeout_s must be > 0, got {self.start_timeout_s}")

    def require_choices(self, quant: str, drafter: str) -> None:
        """Raise ConfigError, naming the servers that can, for a quant or drafter that this one cannot run."""
        for group, choice in (("quant", quant), ("drafter", drafter)):
            runs = getattr(self, f"runs_{group}")
            if choice in runs:
                continue
            servers = [(n, cls) for (g, n), cls in discover().items() if g == "server"]
            able = sorted(n for n, cls in servers if choice in getattr(cls, f"runs_{group}"))
            raise ConfigError(
                f"server={self.option_name} cannot run {group}={choice}, only {', '.join(sorted(runs))}"
                + (f"; server={','.join(able)} can" if able else "")
            )

    def preflight(self, spec: ServeSpec) -> None:
        """Refuse, before anything is allocated, what this machine cannot run. Paths in `spec` need not exist yet.

        Raises MissingBackend or ConfigError. Must be cheap: no import of a backend, no device initialisation.
        """

    @property
    def serves_any_family(self) -> bool:
        """Whether it takes an unquantised model of a family that omr's own code cannot load."""
        return False

    @property
    def builds_engine(self) -> bool:
        """Whether `build` must have run before `launch`."""
        return False

    def engine_recipe(self, spec: ServeSpec) -> dict[str, Any]:
        """What an engine's bytes depend on beside this option's content, the checkpoint and the drafter.

        Library version, GPU, draft length: part of its artifact key.
        """
        return {}

    def build(self, spec: ServeSpec, out: Path) -> dict[str, float]:
        """Build the engine of `spec` into the empty folder `out` (only with `builds_engine`)."""
        raise TypeError(f"{type(self).__name__} builds no engine")

    def launch(self, spec: ServeSpec, log_dir: Path) -> AbstractContextManager[Endpoint]:
        """Start, wait until it answers, yield the Endpoint, and leave no process behind whatever happens."""
        raise TypeError(f"{type(self).__name__} cannot be launched")

    def request_body(self, body: dict[str, Any], *, chat: bool) -> dict[str, Any]:
        """A completions (or chat) body in vLLM's dialect, as this server takes it. Raises ConfigError for a sampling
        parameter that it has not: leaving one out would change what is drawn.
        """
        return body

    def spec_counts(self, metrics_text: str) -> SpecCounts | None:
        """Counters read from the body of this server's metrics endpoint; None when it reports none."""
        return None

    metrics_path: ClassVar[str] = "/metrics"
    metrics_drain: ClassVar[bool] = False
    """True when reading the metrics page empties it: `spec_counts` then counts since the last read, not since the
    start."""
