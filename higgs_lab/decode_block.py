"""The blocks of a decode step of few rows, in Triton: a step takes as long as reading weights does.

A product of few rows reads a matrix of many megabytes and computes next to nothing. So its sums are
cut in parts (split-K) until every multiprocessor reads, with many loads on their way, and the
kernel that follows adds the parts up, be it for a norm and the residual or for the rotary
embedding. On a GPU a kernel is launched while the one before it ends (programmatic dependent
launch), and waits for its results where it needs them. A single row has products of its own
(`decode_row`).

Needs Triton when imported and a GPU of compute capability 9.0, for which the sizes below were
measured; `engine.Engine` tries it there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from higgs_lab.decode_attention import decode_attention, launch
from higgs_lab.decode_row import normed_product, product

if TYPE_CHECKING:
    from higgs_lab.engine import Layer

MAX_ROWS = 64
PROGRAMS = 132  # multiprocessors of an H100 or H200: one program of a product each
# of a program: rows of the matrix, elements of each at a time, and how many times ahead is loaded
TILE, CHUNK, STAGES = 64, 128, 5
GATED, GATED_MANY = (64, 128, 3), (128, 64, 4)  # the same of gate and up; from 33 rows of x on
HEADS, WARPS = 8, 4  # of q, k or v that one program rotates, of one kind; its warps


def fits(hidden: int, feed_forward: int, heads: int, head_dim: int) -> bool:
    """Whether the kernels are made for blocks of such sizes."""
    lengths = (hidden, feed_forward, heads * head_dim)
    return all(n % CHUNK == 0 for n in lengths) and head_dim in (32, 64, 128, 256)


def splits_of(rows: int, length: int) -> int:
    """Parts of the sums of a matrix of so many rows, each of `length` products."""
    return max(1, min(PROGRAMS * TILE // rows, length // (2 * CHUNK)))


def decode_blocks(
    x: Tensor,
    layers: Sequence[Layer],
    norm: Tensor,
    eps: float,
    cache: Sequence[tuple[Tensor, Tensor]],
    rope: tuple[Tensor, Tensor],
    position: Tensor,
    shared: Tensor | None = None,
) -> Tensor:
    """Blocks and the last norm: x [B, D], which may be overwritten -> hidden [B, D].

    Row i is what slot i is fed at position[i]: its keys and values are written there, into caches
    [slots, H_kv, C, d], and it sees those up to there. rope: cos and sin [C, d]. shared: see
    `decode_attention`; not of a single row.
    """
    if len(x) == 1:
        return _one_row(x, layers, norm, eps, cache, rope, position)
    lengths = position + 1
    following = [*(layer.norm for layer in layers[1:]), norm]
    with torch.cuda.device_of(x):  # Triton launches on the current one
        h = add_norm(x, None, layers[0].norm, eps)
        for layer, after, (keys, values) in zip(layers, following, cache, strict=True):
            keys, values = keys[: len(x)], values[: len(x)]
            q = rotate(linear(h, layer.qkv), layer, eps, *rope, position, keys, values)
            seen = (q, keys, values, lengths)
            attended = decode_attention(*seen, dependent=x.is_cuda, shared=shared).flatten(1)
            h = add_norm(x, linear(attended, layer.out), layer.mlp_norm, eps)
            h = add_norm(x, linear(gated(h, layer.gate_up), layer.down), after, eps)
    return h


def _one_row(x, layers, norm, eps, cache, rope, position) -> Tensor:
    """`decode_blocks` of one row, whose products begin before it is there."""
    lengths, parts = position + 1, None
    with torch.cuda.device_of(x):
        for layer, (keys, values) in zip(layers, cache, strict=True):
            keys, values = keys[:1], values[:1]
            x, qkv = normed_product(x, parts, layer.norm, eps, layer.qkv, gated=False)
            q = rotate(qkv, layer, eps, *rope, position, keys, values, True)
            seen = (q, keys, values, lengths)
            attended = decode_attention(*seen, dependent=x.is_cuda, early=True).flatten(1)
            parts = product(attended, layer.out)
            x, both = normed_product(x, parts, layer.mlp_norm, eps, layer.gate_up, gated=True)
            parts = product(both, layer.down)
        return add_norm(x, parts, norm, eps)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, K], weight [N, K] -> fp32 parts [S, M, N], whose sum is x weight^T.

    K is a multiple of 128. A row is summed in one order, whatever rows there are beside it.
    """
    N, K = weight.shape
    splits = splits_of(N, K)
    out = torch.empty(splits, len(x), N, dtype=torch.float32, device=x.device)
    return _multiply(x, weight, out, splits, TILE, CHUNK, STAGES)


