"""Many voices on one server: LoRA adapters beside the exported base, chosen by a request's `model`.

    python -m serve.launch exports/base --lora ann=runs/ann --lora bob=runs/bob
    python -m serve.client "Hello." --out hello.wav --model ann

vLLM-Omni 0.30 cannot do this by itself; the plugin in serve/lora, installed next to vllm, adds what
is missing. Here an adapter is checked before a server starts, since vLLM would load one whose keys
match nothing without a word, and the launch plan gets what the engine needs.
"""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

from higgs_lab.runlog import atomic_path
from serve.launch import Plan

PLUGIN = "higgs_lab_vllm_lora"
PLUGIN_FOLDER = Path(__file__).parent / "lora"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM allows as max_lora_rank
# Adapters that one batch may mix; each takes room on the card (66 MB at rank 16 on all linears).
MAX_ACTIVE = 8

_KEY = re.compile(
    r"base_model\.model\.model\.layers\.(\d+)\."
    r"(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)\.lora_[AB]\.weight"
)
# Settings of adapter_config.json that change what an adapter computes and that vLLM refuses or
# leaves unread, with the value that means "not used".
_UNUSED = {
    "modules_to_save": None,
    "use_dora": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "layer_replication": None,
    "trainable_token_indices": None,
    "lora_bias": False,
    "fan_in_fan_out": False,
}


def parse_lora(words: list[str]) -> dict[str, Path]:
    """["ann=runs/ann"] -> {"ann": Path("runs/ann")}."""
    adapters = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or not name or not path:
            raise ValueError(f"--lora takes NAME=FOLDER, got {word!r}")
        if name in adapters:
            raise ValueError(f"--lora {name} is given twice")
        adapters[name] = Path(path)
    return adapters


def check_lora(adapter: str | Path, export: str | Path) -> tuple[Path, int]:
    """The adapter's folder and rank; raises ValueError when a server could not serve it beside
    this export as it was trained."""
    from higgs_lab.adapter import check_base, find_adapter
    from higgs_lab.checkpoint import NativeFiles, read_config

    folder = find_adapter(adapter).resolve()
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    merge = "merge it with python -m serve.export and serve that export by itself"
    for name, unused in _UNUSED.items():
        if (value := config.get(name) or unused) != unused:
            raise ValueError(f"adapter {folder} uses {name} ({value}), which vLLM cannot: {merge}")
    if (rank := int(config["r"])) > RANKS[-1]:
        raise ValueError(f"adapter {folder} has rank {rank}, vLLM takes {RANKS[-1]}: {merge}")
    check_base(folder, export)
    layers, changes = read_config(export)["text_config"]["num_hidden_layers"], False
    for key, tensor in NativeFiles(folder).items():
        if not (match := _KEY.fullmatch(key)):
            raise ValueError(f"adapter {folder}: vLLM would ignore {key!r}: {merge}")
        if int(match[1]) >= layers:
            raise ValueError(
                f"adapter {folder} has a layer {match[1]}, {export} has {layers} layers"
            )
        changes = changes or (".lora_B." in key and bool(tensor.any()))
    if not changes:
        raise ValueError(f"adapter {folder} has no effect: its lora_B are zero. Was it trained?")
    return folder, rank


def with_adapters(
    plan: Plan, export: str | Path, adapters: dict[str, Path], max_active: int | None = None
) -> Plan:
    """The plan with adapters; writes the deploy file beside its log.

    max_active: adapters that one batch may mix; further requests wait. Default: all, up to 8.
    """
    if not adapters:
        return plan
    if plan.model in adapters:
        raise ValueError(f"--lora {plan.model}: that is the base's own name, choose another")
    checked = {name: check_lora(path, export) for name, path in adapters.items()}
    _check_plugin(plan.command[0])
    active = max_active or min(len(adapters), MAX_ACTIVE)
    settings = {
        "enable_lora": True,
        "max_loras": active,
        "max_cpu_loras": max(active, len(adapters)),  # all stay in memory
        "max_lora_rank": min(r for r in RANKS if r >= max(rank for _, rank in checked.values())),
    }
    overlay = {
        "base_config": str(plan.deploy),
        "stages": [{"stage_id": 0, "additional_config": {"higgs_lab_lora": settings}}],
    }
    deploy = plan.log.resolve().with_name(f"{plan.log.stem}-lora.yaml")
    deploy.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(deploy) as temporary:
        temporary.write_text(json.dumps(overlay, indent=2) + "\n", encoding="utf-8")  # JSON is YAML
    command = [str(deploy) if word == str(plan.deploy) else word for word in plan.command]
    command += ["--lora-modules", *(f"{name}={folder}" for name, (folder, _) in checked.items())]
    return replace(plan, command=command, deploy=deploy)


def _check_plugin(vllm: str) -> None:
    """Raise FileNotFoundError unless the plugin is installed next to the vllm program."""
    python = Path(vllm).with_name("python")
    if not python.is_file():
        return  # a vllm of its own making; the server will say "does not support LoRA"
    code = f"import importlib.metadata as m; m.distribution({PLUGIN!r})"
    if subprocess.run([python, "-c", code], capture_output=True).returncode:
        raise FileNotFoundError(
            f"the plugin that LoRA needs is not installed next to {vllm}: "
            f"{python} -m pip install {PLUGIN_FOLDER}"
        )
