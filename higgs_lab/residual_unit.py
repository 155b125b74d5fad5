"""DAC's residual unit as one Triton kernel: both convolutions, both activations and the sum.

x + conv2(snake(conv1(snake(x)))), where conv1 has seven far apart taps and conv2 one. By cuDNN and
`snake` that is four kernels, which read and write ten tensors of a clip's full length; here two are
read and two written, and what lies between stays in registers. With few channels, at the end of the
decoder and the beginning of the encoder, reading and writing is all that such a unit costs.

Needs Triton when imported, channels last in memory and half precision; `runs_for` says where.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from higgs_lab.snake import activated, snake_in_torch
from higgs_lab.trial import kernels_agree

# by channels: steps of a program, channels summed at a time, warps, how many loads are ahead
SIZES = {32: (128, 32, 4, 3), 64: (64, 64, 4, 3), 128: (128, 64, 4, 3), 256: (64, 64, 8, 4)}
TAPS = 7
LEAST = 1 << 24  # elements, 22 s of 32 channels: a kernel takes a second to compile, once a machine


def runs_for(unit: nn.Module, active: Tensor) -> bool:
    """Whether `residual_unit` takes this unit, and is worth it, of active [B, C, T], C last."""
    conv, (B, C, T) = unit.conv1, active.shape
    return (
        active.is_cuda
        and C in SIZES
        and B * C * T >= LEAST
        and C * T < 2**31
        and conv.kernel_size == (TAPS,)
        and unit.conv2.kernel_size == (1,)
        and 2 * conv.padding[0] == conv.dilation[0] * (TAPS - 1)
        and _runs(active.device, active.dtype, C)
    )


def residual_unit(
    unit: nn.Module, active: Tensor, trunk: Tensor, alpha: Tensor, ends: Tensor, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """active [B, C, T]: snake1 of the trunk [B, C, T], zero behind a clip's end; both with channels
    last in memory. alpha: of the Snake that follows; ends [B]: steps of each clip.

    Returns (what that Snake gives, zero behind the ends; the trunk if keep else None).
    """
    first, second, dtype = unit.conv1, unit.conv2, active.dtype
    B, C, T = active.shape
    steps, chunk, warps, stages = SIZES[C]
    taps = first.weight.to(dtype).permute(2, 1, 0).contiguous()
    mix = second.weight[:, :, 0].to(dtype).t().contiguous()
    made, kept = torch.empty_like(active), torch.empty_like(active) if keep else None
    with torch.cuda.device_of(active):  # Triton launches on the current one
        _unit[triton.cdiv(T, steps), B](
            active, trunk, taps, first.bias, unit.snake2.alpha, mix, second.bias, alpha, ends,
            made, kept if keep else made, T, first.dilation[0], int(keep), C=C, TAPS=TAPS,
            STEPS=steps, CHUNK=chunk, FAST=active.is_cuda, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return made, kept


@triton.jit(do_not_specialize=["T", "dilation", "keep"])  # one compilation a number of channels
def _unit(
    active, trunk, taps, bias1, alpha2, mix, bias2, alpha3, ends, made, kept, T, dilation, keep,
    C: tl.constexpr, TAPS: tl.constexpr, STEPS: tl.constexpr, CHUNK: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """STEPS steps of one clip. active, trunk, made, kept: [B, T, C] in memory; taps [TAPS, C, C]
    and mix [C, C] have the channels that are summed first."""
    clip = tl.program_id(1)
    step, channel = tl.program_id(0) * STEPS + tl.arange(0, STEPS), tl.arange(0, C)
    at = clip.to(tl.int64) * T * C + step[:, None] * C + channel[None, :]
    end = tl.load(ends + clip)
    if tl.program_id(0) * STEPS >= end:  # only what fills the batch up
        nothing = tl.zeros([STEPS, C], made.dtype.element_ty)
        tl.store(made + at, nothing, mask=(step < T)[:, None])
        if keep:
            tl.store(kept + at, nothing, mask=(step < T)[:, None])
        return
    part = tl.arange(0, CHUNK)
    x_at = active + clip.to(tl.int64) * T * C + part[None, :]
    w_at = taps + part[:, None] * C + channel[None, :]
    x = tl.zeros([STEPS, C], tl.float32)
    PARTS: tl.constexpr = C // CHUNK
    for i in range(TAPS * PARTS):
        there = step + (i // PARTS - TAPS // 2) * dilation
        some = tl.load(
            x_at + there[:, None] * C + i % PARTS * CHUNK,
            mask=((there >= 0) & (there < T))[:, None],
            other=0.0,
        )
        x = tl.dot(some, tl.load(w_at + i * CHUNK * C), x)
    x += tl.load(bias1 + channel).to(tl.float32)[None, :]
    x = activated(x, tl.load(alpha2 + channel)[None, :], FAST).to(active.dtype.element_ty)
    weight = tl.load(mix + channel[:, None] * C + channel[None, :])
    x = tl.dot(x, weight) + tl.load(bias2 + channel).to(tl.float32)[None, :]
    x += tl.load(trunk + at, mask=(step < T)[:, None], other=0.0).to(tl.float32)
    if keep:
        tl.store(kept + at, x.to(kept.dtype.element_ty), mask=(step < T)[:, None])
    x = activated(x, tl.load(alpha3 + channel)[None, :], FAST)
    x = tl.where((step < end)[:, None], x, 0.0)
    tl.store(made + at, x.to(made.dtype.element_ty), mask=(step < T)[:, None])


def unit_in_torch(
    unit: nn.Module, active: Tensor, trunk: Tensor, alpha: Tensor, ends: Tensor, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """`residual_unit` by PyTorch's functions, sums in fp32."""
    y = nn.functional.conv1d(
        active.float(), unit.conv1.weight.float(), padding=unit.conv1.padding,
        dilation=unit.conv1.dilation,
    )  # fmt: skip
    y, _ = snake_in_torch(y, unit.conv1.bias, unit.snake2.alpha, ends)
    y = nn.functional.conv1d(y, unit.conv2.weight.float())
    made, kept = snake_in_torch(y, unit.conv2.bias, alpha, ends, trunk, keep)
    return made.to(active.dtype), kept.to(active.dtype) if keep else None


