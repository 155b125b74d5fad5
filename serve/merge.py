"""Fold a PEFT adapter into weights one tensor at a time, so that a 4B merge needs little memory.

Reads the adapter's matrices from disk and never builds the model: W + scale * B @ A in fp32, one
cast to the stored dtype at the end. `higgs_lab.adapter.merge_lora` does the same to a model in
memory; the tests hold the two against each other.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from higgs_lab.adapter import find_adapter
from higgs_lab.checkpoint import to_native_key

PREFIX = "base_model.model."
# Largest relative error of a merged layer's product with a random vector. Rounding errs by up to
# 2^-9 of a weight in bf16, and the errors of a sum average out: more means that something is wrong.
MAX_OUTPUT_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}
UNSUPPORTED = ("use_dora", "fan_in_fan_out", "lora_bias", "trainable_token_indices")


@dataclass
class Adapter:
    """A PEFT adapter by native checkpoint key."""

    path: Path
    pairs: dict[str, tuple[Tensor, Tensor, float]]  # key -> A [r, in], B [out, r], scale
    whole: dict[str, Tensor]  # key -> a tensor trained whole (PEFT's modules_to_save)

    @property
    def keys(self) -> set[str]:
        return {*self.pairs, *self.whole}

    def shape(self, key: str) -> tuple[int, ...]:
        if key in self.whole:
            return tuple(self.whole[key].shape)
        a, b, _ = self.pairs[key]
        return b.shape[0], a.shape[1]

    def delta(self, key: str, weight: Tensor) -> Tensor:
        """What the adapter adds to an fp32 weight of this key, in fp32."""
        if key in self.whole:
            return self.whole[key].float() - weight
        a, b, scale = self.pairs[key]
        return scale * (b.float() @ a.float())


def read_adapter(path: str | Path) -> Adapter:
    """Read an adapter folder, or the one of a run directory.

    Raises FileNotFoundError when it is none, ValueError for a damaged file, a kind of adapter that
    cannot be merged here (DoRA and the like), half a LoRA pair, or keys that are no talker's.
    """
    folder = find_adapter(path)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        raise ValueError(f"adapter {folder} is {config.get('peft_type')}, only LORA can be merged")
    odd = [name for name in UNSUPPORTED if config.get(name)]
    if odd or config.get("bias", "none") != "none":
        raise ValueError(f"adapter {folder} uses {odd[0] if odd else 'bias'}: not supported here")
    halves: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in _tensors(folder / "adapter_model.safetensors"):
        module, half = _split(folder, key)
        if half == "weight":
            whole[_native(folder, f"{module}.weight")] = tensor
        else:
            halves.setdefault(module, {})[half] = tensor
    pairs = {}
    for module, both in halves.items():
        if set(both) != {"A", "B"}:
            raise ValueError(f"adapter {folder}: {module} has lora_{min(both)} without its partner")
        scale = _scale(config, module, both["A"].shape[0])
        pairs[_native(folder, f"{module}.weight")] = (both["A"], both["B"], scale)
    if not pairs and not whole:
        raise ValueError(f"adapter {folder} holds no weights")
    return Adapter(folder, pairs, whole)


def _tensors(file: Path):
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: the adapter folder is incomplete")
    try:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():
                yield key, tensors.get_tensor(key)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}): copy the adapter again") from error


def _split(folder: Path, key: str) -> tuple[str, str]:
    """PEFT key -> (module name in the talker, "A", "B" or "weight")."""
    if not key.startswith(PREFIX):
        raise ValueError(
            f"adapter {folder}: key {key!r} does not begin with {PREFIX!r}: not PEFT's"
        )
    name = key[len(PREFIX) :]
    if match := re.fullmatch(r"(.+)\.lora_([AB])(?:\.\w+)?\.weight", name):
        return match[1], match[2]
    if match := re.fullmatch(r"(.+?)(?:\.modules_to_save(?:\.\w+)?)?\.weight", name):
        if "lora_" not in match[1]:
            return match[1], "weight"
    raise ValueError(f"adapter {folder}: key {key!r} is of no kind that can be merged")


def _native(folder: Path, key: str) -> str:
    try:
        return to_native_key(key)
    except KeyError:
        raise ValueError(f"adapter {folder}: {key!r} is no weight of a Higgs talker") from None


def _scale(config: dict, module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA, after PEFT's per-module patterns."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


@dataclass
class MergeFigures:
    """How true a merge is, over all merged tensors."""

    keys: set[str] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)  # those that differ from the base after the cast
    output_error: float = 0.0  # largest relative error of a product with a random vector
    delta_norm2: float = 0.0
    kept_dot: float = 0.0

    @property
    def kept(self) -> float:
        """Share of the adapter's change that survived the cast: 1 is all of it, 0 none."""
        return self.kept_dot / self.delta_norm2 if self.delta_norm2 > 0 else 0.0

    def as_dict(self) -> dict[str, float]:
        return {
            "tensors": len(self.keys),
            "changed": len(self.changed),
            "output_error": self.output_error,
            "delta_kept": self.kept,
        }


@torch.no_grad()
def merged(adapter: Adapter, key: str, weight: Tensor, figures: MergeFigures) -> Tensor:
    """The stored weight of `key` with the adapter folded in, in its own dtype; adds to `figures`.

    Raises ValueError when shapes do not fit, the result is not finite, or its product with a random
    vector is off by more than rounding explains.
    """
    if key not in adapter.keys:
        return weight
    if (shape := adapter.shape(key)) != tuple(weight.shape):
        raise ValueError(
            f"adapter {adapter.path} was made for another base: {key} is {tuple(weight.shape)} "
            f"there, {shape} in the adapter"
        )
    full = weight.float()
    delta = adapter.delta(key, full)
    wanted = full + delta
    result = wanted.to(weight.dtype)
    if not bool(torch.isfinite(result).all()):
        raise ValueError(f"adapter {adapter.path}: merging {key} gives NaN or infinite weights")
    if key in figures.keys:  # asked for again, for its tied copy
        return result
    back = result.float()
    probe = torch.randn(weight.shape[-1], generator=torch.Generator().manual_seed(0))
    want = wanted @ probe
    error = float((back @ probe - want).norm() / want.norm().clamp_min(1e-30))
    allowed = MAX_OUTPUT_ERROR.get(weight.dtype, 2**-8)
    if error > allowed:
        raise ValueError(f"merge parity failed: {key} is off by {error:.2g}, allowed {allowed:.2g}")
    figures.keys.add(key)
    if not torch.equal(result, weight):
        figures.changed.add(key)
    figures.output_error = max(figures.output_error, error)
    figures.delta_norm2 += float(delta.square().sum())
    figures.kept_dot += float(((back - full) * delta).sum())
    return result
