"""The paged KV cache and attention over it, in plain torch.

The cache is one tensor of slots; slot s of layer l holds the keys and values of one token, all heads side by side, so a
token is written with one copy and a block of consecutive slots is gathered with one. A sequence owns a list of blocks,
and token t of it lives in slot blocks[t // block_size] * block_size + t % block_size. Block 0 belongs to nobody: rows
that only pad a batch, and draft positions past a sequence's end, write there.

Two shapes of batch attend to the cache:
- Ragged: prompts, or chunks of them, laid end to end.
- Padded: the same few new tokens for every sequence (1 to decode, 1 + drafts to verify). Keys and values are gathered
  to (B, L, ...) and the query heads that share a key head are stacked as rows of one product.

Shapes: T tokens, B sequences, Q new tokens per sequence, L gathered tokens, Hq, Hkv heads, G = Hq / Hkv, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F

from omr.nn.config import DecoderConfig
from omr.nn.linear import to_e4m3

NULL_BLOCK = 0


class KVCache:
    """Keys and values of every layer: `data` (layers, slots, 2 * Hkv * D)."""

    def __init__(
        self, config: DecoderConfig, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.block_size, self.num_blocks = block_size, num_blocks
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.width = 2 * self.num_kv_heads * self.head_dim
        shape = (config.num_hidden_layers, num_blocks * block_size, self.width)
        self.data = torch.zeros(shape, device=device, dtype=dtype)
        self.layers = list(self.data)
        """One (slots, 2 * Hkv * D) view per layer."""
        self.has_flash = (
            device.type == "cuda"
            and dtype.itemsize == 2
            and self.head_dim % 8 == 0
            and torch.cuda.get_device_capability(device) >= (8, 0)
        )
        self.first_key = self.num_heads * self.head_dim
        self.triangles: dict[int, torch.Tensor] = {}
        self.blocks = [layer.view(num_blocks, block_size * self.width) for layer in self.layers]

    def store(self, layer: int, slots: torch.Tensor, qkv: torch.Tensor) -> None:
        """Write the keys and values of qkv (T, (Hq + 2 Hkv) * D) to slots (T,) int64."""
        self.layers[layer].index_copy_(0, slots, qkv[:, self.first_key :])

    def triangle(self, new: int, total: int) -> torch.Tensor:
        """What each of the last `new` of `total` tokens sees, (1, 1, G * new, total): 0 or -inf to add to the scores.

        A view of the right end of a mask kept for longer sequences: a decode step builds nothing.
        """
        kept = self.triangles.get(new)
        if kept is None or kept.shape[-1] < total:
            size = 1 << total.bit_length()
            steps = torch.arange(size, device=self.data.device)
            hidden = steps > steps[size - new :, None]
            mask = torch.zeros(hidden.shape, dtype=self.data.dtype, device=hidden.device)
            mask.masked_fill_(hidden, float("-inf"))
            kept = self.triangles[new] = mask.repeat(self.num_heads // self.num_kv_heads, 1)[None, None]
        return kept[..., kept.shape[-1] - total :]

    @property
    def cache_bytes(self) -> int:
        return self.data.numel() * self.data.element_size()


@dataclass(kw_only=True)
class Part:
    """One sequence's share of a Ragged batch."""

    length: int
    """New tokens."""
    slots: list[int]
    """Slots of all its tokens, those in the cache already and then the new ones."""

    @property
    def context(self) -> int:
        return len(self.slots) - self.length


