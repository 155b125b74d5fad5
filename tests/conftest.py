"""Fixtures of the suite: one thread a process, one small checkpoint, real speech if present."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Two cores and several workers: more threads than cores make torch slower, not faster."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def nano() -> Path:
    """The native directory of the nano checkpoint, built once into the cache."""
    from higgs_lab.nano import nano_checkpoint

    return nano_checkpoint()


@pytest.fixture(scope="session")
def speech_dir() -> Path:
    """Folder of real human speech with a manifest.jsonl: $HIGGS_LAB_SPEECH or a sibling folder."""
    for folder in (os.environ.get("HIGGS_LAB_SPEECH"), ROOT.parent / "shared" / "speech"):
        if folder and (Path(folder) / "manifest.jsonl").is_file():
            return Path(folder)
    pytest.skip("no real speech here: set HIGGS_LAB_SPEECH to a folder with manifest.jsonl")
