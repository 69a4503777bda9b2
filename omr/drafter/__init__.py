"""Drafters: what proposes tokens for the target to verify. One module per option.

A drafter has two sides: `fit` writes weights (in a child process), `load` gives the engine a DraftModel. The verb is
not called `train` because that is the field of a trained drafter's recipe: `drafter.train.lr`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from omr.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from omr.drafter._own_text import OwnText
    from omr.nn.draft_tree import Tree
    from omr.nn.transformer import Transformer


NO_DRAFT = -1
"""Fills the rows of a DraftModel's proposal whose chain is shorter than the longest one."""


def filled_up(chains: Sequence[list[int]]) -> torch.Tensor:
    """The chains as a proposal: (batch, longest) int64 on the CPU, shorter ones filled up with NO_DRAFT."""
    import torch

    longest = max(map(len, chains))
    return torch.tensor([chain + [NO_DRAFT] * (longest - len(chain)) for chain in chains], dtype=torch.int64)


class DraftModel(Protocol):
    """What the native engine asks of a drafter: one deterministic chain of draft tokens per sequence.

    Deterministic proposals are what keeps verification exact: the target draws its own token at each position and the
    chain is followed while the two agree, so the output law is the target's whatever is proposed.

    A drafter that has nothing to say says nothing: a sequence with a shorter chain than others, or none, is filled up
    with NO_DRAFT. Such places take part in the forward (a step verifies equally many rows for everybody) but are
    neither followed nor counted, so acceptance statistics are of tokens that the drafter did propose. A step in which
    no sequence has a draft is a plain one.
    """

    num_draft_tok: int
    """Tokens proposed per step at most. An adaptive engine lowers it for a step at a time."""
    needs_hidden: bool
    """Whether `propose` reads the target's hidden state (and can be captured in a CUDA graph)."""
    adaptive: bool
    """Draft as many tokens as is fastest, none if plain decoding is, as the engine measures it."""

    def propose(
        self,
        hidden: torch.Tensor | None,
        tokens: torch.Tensor,
        history: Sequence[Sequence[int]] | None,
    ) -> torch.Tensor:
        """Draft after `tokens` (batch,) int64, the newest token of each sequence.

        `hidden` (batch, hidden_size) is the target's final-norm output at the position that predicted that token.
        `history` holds all token ids of each sequence, newest last; it is None when `needs_hidden`. A sequence has the
        same list from step to step, and it only grows.
        Returns (batch, n) int64, n <= num_draft_tok; n = 0 when no sequence has a draft. A drafter that reads the
        history runs on the host and may return its chains on the CPU whatever the device. One that is captured in a
        CUDA graph returns num_draft_tok columns always, without NO_DRAFT.
        """
        ...


class SampledDraftModel(DraftModel, Protocol):
    """A drafter whose chain can be drawn from its own law instead (see omr.engine.sampled)."""

    sampled: bool
    """Whether that is wanted for requests with temperature > 0."""
    draft_tokens: torch.Tensor | None
    """(D,) int64 token of each draft logit; None when every token has one."""

    def propose_sampled(
        self,
        hidden: torch.Tensor | None,
        tokens: torch.Tensor,
        history: Sequence[Sequence[int]] | None,
        choose: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        """As `propose`, each token picked by `choose(step, logits)`: (B, D) draft logits -> (B,) int64 token ids.

        `choose(step, logits, rows)` does so for a part of the batch; the others' drafts are not sampled.
        """
        ...


def check_sampled(*, sampled: bool, adaptive: bool) -> None:
    """Raise ConfigError for a pair of knobs under which a seed would not fix the output."""
    if sampled and adaptive:
        raise ConfigError(
            "drafter.sampled=true needs drafter.adaptive=false: which steps draft would follow the clock, and with "
            "sampled drafts the tokens follow the steps"
        )


class TreeDraftModel(DraftModel, Protocol):
    """A drafter that proposes a prefix tree; its `propose` gives one chain.

    `num_draft_tok` is the depth of the tree: the most that one step can accept.
    """

    def propose_tree(self, hidden: torch.Tensor, tokens: torch.Tensor) -> Tree:
        """Trees (see omr.nn.draft_tree) whose roots are `tokens` (batch,) int64; arguments as of `propose`."""
        ...


@dataclass(kw_only=True)
class Drafter:
    """Contract. The default is a drafter that needs no training."""

    option_group: ClassVar[str]
    option_name: ClassVar[str]
    REVISION: ClassVar[int] = 1
    trained: ClassVar[bool] = False
    """True when `fit` must have run: the pipeline then gives `load` the trained folder."""

    def fit(self, base: Path, text: Path, out: Path, device: str) -> dict[str, float]:
        """Train for the checkpoint `base` on the parquet `text`; write safetensors, config and curve into `out`.

        `text` has columns `text` (str) and `spans` (list of [start, end) character ranges written by the model).
        Returns summary metrics (`redrafter{i}_top{k}` and the like). Raises TrainingError, InputError.
        """
        raise TypeError(f"{type(self).__name__} is not trained")

    def text_rows(self) -> int:
        """Rows of training text that `fit` wants; 0 when it is not trained."""
        return 0

    def own_text(self) -> OwnText | None:
        """How the base writes the training text itself; None when the text is given to it."""
        return None

    def fits_checkpoint(self) -> bool:
        """Whether `fit` is given the quantised checkpoint that is served, instead of the weights it was made from."""
        return False

    def preflight(self) -> None:
        """Refuse, before anything is allocated, what `load` could not use. Raises ConfigError or InputError."""

    def load(self, folder: Path | None, base: Transformer) -> DraftModel | None:
        """The proposer for `base`, on its device, or None for plain decoding. Raises InputError on a mismatch."""
        return None
