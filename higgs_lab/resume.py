"""Checkpoints of a running training: whole or absent, and exact.

`checkpoints/step-N/` holds everything that the next step depends on: trainable weights, optimiser,
data position, random states of all processes. A run killed at any moment goes on from the last one
as if nothing had happened, bit for bit on a CPU.
"""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

import numpy as np
import torch

from higgs_lab.runlog import atomic_path, remove_leftovers


def random_state() -> dict:
    """The random states of this process."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])


def trainable_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def save_step(
    folder: Path,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: dict,
    random_states: list[dict],
    keep: int,
) -> Path:
    """Write `folder/step-N`, then drop all but the last `keep`. For the main process only."""
    path = folder / f"step-{step}"
    with atomic_path(path) as temporary:
        temporary.mkdir()
        torch.save(
            {
                "step": step,
                "model": trainable_state(model),
                "optimizer": optimizer.state_dict(),
                "loader": loader,
                "random": random_states,
            },
            temporary / "state.pt",
        )
    for old in saved_steps(folder)[:-keep]:
        shutil.rmtree(folder / f"step-{old}")
    return path


def saved_steps(folder: Path) -> list[int]:
    """Steps that have a whole checkpoint, in order."""
    found = [re.fullmatch(r"step-(\d+)", p.name) for p in folder.glob("step-*")]
    return sorted(int(m.group(1)) for m in found if m)


def load_step(
    folder: Path,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    rank: int,
) -> dict:
    """Restore a checkpoint into model and optimiser; returns the loader's state.

    Raises ValueError when the checkpoint is of another set of trainable weights.
    """
    remove_leftovers(folder)
    file = folder / f"step-{step}" / "state.pt"
    # our own file: it holds python and numpy random states, which weights_only refuses
    state = torch.load(file, map_location="cpu", weights_only=False)
    own = trainable_state(model)
    if set(own) != set(state["model"]):
        odd = sorted(set(own) ^ set(state["model"]))[0]
        raise ValueError(
            f"{file} was saved with other trainable weights ({odd!r} differs): resume with the "
            "same preset and rank, or choose another out="
        )
    for name, value in state["model"].items():
        if own[name].shape != value.shape:
            raise ValueError(f"{file}: {name!r} has shape {tuple(value.shape)}, the model another")
        own[name].copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    if rank < len(state["random"]):
        set_random_state(state["random"][rank])
    return state["loader"]
