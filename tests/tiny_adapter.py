"""What tests of LoRA share: adapters, trained a little or of a known size."""

from __future__ import annotations

from pathlib import Path

import torch

from higgs_lab.adapter import (
    attach_lora,
    base_fingerprint,
    save_adapter,
)
from higgs_lab.checkpoint import load_talker
from higgs_lab.loss import codebook_loss
from tests.tiny import (
    three_examples,
)


def train(model, steps: int = 3, lr: float = 3e-2) -> None:
    """A few real steps on one clip."""
    example = three_examples()[2]
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr)
    batch = (example.ids[None], example.is_audio[None], example.rows[None])
    for _ in range(steps):
        logits = model(*batch).logits[0]
        total, count = codebook_loss(logits, example.labels, example.supervised).weighted()
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def randomise(model, std: float) -> None:
    """An adapter of a known small size, as if trained."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def trained(base: Path, out: Path, preset: str = "attention_mlp", dtype=torch.float32, **meta):
    """(adapter folder, the model it was saved from)."""
    model = attach_lora(load_talker(base, dtype=dtype), preset, rank=4, alpha=8)
    train(model)
    info = {"base": "org/base", "revision": "abc", "fingerprint": base_fingerprint(base)} | meta
    save_adapter(model, out, info)
    return out, model
