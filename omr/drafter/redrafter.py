"""ReDrafter: a recurrent head trained on the frozen base's hidden states (see omr/nn/redrafter.py for the model).

Defaults are those of the AIMO-2 pipeline (rnn, 2 layers, 3 drafted tokens, lr 1e-3 cosine, warmup 0.1, length 2048, one
epoch, loss on all model-written tokens), but for the number of rows; conf/drafter/redrafter_aimo2.yaml has that as
well. Where the reference differs from the published recipe or is wrong, the module that does it better says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from omr.drafter import Drafter, check_sampled
from omr.drafter._own_text import OwnText
from omr.errors import ConfigError, InputError
from omr.option import option

if TYPE_CHECKING:
    from omr.drafter import DraftModel
    from omr.nn.transformer import Transformer


LEAST = {
    "predict_n": 1,
    "num_draft_layers": 0,
    "head_rank": 0,
    "draft_vocab_size": 0,
    "num_processes": 1,
    "num_beams": 1,
}
"""Least value of the integer knobs."""
MAX_BEAMS = 50
"""Beam search looks at this many tokens a step."""


class Head(Enum):
    full = "full"
    low_rank = "low_rank"
    base = "base"


class Schedule(Enum):
    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class Precision(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Trainer(Enum):
    omr = "omr"
    nemo_skills = "nemo_skills"
    apple = "apple"


class Base(Enum):
    weights = "weights"
    checkpoint = "checkpoint"


class Data(Enum):
    text = "text"
    self = "self"


class Start(Enum):
    base = "base"
    random = "random"


@dataclass(kw_only=True)
class Train:
    """How the head is trained: part of its recipe, so every field here is part of its artifact key."""

    data: Data = Data.text
    """text: the documents of model.text; self: solutions that the base writes itself, see `own`."""
    own: OwnText = field(default_factory=OwnText)
    """How it writes them."""
    rows: int = 2500
    """Documents read, held-out ones included. Enough for the embedded model; a large model wants 20,000 or more."""
    base: Base = Base.weights
    """Whose hidden states to learn from: the unquantised weights', so that one head serves every quantisation, or the
    served checkpoint's own."""
    max_length: int = 2048
    """Longest document, in tokens; longer ones are cut."""
    epochs: int = 1
    batch_rows: int = 1
    """Documents per forward and backward of the head. Few documents are best read in small steps."""
    accumulation: int = 1
    """Forwards per optimiser step, over all processes. The pipeline's step is 1 document x 4 on each of 2 GPUs."""
    forward_tok: int = 8192
    """Tokens per forward of the base, padding included, and of hidden states kept ahead of their step."""
    cache_states: bool = False
    """Compute the base's hidden states once, before training, and read them from disk after that: for several epochs or
    frequent measurements. Takes hidden_size x 2 bytes a token (4 on CPU) while training."""
    start: Start = Start.base
    """base: output matrix and scale of the state start from the base's own; random: as in the reference."""
    lr: float = 1e-3
    schedule: Schedule = Schedule.cosine
    warmup: float = 0.1
    """Share of the steps in which the rate rises from 0."""
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    """Largest gradient norm; 0 does not clip."""
    precision: Precision = Precision.float32
    """Of the products. Weights and optimiser state are float32 either way."""
    distil: float = 0.0
    """Share in [0, 1] of the base's own distribution in the target; the rest is the token of the text."""
    trainer: Trainer = Trainer.omr
    """omr, or the reference programs: NeMo-Skills' and Apple's, in an environment that has them."""
    python: str | None = field(default=None, metadata={"content": False})
    """Interpreter of that environment; null is omr's own."""
    eval_every: int = 0
    """Steps between measurements on the held-out documents, logged in the curve; 0 measures at the end only."""
    patience: int = 0
    """Stop after this many measurements without a lower held-out loss and keep the best head; 0 never stops early."""
    held_out: int = 200
    """Documents kept out of training to measure the head on, at most a tenth of all."""
    seed: int = 0
    checkpoint_min: float = field(default=5.0, metadata={"content": False})
    """Minutes between saves of the training state; a killed training goes on from the last one."""

    def __post_init__(self) -> None:
        for name in ("rows", "epochs", "batch_rows", "accumulation", "forward_tok"):
            if getattr(self, name) < 1:
                raise ConfigError(f"drafter.train.{name} must be >= 1, got {getattr(self, name)}")
        for name in ("weight_decay", "grad_clip", "held_out", "checkpoint_min", "eval_every", "patience"):
            if getattr(self, name) < 0:
                raise ConfigError(f"drafter.train.{name} must be >= 0, got {getattr(self, name)}")
        for name in ("warmup", "distil"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"drafter.train.{name} must be in [0, 1], got {getattr(self, name)}")
        if self.patience and not self.eval_every:
            raise ConfigError(f"drafter.train.patience={self.patience} needs drafter.train.eval_every >= 1")
        if self.lr <= 0:
            raise ConfigError(f"drafter.train.lr must be > 0, got {self.lr}")
        if self.max_length < 3:
            raise ConfigError(f"drafter.train.max_length must be >= 3 (context, token, target), got {self.max_length}")


