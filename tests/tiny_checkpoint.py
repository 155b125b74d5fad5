"""What tests of native directories share: reading, spoiling and sharding one."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from higgs_lab.checkpoint import (
    INDEX,
    TIED_COPIES,
)

TABLE = "tied.embedding.modality_embeddings.0.embedding.weight"
TEXT = "tied.embedding.text_embedding.weight"
HEADS = sorted(TIED_COPIES)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= {k: v.clone() for k, v in load_file(file).items()}
    return found


def rewrite(path: Path, change) -> None:
    """Spoil the one file of a directory: change(tensors), the index following."""
    tensors = tensors_of(path)
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    weight_map = {k: "model.safetensors" for k in tensors if k not in TIED_COPIES}
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def shard(path: Path, files: int = 3) -> None:
    """Spread the directory's tensors over several files, as larger checkpoints are."""
    tensors = tensors_of(path)
    keys = sorted(tensors)
    (path / "model.safetensors").unlink()
    weight_map = {}
    for i in range(files):
        name = f"model-{i + 1:05}-of-{files:05}.safetensors"
        save_file({k: tensors[k] for k in keys[i::files]}, path / name)
        weight_map |= {k: name for k in keys[i::files] if k not in TIED_COPIES}
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
