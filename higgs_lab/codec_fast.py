"""The codec's DAC networks again, for speed: fused activations, clips of any length in a batch.

Same weights, same formulas as transformers' model; results differ by rounding alone:

* DAC's Snake, the bias before it and the residual sum are one kernel (`snake`): as separate
  operations of PyTorch they are more than half of the GPU's time, all of it waiting for memory.
* A batch may hold clips of different lengths: what lies behind a clip's end is set to zero before
  every convolution, as if it were the padding that follows the clip alone.
* On a GPU what DAC's decoder (and HuBERT's convolutions, `codec_encoder`) read and write has its
  channels last, as the matrix units want it; in half precision DAC's encoder's too, and there a
  residual unit of up to 256 channels is one kernel (`residual_unit`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    conv1d,
    conv2d,
    conv_transpose1d,
    conv_transpose2d,
    linear,
    pad,
)

from higgs_lab.snake import is_channels_last, lay_channels_last, snake

WIDE = 256  # channels from which a convolution has few steps


def run_dac(
    net: nn.Module, x: Tensor, lengths: Sequence[int], channels_last: bool = False
) -> Tensor:
    """DAC's encoder or decoder: x [B, C, T], of clip i only the first lengths[i] steps counting.

    Every stage is an activation and what follows it, up to the next residual sum. channels_last: in
    memory, of all that lies between.
    """
    stages = list(_stages(net))
    ends = torch.tensor([stage_lengths(net, n) for n in lengths], dtype=torch.int32).T.contiguous()
    # [stages + 1, B], rows of whole 16 bytes: for others, Triton would compile its kernels again
    ends = pad(ends, (0, -len(x) % 4)).to(x.device, non_blocking=True)[:, : len(x)]
    inside = torch.arange(x.shape[-1], device=x.device) < ends[0][:, None]
    y, bias, trunk = begin(net.conv1, x * inside[:, None], channels_last), net.conv1.bias, None
    active, trunk = snake(y, bias, _activation(stages[0]).alpha, ends[1], keep=_is_unit(stages[0]))
    for end, stage, after in zip(ends[2:], stages, stages[1:], strict=False):
        alpha, keep = _activation(after).alpha, _is_unit(after)
        if not _is_unit(stage):
            active, trunk = snake(convolve(stage[1], active), stage[1].bias, alpha, end, keep=keep)
            continue
        unit = stage[0]
        if channels_last and _fused_unit_runs(unit, active):
            from higgs_lab.residual_unit import residual_unit

            active, trunk = residual_unit(unit, active, trunk, alpha, end, keep)
            continue
        y = convolve(unit.conv1, active)
        active, _ = snake(y, unit.conv1.bias, unit.snake2.alpha, end)
        y = convolve(unit.conv2, active)
        active, trunk = snake(y, unit.conv2.bias, alpha, end, trunk, keep)
    last = stages[-1][1]
    return convolve(last, active) + last.bias[:, None].to(active.dtype)


def _stages(net: nn.Module) -> Iterator[tuple[nn.Module, ...]]:
    """(residual unit,) or (Snake, convolution), in order, behind the first convolution."""
    for block in net.block:
        units = [(block.res_unit1,), (block.res_unit2,), (block.res_unit3,)]
        if hasattr(block, "conv_t1"):
            yield from [(block.snake1, block.conv_t1), *units]
        else:
            yield from [*units, (block.snake1, block.conv1)]
    yield net.snake1, net.conv2


def _is_unit(stage: tuple[nn.Module, ...]) -> bool:
    return len(stage) == 1


def _activation(stage: tuple[nn.Module, ...]) -> nn.Module:
    """The Snake with which a stage begins."""
    return stage[0].snake1 if _is_unit(stage) else stage[0]


def _fused_unit_runs(unit: nn.Module, active: Tensor) -> bool:
    if not active.is_cuda or active.dtype not in (torch.float16, torch.bfloat16):
        return False
    try:
        from higgs_lab.residual_unit import runs_for
    except ImportError:  # no Triton
        return False
    return runs_for(unit, active)


def stage_lengths(net: nn.Module, length: int) -> list[int]:
    """Steps of a clip before the first convolution, before each stage and behind the last."""
    lengths = [length, length_behind(net.conv1, length)]
    for stage in _stages(net):  # a unit keeps the length
        lengths.append(length_behind(stage[1], lengths[-1]) if len(stage) == 2 else lengths[-1])
    return lengths


def length_behind(conv: nn.Conv1d | nn.ConvTranspose1d, length: int) -> int:
    (kernel,), (stride,), (padding,) = conv.kernel_size, conv.stride, conv.padding
    if isinstance(conv, nn.ConvTranspose1d):
        return (length - 1) * stride - 2 * padding + kernel + conv.output_padding[0]
    return (length + 2 * padding - conv.dilation[0] * (kernel - 1) - 1) // stride + 1


def begin(conv: nn.Conv1d, x: Tensor, channels_last: bool) -> Tensor:
    """`convolve` where the layout of all that follows is chosen."""
    if not channels_last:
        return convolve(conv, x.contiguous())
    return _of_one_channel(conv, x) if x.shape[1] == 1 else convolve(conv, lay_channels_last(x))


def convolve(conv: nn.Conv1d | nn.ConvTranspose1d, x: Tensor) -> Tensor:
    """Without the bias, which the activation adds. Channels stay last if they are."""
    if is_channels_last(x) and x.shape[1] > 1:
        return _convolve_last(conv, x)
    if isinstance(conv, nn.ConvTranspose1d):
        return conv_transpose1d(
            x, conv.weight, None, conv.stride, conv.padding, conv.output_padding
        )
    return conv1d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation)


def _convolve_last(conv: nn.Conv1d | nn.ConvTranspose1d, x: Tensor) -> Tensor:
    """x [B, C, T] with C last in memory, by cuDNN's images: only they are known to be so laid.

    In fp32 many channels are a product (`convolution_by_product`).
    Where many channels are far dilated, cuDNN now and then takes a kernel that is hundreds of times
    slower (512 channels of 1500 or 2000 steps in bf16, H100): that is done without dilation.
    """
    few_steps = isinstance(conv, nn.Conv1d) and conv.stride == (1,) and x.shape[1] >= WIDE
    if few_steps and _is_exact(x):
        return convolution_by_product(conv, x, biased=False)
    stride, (padding,), (dilation,) = (1, *conv.stride), conv.padding, conv.dilation
    weight, out = conv.weight[:, :, None], conv.out_channels
    if isinstance(conv, nn.ConvTranspose1d):
        shift = (0, *conv.output_padding)
        y = conv_transpose2d(x[:, :, None], weight, None, stride, (0, padding), shift)
    elif few_steps and dilation > 3 and _keeps_length(conv):
        phases = _phases(x, dilation)[:, :, None]
        y = conv2d(phases, weight, None, stride, (0, padding // dilation))
        y = y.contiguous(memory_format=torch.channels_last)[:, :, 0].transpose(1, 2)
        y = y.view(len(x), dilation, -1, out).transpose(1, 2).reshape(len(x), -1, out)
        return y[:, : x.shape[2]].contiguous().transpose(1, 2)
    else:
        y = conv2d(x[:, :, None], weight, None, stride, (0, padding), (1, dilation))
    return y.contiguous(memory_format=torch.channels_last)[:, :, 0]


def _is_exact(x: Tensor) -> bool:
    tf32 = x.is_cuda and torch.backends.cudnn.allow_tf32
    return x.dtype == torch.float32 and not tf32 and not torch.is_autocast_enabled(x.device.type)


def convolution_by_product(conv: nn.Conv1d, x: Tensor, biased: bool = True) -> Tensor:
    """conv(x) of stride 1 and one group, x [B, C, T], as one matrix product; channels last.

    In fp32 cuDNN cannot be left alone with many channels and few steps: for 16 clips of 3 s or 8 of
    5 s (768 channels, three taps) it took most of an 80 GB card and was wrong, for 32 of 2 s of
    DAC's decoder as much, but was right (9.19 with torch 2.11, H100; CUDNN_CONV_WSCAP_DBG did not
    keep it from the like). x [B, C, T] -> [B, out, T'].
    """
    (width,), (dilation,) = conv.kernel_size, conv.dilation
    rows = pad(x.transpose(1, 2), (0, 0, *conv.padding, *conv.padding)).contiguous()
    B, T, C = rows.shape
    size = (B, T - dilation * (width - 1), width, C)
    windows = rows.as_strided(size, (T * C, C, dilation * C, 1)).flatten(2)
    weight = conv.weight.permute(0, 2, 1).flatten(1)  # [out, width * C]
    return linear(windows, weight, conv.bias if biased else None).transpose(1, 2)


def _keeps_length(conv: nn.Conv1d) -> bool:
    return 2 * conv.padding[0] == conv.dilation[0] * (conv.kernel_size[0] - 1)


def _phases(x: Tensor, count: int) -> Tensor:
    """x [B, C, T], C last -> [B * count, C, T / count], C last: every count-th step from each of
    the first ones on, zeros behind the end."""
    rows = pad(x.transpose(1, 2), (0, 0, 0, -x.shape[2] % count))
    rows = rows.view(len(x), -1, count, x.shape[1]).transpose(1, 2)
    return rows.reshape(len(x) * count, -1, x.shape[1]).transpose(1, 2)


def _of_one_channel(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """x [B, 1, T] -> [B, C, steps], C last: a product, which takes less than cuDNN's kernels do."""
    (width,), (stride,) = conv.kernel_size, conv.stride
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    rest = -width % 8  # rows of 16 bytes for the matrix units
    windows = pad(x[:, 0], (*conv.padding, *conv.padding)).unfold(1, width, stride)
    sums = pad(conv.weight[:, 0], (0, rest)).to(x.dtype)
    return (pad(windows, (0, rest)) @ sums.t()).transpose(1, 2)
