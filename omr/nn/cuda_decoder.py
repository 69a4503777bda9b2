"""The decoder on CUDA: the same weights as omr.nn.decoder, with Triton kernels between the products.

Ten launches a layer in bf16 and in FP8: what turns a product's input into E4M3 is part of the kernel before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from omr.nn import kernels, rope
from omr.nn.decoder import Batch, Decoder, product
from omr.nn.linear import Fp8Linear
from omr.nn.paged import KVCache
from omr.nn.transformer import Transformer


@dataclass(kw_only=True)
class Grid:
    """The same number of new tokens for every sequence, in tensors of fixed shape: what a CUDA graph can replay."""

    cache: KVCache
    tables: torch.Tensor
    """(B, W) int32 block ids."""
    starts: torch.Tensor
    """(B,) int64 position of each sequence's first new token."""
    slots: torch.Tensor
    """(B * new,) int64."""
    new: int

    def attend(self, layer: int, qkv: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        cache = self.cache
        return kernels.paged_attention(
            qkv,
            cache.layers[layer],
            self.tables,
            self.starts,
            self.new,
            cache.num_heads,
            cache.num_kv_heads,
            cache.block_size,
            scale,
        )


def _input_scale(linear: nn.Module) -> torch.Tensor | None:
    return linear.input_scale if isinstance(linear, Fp8Linear) and linear.product else None


def _multiply(linear: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The product alone, for an input that is in E4M3 already where the layer is FP8."""
    return linear.multiply if isinstance(linear, Fp8Linear) and linear.product else product(linear)


class CudaDecoder(Decoder):
    def __init__(self, model: Transformer, num_positions: int) -> None:
        super().__init__(model, num_positions)
        self.cos, self.sin = rope.tables(self.config, num_positions, self.device)
        self._plan = [
            (
                (layer.input_norm_weight, _input_scale(layer.qkv), _multiply(layer.qkv)),
                (layer.head_weight, _input_scale(layer.o), _multiply(layer.o)),
                (layer.post_norm_weight, _input_scale(layer.gate_up), _multiply(layer.gate_up)),
                (_input_scale(layer.down), _multiply(layer.down)),
            )
            for layer in self.layers
        ]

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, batch: Batch) -> torch.Tensor:
        config, cache = self.config, batch.cache
        eps, heads, kv_heads = config.rms_norm_eps, config.num_attention_heads, config.num_key_value_heads
        x, delta = self.embed.index_select(0, tokens), None
        for index, (attention_in, attention_out, mlp_in, mlp_out) in enumerate(self._plan):
            weight, scale, multiply = attention_in
            qkv = multiply(kernels.add_norm(x, delta, weight, eps, scale))
            head_weight, scale, multiply = attention_out
            kernels.rotate_and_store(
                qkv,
                self.cos,
                self.sin,
                positions,
                batch.slots,
                cache.layers[index],
                heads,
                kv_heads,
                head_weight,
                eps,
            )
            delta = multiply(batch.attend(index, qkv, scale))
            weight, scale, multiply = mlp_in
            gate_up = multiply(kernels.add_norm(x, delta, weight, eps, scale))
            scale, multiply = mlp_out
            delta = multiply(kernels.silu_mul(gate_up, scale))
        return kernels.add_norm(x, delta, self.model.norm.weight, eps, None)
