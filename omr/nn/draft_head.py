"""Output layers of a drafter: features (..., E) to logits (..., D).

With a modern vocabulary the output matrix is 85 to 95 % of a drafter and is read once per drafted token, so it is
what a draft costs. Three kinds, all a (small) projection followed by one big matrix:

    full      the (D, E) matrix itself                               Apple's
    low_rank  (r, E), then (D, r)                                    4 to 5 times fewer bytes at r = E / 5
    base      (H, E), then the base's own lm_head, frozen            no new vocabulary-sized parameters

Any of them can be restricted to a draft vocabulary of D < V tokens. The loss needs the two parts apart (`project`,
`matrix`), so that it can form the logits chunk by chunk and never whole.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

Pack = Callable[[Tensor, Tensor | None], nn.Module]
HEADS = ("full", "low_rank", "base")


class DraftHead(nn.Module):
    """project: (..., E) -> (..., R); matrix: (D, R), frozen or trained; logits = project(x) @ matrix.T."""

    @property
    def matrix(self) -> Tensor:
        raise TypeError(type(self).__name__)

    def project(self, x: Tensor) -> Tensor:
        raise TypeError(type(self).__name__)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.project(x), self.matrix)

    @property
    def parts(self) -> list[Tensor]:
        """The weights of logits = x @ parts[0].T @ parts[1].T ..., without bias."""
        return [self.matrix]

    def attach(self, output_matrix: Tensor) -> None:
        """Take the base's output matrix, if this head uses it."""


class FullHead(DraftHead):
    def __init__(self, exit_dim: int, num_words: int) -> None:
        super().__init__()
        self.weight = nn.Linear(exit_dim, num_words, bias=False).weight

    @property
    def matrix(self) -> Tensor:
        return self.weight

    def project(self, x: Tensor) -> Tensor:
        return x


class LowRankHead(DraftHead):
    def __init__(self, exit_dim: int, num_words: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(exit_dim, rank, bias=False)
        self.up = nn.Linear(rank, num_words, bias=False)

    @property
    def parts(self) -> list[Tensor]:
        return [self.down.weight, self.up.weight]

    @property
    def matrix(self) -> Tensor:
        return self.up.weight

    def project(self, x: Tensor) -> Tensor:
        return self.down(x)


class BaseHead(DraftHead):
    def __init__(self, exit_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Linear(exit_dim, hidden_size, bias=False)
        self._matrix: list[Tensor] = []  # in a list, so that it is not a parameter or buffer of ours

    @property
    def parts(self) -> list[Tensor]:
        return [self.proj.weight, self.matrix]

    @property
    def matrix(self) -> Tensor:
        assert self._matrix, "head=base: attach the base's output matrix first"
        return self._matrix[0]

    def project(self, x: Tensor) -> Tensor:
        return self.proj(x)

    def attach(self, output_matrix: Tensor) -> None:
        weight = self.proj.weight
        self._matrix = [output_matrix.detach().to(device=weight.device, dtype=weight.dtype)]


class PackedHead(DraftHead):
    """A head whose products were packed (for example in 8 bits): for drafting only."""

    def __init__(self, head: DraftHead, pack: Pack) -> None:
        super().__init__()
        self.packed = nn.Sequential(*(pack(part, None) for part in head.parts))

    def forward(self, x: Tensor) -> Tensor:
        return self.packed(x)


def make_head(kind: str, exit_dim: int, hidden_size: int, num_words: int, rank: int) -> DraftHead:
    if kind == "full":
        return FullHead(exit_dim, num_words)
    if kind == "low_rank":
        return LowRankHead(exit_dim, num_words, rank)
    assert kind == "base", kind
    return BaseHead(exit_dim, hidden_size)
