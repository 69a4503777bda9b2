"""Triton kernels of a decode step: norm, rotary positions with the cache write, paged attention, gated activation.

A step of a small model is bound by the number of kernels and of a large one by bytes, so each kernel does all that lies
between two matrix products in one pass. Where the next product is FP8, the kernel writes its input in E4M3 itself:
`scale` is then that layer's static input scale.

Attention is split along the context (flash decoding): program (sequence, key head, split) runs over every SPLITS-th
part of the sequence's tokens with an online softmax and leaves a partial sum; a second kernel adds the parts. All
query heads that share a key head, for all new tokens, are the rows of one product, so keys and values are read once.

Rounding follows the modules of omr.nn.transformer: what they round to the model's dtype between operations is rounded
here too. Products accumulate in float32; softmax is in float32.

Shapes: T tokens = B sequences x Q new ones, H hidden, Hq and Hkv heads, G = Hq / Hkv, D head_dim, W table width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from omr.nn.linear import E4M3_MAX


@triton.jit
def _norm_kernel(
    x_ptr, delta_ptr, weight_ptr, out_ptr, scale_ptr, size, eps, limit,
    ADD: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    raw = tl.load(x_ptr + row * size + at, mask=inside, other=0.0)
    dtype = raw.dtype
    if ADD:
        delta = tl.load(delta_ptr + row * size + at, mask=inside, other=0.0)
        raw = (raw.to(tl.float32) + delta.to(tl.float32)).to(dtype)
        tl.store(x_ptr + row * size + at, raw, mask=inside)
    x = raw.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 0) / size + eps)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y = ((x * inverse).to(dtype).to(tl.float32) * weight).to(dtype)
    if FP8:
        y8 = y.to(tl.float32) / tl.load(scale_ptr)
        y8 = tl.minimum(tl.maximum(y8, -limit), limit)
        tl.store(out_ptr + row * size + at, y8.to(tl.float8e4nv), mask=inside)
    else:
        tl.store(out_ptr + row * size + at, y, mask=inside)


def add_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float, scale: torch.Tensor | None
) -> torch.Tensor:
    """x (T, H) += delta in place, then the RMS norm of x times weight; in E4M3 over `scale` when that is given."""
    tokens, size = x.shape
    out = torch.empty_like(x, dtype=x.dtype if scale is None else torch.float8_e4m3fn)
    _norm_kernel[(tokens,)](
        x, delta if delta is not None else x, weight, out, scale if scale is not None else weight, size, eps, E4M3_MAX,
        ADD=delta is not None, FP8=scale is not None, BLOCK=triton.next_power_of_2(size),
        num_warps=4 if size <= 2048 else 8,
    )  # fmt: skip
    return out


@triton.jit
def _rotate_kernel(
    qkv_ptr, cos_ptr, sin_ptr, position_ptr, slot_ptr, cache_ptr, head_weight_ptr, eps,
    ROTATED: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    at = tl.arange(0, HALF)
    inside = at < DIM // 2
    base = qkv_ptr + (token * HEADS + head) * DIM
    first = tl.load(base + at, mask=inside, other=0.0)
    second = tl.load(base + DIM // 2 + at, mask=inside, other=0.0)
    dtype = first.dtype
    if head < ROTATED:
        a, b = first.to(tl.float32), second.to(tl.float32)
        if NORM:
            inverse = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / DIM + eps)
            weight = head_weight_ptr + head * DIM + at
            wa = tl.load(weight, mask=inside, other=0.0).to(tl.float32)
            wb = tl.load(weight + DIM // 2, mask=inside, other=0.0).to(tl.float32)
            a = ((a * inverse).to(dtype).to(tl.float32) * wa).to(dtype).to(tl.float32)
            b = ((b * inverse).to(dtype).to(tl.float32) * wb).to(dtype).to(tl.float32)
        position = tl.load(position_ptr + token)
        cos = tl.load(cos_ptr + position * DIM + at, mask=inside, other=0.0)
        sin = tl.load(sin_ptr + position * DIM + DIM // 2 + at, mask=inside, other=0.0)
        first = (a * cos - b * sin).to(dtype)
        second = (b * cos + a * sin).to(dtype)
        tl.store(base + at, first, mask=inside)
        tl.store(base + DIM // 2 + at, second, mask=inside)
    if head >= QUERIES:
        slot = tl.load(slot_ptr + token)
        target = cache_ptr + (slot * (HEADS - QUERIES) + head - QUERIES) * DIM
        tl.store(target + at, first, mask=inside)
        tl.store(target + DIM // 2 + at, second, mask=inside)


def rotate_and_store(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cache: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_weight: torch.Tensor | None,
    eps: float,
) -> None:
    """Norm (Qwen3) and rotate the q and k heads of qkv (T, (Hq + 2 Hkv) D) in place; write k and v to cache[slots].

    cos, sin (positions, D) float32 as omr.nn.rope makes them; cache (slots, 2 Hkv D); head_weight (Hq + Hkv, D) or
    None.
    """
    heads = num_heads + 2 * num_kv_heads
    dim = qkv.shape[1] // heads
    _rotate_kernel[(qkv.shape[0], heads)](
        qkv, cos, sin, positions, slots, cache, head_weight if head_weight is not None else cos, eps,
        ROTATED=num_heads + num_kv_heads, QUERIES=num_heads, HEADS=heads, DIM=dim,
        HALF=triton.next_power_of_2(dim // 2), NORM=head_weight is not None, num_warps=1,
    )  # fmt: skip


@triton.jit
def _silu_kernel(gate_up_ptr, out_ptr, scale_ptr, size, limit, FP8: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    gate = tl.load(gate_up_ptr + row * 2 * size + at, mask=inside, other=0.0)
    dtype = gate.dtype
    up = tl.load(gate_up_ptr + row * 2 * size + size + at, mask=inside, other=0.0).to(tl.float32)
    g = gate.to(tl.float32)
    y = ((g / (1.0 + tl.exp(-g))).to(dtype).to(tl.float32) * up).to(dtype)
    if FP8:
        y8 = y.to(tl.float32) / tl.load(scale_ptr)
        y8 = tl.minimum(tl.maximum(y8, -limit), limit)
        tl.store(out_ptr + row * size + at, y8.to(tl.float8e4nv), mask=inside)
    else:
        tl.store(out_ptr + row * size + at, y, mask=inside)


def silu_mul(gate_up: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """silu(gate) * up for gate_up (T, 2 I) -> (T, I); in E4M3 over `scale` when that is given."""
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, size, dtype=gate_up.dtype if scale is None else torch.float8_e4m3fn)
    block = min(1024, triton.next_power_of_2(size))
    _silu_kernel[(tokens, triton.cdiv(size, block))](
        gate_up, out, scale if scale is not None else gate_up, size, E4M3_MAX, FP8=scale is not None, BLOCK=block
    )
    return out


@triton.jit
def _add_tile(q, k, v, visible, best, weight_sum, acc, scale_log2):
    """The online softmax after one more tile of keys and values."""
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
    score = tl.where(visible, score, float("-inf"))
    now = tl.maximum(best, tl.max(score, 1))
    base = tl.where(now == float("-inf"), 0.0, now)
    p = tl.exp2(score - base[:, None])
    keep = tl.exp2(best - base)
    weight_sum = weight_sum * keep + tl.sum(p, 1)
    acc = acc * keep[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return now, weight_sum, acc


@triton.jit
def _attend_kernel(
    qkv_ptr, cache_ptr, table_ptr, start_ptr, node_ptr, sees_ptr, acc_ptr, stat_ptr, scale_log2, width,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr, NEW: tl.constexpr, DIM: tl.constexpr,
    PAD_DIM: tl.constexpr, ROWS: tl.constexpr, ROW_BLOCKS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, SPLITS: tl.constexpr, TREE: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    key_head = tl.program_id(1) // ROW_BLOCKS
    split = tl.program_id(2)
    start = tl.load(start_ptr + sequence)
    total = start if TREE else start + NEW
    tiles = tl.cdiv(tl.cdiv(total, TILE), SPLITS)
    begin = split * tiles * TILE
    end = tl.minimum(total, begin + tiles * TILE)

    row = tl.program_id(1) % ROW_BLOCKS * ROWS + tl.arange(0, ROWS)
    new, in_group = row // GROUP, row % GROUP
    dim = tl.arange(0, PAD_DIM)
    in_dim = dim < DIM
    q_at = ((sequence * NEW + new) * (QUERIES + 2 * KEYS) + key_head * GROUP + in_group) * DIM
    real = row < NEW * GROUP
    q = tl.load(qkv_ptr + q_at[:, None] + dim[None, :], mask=real[:, None] & in_dim[None, :], other=0.0)

    best = tl.full([ROWS], float("-inf"), tl.float32)
    weight_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, PAD_DIM], tl.float32)
    for tile in range(begin, end, TILE):
        token = tile + tl.arange(0, TILE)
        inside = token < end
        block = tl.load(table_ptr + sequence * width + token // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        at = (block * BLOCK_SIZE + token % BLOCK_SIZE) * (2 * KEYS * DIM) + key_head * DIM
        seen = inside[:, None] & in_dim[None, :]
        k = tl.load(cache_ptr + at[:, None] + dim[None, :], mask=seen, other=0.0)
        v = tl.load(cache_ptr + at[:, None] + KEYS * DIM + dim[None, :], mask=seen, other=0.0)
        visible = (token[None, :] <= start + new[:, None]) & inside[None, :]
        best, weight_sum, acc = _add_tile(q, k, v, visible, best, weight_sum, acc, scale_log2)
    if TREE:  # the nodes themselves, which are not in the cache, are the last split's
        for tile in range(0, tl.where(split == SPLITS - 1, NEW, 0), TILE):
            node = tile + tl.arange(0, TILE)
            inside = node < NEW
            at = (sequence * NEW + node) * (2 * KEYS * DIM) + key_head * DIM
            seen = inside[:, None] & in_dim[None, :]
            k = tl.load(node_ptr + at[:, None] + dim[None, :], mask=seen, other=0.0)
            v = tl.load(node_ptr + at[:, None] + KEYS * DIM + dim[None, :], mask=seen, other=0.0)
            sees = sees_ptr + (sequence * NEW + new[:, None]) * NEW + node[None, :]
            visible = tl.load(sees, mask=real[:, None] & inside[None, :], other=0) != 0
            best, weight_sum, acc = _add_tile(q, k, v, visible, best, weight_sum, acc, scale_log2)

    part = ((sequence * KEYS + key_head) * SPLITS + split) * (ROWS * ROW_BLOCKS) + row
    tl.store(stat_ptr + part * 2, best)
    tl.store(stat_ptr + part * 2 + 1, weight_sum)
    tl.store(acc_ptr + part[:, None] * PAD_DIM + dim[None, :], acc)


@triton.jit
def _combine_kernel(
    acc_ptr, stat_ptr, out_ptr, scale_ptr, limit,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr, NEW: tl.constexpr, DIM: tl.constexpr,
    PAD_DIM: tl.constexpr, ROWS: tl.constexpr, ROW_BLOCKS: tl.constexpr, SPLITS: tl.constexpr, FP8: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = (token % NEW) * GROUP + head % GROUP
    split = tl.arange(0, SPLITS)
    dim = tl.arange(0, PAD_DIM)
    part = ((token // NEW * KEYS + head // GROUP) * SPLITS + split) * (ROWS * ROW_BLOCKS) + row
    best = tl.load(stat_ptr + part * 2)
    weight_sum = tl.load(stat_ptr + part * 2 + 1)
    scale = tl.exp2(best - tl.max(best, 0))
    acc = tl.load(acc_ptr + part[:, None] * PAD_DIM + dim[None, :])
    y = (tl.sum(acc * scale[:, None], 0) / tl.sum(weight_sum * scale, 0)).to(DTYPE)
    at = (token * QUERIES + head) * DIM + dim
    if FP8:
        y8 = y.to(tl.float32) / tl.load(scale_ptr)
        y8 = tl.minimum(tl.maximum(y8, -limit), limit)
        tl.store(out_ptr + at, y8.to(tl.float8e4nv), mask=dim < DIM)
    else:
        tl.store(out_ptr + at, y, mask=dim < DIM)


@triton.jit
def _int8_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, tokens, rows, columns,
    BIAS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    in_rows, in_tokens = row < rows, token < tokens
    acc = tl.zeros([TOKENS, ROWS], tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < columns
        x = tl.load(
            x_ptr + token[:, None] * columns + column[None, :], mask=in_tokens[:, None] & inside[None, :], other=0.0
        )
        weight = tl.load(
            weight_ptr + row.to(tl.int64)[:, None] * columns + column[None, :],
            mask=in_rows[:, None] & inside[None, :],
            other=0,
        )
        acc += tl.dot(x, tl.trans(weight.to(x.dtype)), input_precision="ieee")
    acc = acc * tl.load(scale_ptr + row, mask=in_rows, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + row, mask=in_rows, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + token[:, None] * rows + row[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=in_tokens[:, None] & in_rows[None, :])


def int8_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (M, K) times int8 weight (N, K) transposed, scale (N,) per row: (M, N). For few rows, M <= 64."""
    tokens, (rows, columns) = x.shape[0], weight.shape
    out = x.new_empty(tokens, rows)
    block = 32 if rows >= 4096 else 16
    _int8_kernel[(triton.cdiv(rows, block),)](
        x, weight, scale, bias if bias is not None else scale, out, tokens, rows, columns, BIAS=bias is not None,
        TOKENS=max(16, triton.next_power_of_2(tokens)), ROWS=block, COLUMNS=128, num_warps=4, num_stages=4,
    )  # fmt: skip
    return out


