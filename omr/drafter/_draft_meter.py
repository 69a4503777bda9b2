"""Losses and accuracies of a drafter, summed on the device and read once.

For draft position i: cross-entropy in nats over the targets that can be drafted; top-k, the share of all targets among
the k best; and the prefix share, contexts whose first i+1 drafts are all right over contexts that have i+1 targets.
1 + the sum of prefix shares is the acceptance length if steps began at every context alike: the predicted length.

They do not: an accepted draft is not begun from again, so steps begin more often where drafts fail. `replay` walks a
document as serving would have, from a rejected or last token to the next, and counts what each step accepts. On text
that the base sampled itself (drafter.train.data=self) that is serving's own law; on other text it is a prediction too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from omr.nn.draft_loss import TOP_K, DraftLoss, Targets


class DraftMeter:
    def __init__(self, predict_n: int, device: torch.device | str) -> None:
        self.predict_n = predict_n
        # columns: loss, targets that can be drafted, targets, whole prefixes, whole and right, then hits of k = 1..5
        self._sums = torch.zeros(predict_n, 5 + TOP_K, dtype=torch.float64, device=device)
        self._steps = [0] * (predict_n + 1)  # replayed steps that accepted at least so many drafts

    def add(self, targets: Targets, out: DraftLoss, *, replay: bool = False) -> None:
        """Count one micro-batch; `out` must have ranks. `replay` is for one document at a time, and waits for it."""
        assert out.ranks is not None
        size, device = len(targets.context), targets.context.device
        valid = torch.zeros(self.predict_n, size, dtype=torch.bool, device=device)
        right = torch.zeros_like(valid)
        ks = torch.arange(1, TOP_K + 1, device=device)
        for i in range(self.predict_n):
            at, ranks = targets.at[i], out.ranks[i]
            valid[i, at] = True
            right[i, at] = ranks == 0
            row = self._sums[i]
            row[0] += out.losses[i].sum()
            row[1] += out.drafted[i].sum()
            row[2] += len(at)
            row[5:] += (ranks[:, None] < ks).sum(0)
        whole, good = valid.cummin(0).values, (valid & right).cummin(0).values
        self._sums[:, 3] += whole.sum(1)
        self._sums[:, 4] += good.sum(1)
        if replay:
            for accepted in walk(targets.context.tolist(), good.sum(0).tolist()):
                for count in range(accepted + 1):
                    self._steps[count] += 1

    def read(self) -> dict[str, float]:
        """`redrafter{i}_loss`, `_top{k}`, `_prefix`, `_replay`, `predicted_len_mean_tok`, `replayed_len_mean_tok`.

        Absent where nothing was counted.
        """
        values: dict[str, float] = {}
        accepted = 0.0
        for i, row in enumerate(self._sums.tolist()):
            loss, drafted, targets, whole, good = row[:5]
            if drafted:
                values[f"redrafter{i}_loss"] = loss / drafted
            if targets:
                values |= {f"redrafter{i}_top{k + 1}": row[5 + k] / targets for k in range(TOP_K)}
            if whole:
                values[f"redrafter{i}_prefix"] = good / whole
                accepted += good / whole
        values["predicted_len_mean_tok"] = 1 + accepted
        if begun := self._steps[0]:
            values |= {f"redrafter{i}_replay": count / begun for i, count in enumerate(self._steps[1:])}
            values["replayed_len_mean_tok"] = 1 + sum(self._steps[1:]) / begun
        return values


def walk(contexts: Sequence[int], accepted: Sequence[int]) -> Iterator[int]:
    """What each speculative step on a document accepts, given what one at each of its `contexts` (ascending) would.

    contexts 3 4 5 6 9, accepted 0 2 1 0 1: steps at 3 (0), 4 (2), 9 (1), where a step at 4 leads to context 7
    """
    at = -1
    for context, count in zip(contexts, accepted, strict=True):
        if context >= at:
            yield count
            at = context + count + 1
