"""Small fine-tunes of nano: their data, in this process and as processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file

from higgs_lab.batches import PackedLoader, pack
from higgs_lab.checkpoint import load_talker
from higgs_lab.codec import Codec
from higgs_lab.prepared import save_prepared
from higgs_lab.runlog import read_jsonl
from higgs_lab.training_set import Modes, TrainingSet
from higgs_lab.vocab import Vocab
from recipes.finetune import train
from recipes.train_config import TrainConfig
from tests.tiny import prepared_rows

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(rank=4, budget_positions=400, lr=2e-3, warmup_steps=2, seed=3, packs_per_step=2)


def random_data(path: Path, nano: Path) -> Path:
    """Prepared data of random codes for nano: 14 clips to train on, 3 to validate."""
    rows = prepared_rows(14) + prepared_rows(3, "valid", seed=1)
    splits = {"train": {"clips": 14, "hours": 0.01}, "valid": {"clips": 3, "hours": 0.001}}
    info = {"codec_hash": Codec.from_pretrained(nano).hash, "splits": splits}
    info["model"] = {"name": "nano", "revision": nano.name}
    save_prepared(path, rows, 8, info, [])
    return path


@torch.no_grad()
def loss_before(nano: Path) -> float:
    """Of nano itself in fp32, on what a run shows it in its first step: there a run must begin.
    Far above chance, as nano is sure of its words and these codes are random."""
    config = TrainConfig(data="", out="", **SMALL)
    modes = Modes(config.clone_share, config.clone_text_share)
    options = dict(seed=config.seed, budget_positions=config.budget_positions)
    data = TrainingSet(prepared_rows(14), Vocab.from_pretrained(nano), modes, **options)
    steps = dict(seed=config.seed, packs_per_step=config.packs_per_step)
    loader = PackedLoader(data.lengths, data.build, config.budget_positions, **steps)
    first = loader.epoch_packs(0)[: config.packs_per_step]
    batch = pack([data.build(i, 0) for part in first for i in part])
    talker = load_talker(nano, dtype=torch.float32)
    sums = talker(**batch.inputs(), targets=batch.targets(torch.ones(8))).sums
    return sums.means()["loss"]


def run(prepared: Path, out: Path, **changes) -> list[dict]:
    config = TrainConfig(data=str(prepared), out=str(out), **{**SMALL, **changes})
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()  # process-wide singletons, but each run here is a run of its own
    train(config)
    return read_jsonl(out / "metrics.jsonl")


def curve(metrics: list[dict], name: str) -> list[float]:
    return [m[name] for m in metrics if name in m]


def launch(
    prepared: Path, out: Path, processes: int, config: str = "one_gpu", machine: int = 0, **changes
) -> subprocess.Popen:
    """The recipe under `accelerate launch` with a shipped configuration; processes = 0: without it,
    which starts sooner.

    Its multi-GPU kind is how accelerate is told to start several processes, on CPUs too: with --cpu
    it starts one, whatever --num_processes says.
    """
    options = {**SMALL, "data": prepared, "out": out, **changes}
    command = [sys.executable]
    if processes:
        file = ROOT / "recipes" / "configs" / "accelerate" / f"{config}.yaml"
        command += ["-m", "accelerate.commands.launch", "--config_file", str(file)]
        command += ["--num_processes", str(processes), "--machine_rank", str(machine)]
    if processes > 1:
        command += ["--main_process_port", str(20000 + os.getpid() % 20000)]
        command += ["--main_process_ip", "127.0.0.1"]
    command += [str(ROOT / "recipes" / "finetune.py")]
    command += [f"{key}={value}" for key, value in options.items()]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")