class Ragged:
    """New tokens of `parts`, laid end to end.

    In half precision on CUDA one call of PyTorch's flash attention (`_flash_attention_forward`, the operator behind
    `torch.nn.attention.varlen`) serves all sequences; elsewhere each gets a call of its own.
    """

    def __init__(self, cache: KVCache, parts: list[Part]) -> None:
        self.cache, self.parts = cache, parts
        device = cache.data.device
        self.slots = _ids([slot for part in parts for slot in part.slots[part.context :]], device)
        """Where the new tokens are written, (T,) int64."""
        self.in_one = cache.has_flash
        # Without context the new keys are all there is; else they are read back from the cache.
        self.seen: list[torch.Tensor | None] = []
        if not self.in_one:
            self.seen = [_ids(part.slots, device) if part.context else None for part in parts]
            return
        if any(part.context for part in parts):
            self.seen = [_ids([slot for part in parts for slot in part.slots], device)]
        self.most_new = max(part.length for part in parts)
        self.most_seen = max(len(part.slots) for part in parts)
        ends = [[0, *accumulate(lengths)] for lengths in zip(*((p.length, len(p.slots)) for p in parts), strict=True)]
        self.new_ends, self.seen_ends = torch.tensor(ends, dtype=torch.int32).to(device, non_blocking=True)

    def attend(self, layer: int, qkv: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """qkv (T, (Hq + 2 Hkv) * D), rotated and stored -> (T, Hq * D); in E4M3 over `scale` when that is given."""
        out = self._attend_in_one(layer, qkv) if self.in_one else self._attend_each(layer, qkv)
        return out if scale is None else to_e4m3(out, scale)

    def _attend_in_one(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        cache = self.cache
        q, kv = qkv.split([cache.first_key, cache.width], -1)
        if self.seen:
            kv = cache.layers[layer].index_select(0, self.seen[0])
        k, v = kv.unflatten(-1, (2, cache.num_kv_heads, cache.head_dim)).unbind(1)  # (tokens seen, Hkv, D) each
        out = torch.ops.aten._flash_attention_forward(
            q.unflatten(-1, (cache.num_heads, cache.head_dim)), k, v, self.new_ends, self.seen_ends,
            self.most_new, self.most_seen, 0.0, True, False,
        )[0]  # fmt: skip
        return out.flatten(1)

    def _attend_each(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        cache = self.cache
        dim, num_kv, width = cache.head_dim, cache.num_kv_heads, cache.first_key
        out = qkv.new_empty(qkv.shape[0], width)
        end = 0
        for part, slots in zip(self.parts, self.seen, strict=True):
            rows = slice(end, end := end + part.length)
            q = qkv[rows, :width].view(1, part.length, -1, dim).transpose(1, 2)
            seen = qkv[rows, width:] if slots is None else cache.layers[layer].index_select(0, slots)
            seen = seen.view(1, -1, 2, num_kv, dim).permute(2, 0, 3, 1, 4)  # (2, 1, Hkv, L, D)
            if part.context:
                mask = torch.ones(part.length, len(part.slots), dtype=torch.bool, device=q.device).tril(part.context)
                group = cache.num_heads // num_kv
                if q.is_cuda and group > 1:  # no fused CUDA kernel takes both a mask and shared key heads
                    seen = seen.repeat_interleave(group, 2)
                got = F.scaled_dot_product_attention(q, seen[0], seen[1], attn_mask=mask, enable_gqa=True)
            else:
                got = F.scaled_dot_product_attention(q, seen[0], seen[1], is_causal=True, enable_gqa=True)
            out[rows] = got.transpose(1, 2).reshape(part.length, width)
        return out


def _ids(values: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)


class Padded:
    """Q new tokens for each of B sequences.

    `tables` (B, blocks) int64 block ids, padded with NULL_BLOCK; `positions` (B, Q) int64 of the new tokens; `slots`
    (B * Q,) int64 where they are written; `longest` the greatest position.
    """

    def __init__(
        self, cache: KVCache, tables: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, longest: int
    ) -> None:
        self.cache, self.slots = cache, slots
        self.batch, self.new = positions.shape
        self.total = longest + 1
        self.blocks = tables.flatten()
        self.mask = None
        if self.batch == 1 and self.new > 1:
            self.mask = cache.triangle(self.new, self.total)
        elif self.batch > 1:
            steps = torch.arange(self.total, device=positions.device)
            hidden = steps > positions[:, None, :, None]  # (B, 1, Q, L)
            mask = torch.zeros(hidden.shape, dtype=cache.data.dtype, device=positions.device)
            mask.masked_fill_(hidden, float("-inf"))
            self.mask = mask if self.new == 1 else stacked(mask, cache.num_heads // cache.num_kv_heads)

    def attend(self, layer: int, qkv: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """qkv (B * Q, (Hq + 2 Hkv) * D), rotated and stored -> (B * Q, Hq * D); in E4M3 over `scale` if given."""
        out = self._attend(layer, qkv)
        return out if scale is None else to_e4m3(out, scale)

    def _attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        cache, batch = self.cache, self.batch
        seen = cache.blocks[layer].index_select(0, self.blocks).view(batch, -1, cache.width)[:, : self.total]
        return attend(qkv, seen, self.mask, cache)


def stacked(mask: torch.Tensor, group: int) -> torch.Tensor:
    """(B, 1, Q, L) -> (B, 1, G * Q, L): the mask for query heads that share a key head, one below the other."""
    return mask if group == 1 else mask.repeat(1, 1, group, 1)


def attend(qkv: torch.Tensor, seen: torch.Tensor, mask: torch.Tensor | None, cache: KVCache) -> torch.Tensor:
    """Queries of qkv (B * Q, (Hq + 2 Hkv) * D) over keys and values `seen` (B, L, 2 * Hkv * D) -> (B * Q, Hq * D).

    `mask` (B, 1, G * Q, L) is added to the scores.
    """
    rows, batch, dim, num_kv = qkv.shape[0], seen.shape[0], cache.head_dim, cache.num_kv_heads
    width = cache.num_heads * dim
    k, v = seen.view(batch, -1, 2, num_kv, dim).permute(2, 0, 3, 1, 4)  # (B, Hkv, L, D) each
    q = qkv[:, :width]
    if rows == batch:
        return F.scaled_dot_product_attention(q.view(rows, num_kv, -1, dim), k, v, attn_mask=mask).reshape(rows, width)
    if cache.num_heads == num_kv:
        q = q.view(batch, -1, num_kv, dim).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(rows, width)
    q = q.view(batch, rows // batch, num_kv, -1, dim).permute(0, 2, 3, 1, 4).reshape(batch, num_kv, -1, dim)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.view(batch, num_kv, -1, rows // batch, dim).permute(0, 3, 1, 2, 4).reshape(rows, width)