@cache
def _runs(device: torch.device, dtype: torch.dtype, channels: int) -> bool:
    """Whether the kernel runs here and is right; what a card has no room for is no surprise."""

    def results() -> Iterator[tuple[Tensor, Tensor]]:
        given = example(channels, device, dtype)
        inside = given[2].any(1, keepdim=True)  # the trunk is anything behind a clip's end
        for made, wanted in zip(residual_unit(*given), unit_in_torch(*given), strict=True):
            yield made * inside, wanted * inside

    def fits() -> bool:
        steps, chunk, _, stages = SIZES[channels]
        loads, mix = stages * chunk * (steps + channels), channels * (steps + channels)
        room = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
        return max(loads, mix) * dtype.itemsize + 1024 <= room

    otherwise = f"the codec's residual units of {channels} channels are four kernels each"
    return kernels_agree(device, dtype, fits, results, otherwise)


@torch.no_grad()
def example(channels: int, device: torch.device, dtype: torch.dtype, steps: int = 300) -> tuple:
    """Arguments of `residual_unit`: two clips, the second shorter, whose steps behind its end are
    filled with zeros."""
    from transformers.models.dac.modeling_dac import DacResidualUnit

    with torch.device("meta"):  # drawing weights would move the caller's random numbers on
        unit = DacResidualUnit(channels, dilation=3)
    unit, random = unit.to_empty(device=device), torch.Generator().manual_seed(channels)
    for parameter in unit.parameters():
        drawn = torch.randn(parameter.shape, generator=random) / parameter[0].numel() ** 0.5
        parameter.copy_(drawn)
    alpha = torch.rand(unit.snake1.alpha.shape, generator=random).to(device)
    unit.snake2.alpha.copy_(1 + alpha)
    ends = torch.tensor([steps, steps // 3], dtype=torch.int32, device=device)
    active, trunk = torch.randn(2, 2, steps, channels, generator=random).to(device, dtype)
    inside = torch.arange(steps, device=device)[:, None] < ends[:, None, None]
    active, trunk = ((t * inside).transpose(1, 2) for t in (active, trunk))
    return unit, active, trunk, alpha, ends, True
