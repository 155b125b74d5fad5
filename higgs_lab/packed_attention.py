"""Causal attention within the documents of a pack, forth and back, as Triton kernels.

FlashAttention 2 (Dao 2023) for short documents and grouped heads: the query heads that share a
key-value head are rows of one product, so that a tile holds few positions, which wastes little
beyond the diagonal of a document of some hundred positions, and reads its keys once for all of
them. Where a document begins is told to each position, so that a tile may hold parts of two and
needs no list of tiles; what lies before the first one's begin is never read. The way back takes
two kernels, one over queries and one over keys: each adds up in registers, in the order of the
pack, and so nothing is added in memory, where the order of sums would change from run to run.

What is hidden counts nothing unless it is no number: a NaN or an infinity reaches other documents
of its tile. Offsets are of 32 bits: 349,000 positions of the 4B shape. Needs Triton when imported.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

LOWEST = tl.constexpr(-1.0e30)  # of a hidden key; an infinity less itself would be no number
LOG2_E = 1.4426950408889634
# (rows: positions times the query heads of a key-value head; keys; warps; buffers) at a time, the
# fastest on an H100 for documents of 150 to 700 positions with 32 and 8 heads of 128. Of KEYS_BACK
# the keys must be a multiple of the positions.
FORTH = (64, 32, 4, 3)
QUERIES_BACK = (64, 32, 4, 2)
KEYS_BACK = (32, 64, 4, 3)


def fits(heads: int, kv_heads: int, head_dim: int) -> bool:
    """Whether the kernels are made for such heads."""
    return heads in (kv_heads * n for n in (1, 2, 4, 8)) and head_dim in (16, 32, 64, 128)


class PackedAttention(torch.autograd.Function):
    """q [L, H, d], k and v [L, H_kv, d] -> [L, H, d].

    starts, ends: int32 [L], `attention.document_spans`. A position's heads must be dense, positions
    may lie apart, as those of views of one product do; raises ValueError for other strides.
    """

    @staticmethod
    def forward(ctx, q, k, v, starts, ends):
        out, lse = forth(q, k, v, starts)
        ctx.save_for_backward(q, k, v, starts, ends, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        return *back(d_out.contiguous(), *ctx.saved_tensors), None, None


def forth(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """-> attention [L, H, d], and the logarithms (base 2) of the sums of exponentials [L, H]."""
    L, H, d = q.shape
    kv_heads = k.shape[1]
    rows, keys, warps, stages = FORTH
    tile = rows * kv_heads // H  # positions
    out = torch.empty(L, H, d, dtype=q.dtype, device=q.device)
    lse = torch.empty(L, H, dtype=torch.float32, device=q.device)
    shape = dict(H=H, GROUP=H // kv_heads, D=d, TILE=tile, KEYS=keys)
    with torch.cuda.device_of(q):
        _forth[(triton.cdiv(L, tile), kv_heads)](
            q, k, v, starts, out, lse, L, *_apart(q, k, v), d**-0.5 * LOG2_E, **shape,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out, lse


def back(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, ends: Tensor, out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q [L, H, d], k and v [L, H_kv, d], from what `forth` gave.

    out [L, H, d], lse [L, H] and out's gradient d_out [L, H, d] are dense.
    """
    L, H, d = q.shape
    kv_heads = k.shape[1]
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    delta = torch.empty_like(lse)
    shape = dict(H=H, GROUP=H // kv_heads, D=d)
    scale, apart = d**-0.5, _apart(q, k, v)
    with torch.cuda.device_of(q):
        rows, keys, warps, stages = QUERIES_BACK
        tile = rows * kv_heads // H
        _queries_back[(triton.cdiv(L, tile), kv_heads)](
            q, k, v, starts, out, d_out, lse, delta, dq, L, *apart, scale * LOG2_E, scale,
            **shape, TILE=tile, KEYS=keys, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        rows, keys, warps, stages = KEYS_BACK
        tile = rows * kv_heads // H
        _keys_back[(triton.cdiv(L, keys), kv_heads)](
            q, k, v, starts, ends, d_out, lse, delta, dk, dv, L, *apart, scale * LOG2_E,
            scale, **shape, KEYS=keys, TILE=tile, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return dq, dk, dv


def _apart(*heads: Tensor) -> tuple[int, ...]:
    """Elements from a position to the next."""
    for t in heads:
        if t.stride()[1:] != (t.shape[2], 1):
            raise ValueError(f"the heads of a position must be dense; strides are {t.stride()}")
    return tuple(t.stride(0) for t in heads)


@triton.jit(do_not_specialize=["L"])
def _forth(
    q, k, v, starts, out, lse, L, q_apart, k_apart, v_apart, scale,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A tile of TILE positions of the GROUP query heads of one key-value head."""
    position, query_head, inside, start, lowest, seen, end = _queries(starts, L, GROUP, TILE, KEYS)
    head, column = tl.program_id(1), tl.arange(0, D)
    place = position * H + query_head
    query = tl.load(q + (position * q_apart + query_head * D)[:, None] + column[None, :])
    top = tl.full([TILE * GROUP], LOWEST, tl.float32)
    total = tl.zeros([TILE * GROUP], tl.float32)
    sums = tl.zeros([TILE * GROUP, D], tl.float32)
    for at in range(lowest, seen, KEYS):
        top, total, sums = _forth_step(
            query, k, v, at, position, start, top, total, sums, L, head,
            k_apart, v_apart, scale, D, KEYS, False,
        )  # fmt: skip
    for at in range(seen, end, KEYS):
        top, total, sums = _forth_step(
            query, k, v, at, position, start, top, total, sums, L, head,
            k_apart, v_apart, scale, D, KEYS, True,
        )  # fmt: skip
    tl.store(lse + place, top + tl.log2(total), mask=inside)
    found = (sums / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + place[:, None] * D + column[None, :], found, mask=inside[:, None])


@triton.jit
def _queries(starts, L, GROUP: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr):
    """Of this program's tile, by row: position, query head, whether it is inside of the pack, where
    its document begins. Then keys: the first that any row sees, the first that not every row sees,
    and the one after the last."""
    first = tl.program_id(0) * TILE
    end = tl.minimum(first + TILE, L)
    row = tl.arange(0, TILE * GROUP)
    position = tl.minimum(first + row // GROUP, L - 1)  # beyond the pack: the last one again
    inside = first + row // GROUP < L
    query_head = tl.program_id(1) * GROUP + row % GROUP
    start = tl.load(starts + position)
    lowest = tl.load(starts + first)
    seen = lowest + (first - lowest) // KEYS * KEYS  # whole steps before the tile
    seen = tl.where(tl.load(starts + end - 1) == lowest, seen, lowest)  # none, if it holds several
    return position, query_head, inside, start, lowest, seen, end


@triton.jit
def _forth_step(
    query, k, v, at, position, start, top, total, sums, L, head,
    k_apart, v_apart, scale, D: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    column, near = tl.arange(0, D), at + tl.arange(0, KEYS)
    place = near
    if MASKED:
        place = tl.minimum(near, L - 1)
    key = tl.load(k + head * D + place[None, :] * k_apart + column[:, None])
    scores = tl.dot(query, key) * scale
    if MASKED:
        sees = (near[None, :] <= position[:, None]) & (near[None, :] >= start[:, None])
        scores = tl.where(sees, scores, LOWEST)
    higher = tl.maximum(top, tl.max(scores, 1))
    shrink, chance = tl.exp2(top - higher), tl.exp2(scores - higher[:, None])
    value = tl.load(v + head * D + place[:, None] * v_apart + column[None, :])
    sums = tl.dot(chance.to(value.dtype), value, sums * shrink[:, None])
    total = total * shrink + tl.sum(chance, 1)
    return higher, total, sums


@triton.jit(do_not_specialize=["L"])
def _queries_back(
    q, k, v, starts, out, d_out, lse, delta, dq, L, q_apart, k_apart, v_apart,
    scale, factor,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of queries; and each row's sum of out * d_out, for `_keys_back`."""
    position, query_head, inside, start, lowest, seen, end = _queries(starts, L, GROUP, TILE, KEYS)
    head, column = tl.program_id(1), tl.arange(0, D)
    place = position * H + query_head
    where = place[:, None] * D + column[None, :]
    grad = tl.load(d_out + where)
    less = tl.sum(grad.to(tl.float32) * tl.load(out + where).to(tl.float32), 1)
    tl.store(delta + place, less, mask=inside)
    query = tl.load(q + (position * q_apart + query_head * D)[:, None] + column[None, :])
    log = tl.load(lse + place)
    sums = tl.zeros([TILE * GROUP, D], tl.float32)
    for at in range(lowest, seen, KEYS):
        sums = _queries_back_step(
            query, grad, k, v, at, position, start, log, less, sums, L, head,
            k_apart, v_apart, scale, D, KEYS, False,
        )  # fmt: skip
    for at in range(seen, end, KEYS):
        sums = _queries_back_step(
            query, grad, k, v, at, position, start, log, less, sums, L, head,
            k_apart, v_apart, scale, D, KEYS, True,
        )  # fmt: skip
    tl.store(dq + where, (sums * factor).to(dq.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _queries_back_step(
    query, grad, k, v, at, position, start, log, less, sums, L, head,
    k_apart, v_apart, scale, D: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    column, near = tl.arange(0, D), at + tl.arange(0, KEYS)
    place = near
    if MASKED:
        place = tl.minimum(near, L - 1)
    key = tl.load(k + head * D + place[:, None] * k_apart + column[None, :])
    value = tl.load(v + head * D + place[:, None] * v_apart + column[None, :])
    chance = tl.exp2(tl.dot(query, tl.trans(key)) * scale - log[:, None])
    if MASKED:
        sees = (near[None, :] <= position[:, None]) & (near[None, :] >= start[:, None])
        chance = tl.where(sees, chance, 0.0)
    d_scores = chance * (tl.dot(grad, tl.trans(value)) - less[:, None])
    return tl.dot(d_scores.to(key.dtype), key, sums)


@triton.jit(do_not_specialize=["L"])
def _keys_back(
    q, k, v, starts, ends, d_out, lse, delta, dk, dv, L, q_apart, k_apart, v_apart,
    scale, factor,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of keys and values of one head, from the positions after them."""
    first, head = tl.program_id(0) * KEYS, tl.program_id(1)
    column, near = tl.arange(0, D), first + tl.arange(0, KEYS)
    known = tl.minimum(near, L - 1)
    end = tl.load(ends + known)
    last = tl.minimum(first + KEYS, L) - 1
    highest = tl.load(ends + last)
    key = tl.load(k + head * D + known[:, None] * k_apart + column[None, :])
    value = tl.load(v + head * D + known[:, None] * v_apart + column[None, :])
    d_key = tl.zeros([KEYS, D], tl.float32)
    d_value = tl.zeros([KEYS, D], tl.float32)
    # from `begun` to `sees_all`, every position sees every key of the tile
    begun = tl.minimum(first + KEYS, highest)
    sees_all = begun + (highest - begun) // TILE * TILE
    spans = tl.load(starts + first) != tl.load(starts + last)
    begun = tl.where(spans, highest, begun)
    sees_all = tl.where(spans, highest, sees_all)
    for at in range(first, begun, TILE):
        d_key, d_value = _keys_back_step(
            key, value, q, d_out, lse, delta, at, near, end, d_key, d_value, L, head,
            q_apart, scale, H, GROUP, D, TILE, True,
        )  # fmt: skip
    for at in range(begun, sees_all, TILE):
        d_key, d_value = _keys_back_step(
            key, value, q, d_out, lse, delta, at, near, end, d_key, d_value, L, head,
            q_apart, scale, H, GROUP, D, TILE, False,
        )  # fmt: skip
    for at in range(sees_all, highest, TILE):
        d_key, d_value = _keys_back_step(
            key, value, q, d_out, lse, delta, at, near, end, d_key, d_value, L, head,
            q_apart, scale, H, GROUP, D, TILE, True,
        )  # fmt: skip
    where = (known * (H // GROUP) + head)[:, None] * D + column[None, :]
    inside = near[:, None] < L
    tl.store(dk + where, (d_key * factor).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + where, d_value.to(dv.dtype.element_ty), mask=inside)


@triton.jit
def _keys_back_step(
    key, value, q, d_out, lse, delta, at, near, end, d_key, d_value, L, head,
    q_apart, scale, H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    row, column = tl.arange(0, TILE * GROUP), tl.arange(0, D)
    position = at + row // GROUP
    known = position
    if MASKED:
        known = tl.minimum(position, L - 1)
    query_head = head * GROUP + row % GROUP
    place = known * H + query_head
    query = tl.load(q + (known * q_apart + query_head * D)[:, None] + column[None, :])
    grad = tl.load(d_out + place[:, None] * D + column[None, :])
    log, less = tl.load(lse + place), tl.load(delta + place)
    chance = tl.exp2(tl.dot(key, tl.trans(query)) * scale - log[None, :])  # [KEYS, rows]
    if MASKED:
        sees = (position[None, :] >= near[:, None]) & (position[None, :] < end[:, None])
        chance = tl.where(sees, chance, 0.0)
    d_value = tl.dot(chance.to(grad.dtype), grad, d_value)
    d_scores = chance * (tl.dot(value, tl.trans(grad)) - less[None, :])
    d_key = tl.dot(d_scores.to(query.dtype), query, d_key)
    return d_key, d_value