def gated(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, K], weight [2 F, K], gate above up -> silu(gate) * up [M, F], rounded once.

    K is a multiple of 128.
    """
    out = torch.empty(len(x), len(weight) // 2, dtype=x.dtype, device=x.device)
    return _multiply(x, weight, out, 1, *(GATED if len(x) <= 32 else GATED_MANY))


def _multiply(x, weight, out, splits: int, tile: int, chunk: int, stages: int) -> Tensor:
    (M, K), N = x.shape, len(weight)
    sizes = dict(ROWS=16 if M <= 16 else 32 if M <= 32 else MAX_ROWS, TILE=tile, CHUNK=chunk)
    _linear[triton.cdiv(N, tile), splits](
        x, weight, out, M, N, K, GATED=out.ndim == 2, **sizes, **launch(4, x.is_cuda),
        num_stages=stages,
    )  # fmt: skip
    return out


def add_norm(x: Tensor, parts: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Adds the sum of parts [S, M, D] to x [M, D] in place; returns the RMSNorm of x."""
    h, D = torch.empty_like(x), x.shape[1]
    sizes = dict(SPLITS=0 if parts is None else len(parts), D=D, BLOCK=triton.next_power_of_2(D))
    parts = x if parts is None else parts
    _add_norm[(len(x),)](x, parts, weight, h, eps, **sizes, **launch(8, x.is_cuda))
    return h


def rotate(
    parts: Tensor, layer: Layer, eps: float, cos: Tensor, sin: Tensor, position: Tensor,
    keys: Tensor, values: Tensor, early: bool = False,
) -> Tensor:  # fmt: skip
    """parts [S, M, (H + 2 H_kv) d], summing up to q, k, v -> q [M, H, d].

    For any number of rows, parts of any dtype. q and k get their norms and are rotated by cos and
    sin [C, d]; k and v go into the caches [M, H_kv, C, d], at each row's position. early: the next
    kernel may begin as this one begins (`decode_row`).
    """
    splits, M, width = parts.shape
    kv_heads, d = keys.shape[1], keys.shape[3]
    heads = width // d - 2 * kv_heads
    q = torch.empty(M, heads, d, dtype=keys.dtype, device=keys.device)
    together = min(HEADS, math.gcd(heads, kv_heads) & -math.gcd(heads, kv_heads))
    sizes = dict(SPLITS=splits, H=heads, KV=kv_heads, D=d, HEADS=together, EARLY=early)
    with torch.cuda.device_of(q):  # Triton launches on the current one
        _rotate[M, (heads + 2 * kv_heads) // together](
            parts, layer.q_norm, layer.k_norm, cos, sin, position, q, keys, values,
            *keys.stride()[:2], eps, **sizes, **launch(WARPS, keys.is_cuda),
        )  # fmt: skip
    return q


