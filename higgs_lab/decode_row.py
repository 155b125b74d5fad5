"""Products of a decode step of one row, in Triton: weights are read without a pause between them.

A product of one row takes as long as reading its matrix; what is left to save is the time in which
nothing is read, since each kernel waits for the one before it. Here a program keeps the row in
registers and goes through its share of the matrix in small tiles, and it asks for the first of them
before the row is there: every kernel of such a step lets the next one begin as it begins itself
(programmatic dependent launch), which fills its shared memory with weights and then waits. The
residual sum and the norm before a product are computed by each of its programs anew, as the row is
short.

A kernel that begins early has older ones beside it. They may leave in the L1 cache what yet others
then overwrite, and waiting does not clean it: so what a kernel has written, those that begin early
read past that cache (".cg"), all but positions, which no kernel of the blocks writes. Without, some
recordings of 36 blocks gave other results each time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from higgs_lab.decode_attention import launch

# Measured on an H100: two programs a multiprocessor, the bytes of a tile, warps, and parts that
# sums not behind a norm are cut in; of so many tiles one is worked on, the others are on their way
PROGRAMS, TILE_BYTES, WARPS, SPLITS = 264, 24 << 10, 4, 2
SHARED_BYTES = 200 << 10  # of a multiprocessor's, for the tiles of larger models
STAGES, STAGES_NORMED = 5, 4  # the latter of what attention follows, whose kernels want room


def normed_product(
    x: Tensor, parts: Tensor | None, norm: Tensor, eps: float, weight: Tensor, gated: bool
) -> tuple[Tensor, Tensor]:
    """x [1, K] plus the sum of parts [S, 1, K], rounded, and the product of its RMSNorm.

    weight [N, K] -> fp32 [1, 1, N]; gated: gate above up, silu(gate) * up [1, N / 2], rounded once.
    Returns the sum, which is x without parts, and the product.
    """
    total = x if parts is None else torch.empty_like(x)
    count = 0 if parts is None else len(parts)
    given = (x, weight, x if parts is None else parts, norm, total, eps)
    stages = STAGES if gated else STAGES_NORMED
    return total, _multiply(*given, stages, 1, NORM=True, PARTS=count, GATED=gated)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [1, K], weight [N, K] -> fp32 parts [S, 1, N], whose sum is x weight^T."""
    return _multiply(x, weight, x, x, x, 0.0, STAGES, SPLITS, NORM=False, PARTS=0, GATED=False)


def _multiply(
    x, weight, parts, norm, total, eps, stages, splits, NORM: bool, PARTS: int, GATED: bool
) -> Tensor:
    N, K = weight.shape
    length = K // splits
    tile = _floor(max(2, TILE_BYTES // (weight.element_size() * length)))
    front = _floor(length)
    back = triton.next_power_of_2(length - front) if length > front else 0
    while (stages - 1) * tile * (front + back) * weight.element_size() > SHARED_BYTES:
        stages -= 1
    out = (
        torch.empty(1, N // 2, dtype=x.dtype, device=x.device)
        if GATED
        else torch.empty(splits, 1, N, dtype=torch.float32, device=x.device)
    )
    programs = min(PROGRAMS // splits, triton.cdiv(N, tile))
    _row_product[programs, splits](
        x, weight, parts, norm, total, out, eps, N, K, length, TILE=tile, FRONT=front, BACK=back,
        STAGES=stages, NORM=NORM, PARTS=PARTS, GATED=GATED, **launch(WARPS, x.is_cuda),
        num_stages=stages,
    )  # fmt: skip
    return out


def _floor(n: int) -> int:
    """The largest power of two up to n."""
    return 1 << n.bit_length() - 1


@triton.jit
def _row_product(
    x, weight, parts, norm, total, out, eps, N, K, length,
    TILE: tl.constexpr, FRONT: tl.constexpr, BACK: tl.constexpr, STAGES: tl.constexpr,
    NORM: tl.constexpr, PARTS: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Every so-manieth tile of a matrix, by one part of the row, which is a front and a back.

    Both are a power of two long, the back with a rest that is nothing.
    """
    first, step, split = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    r, a = tl.arange(0, TILE), tl.arange(0, FRONT)
    b = FRONT + tl.arange(0, BACK if BACK > 0 else 1)
    inside = b < length
    a += split * length
    b += split * length
    front, back = tl.zeros([FRONT], tl.float32), tl.zeros([BACK if BACK > 0 else 1], tl.float32)
    scale = 1.0
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    for tile in tl.range(first, tl.cdiv(N, TILE), step, num_stages=STAGES):
        if GATED:
            width = N // 2
            n = tl.minimum(tile * (TILE // 2) + r // 2, width - 1) + r % 2 * width
        else:
            n = tl.minimum(tile * TILE + r, N - 1)
        rows = weight + n.to(tl.int64)[:, None] * K
        in_front = tl.load(rows + a[None, :])
        if BACK > 0:
            in_back = tl.load(rows + b[None, :], mask=inside[None, :], other=0.0)
        if tile == first:  # by now the first tiles of all stages are on their way
            if PDL:
                tl.extra.cuda.gdc_wait()
            front, power = _part_of_row(
                x, parts, norm, total, a, a >= 0, first == 0, K, NORM=NORM, PARTS=PARTS
            )
            if BACK > 0:
                back, more = _part_of_row(
                    x, parts, norm, total, b, inside, first == 0, K, NORM=NORM, PARTS=PARTS
                )
                power += more
            if NORM:
                scale = tl.rsqrt(power / K + eps)
        sums = tl.sum(in_front.to(tl.float32) * front[None, :], 1)
        if BACK > 0:
            sums += tl.sum(in_back.to(tl.float32) * back[None, :], 1)
        sums *= scale
        if GATED:
            gate, up = tl.split(tl.reshape(sums, (TILE // 2, 2)))
            both = gate / (1 + tl.exp(-gate)) * up
            pair = tile * (TILE // 2) + tl.arange(0, TILE // 2)
            tl.store(out + pair, both.to(out.dtype.element_ty), mask=pair < N // 2)
        else:
            place = tile * TILE + r
            tl.store(out + split * N + place, sums, mask=place < N)


@triton.jit
def _part_of_row(
    x, parts, norm, total, at, inside, stores, K, NORM: tl.constexpr, PARTS: tl.constexpr
):
    """The row as the product takes it, but for the norm's scale, and its sum of squares."""
    value = tl.load(x + at, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    for part in tl.static_range(PARTS):
        value += tl.load(parts + part * K + at, mask=inside, other=0.0, cache_modifier=".cg")
    if PARTS > 0:
        rounded = value.to(x.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside & stores)
        value = rounded.to(tl.float32)
    power = tl.sum(value * value, 0)
    if NORM:
        value *= tl.load(norm + at, mask=inside, other=0.0).to(tl.float32)
    return value, power
