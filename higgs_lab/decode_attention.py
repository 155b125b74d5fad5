"""Attention of one query a slot over a ragged cache, as two Triton kernels.

Split-KV decoding (flash-decoding, Dao et al. 2023; the running softmax is FlashAttention's): each
slot's keys are cut into parts of equal length, each part keeps its own maximum, sum and weighted
values, a second kernel joins them. A slot's keys are read up to its own length, where SDPA reads
all slots up to the longest and hides the rest with a mask; the query heads that share a key-value
head are rows of one product, so that no key is read twice.

Needs Triton when imported; `engine.Engine` imports it where it runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64  # keys at a time
ROWS = 16  # of a product, the fewest that tl.dot takes: query heads a key-value head, padded
MAX_SPLITS = 16
PROGRAMS = 264  # that fill a GPU: two for each of 132 multiprocessors (H100, H200)


def fits(heads: int, kv_heads: int, head_dim: int) -> bool:
    """Whether the kernels are made for such heads."""
    return heads // kv_heads <= ROWS and head_dim in (16, 32, 64, 128, 256)


def splits_of(slots: int, kv_heads: int) -> int:
    """Parts of each slot's cache.

    It follows from shapes alone, for a CUDA graph keeps it while the lengths grow.
    """
    splits = 1
    while splits < MAX_SPLITS and 2 * splits * slots * kv_heads <= PROGRAMS:
        splits *= 2
    return splits


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    splits: int | None = None,
    dependent: bool = False,
    early: bool = False,
    shared: Tensor | None = None,
) -> Tensor:
    """q [B, H, d] over the first `lengths` [B] positions of caches [B, H_kv, C, d] -> [B, H, d].

    Query head h looks at key-value head h // (H / H_kv). The caches may be views of equal strides;
    what lies beyond a length is never read. Lengths are at least 1. Sums are fp32. A slot's result
    depends on its own tensors and `splits` alone, by default `splits_of`: another number of batch
    mates may round it otherwise, other mates may not. dependent: start while the kernel before ends
    (compute capability 9.0 or more); early: and let the next one begin at once (`decode_row`).
    shared: int64 [2, B], of each slot another whose cache begins with the same, and with how many
    positions: they are read there, so that all slots of one beginning but the first read it from
    the L2 cache.
    Raises ValueError for strides it cannot read.
    """
    B, H, d = q.shape
    kv_heads = keys.shape[1]
    if splits is None:
        splits = splits_of(B, kv_heads)
    if keys.stride() != values.stride() or keys.stride()[2:] != (d, 1) or not q.is_contiguous():
        raise ValueError(
            "q must be contiguous, keys and values equally strided and dense in their last two "
            f"dimensions; strides are {q.stride()}, {keys.stride()}, {values.stride()}"
        )
    out = torch.empty_like(q)
    parts, best, weight = out, out, out
    if splits > 1:
        parts = torch.empty(B * H * splits, d, dtype=torch.float32, device=q.device)
        best, weight = torch.empty(2, B * H * splits, dtype=torch.float32, device=q.device)
    shape = dict(SPLITS=splits, D=d, EARLY=early)
    more = dict(GROUP=H // kv_heads, BLOCK=BLOCK, ROWS=ROWS, **launch(4, dependent))
    strides = keys.stride()[:2]
    holders, held = (lengths, lengths) if shared is None else shared
    with torch.cuda.device_of(q):  # Triton launches on the current one
        _attend_part[(B, kv_heads, splits)](
            q, keys, values, lengths, holders, held, parts, best, weight, *strides, d**-0.5,
            **shape, **more, SHARED=shared is not None,
            num_stages=2,  # more buffers leave room for fewer programs
        )  # fmt: skip
        if splits > 1:
            _join_parts[(B * H,)](parts, best, weight, out, **shape, **launch(2, dependent))
    return out


def launch(num_warps: int, dependent: bool) -> dict:
    """Options of a kernel which, if dependent, is launched while the one before it ends."""
    return {"num_warps": num_warps, "PDL": dependent} | ({"launch_pdl": True} if dependent else {})


@triton.jit
def _attend_part(
    q, keys, values, lengths, holders, held, out, best, weight, slot_stride, head_stride, scale,
    SPLITS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, SHARED: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One part of one slot's keys, for the GROUP query heads of one key-value head.

    A part without keys leaves a maximum of -inf and zeros, which count for nothing when joined.
    """
    if PDL and EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    if PDL:
        tl.extra.cuda.gdc_wait()
    slot, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + slot).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK
    start = part * share
    end = tl.minimum(start + share, length)
    row, column = tl.arange(0, ROWS), tl.arange(0, D)
    mine = row < GROUP
    heads = tl.num_programs(1) * GROUP
    place = slot * heads + head * GROUP + row
    # .cg: past the L1 cache, which may hold what stood there when a kernel begins early
    at_query = q + place[:, None] * D + column[None, :]
    query = tl.load(at_query, mask=mine[:, None], other=0.0, cache_modifier=".cg")
    # 64 bits: the cache of 256 slots of 8192 positions has 2^31 elements
    own = slot.to(tl.int64) * slot_stride + head.to(tl.int64) * head_stride
    if SHARED:
        other = tl.load(holders + slot) * slot_stride + head.to(tl.int64) * head_stride
        common = tl.load(held + slot).to(tl.int32) // BLOCK * BLOCK
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, D], tl.float32)
    for at in range(start, end, BLOCK):
        position = at + tl.arange(0, BLOCK)
        inside = position < end
        base = own
        if SHARED:
            base = tl.where(at < common, other, own)
        key = tl.load(
            keys + base + position[None, :] * D + column[:, None], mask=inside[None, :], other=0.0
        )
        scores = tl.where(inside[None, :], tl.dot(query, key) * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shrink, chance = tl.exp(top - higher), tl.exp(scores - higher[:, None])
        value = tl.load(
            values + base + position[:, None] * D + column[None, :],
            mask=inside[:, None],
            other=0.0,
        )
        sums = sums * shrink[:, None] + tl.dot(chance.to(value.dtype), value)
        total = total * shrink + tl.sum(chance, 1)
        top = higher
    if PDL and not EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    if SPLITS == 1:
        found = (sums / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + place[:, None] * D + column[None, :], found, mask=mine[:, None])
    else:
        place = place * SPLITS + part
        tl.store(out + place[:, None] * D + column[None, :], sums, mask=mine[:, None])
        tl.store(best + place, top, mask=mine)
        tl.store(weight + place, total, mask=mine)


@triton.jit
def _join_parts(
    parts, best, weight, out,
    SPLITS: tl.constexpr, D: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The parts of one query head, each scaled to the highest maximum."""
    if PDL and EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    split, column = tl.arange(0, SPLITS), tl.arange(0, D)
    top = tl.load(best + row * SPLITS + split, cache_modifier=".cg")
    shrink = tl.exp(top - tl.max(top, 0))
    weights = tl.load(weight + row * SPLITS + split, cache_modifier=".cg")
    total = tl.sum(shrink * weights, 0)
    at = parts + (row * SPLITS + split)[:, None] * D + column[None, :]
    sums = tl.load(at, cache_modifier=".cg")
    if PDL and not EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    found = tl.sum(sums * shrink[:, None], 0) / total
    tl.store(out + row * D + column, found.to(out.dtype.element_ty))
