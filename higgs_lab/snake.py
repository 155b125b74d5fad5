"""DAC's Snake activation with what surrounds it, as one kernel: read once, written once.

y + bias [+ trunk] -> x + sin(alpha x)^2 / (alpha + 1e-9), zero from each clip's end on. Sums are
fp32, whatever is read and written; on the CPU, or where Triton cannot compile, the same in PyTorch.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # builds of PyTorch without CUDA lack it
    triton = None

BLOCK = 1024  # elements of a program; 4 warps, 8 elements a thread: 16 bytes of bf16


def is_channels_last(x: Tensor) -> bool:
    """Whether x [B, C, T] lies in memory as [B, T, C]; a single channel lies both ways."""
    return x.stride(1) == 1 and x.transpose(1, 2).is_contiguous()


def lay_channels_last(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def snake(
    y: Tensor,
    bias: Tensor,
    alpha: Tensor,
    ends: Tensor,
    trunk: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """y [B, C, T], a convolution's output without its bias [C]; alpha has C elements; ends [B].

    Returns (the activation, y + bias + trunk if keep else None), both of y's dtype and with
    channels last if y has; of clip i only the first ends[i] steps are filled, the activation's
    others are zero.
    """
    if y.is_cuda and y[0].numel() <= 2**31 - BLOCK and _works(y.device):
        with torch.cuda.device(y.device):
            return _launch(y, bias, alpha, ends, trunk, keep)
    return snake_in_torch(y, bias, alpha, ends, trunk, keep)


def snake_in_torch(y, bias, alpha, ends, trunk=None, keep=False) -> tuple[Tensor, Tensor | None]:
    """`snake` in PyTorch's operations."""
    x = y.float() + bias.float()[:, None]
    if trunk is not None:
        x = x + trunk.float()
    alpha = alpha.float().reshape(-1, 1)
    active = x + (alpha + 1e-9).reciprocal() * torch.sin(alpha * x).square()
    inside = torch.arange(y.shape[-1], device=y.device) < ends[:, None]
    return (active * inside[:, None]).to(y.dtype), x.to(y.dtype) if keep else None


def _launch(y, bias, alpha, ends, trunk=None, keep=False) -> tuple[Tensor, Tensor | None]:
    clips, channels, steps = y.shape
    last = is_channels_last(y)
    lay = lay_channels_last if last else Tensor.contiguous
    y, bias, alpha = lay(y), bias.contiguous(), alpha.contiguous()
    trunk = None if trunk is None else lay(trunk)
    active, kept = torch.empty_like(y), torch.empty_like(y) if keep else None
    grid = (triton.cdiv(channels * steps, BLOCK), clips)
    _kernel[grid](y, bias, alpha, ends, trunk if trunk is not None else y, active,
                  kept if keep else y, channels if last else steps, channels * steps,
                  LAST=last, HAS_TRUNK=trunk is not None, KEEP=keep, BLOCK=BLOCK,
                  FAST=y.is_cuda and y.dtype.itemsize == 2)  # fmt: skip
    return active, kept


@functools.cache
def _works(device: torch.device) -> bool:
    """Whether Triton can compile here: it wants a C compiler for what calls the kernel."""
    if triton is None:
        return False
    try:
        with torch.cuda.device(device):
            y = torch.linspace(-2, 2, 96, device=device).reshape(2, 3, 16)
            more = y[0, :, 0], y[1, :, 0].abs(), torch.tensor([16, 5], device=device).int()
            for x, error in ((y, 1e-5), (y.half(), 2e-3)):  # the latter by the card's own sine
                made, wanted = _launch(x, *more, x, True), snake_in_torch(x, *more, x, True)
                torch.testing.assert_close(made, wanted, atol=error, rtol=error)
        return True
    except Exception as error:
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        warnings.warn(f"the codec runs without its fused kernel: {first}", stacklevel=4)
        return False


if triton is not None:

    @triton.jit
    def activated(x, alpha, FAST: tl.constexpr):
        """Snake of x in fp32. FAST: by the card's own sine, some 2e-6 off with its argument's
        rounding where alpha x is 10, 1e-5 where it is 100: what half precision does not see."""
        alpha = alpha.to(tl.float32)
        scale = 1 / (alpha + 1e-9)
        if FAST:
            turns = alpha * 0.15915494309189535 * x
            turns -= tl.floor(turns + 0.5)
            wave = tl.extra.cuda.libdevice.fast_sinf(turns * 6.283185307179586)
        else:
            wave = tl.sin(alpha * x)
        return x + scale * (wave * wave)

    @triton.jit
    def _kernel(
        y, bias, alpha, ends, trunk, active, kept, row, size,
        LAST: tl.constexpr, HAS_TRUNK: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,
        FAST: tl.constexpr,
    ):  # fmt: skip
        clip = tl.program_id(1)
        # size: elements of a clip; row: of what lies together, its channels if LAST, else its steps
        base = clip.to(tl.int64) * size
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        valid = at < size
        if LAST:
            channel, step = at % row, at // row
        else:
            channel, step = at // row, at % row
        x = tl.load(y + base + at, mask=valid, other=0.0).to(tl.float32)
        x += tl.load(bias + channel, mask=valid, other=0.0).to(tl.float32)
        if HAS_TRUNK:
            x += tl.load(trunk + base + at, mask=valid, other=0.0).to(tl.float32)
        if KEEP:
            tl.store(kept + base + at, x.to(kept.dtype.element_ty), mask=valid)
        x = activated(x, tl.load(alpha + channel, mask=valid, other=1.0), FAST)
        x = tl.where(step < tl.load(ends + clip), x, 0.0)
        tl.store(active + base + at, x.to(active.dtype.element_ty), mask=valid)
