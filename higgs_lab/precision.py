"""What the codec computes in: exact fp32, TF32, or half precision, switched for a while.

TF32 is a switch of the whole process, so one thread at a time computes with it in a chosen place.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager

import torch

PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}

_one_setting = threading.RLock()


def check_precision(precision: str, device: torch.device, setting: str = "precision") -> None:
    """Raises ValueError for what is none of PRECISIONS, or what only CUDA has in good time.

    A CPU knows no TF32, and computes a minute and more on a clip in fp16.
    """
    _known(precision, setting)
    if precision in ("tf32", "fp16") and device.type != "cuda":
        on = "a CPU" if device.type == "cpu" else device.type
        raise ValueError(f"{setting}={precision} is for a CUDA GPU: choose fp32 or bf16 on {on}")


def _known(precision: str, setting: str = "precision") -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"{setting}={precision}: choose {', '.join(PRECISIONS)}")


@contextmanager
def exact_float32():
    """No TF32, no autotuned convolutions: codes depend on card and batch by rounding alone."""
    with _switches(matmul_tf32=False, convolution_tf32=False):
        yield


@contextmanager
def arithmetic(precision: str, device: torch.device, convolutions_alone: bool = False):
    """fp32: the reference, exact. tf32: its products in TF32 (CUDA). fp16, bf16: autocast.

    fp16 rounds products as TF32 does; what leaves its range is computed again in TF32.
    convolutions_alone: have TF32 in no other product. Other threads see matmul's switch: their
    compiled code is compiled anew when it changes, and a talker in fp32 would speak in TF32. So the
    halves and a decoder, which have no use for it, leave it alone.
    """
    _known(precision)
    half = HALVES.get(precision)
    untouched = half or (precision == "tf32" and convolutions_alone)
    with (
        _switches(None if untouched else precision == "tf32", precision != "fp32"),
        torch.autocast(device.type, half or torch.bfloat16, enabled=half is not None),
    ):
        yield


@contextmanager
def _switches(matmul_tf32: bool | None, convolution_tf32: bool):
    """TF32 on or off, for the whole process; None leaves matmul's as it is. No autotuning.

    One thread at a time: another would change what this one computes with, and put it back wrong.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    with _one_setting:
        saved = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
        if matmul_tf32 is not None:
            matmul.allow_tf32 = matmul_tf32
        cudnn.allow_tf32, cudnn.benchmark = convolution_tf32, False
        try:
            yield
        finally:
            if matmul_tf32 is not None:
                matmul.allow_tf32 = saved[0]
            cudnn.allow_tf32, cudnn.benchmark = saved[1:]