@triton.jit
def _place_kernel(start_ptr, table_ptr, position_ptr, slot_ptr, width, NEW: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(start_ptr + token // NEW) + token % NEW
    block = tl.load(table_ptr + token // NEW * width + position // BLOCK_SIZE).to(tl.int64)
    tl.store(position_ptr + token, position)
    tl.store(slot_ptr + token, block * BLOCK_SIZE + position % BLOCK_SIZE)


def place(starts: torch.Tensor, tables: torch.Tensor, new: int, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and cache slots (B * Q,) int64 of the `new` tokens that begin at starts (B,) int64."""
    positions = starts.new_empty(starts.shape[0] * new)
    slots = torch.empty_like(positions)
    _place_kernel[(positions.shape[0],)](
        starts, tables, positions, slots, tables.shape[1], NEW=new, BLOCK_SIZE=block_size, num_warps=1
    )
    return positions, slots


PROGRAMS = 264
"""Attention programs aimed at: two for each multiprocessor of an H100."""
MAX_SPLITS = 32
MAX_ROWS = 64
"""Query rows of one attention program."""
TILE = 64
DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def paged_attention(
    qkv: torch.Tensor,
    cache: torch.Tensor,
    tables: torch.Tensor,
    starts: torch.Tensor,
    new: int,
    num_heads: int,
    num_kv_heads: int,
    block_size: int,
    scale: torch.Tensor | None = None,
    *,
    tree: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Attention of the new tokens' queries over the cache, which already holds their keys: (T, Hq D).

    qkv (B * Q, (Hq + 2 Hkv) D) with rotated queries; cache (slots, 2 Hkv D); tables (B, W) block ids; starts (B,) the
    position of each sequence's first new token; `new` is Q. In E4M3 over `scale` when that is given.

    `tree`: the new tokens are the nodes of a tree. Their keys and values are not in the cache but in its first tensor,
    (B * Q, 2 Hkv D), and which of each other they see says the second, (B, Q, Q) bool.
    """
    batch, width = tables.shape
    dim = cache.shape[1] // (2 * num_kv_heads)
    group = num_heads // num_kv_heads
    rows = min(MAX_ROWS, max(16, triton.next_power_of_2(new * group)))
    row_blocks = triton.cdiv(new * group, rows)
    pad_dim = max(16, triton.next_power_of_2(dim))
    splits = 1
    while splits < MAX_SPLITS and batch * num_kv_heads * row_blocks * splits < PROGRAMS:
        splits *= 2
    parts = batch * num_kv_heads * splits * rows * row_blocks
    acc = torch.empty(parts, pad_dim, dtype=torch.float32, device=qkv.device)
    stat = torch.empty(parts, 2, dtype=torch.float32, device=qkv.device)
    shape = {
        "QUERIES": num_heads, "KEYS": num_kv_heads, "GROUP": group, "NEW": new, "DIM": dim, "PAD_DIM": pad_dim,
        "ROWS": rows, "ROW_BLOCKS": row_blocks, "SPLITS": splits,
    }  # fmt: skip
    nodes, sees = tree if tree is not None else (cache, starts)
    _attend_kernel[(batch, num_kv_heads * row_blocks, splits)](
        qkv, cache, tables, starts, nodes, sees, acc, stat, dim**-0.5 * 1.4426950408889634, width,
        BLOCK_SIZE=block_size, TILE=TILE, TREE=tree is not None, num_warps=4, num_stages=2, **shape,
    )  # fmt: skip
    out = qkv.new_empty(batch * new, num_heads * dim, dtype=qkv.dtype if scale is None else torch.float8_e4m3fn)
    _combine_kernel[(batch * new, num_heads)](
        acc, stat, out, scale if scale is not None else qkv, E4M3_MAX,
        FP8=scale is not None, DTYPE=DTYPES[qkv.dtype], num_warps=2, **shape,
    )  # fmt: skip
    return out
