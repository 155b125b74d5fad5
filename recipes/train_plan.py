"""What a fine-tune is about to do and to need, printed before it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from higgs_lab.cost import GIB, matrix_tflops, training_gib
from higgs_lab.fused import unfusable
from higgs_lab.runlog import duration
from higgs_lab.training_set import TrainingSet
from recipes.train_config import TrainConfig

if TYPE_CHECKING:
    from recipes.train_run import Run

USUAL_SHARE = 0.45  # of a card's peak, for the first guess; the first steps correct it


def card_peak(device: torch.device) -> float | None:
    """TFLOP/s of the card's bf16 matrix units, measured; None on a CPU."""
    return matrix_tflops(device, torch.bfloat16) if device.type == "cuda" else None


def plan(config: TrainConfig, run: Run, data: TrainingSet, start: int) -> str:
    """Data, steps, longest batch, memory and minutes, a line each."""
    loader, device = run.loader, run.accelerator.device
    lengths = loader.checked_lengths(0)
    packs = loader.epoch_packs(0)
    fullest = max(sum(lengths[i] for i in members) for members in packs)
    fill = sum(lengths) / (len(packs) * config.budget_positions)
    hours = sum(data.frames) / run.vocab.frame_rate_hz / 3600
    shares = ", ".join(f"{mode} {share:.0%}" for mode, share in data.mode_shares().items())
    epochs = config.steps * config.packs_per_step / len(packs)
    lines = [
        f"data: {len(data)} clips, {hours:.2f} h; prompts: {shares}",
        f"steps: {config.steps} of {config.packs_per_step} packs of {config.budget_positions} "
        f"positions ({fill:.1%} real) over {run.accelerator.num_processes} process(es) = "
        f"{epochs:.1f} epochs, {'from step ' + str(start) if start else 'from the base'}",
        f"longest batch: {fullest} positions, longest example {int(lengths.max())}; it is tried "
        "first",
        f"blocks: {blocks(config, run)}",
    ]
    shape = run.shape
    positions = config.budget_positions if loader.pad else fullest
    if device.type == "cuda":
        need = training_gib(
            shape, config.method, config.rank, positions, config.checkpointing, config.optimizer
        )
        parts = ", ".join(f"{name} {size:.1f}" for name, size in need.items() if name != "total")
        have = torch.cuda.get_device_properties(device).total_memory / GIB
        lines.append(
            f"memory: about {need['total']:.1f} GiB by arithmetic ({parts}); "
            f"the card has {have:.1f}"
        )
        flops = shape.useful_flops(config.method) * config.packs_per_step * positions
        seconds = flops / (USUAL_SHARE * run.peak * 1e12 * run.accelerator.num_processes)
        lines.append(
            f"time: about {duration(seconds * (config.steps - start))} at {USUAL_SHARE:.0%} of the "
            f"card's {run.peak:.0f} TFLOP/s (measured)"
        )
    return "\n".join(lines)


def blocks(config: TrainConfig, run: Run) -> str:
    """How the blocks are computed, in words."""
    fused = run.talker.fused
    if fused is None:
        return f"by modules, not fused: {unfusable(run.model)}"
    return (
        f"fused, {'compiled' if fused.compiled else 'not compiled'}, attention {fused.attention}, "
        f"checkpointing {fused.checkpointing}"
    )
