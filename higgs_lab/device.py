"""Which device a process computes on."""

from __future__ import annotations

import os

import torch


def chosen_device(device: str | torch.device | None = None) -> torch.device:
    """The given one; None or "auto": CUDA when there is one, else the CPU.

    Of several processes that a launcher started (WORLD_SIZE, LOCAL_RANK), "cuda" gives each its own
    GPU. Raises ValueError for what is no device, or none that this machine has or we compute on.
    """
    if device in (None, "auto"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device={device}: choose cpu, cuda, cuda:N or auto") from None
    if found.type == "mps" and torch.backends.mps.is_available():
        return found
    if found.type not in ("cpu", "cuda") or found.index and found.type == "cpu":
        raise ValueError(f"device={device}: there is none here; choose cpu, cuda, cuda:N or auto")
    if found.type == "cpu":
        return found
    count = torch.cuda.device_count()
    if (found.index or 0) >= count:
        raise ValueError(f"device={device}: torch sees {count} CUDA GPUs here; cpu is always there")
    local, world = os.environ.get("LOCAL_RANK"), os.environ.get("WORLD_SIZE")
    if found.index is None and local and world and int(world) > 1:
        return torch.device("cuda", int(local) % count)
    return found
