"""Whether own Triton kernels run on a card and are right, asked before they are relied on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from importlib.util import find_spec

import torch
from torch import Tensor


def kernels_agree(
    device: torch.device,
    dtype: torch.dtype,
    fits: Callable[[], bool],
    results: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    otherwise: str,
) -> bool:
    """Whether each pair of (a kernel's result, what it stands for) is equal within 2 %.

    For half precision: the products of fp32 would be TF32's. fits: whether the kernels are made for
    such shapes at all. Triton may be missing, the C compiler that it calls too, and a card may have
    too little shared memory: then a warning says so, and what follows (`otherwise`). Results are
    asked for with gradients, whatever mode the caller is in.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    if device.type != "cuda" or not half or find_spec("triton") is None:
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    modes = (torch.inference_mode(False), torch.enable_grad())
    with torch.cuda.device(device), modes[0], modes[1], torch.autocast("cuda", enabled=False):
        try:
            if not fits():
                return False
            pairs = [(a.detach().float(), b.detach().float()) for a, b in results()]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # Triton's own share no class, a missing compiler's neither
            warnings.warn(f"Triton does not run here, {otherwise}: {error}", stacklevel=3)
            return False
        errors = [float((a - b).norm() / b.norm()) for a, b in pairs]
    if not all(error < 0.02 for error in errors):  # a NaN is not
        warnings.warn(f"Triton's kernels are wrong here, {otherwise}", stacklevel=3)
        return False
    return True