@option("drafter", "redrafter")
@dataclass(kw_only=True)
class Redrafter(Drafter):
    """A recurrent draft head on the target's last hidden state."""

    REVISION: ClassVar[int] = 3
    trained: ClassVar[bool] = True

    predict_n: int = 3
    """Draft positions trained."""
    draft_tok: int | None = field(default=None, metadata={"content": False})
    """Tokens drafted per step when serving; null is predict_n, more is refused."""
    adaptive: bool = field(default=True, metadata={"content": False})
    """Draft only while that is faster than plain decoding, as measured while serving; output is the same either way."""
    stop_below: float = field(default=0.25, metadata={"content": False})
    """End a step's draft once the drafter gives it less than this chance to hold as a whole (of one sequence; towards
    twice as much in a batch, where verifying costs more); 0 drafts to the end. For greedy chains on CPU: elsewhere a
    draft of varying length costs more than it saves. Output is not affected."""
    sampled: bool = field(default=False, metadata={"content": False})
    """Draw the drafts of requests with temperature from the drafter's own law, verified by rejection. Output keeps the
    model's law but is no longer plain decoding's token for token. Greedy drafts are usually accepted more often."""
    num_beams: int = field(default=1, metadata={"content": False})
    """1 drafts a chain; more draft a tree of the likeliest beams, verified in one forward of up to
    1 + num_beams * draft_tok tokens."""
    eight_bit: bool = field(default=False, metadata={"content": False})
    """Draft with blocks and output matrix in 8 bits (int8 on CPU, E4M3 on CUDA). Output is not affected, only speed."""
    num_draft_layers: int = 2
    """Residual blocks before the output matrix."""
    rnn: bool = True
    """A recurrent state; false sums embeddings."""
    exit_dim: int | None = None
    """Width of the blocks and of the output matrix; null is twice the base's hidden size."""
    head: Head = Head.full
    """full: an output matrix of its own; low_rank: two thin ones; base: the base's own lm_head behind a projection."""
    head_rank: int = 0
    """Rank of head=low_rank."""
    draft_vocab_size: int = 0
    """Draft only the most frequent tokens of the training text; 0 drafts any. Output is not affected, only speed."""
    num_processes: int = field(default=1, metadata={"content": False})
    """GPUs to train on, one process each; on CPU, processes. The forwards of a step are shared among them."""
    train: Train = field(default_factory=Train)

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ConfigError(f"drafter.{name} must be >= {least}, got {getattr(self, name)}")
        if not 0 <= self.stop_below <= 1:
            raise ConfigError(f"drafter.stop_below must be in [0, 1], got {self.stop_below}")
        if self.num_beams > MAX_BEAMS:
            raise ConfigError(f"drafter.num_beams must be <= {MAX_BEAMS}, got {self.num_beams}")
        if 0 < self.draft_vocab_size < self.num_beams:
            raise ConfigError(
                f"drafter.num_beams={self.num_beams} different first tokens cannot be drafted from "
                f"drafter.draft_vocab_size={self.draft_vocab_size}; lower the first or raise the second"
            )
        check_sampled(sampled=self.sampled, adaptive=self.adaptive)
        if self.sampled and self.num_beams > 1:
            raise ConfigError(
                f"drafter.sampled=true draws a chain; set drafter.num_beams=1, got {self.num_beams}, or "
                "drafter.sampled=false"
            )
        if self.exit_dim is not None and self.exit_dim < 1:
            raise ConfigError(f"drafter.exit_dim must be >= 1 or null, got {self.exit_dim}")
        if (self.head is Head.low_rank) != (self.head_rank > 0):
            raise ConfigError(f"drafter.head_rank belongs to drafter.head=low_rank and is >= 1 there: {self.head_rank}")
        if self.draft_tok is not None and not 1 <= self.draft_tok <= self.predict_n:
            raise ConfigError(f"drafter.draft_tok must be in 1..predict_n={self.predict_n}, got {self.draft_tok}")
        if self.train.accumulation % self.num_processes:
            raise ConfigError(
                f"drafter.train.accumulation={self.train.accumulation} forwards a step cannot be shared evenly by "
                f"drafter.num_processes={self.num_processes}; make it a multiple"
            )

        if self.train.trainer is not Trainer.omr:
            from omr.drafter._other_trainers import check

            check(self)

    def text_rows(self) -> int:
        return self.train.rows

    def own_text(self) -> OwnText | None:
        return self.train.own if self.train.data is Data.self else None

    def fits_checkpoint(self) -> bool:
        return self.train.base is Base.checkpoint

    def fit(self, base: Path, text: Path, out: Path, device: str) -> dict[str, float]:
        """See Drafter. Resumes from the training state that a killed run left beside `out`."""
        if self.train.trainer is not Trainer.omr:
            from omr.drafter._other_trainers import fit_elsewhere

            return fit_elsewhere(self, base, text, out, device)
        if self.num_processes > 1:
            from omr.drafter._ranks import fit_in_ranks

            return fit_in_ranks(self, base, text, out, device)
        from omr.drafter._redrafter_fit import fit

        return fit(self, base, text, out, device)

    def load(self, folder: Path | None, base: Transformer) -> DraftModel:
        """Refuses a head trained for another base or vocabulary, or for fewer positions than it shall draft."""
        from omr.drafter._redrafter_chain import draft_model
        from omr.nn.redrafter import fingerprint, load_redrafter

        if folder is None:
            raise InputError("drafter=redrafter needs a trained head; run job=train first")
        head = load_redrafter(folder, device=base.device, dtype=base.dtype)
        config, hidden, vocab = head.config, base.config.hidden_size, base.config.vocab_size
        if (config.hidden_size, config.vocab_size) != (hidden, vocab):
            raise InputError(
                f"the drafter in {folder} is for hidden size {config.hidden_size} and {config.vocab_size} tokens, the "
                f"base has {hidden} and {vocab}; train one for this base"
            )
        if config.base and config.base != fingerprint(base.embed.weight):
            raise InputError(f"the drafter in {folder} was trained for another base model; train one for this base")
        wanted = self.draft_tok or self.predict_n
        if config.predict_n and wanted > config.predict_n:
            raise InputError(
                f"the drafter in {folder} was trained to draft {config.predict_n} tokens, {wanted} were asked for; "
                f"set drafter.draft_tok={config.predict_n} or train with drafter.predict_n={wanted}"
            )
        head.attach(base.lm_head.weight)
        draft = draft_model(
            head,
            base.embed.weight,
            wanted,
            num_beams=self.num_beams,
            in_eight_bit=self.eight_bit,
            stop_below=self.stop_below,
        )
        draft.adaptive, draft.sampled = self.adaptive, self.sampled
        return draft
