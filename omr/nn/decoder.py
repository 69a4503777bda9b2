"""The decoder as the engine runs it: the Transformer's own weights with q/k/v and gate/up as one product each.

At batch 1 a small model is bound by the number of operations, not by their size, so a layer is written as few calls as
torch allows and reads plain attributes: `nn.Module` looks a parameter up through three dictionaries. Fusing keeps one
copy of the weights: the modules' own tensors become views into the fused one, and `Transformer.hidden_states` still
works.

Shapes: T tokens of all sequences laid end to end, H hidden_size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from omr.nn import rope
from omr.nn.linear import Fp8Linear, Parallel, QuantLinear, fuse, lay_out
from omr.nn.packed import MAX_BYTES, dense_add, dense_product
from omr.nn.paged import KVCache
from omr.nn.transformer import DecoderLayer, RMSNorm, Transformer

Product = Callable[[torch.Tensor], torch.Tensor]


class Batch(Protocol):
    """What a step attends to: see omr.nn.paged."""

    cache: KVCache
    slots: torch.Tensor

    def attend(self, layer: int, qkv: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor: ...


class FusedLayer:
    """One decoder layer's weights, ready to run."""

    def __init__(self, layer: DecoderLayer, num_heads: int, num_kv_heads: int, *, packed: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv = fuse([attention.q_proj, attention.k_proj, attention.v_proj])
        self.o = attention.o_proj
        if isinstance(self.o, nn.Linear):
            self.o.weight.data = lay_out(self.o.weight.detach())
        self.gate_up = fuse([mlp.gate_proj, mlp.up_proj])
        self.down = mlp.down_proj
        self.input_norm_weight = layer.input_layernorm.weight.detach()
        self.post_norm_weight = layer.post_attention_layernorm.weight.detach()
        self.norm = norm_of(layer.input_layernorm)
        self.post_norm = norm_of(layer.post_attention_layernorm)
        self.run_qkv, self.run_gate_up = product(self.qkv, packed=packed), product(self.gate_up, packed=packed)
        self.add_o, self.add_down = product_add(self.o, packed=packed), product_add(self.down, packed=packed)
        self.head_norm: Product | None = None
        self.head_weight: torch.Tensor | None = None
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm.weight, attention.k_norm.weight
            self.head_weight = torch.cat([q.expand(num_heads, -1), k.expand(num_kv_heads, -1)]).detach()
            self.head_norm = norm(self.head_weight, attention.q_norm.eps)


class Decoder:
    """Hidden states of new tokens, given a batch that knows where their keys and values are kept."""

    def __init__(self, model: Transformer, num_positions: int) -> None:
        config = self.config = model.config
        self.model = model
        self.device, self.dtype = model.device, model.dtype
        self.num_rotated = config.num_attention_heads + config.num_key_value_heads
        self.embed = model.embed_tokens.weight.detach()
        packed = model.device.type == "cpu" and config.num_params * self.embed.element_size() <= MAX_BYTES
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.layers = [FusedLayer(layer, heads, kv_heads, packed=packed) for layer in model.layers]
        self.final_norm = norm_of(model.norm)
        self.run_head = _head(model, packed)
        cos, sin = rope.tables(config, num_positions, self.device)
        self.cos, self.sin = cos.to(self.dtype)[:, None], sin.to(self.dtype)[:, None]  # (positions, 1, D)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Final-norm states (T, H) of `tokens` (T,) int64 at `positions` (T,) int64."""
        heads, dim = self.num_rotated, self.config.head_dim
        cos, sin = self.cos.index_select(0, positions), self.sin.index_select(0, positions)
        x = self.embed.index_select(0, tokens)
        for index, layer in enumerate(self.layers):
            qkv = layer.run_qkv(layer.norm(x))
            rotated = qkv[:, : heads * dim].view(-1, heads, dim)
            flat = rotated if layer.head_norm is None else layer.head_norm(rotated)
            torch.addcmul(flat * cos, flat.roll(dim // 2, -1), sin, out=rotated)
            batch.cache.store(index, batch.slots, qkv)
            x = layer.add_o(x, batch.attend(index, qkv))
            gate, up = layer.run_gate_up(layer.post_norm(x)).chunk(2, -1)
            x = layer.add_down(x, F.silu(gate).mul_(up))
        return self.final_norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(T, vocabulary) float32."""
        return self.run_head(hidden).float()


def _head(model: Transformer, packed: bool) -> Product:
    """The output product; from a copy laid out for it when the weight is the embedding's, which is read by rows."""
    head = model.lm_head
    if not isinstance(head, nn.Linear):
        return product(head, packed=packed)
    weight = lay_out(head.weight.detach())
    if not model.config.tie_word_embeddings:
        head.weight.data = weight
    return dense_product(weight, head.bias, packed=packed)


def product(linear: nn.Module, *, packed: bool = False) -> Product:
    """x (T, K) -> linear(x), without the module call; by a re-ordered copy of the weight if `packed`."""
    if (isinstance(linear, QuantLinear) and not linear.is_dense) or isinstance(linear, Parallel):
        return linear.forward
    run = dense_product(linear.weight, linear.bias, packed=packed)
    if isinstance(linear, Fp8Linear) and linear.input_scale is not None:
        return lambda x: run(linear.rounded(x))
    return run


def product_add(linear: nn.Module, *, packed: bool = False) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """(residual, x) -> residual + linear(x), in one call where there is no bias."""
    if linear.bias is None and not (isinstance(linear, QuantLinear) and not linear.is_dense):
        add = dense_add(linear.weight, packed=packed)
        if isinstance(linear, Fp8Linear) and linear.input_scale is not None:
            return lambda residual, x: add(residual, linear.rounded(x))
        return add
    run = product(linear, packed=packed)
    return lambda residual, x: run(x).add_(residual)


def norm_of(module: RMSNorm) -> Product:
    return norm(module.weight.detach(), module.eps)


def norm(weight: torch.Tensor, eps: float) -> Product:
    """RMS norm over the last dimension; in float32 x / hypot(|x|, sqrt(n eps)) * (weight sqrt(n)): four light calls."""
    size = weight.shape[-1]
    if weight.dtype != torch.float32:
        shape = (size,)
        if weight.dim() == 1:
            return lambda x: F.rms_norm(x, shape, weight, eps)
        return lambda x: F.rms_norm(x, shape, None, eps).mul_(weight)
    scaled = weight * math.sqrt(size)
    floor = torch.tensor(math.sqrt(size * eps), device=weight.device)

    def light(x: torch.Tensor) -> torch.Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x / torch.hypot(length, floor)).mul_(scaled)

    return light
