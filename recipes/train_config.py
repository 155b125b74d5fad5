"""What a fine-tune can be told, and the learning rate that follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from higgs_lab.adapter import TARGETS
from higgs_lab.attention import KINDS
from higgs_lab.fused import CHECKPOINTING
from higgs_lab.optimizer import OPTIMIZERS


@dataclass
class TrainConfig:
    data: str = "???"  # prepared data, made by recipes/prepare.py
    out: str = "???"  # run directory; an interrupted run there is resumed
    model: str = "nano"  # base: nano, a native directory, or org/name@revision

    method: str = "lora"  # lora; qlora: the frozen base in 4 bits (bitsandbytes); or full
    preset: str = (
        "attention_mlp"  # what LoRA touches: attention, attention_mlp, attention_mlp_table
    )
    rank: int = 16  # LoRA rank
    alpha: float = 32  # LoRA scale is alpha / rank
    dropout: float = 0.0  # LoRA dropout

    steps: int = 500  # optimiser steps
    budget_positions: int = 8192  # positions of one pack: audio frames + text + reference
    packs_per_step: int = 1  # packs of one optimiser step, over all processes
    lr: float = 1e-4  # peak learning rate
    schedule: str = "cosine"  # after the warm-up: cosine, linear or constant
    min_lr_ratio: float = 0.1  # the schedule ends at lr times this
    warmup_steps: int = 20
    optimizer: str = "adamw"  # adamw; adamw8bit: a quarter of its memory (bitsandbytes)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    codebook_weights: list[float] | None = None  # K weights of the loss; none: all alike
    supervise_boc: bool = False  # loss on the cells that both engines force

    clone_share: float = 0.25  # examples with a reference and no transcript
    clone_text_share: float = 0.5  # with a reference and its transcript; the rest has none
    max_ref_sec: float = 10.0  # longer clips are no references

    precision: str = "auto"  # bf16, fp32; auto: bf16 on a GPU that has it
    attention: str = "auto"  # triton, varlen, flex, sdpa, split; auto: the fastest that runs here
    checkpointing: str = "none"  # what is computed again to save memory: none, selective, full
    compile: bool | None = None  # null: on a GPU, if the run has 200 steps or more
    seed: int = 0

    valid_every: int = 100  # steps between validations; 0: never
    valid_rows: int = 256  # at most so many rows of the split "valid"
    save_every: int = 100  # steps between checkpoints
    keep_checkpoints: int = 2
    sample_every: int = 0  # steps between spoken samples; 0: never
    sample_texts: list[str] = field(default_factory=list)  # none: texts of the validation rows
    log_every: int = 1  # steps between lines; each waits for the device
    trackers: list[str] = field(
        default_factory=list
    )  # tensorboard, wandb (WANDB_MODE=offline works)
    project: str = "higgs_lab"  # name under which trackers file the run


def check(config: TrainConfig) -> None:
    """Raise ValueError for settings that contradict each other."""
    known = {"method": ("lora", "qlora", "full"), "schedule": ("cosine", "linear", "constant")}
    known |= {"precision": ("auto", "bf16", "fp32"), "attention": ("auto", *KINDS)}
    known |= {"preset": tuple(TARGETS), "checkpointing": CHECKPOINTING}
    known |= {"optimizer": OPTIMIZERS}
    for name, choices in known.items():
        if getattr(config, name) not in choices:
            raise ValueError(f"{name}={getattr(config, name)!r}: choose {', '.join(choices)}")
    counts = ("steps", "budget_positions", "packs_per_step", "rank", "save_every", "log_every")
    for name in (*counts, "keep_checkpoints", "valid_rows"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)}: must be at least 1")
    for name in ("lr", "alpha", "max_grad_norm"):  # 0 would train nothing, and not say so
        if not getattr(config, name) > 0:
            raise ValueError(f"{name}={getattr(config, name)}: must be above 0")
    weights = config.codebook_weights
    if weights is not None and not (min(weights, default=-1) >= 0 and sum(weights) > 0):
        raise ValueError(f"codebook_weights={weights}: must be at least 0 and not all 0")


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of optimiser step `step`, counted from 0.

    A function of the step and of nothing else: a scheduler object that `accelerate` prepares steps
    once per process, and with two processes reaches its end at half the run.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    span = max(1, config.steps - config.warmup_steps)
    done = min(1.0, (step - config.warmup_steps) / span)
    shape = (1 + math.cos(math.pi * done)) / 2 if config.schedule == "cosine" else 1 - done
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * shape)
