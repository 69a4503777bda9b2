"""Losses and accuracies of a drafter, summed on the device and read once.

For draft position i: cross-entropy in nats over the targets that can be drafted; top-k, the share of all targets among
the k best; and the prefix share, contexts whose first i+1 drafts are all right over contexts that have i+1 targets.
Greedy decoding of the same text would accept 1 + sum of prefix shares tokens a step: the predicted acceptance length.
It is a prediction for text like this one, where every token is the base's own choice; serving measures the real one.
"""

from __future__ import annotations

import torch

from omr.nn.draft_loss import TOP_K, DraftLoss, Targets


class DraftMeter:
    def __init__(self, predict_n: int, device: torch.device | str) -> None:
        self.predict_n = predict_n
        # columns: loss, targets that can be drafted, targets, whole prefixes, whole and right, then hits of k = 1..5
        self._sums = torch.zeros(predict_n, 5 + TOP_K, dtype=torch.float64, device=device)

    def add(self, targets: Targets, out: DraftLoss) -> None:
        """Count one micro-batch; `out` must have ranks."""
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

    def read(self) -> dict[str, float]:
        """`redrafter{i}_loss`, `_top{k}`, `_prefix`, `predicted_len_mean_tok`; absent where nothing was counted."""
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
        return values
