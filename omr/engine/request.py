"""What goes into the engine, what comes out, and what it remembers in between."""

from __future__ import annotations

from dataclasses import dataclass, field

from omr.errors import InputError

FINISHED = ("stop", "length", "abort")


@dataclass(kw_only=True)
class Request:
    """One generation. Sampling fields mean what they mean in the OpenAI and vLLM request bodies."""

    id: str
    prompt_ids: list[int]
    max_tokens: int = 16
    temperature: float = 0.0
    """0 is greedy; the filters below then change nothing, penalties still do."""
    top_k: int = 0
    """0 keeps the whole vocabulary. Tokens as likely as the last one kept are kept too."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or the output."""
    frequency_penalty: float = 0.0
    """Taken off a logit per occurrence in the output."""
    presence_penalty: float = 0.0
    """Taken off once for a token that occurs in the output."""
    seed: int | None = None
    """None draws a fresh one. A token depends on (logits, seed, its position in the sequence) and nothing else."""
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    """Go on past the model's end-of-text ids; `stop_token_ids` still stop."""
    logprobs: int | None = None
    """Report each token's log-probability and this many alternatives, under the model's own (unfiltered) law."""
    speculate: bool = True
    """False decodes this request one token a step; the tokens are the same either way."""

    def __post_init__(self) -> None:
        checks = [
            (bool(self.prompt_ids), "prompt_ids", "at least one token"),
            (self.max_tokens >= 1, "max_tokens", ">= 1"),
            (self.temperature >= 0, "temperature", ">= 0"),
            (self.top_k >= 0, "top_k", ">= 0; 0 keeps everything"),
            (0 < self.top_p <= 1, "top_p", "in (0, 1]"),
            (0 <= self.min_p < 1, "min_p", "in [0, 1)"),
            (self.repetition_penalty > 0, "repetition_penalty", "> 0"),
            (self.logprobs is None or self.logprobs >= 0, "logprobs", ">= 0"),
        ]
        for good, name, rule in checks:
            if not good:
                raise InputError(f"{name} must be {rule}, got {getattr(self, name)!r}")

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    @property
    def filtered(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclass(kw_only=True)
class TokenLogprob:
    token_id: int
    logprob: float
    top: list[tuple[int, float]]
    """(token id, log-probability), likeliest first, `Request.logprobs` of them."""


@dataclass(kw_only=True)
class Output:
    """What one step added to one request."""

    id: str
    token_ids: list[int]
    """New tokens, at least one (none when aborted). A token that stops the request is the last of them."""
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None
    """None while running, then stop, length or abort."""
    stop_token_id: int | None = None
    """The end-of-text or stop token that ended it."""
    num_cached_tokens: int = 0
    """Prompt tokens whose keys and values were found in the cache."""
    num_drafts: int = 0
    """Of the request so far: its steps that had a draft, ..."""
    num_draft_tokens: int = 0
    """... the tokens drafted ..."""
    num_accepted_tokens: int = 0
    """... and those accepted."""


class Sequence:
    """A request on its way through the engine.

    `tokens` is prompt plus output. Keys and values of the first `num_computed` are in the cache; while it decodes that
    is all but the newest token, which the next step computes.
    """

    def __init__(self, request: Request, seed: int, max_len: int) -> None:
        self.request = request
        self.id = request.id
        self.seed = seed
        self.tokens = list(request.prompt_ids)
        self.num_prompt = len(request.prompt_ids)
        self.max_len = max_len
        """Tokens after which it is finished by length."""
        self.num_computed = 0
        self.num_cached = 0
        self.blocks: list[int] = []
        self.block_keys: list[int] = []
        """Content ids of the leading full blocks, for reuse by other sequences."""
        self.admission = 0
        """Number of its latest admission, never used twice: it names the sequence with its row and blocks."""
        self.row = -1
        """Row of the runner's per-sequence buffers, -1 while waiting."""
        self.decoding = False
        """Whether its prefill is done."""
        self.num_drafts = self.num_draft_tokens = self.num_accepted_tokens = 0
        """See Output."""

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    def __repr__(self) -> str:
        return f"Sequence({self.id}, {self.num_computed}/{len(self.tokens)} computed, row {self.row})"