@triton.jit(do_not_specialize=["M"])
def _linear(
    x, weight, out, M, N, K,
    ROWS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, GATED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One part of the sums of TILE rows of a matrix, of gate and up in turn if GATED.

    The matrix is the left operand, 64 rows of which the tensor cores take at a time: the few rows
    of x are columns, which they take by eight.
    """
    tile, part, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    chunks = K // CHUNK
    first, last = part * chunks // splits, (part + 1) * chunks // splits
    r, m, k = tl.arange(0, TILE), tl.arange(0, ROWS), tl.arange(0, CHUNK)
    if GATED:
        width = N // 2
        n = tl.minimum(tile * (TILE // 2) + r // 2, width - 1) + r % 2 * width
    else:
        n = tl.minimum(tile * TILE + r, N - 1)
    weight_at = weight + n.to(tl.int64)[:, None] * K + (first * CHUNK + k)[None, :]
    x_at = x + (m * K)[None, :] + (first * CHUNK + k)[:, None]
    sums = tl.zeros([TILE, ROWS], tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for _ in range(first, last):
        mine = tl.load(x_at, mask=(m < M)[None, :], other=0.0)
        sums = tl.dot(tl.load(weight_at), mine, sums)
        weight_at += CHUNK
        x_at += CHUNK
    if PDL:  # not before, or the next kernel's programs take the place of this one's
        tl.extra.cuda.gdc_launch_dependents()
    if GATED:
        pairs = tl.permute(tl.reshape(sums, (TILE // 2, 2, ROWS)), (0, 2, 1))
        gate, up = tl.split(pairs)
        sums = gate / (1 + tl.exp(-gate)) * up
        n = tile * (TILE // 2) + tl.arange(0, TILE // 2)
    else:
        width = N
        n = tile * TILE + r
    at = out + ((part * M + m) * width)[:, None] + n[None, :]
    inside = (m < M)[:, None] & (n < width)[None, :]
    tl.store(at, tl.trans(sums).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_norm(
    x, parts, weight, h, eps,
    SPLITS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row."""
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside = column < D
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    # .cg: past the L1 cache, see `decode_row`
    total = tl.load(x + row * D + column, mask=inside, other=0.0, cache_modifier=".cg").to(
        tl.float32
    )
    for part in tl.static_range(SPLITS):
        at = parts + (part * tl.num_programs(0) + row) * D + column
        total += tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if SPLITS > 0:
        rounded = total.to(x.dtype.element_ty)
        tl.store(x + row * D + column, rounded, mask=inside)
        total = rounded.to(tl.float32)
    total *= tl.rsqrt(tl.sum(total * total, 0) / D + eps)
    tl.store(h + row * D + column, (total * scale).to(h.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(
    parts, q_norm, k_norm, cos, sin, position, q, keys, values, slot_stride, head_stride, eps,
    SPLITS: tl.constexpr, H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr,
    HEADS: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one row, all of q, of k or of v, as the halves that the rotation mixes."""
    row, first = tl.program_id(0), tl.program_id(1) * HEADS
    HALF: tl.constexpr = D // 2
    head, half = first + tl.arange(0, HEADS), tl.arange(0, HALF)
    if PDL and EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    if PDL:
        tl.extra.cuda.gdc_wait()
    low, high = tl.zeros([HEADS, HALF], tl.float32), tl.zeros([HEADS, HALF], tl.float32)
    for part in tl.static_range(SPLITS):
        at = (part * tl.num_programs(0) + row) * (H + 2 * KV) + head
        at = parts + at[:, None] * D + half[None, :]
        low += tl.load(at, cache_modifier=".cg")
        high += tl.load(at + HALF, cache_modifier=".cg")
    here = tl.load(position + row)
    if first < H + KV:
        scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / D + eps)[:, None]
        norm = q_norm
        if first >= H:
            norm = k_norm
        low *= scale * tl.load(norm + half).to(tl.float32)[None, :]
        high *= scale * tl.load(norm + HALF + half).to(tl.float32)[None, :]
        # both halves of cos and sin are the same
        c = tl.load(cos + here * D + half).to(tl.float32)[None, :]
        s = tl.load(sin + here * D + half).to(tl.float32)[None, :]
        low, high = low * c - high * s, high * c + low * s
    if PDL and not EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    # 64 bits: the cache of 256 slots of 8192 positions has 2^31 elements
    there = row.to(tl.int64) * slot_stride + here * D
    to = q + (row * H + head) * D
    if first >= H + KV:
        to = values + there + (head - H - KV) * head_stride
    elif first >= H:
        to = keys + there + (head - H) * head_stride
    to = to[:, None] + half[None, :]
    tl.store(to, low.to(q.dtype.element_ty))
    tl.store(to + HALF, high.to(q.dtype.element_ty))
