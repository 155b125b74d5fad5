"""What the way back of a block computes between its products, as two Triton kernels.

The compiler makes kernels as fast of the same lines, but writes their results apart: gradients of
q, k and v then go through three products whose outputs are added, those of gate and up through two.
Here they are parts of one tensor, and one product follows. It joins such parts only by a pass over
them, or by computing them twice.

Needs Triton when imported.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 2048  # of a row at a time
POSITIONS = 16  # of one head at a time


def swiglu_back(d_acted: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Of silu(gate) * up: the gradient of [gate | up] [N, 2 F], and the product again [N, F].

    d_acted: the product's gradient [N, F].
    """
    N, F = d_acted.shape
    d_acted, gate_up = d_acted.contiguous(), gate_up.contiguous()
    d_gate_up, acted = torch.empty_like(gate_up), torch.empty_like(d_acted)
    _swiglu_back[(N, triton.cdiv(F, COLUMNS))](d_acted, gate_up, d_gate_up, acted, F, COLUMNS)
    return d_gate_up, acted


@triton.jit
def _swiglu_back(d_acted, gate_up, d_gate_up, acted, F, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < F
    dy = tl.load(d_acted + row * F + column, mask=inside).to(tl.float32)
    gate = tl.load(gate_up + row * 2 * F + column, mask=inside).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + column, mask=inside).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    d_gate = dy * up * (sigmoid + silu * (1 - sigmoid))
    dtype = acted.dtype.element_ty
    tl.store(d_gate_up + row * 2 * F + column, d_gate.to(dtype), mask=inside)
    tl.store(d_gate_up + row * 2 * F + F + column, (dy * silu).to(dtype), mask=inside)
    tl.store(acted + row * F + column, (silu * up).to(dtype), mask=inside)


def heads_back(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, q_norm: Tensor, k_norm: Tensor,
    cos: Tensor, sin: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """Back through the rotary embedding and the norms of heads: the gradient of qkv [N, O].

    dq [N, H, d], dk and dv [N, H_kv, d], dense; qkv as it came out of its product; cos, sin
    [N, 1, d].
    """
    N, H, d = dq.shape
    kv_heads = dk.shape[1]
    d_qkv = torch.empty_like(qkv)
    _heads_back[(triton.cdiv(N, POSITIONS), H + 2 * kv_heads)](
        dq, dk, dv, qkv, q_norm, k_norm, cos, sin, d_qkv, N, eps, H, kv_heads, d // 2, POSITIONS
    )
    return d_qkv


@triton.jit
def _heads_back(
    dq, dk, dv, qkv, q_norm, k_norm, cos, sin, d_qkv, N, eps,
    H: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Some positions of one head, whose halves the rotary embedding mixes."""
    head = tl.program_id(1)
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)[:, None]
    inside = position < N
    left = tl.arange(0, HALF)[None, :]
    right = left + HALF
    whole = position.to(tl.int64) * ((H + 2 * KV_HEADS) * 2 * HALF) + head * 2 * HALF
    dtype = d_qkv.dtype.element_ty
    if head >= H + KV_HEADS:
        of = dv + (position * KV_HEADS + head - H - KV_HEADS) * 2 * HALF
        tl.store(d_qkv + whole + left, tl.load(of + left, mask=inside), mask=inside)
        tl.store(d_qkv + whole + right, tl.load(of + right, mask=inside), mask=inside)
    else:
        if head < H:
            of = dq + (position * H + head) * 2 * HALF
            norm = q_norm
        else:
            of = dk + (position * KV_HEADS + head - H) * 2 * HALF
            norm = k_norm
        dy1 = tl.load(of + left, mask=inside, other=0.0).to(tl.float32)
        dy2 = tl.load(of + right, mask=inside, other=0.0).to(tl.float32)
        turn = position * 2 * HALF
        cos1 = tl.load(cos + turn + left, mask=inside, other=0.0).to(tl.float32)
        cos2 = tl.load(cos + turn + right, mask=inside, other=0.0).to(tl.float32)
        sin1 = tl.load(sin + turn + left, mask=inside, other=0.0).to(tl.float32)
        sin2 = tl.load(sin + turn + right, mask=inside, other=0.0).to(tl.float32)
        pulled1 = (dy1 * cos1 + dy2 * sin2) * tl.load(norm + left).to(tl.float32)
        pulled2 = (dy2 * cos2 - dy1 * sin1) * tl.load(norm + right).to(tl.float32)
        x1 = tl.load(qkv + whole + left, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(qkv + whole + right, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, 1) / (2 * HALF) + eps)[:, None]
        x1, x2 = x1 * scale, x2 * scale
        along = (tl.sum(pulled1 * x1 + pulled2 * x2, 1) / (2 * HALF))[:, None]
        tl.store(d_qkv + whole + left, (scale * (pulled1 - x1 * along)).to(dtype), mask=inside)
        tl.store(d_qkv + whole + right, (scale * (pulled2 - x2 * along)).to(dtype), mask=inside)
