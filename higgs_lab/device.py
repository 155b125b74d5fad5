"""Which device a process computes on."""

from __future__ import annotations

import os

import torch


def chosen_device(device: str | torch.device | None = None) -> torch.device:
    """The given one; None or "auto": CUDA when there is one, else the CPU.

    Of several processes that a launcher started (`LOCAL_RANK`), "cuda" gives each its own GPU.
    Raises ValueError for what is no device, or a GPU that this machine has not.
    """
    if device in (None, "auto"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device={device}: choose cpu, cuda, cuda:N or auto") from None
    if found.type != "cuda":
        return found
    count = torch.cuda.device_count()
    if (found.index or 0) >= count:
        raise ValueError(f"device={device}: torch sees {count} CUDA GPUs here; cpu is always there")
    if found.index is None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % count)
    return found
