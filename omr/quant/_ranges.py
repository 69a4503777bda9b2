"""Activation ranges: how large the inputs of the linear layers get on calibration text.

Forward hooks watch the input of one layer of each fused group (q reads what k and v read, gate what up reads) while
whole documents, prompt and solution, run through the decoder once. Kept per input: the largest absolute value and, for
a percentile, a histogram over log2 |x| with 32 bins an octave. Bins do not depend on the data, so neither order nor
batching of the rows changes the result, and a percentile is exact to 2.2 %.

Padding is masked out. A value that is not finite ends the calibration: a scale made from it would be finite nonsense,
since the cast to E4M3 saturates instead of overflowing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from omr.errors import Failure, InputError, ResourceError
from omr.nn import loader
from omr.nn.transformer import Transformer
from omr.text import encode_text, iter_text, load_tokenizer

WATCHED = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
SHARED = {
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    "mlp.up_proj": "mlp.gate_proj",
}
"""Layers that read the same input as a watched one."""
BATCH_TOKENS = 8192
MIN_BATCHES = 16
"""So that the curve has points on a small set, too."""
BINS_PER_OCTAVE, LOWEST_LOG2, OCTAVES = 32, -24, 48
CURVE_POINTS = 64


@dataclass
class Ranges:
    """What calibration found."""

    amax: dict[str, float]
    """Checkpoint name of a linear layer (`model.layers.0.self_attn.q_proj`) -> range of its input."""
    largest: dict[str, float]
    """The same without the percentile."""
    rows: int
    tokens: int
    curve: list[dict[str, float]] = field(default_factory=list)
    """After `step` rows: the range found so far as a share of the final one, mean and least over the inputs."""


def collect(
    src: Path, text: Path, *, rows: int, max_tokens: int, percentile: float | None, device: str, num_bytes: int
) -> Ranges:
    """Run the first `rows` rows of `text`, cut to `max_tokens`, through the model of `src`.

    `num_bytes` is the size of the weights: ResourceError if the device has no room for them. Raises InputError for too
    few rows or tokens that the model does not have, Failure for an input that is not finite.
    """
    batches = list(_batches(src, text, rows, max_tokens))
    _check_room(device, num_bytes)
    model = loader.load(src, device=device)
    highest = max(int(ids.max()) for ids, _ in batches)
    if highest >= model.config.vocab_size:
        raise InputError(
            f"the tokenizer of {src} makes token {highest}, the model has {model.config.vocab_size}: "
            "tokenizer and weights do not belong together"
        )
    watch = _Watch(model, keep_histogram=percentile is not None)
    seen, snapshots = 0, []
    every = max(1, len(batches) // CURVE_POINTS)
    with watch.hooked(), torch.inference_mode():
        for number, (ids, lengths) in enumerate(_progress(batches), 1):
            ids, lengths = ids.to(device), lengths.to(device)
            watch.inside = torch.arange(ids.shape[1], device=device) < lengths[:, None]
            model.hidden_states(ids, lengths)
            seen += ids.shape[0]
            if number % every == 0 or number == len(batches):
                snapshots.append((seen, watch.largest.clone()))
    largest = watch.largest.cpu()
    for name, value in zip(watch.names, largest.tolist(), strict=True):
        if value != value or value == float("inf"):
            raise Failure(
                f"the input of {name} is not finite on calibration text: the weights are broken, or need float32"
            )
    chosen = largest if percentile is None else torch.minimum(watch.percentiles(percentile), largest)
    last = largest.clamp(min=torch.finfo(torch.float32).tiny)
    curve = []
    for step, amax in snapshots:
        share = torch.where(largest > 0, amax.cpu() / last, torch.ones_like(last))
        curve.append(
            {
                "step": step,
                "calibration/range_share_mean": float(share.mean()),
                "calibration/range_share_min": float(share.min()),
            }
        )
    return Ranges(
        amax=_spread(watch.names, chosen),
        largest=_spread(watch.names, largest),
        rows=seen,
        tokens=int(sum(int(lengths.sum()) for _, lengths in batches)),
        curve=curve,
    )


class _Watch:
    """Hooks on the watched layers. Values stay on the device: nothing is synchronised while batches run."""

    inside: torch.Tensor
    """(B, T) bool: which positions are text and not padding."""

    def __init__(self, model: Transformer, *, keep_histogram: bool) -> None:
        found = {name: module for name, module in model.named_modules() if name.endswith(WATCHED)}
        self.names = [f"model.{name}" for name in found]
        self._modules = list(found.values())
        device = model.device
        self.largest = torch.zeros(len(self.names), device=device)
        bins = OCTAVES * BINS_PER_OCTAVE
        self._histogram = (
            torch.zeros(len(self.names), bins, dtype=torch.int64, device=device) if keep_histogram else None
        )

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles = [module.register_forward_pre_hook(self._hook(i)) for i, module in enumerate(self._modules)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, index: int):  # type: ignore[no-untyped-def]
        def see(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            size = inputs[0].detach().abs()  # (B, T, K)
            top = size.amax(-1).float().masked_fill_(~self.inside, 0.0).amax()
            self.largest[index] = torch.maximum(self.largest[index], top)
            if self._histogram is not None:
                values = size[self.inside].float().flatten()
                bins = ((values.log2() - LOWEST_LOG2) * BINS_PER_OCTAVE).clamp_(0, self._histogram.shape[1] - 1)
                self._histogram[index] += torch.bincount(bins.long(), minlength=self._histogram.shape[1])

        return see

    def percentiles(self, percentile: float) -> torch.Tensor:
        """For each input the upper edge of the first bin at which `percentile` % of the values have been counted."""
        assert self._histogram is not None
        counts = self._histogram.cpu()
        reached = counts.cumsum(-1).double() >= counts.sum(-1, keepdim=True).double() * percentile / 100
        index = reached.int().argmax(-1).double()
        return torch.exp2((index + 1) / BINS_PER_OCTAVE + LOWEST_LOG2).float()


def _batches(src: Path, text: Path, rows: int, max_tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows in order as (ids (B, T) int64 padded right, lengths (B,)), at most BATCH_TOKENS padded tokens each."""
    tokenizer = load_tokenizer(src)
    waiting: list[list[int]] = []
    found, most = 0, max(1, rows // MIN_BATCHES)
    for row in iter_text(text, rows):
        ids = encode_text(row, tokenizer)[0][:max_tokens]
        if not ids:
            continue
        found += 1
        full = len(waiting) == most or max(map(len, [ids, *waiting])) * (len(waiting) + 1) > BATCH_TOKENS
        if waiting and full:
            yield _padded(waiting)
            waiting = []
        waiting.append(ids)
    if waiting:
        yield _padded(waiting)
    if found < rows:
        raise InputError(f"{text} has {found} of the {rows} rows that quant.calib_samples wants; ask for fewer")


def _padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
    return ids, lengths


def _spread(names: list[str], values: torch.Tensor) -> dict[str, float]:
    """Name -> value, the layers that share a watched input included."""
    found = dict(zip(names, values.tolist(), strict=True))
    for name in names:
        prefix, _, kind = name.rpartition(".")
        block, _, part = prefix.rpartition(".")
        for other, watched in SHARED.items():
            if watched == f"{part}.{kind}":
                found[f"{block}.{other}"] = found[name]
    return found


def _check_room(device: str, num_bytes: int) -> None:
    if device.startswith("cuda"):
        free = torch.cuda.mem_get_info(device)[0]
    else:
        import psutil

        free = psutil.virtual_memory().available
        num_bytes = num_bytes * (2 if num_bytes < 2 * loader.SMALL_PARAMS else 1)  # small models run in float32 there
    if num_bytes * 1.1 > free:
        raise ResourceError(
            f"calibration on {device} needs {num_bytes * 1.1 / 1e9:.1f} GB for the weights and {free / 1e9:.1f} GB are "
            "free; use a larger device, or quant=int8_wo, which is not calibrated"
        )


def _progress(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    from tqdm import tqdm

    yield from tqdm(batches, desc="calibrate", unit="batch", mininterval=1.0)
