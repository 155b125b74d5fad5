"""The codec's fused activation, in PyTorch and as Triton's kernel, is DAC's Snake."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from higgs_lab.snake import _works, snake, snake_in_torch


def activation_case(dtype: torch.dtype, steps: int = 37):
    torch.manual_seed(steps)
    y, trunk = torch.randn(2, 3, 8, steps).to(dtype)
    ends = torch.tensor([steps, steps // 2, 0], dtype=torch.int32)
    return y, torch.randn(8), 3 * torch.rand(1, 8, 1), ends, trunk


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_activation_is_dacs_own(dtype):
    from transformers.models.dac import modeling_dac

    y, bias, alpha, ends, trunk = activation_case(dtype)
    active, kept = snake(y, bias, alpha, ends, trunk, keep=True)
    module = modeling_dac.Snake1d(8)
    module.alpha.copy_(alpha)
    whole = y.float() + bias[:, None] + trunk.float()
    wanted = module(whole)
    wanted[1, :, 18:] = wanted[2] = 0
    exact = dtype == torch.float32
    assert active.dtype == kept.dtype == dtype
    torch.testing.assert_close(active.float(), wanted, atol=1e-6, rtol=1e-6 if exact else 8e-3)
    torch.testing.assert_close(kept.float(), whole, atol=1e-6, rtol=1e-6 if exact else 8e-3)
    assert snake(y, bias, alpha, ends)[1] is None


KERNEL = """
import torch
from higgs_lab.snake import _launch, snake_in_torch
from tests.test_snake import activation_case
for dtype in (torch.float32, torch.bfloat16):
    for steps in (1, 37, 700):
        y, bias, alpha, ends, trunk = activation_case(dtype, steps)
        bias = torch.stack([bias, bias], dim=1)[:, 0]  # not contiguous
        last = y.transpose(1, 2).contiguous().transpose(1, 2)
        for given, where in (((None, False), y), ((trunk, True), y), ((trunk, True), last)):
            made, kept = _launch(where, bias, alpha, ends, *given)
            assert made.stride() == where.stride()
            wanted, whole = snake_in_torch(y, bias, alpha, ends, *given)
            torch.testing.assert_close(made, wanted)
            assert (kept is None) == (whole is None)
            if kept is not None:
                torch.testing.assert_close(kept, whole)
"""


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no Triton here")
def test_the_kernel_is_what_pytorch_computes():
    """In Triton's interpreter, which has to be asked for before Triton is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", KERNEL], env=environment, cwd=root, check=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_kernel_on_a_gpu(dtype):
    case = [tensor.cuda() for tensor in activation_case(dtype, 16_001)]
    assert _works(case[0].device)
    wanted = snake_in_torch(*case, keep=True)
    last = case[0].transpose(1, 2).contiguous().transpose(1, 2)
    for y in (case[0], last):
        for made, whole in zip(snake(y, *case[1:], keep=True), wanted, strict=True):
            torch.testing.assert_close(made, whole)
