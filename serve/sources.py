"""What an export puts in the place of the base's weights: a LoRA adapter, or a whole checkpoint.

Adapters and checkpoints come from this toolkit or from others: names differ (a Hugging Face port, a
LoRA on the bare backbone, wrappers of DDP and torch.compile), what they mean does not. Every name
goes through the one key table of `higgs_lab.checkpoint`; a name that is in none of them is an
error, as a weight that is dropped without a word is a fine-tune lost.
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
from higgs_lab.checkpoint import (
    CODEC_PREFIX,
    TIED_COPIES,
    NativeFiles,
    foreign_native_key,
    resolve_checkpoint,
)
from higgs_lab.safetensors_stream import SafetensorsReader

TABLE = TIED_COPIES["tied.head.modality_heads.0.weight"]
# Kinds of LoRA that are more than W + scale * B @ A, or another W.
UNSUPPORTED = (
    "use_dora",
    "fan_in_fan_out",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
)
# Initialisations that take something out of the base's weights; B @ A then belongs to what is left.
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass
class Adapter:
    """A PEFT adapter by native checkpoint key."""

    path: Path
    pairs: dict[str, tuple[Tensor, Tensor, float]]  # key -> A [r, in], B [out, r], scale
    whole: dict[str, Tensor]  # key -> a tensor trained whole (PEFT's modules_to_save)
    names: dict[str, str] = field(default_factory=dict)  # key -> the adapter's own name of it
    kind: str = "adapter"

    @property
    def keys(self) -> set[str]:
        return {*self.pairs, *self.whole}

    def shape(self, key: str) -> tuple[int, ...]:
        if key in self.pairs:
            a, b, _ = self.pairs[key]
            return b.shape[0], a.shape[1]
        return tuple(self.whole[key].shape)

    def wanted(self, key: str, weight: Tensor, rows: slice) -> Tensor:
        """fp32 rows of what the weight shall be; `weight`: the base's, of the same rows, fp32."""
        if key in self.whole:
            weight = self.whole[key][rows].float()
        if key not in self.pairs:
            return weight
        a, b, scale = self.pairs[key]
        return weight + scale * (b[rows].float() @ a.float())


class Weights:
    """A whole checkpoint in any known layout, by native key; read as needed, nothing kept but one.

    Its codec, if it has one, is not used: an export's codec is the base's.
    """

    kind = "checkpoint"

    def __init__(self, path: str | Path, table: str | None = None):
        self.path = Path(path)
        files = NativeFiles(self.path)
        self.names: dict[str, str] = {}
        self.codec: dict[str, str] = {}
        self._files, self._held = files, ("", torch.empty(0))
        for name in files.keys():
            key = _native(self.path, name)
            if key.startswith(CODEC_PREFIX):
                self.codec[key] = name
            elif key not in self.names or self.names[key] in TIED_COPIES:
                self.names[key] = name
            elif name not in TIED_COPIES:  # engines read the embeddings, not the copies
                self.names[key] = _one_of(self.path, self.names[key], name, self.tensor, table)

    @property
    def keys(self) -> set[str]:
        return set(self.names)

    def tensor(self, name: str) -> Tensor:
        if self._held[0] != name:
            with SafetensorsReader(self.path / self._files.shard[name]) as reader:
                self._held = name, reader.read(name)
        return self._held[1]

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensor(self.names[key]).shape)

    def wanted(self, key: str, weight: Tensor, rows: slice) -> Tensor:
        return self.tensor(self.names[key])[rows].float()


Source = Adapter | Weights


def open_source(name: str | Path, table: str | None = None) -> Source:
    """An adapter (a folder, or the one of a run) or a checkpoint, on this disk or the hub.

    table: "embedding" or "head", which of the two to take where a trainer untied them.
    Raises FileNotFoundError when it is neither, ValueError naming the key that cannot be used.
    """
    path = Path(name)
    if not path.exists():
        path = resolve_checkpoint(name).path
    try:
        folder = find_adapter(path)
    except FileNotFoundError:
        if not list(path.glob("*.safetensors")):
            raise FileNotFoundError(
                f"{path} holds neither adapter_config.json (nor does {path / 'adapter'}) nor "
                "*.safetensors: give a run, a PEFT adapter folder or a checkpoint"
            ) from None
        return Weights(path, table)
    return read_adapter(folder, table)


def read_adapter(path: str | Path, table: str | None = None) -> Adapter:
    """Read an adapter folder, or the one of a run directory.

    Raises FileNotFoundError when it is none, ValueError for a damaged file, a kind of adapter that
    cannot be merged here (DoRA and the like), half a LoRA pair, or keys that are no talker's.
    """
    folder = find_adapter(path)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    _check_kind(folder, config)
    halves: dict[str, dict[str, Tensor]] = {}
    found: dict[str, dict[str, Tensor]] = {}  # native key -> name -> tensor
    for name, tensor in _tensors(folder):
        module, half = _split(folder, name)
        if half == "weight":
            found.setdefault(_native(folder, f"{module}.weight", name), {})[name] = tensor
        elif half.startswith("embedding"):  # its delta is (B @ A).T
            swapped = "A" if half.endswith("B") else "B"
            halves.setdefault(module, {})[swapped] = tensor.T
        else:
            halves.setdefault(module, {})[half] = tensor
    adapter = Adapter(folder, {}, {})
    for key, tensors in found.items():
        name, *twins = sorted(tensors)
        for twin in twins:
            name = _one_of(folder, name, twin, tensors.__getitem__, table)
        adapter.names[key], adapter.whole[key] = name, tensors[name]
    for module, both in halves.items():
        if set(both) != {"A", "B"}:
            raise ValueError(f"adapter {folder}: {module} has lora_{min(both)} without its partner")
        key = _native(folder, f"{module}.weight")
        if key in adapter.pairs:
            raise ValueError(f"adapter {folder}: two LoRA pairs for {key!r}, one is {module!r}")
        scale = _scale(config, module, both["A"].shape[0])
        adapter.pairs[key], adapter.names[key] = (both["A"], both["B"], scale), module
    if not adapter.keys:
        raise ValueError(f"adapter {folder} holds no weights")
    return adapter


def _check_kind(folder: Path, config: dict) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"adapter {folder} is {config.get('peft_type')}, only LORA can be merged")
    odd = [name for name in UNSUPPORTED if config.get(name)]
    if odd or config.get("bias", "none") != "none":
        raise ValueError(f"adapter {folder} uses {odd[0] if odd else 'bias'}: not supported here")
    begun = str(config.get("init_lora_weights")).lower()
    if begun.startswith(CHANGE_THE_BASE):
        raise ValueError(
            f"adapter {folder} began with init_lora_weights={begun!r}, which changes the base: on "
            "the released weights it would be wrong. Save it again with PEFT's "
            "path_initial_model_for_weight_conversion"
        )


def _tensors(folder: Path):
    file, pickled = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if not file.is_file() and pickled.is_file():
        yield from torch.load(pickled, map_location="cpu", weights_only=True).items()
        return
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: the adapter folder is incomplete")
    try:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():
                yield key, tensors.get_tensor(key)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}): copy the adapter again") from error


def _split(folder: Path, name: str) -> tuple[str, str]:
    """PEFT's name -> (module as PEFT's patterns match it, "A", "B", "embedding_A" or "weight")."""
    inner = name.replace("_orig_mod.", "")
    inner = inner.removeprefix("module.").removeprefix("base_model.model.")
    if match := re.fullmatch(r"(.+)\.lora_([AB])(?:\.\w+)?\.weight", inner):
        return match[1], match[2]
    if match := re.fullmatch(r"(.+)\.lora_embedding_([AB])(?:\.\w+)?", inner):
        return match[1], f"embedding_{match[2]}"
    whole = r"(.+?)(?:\.base_layer|\.modules_to_save(?:\.\w+)?)?\.weight"
    if (match := re.fullmatch(whole, inner)) and "lora_" not in match[1]:
        return match[1], "weight"
    raise ValueError(f"adapter {folder}: key {name!r} is of no kind that can be merged")


def _one_of(path: Path, one: str, two: str, read, table: str | None) -> str:
    """The name to use of two for the same weight. Raises ValueError when they say two things."""
    if torch.equal(read(one), read(two)):
        return one
    head = next((name for name in (one, two) if "head" in name), None)
    if head is None or _native(path, head) != TABLE:
        raise ValueError(f"{path}: {one!r} and {two!r} are the same weight with other values")
    if table is None:
        raise ValueError(
            f"{path}: {one!r} and {two!r} were trained apart, and a native checkpoint has one "
            "table for both (PEFT copies each module of modules_to_save, which unties them). No "
            "export sounds as that training did; --table embedding or --table head keeps one"
        )
    return head if table == "head" else (two if head == one else one)


def _native(path: Path, key: str, name: str | None = None) -> str:
    try:
        return foreign_native_key(key)
    except KeyError:
        raise ValueError(f"{path}: {name or key!r} is no weight of a Higgs talker") from None


def _scale(config: dict, module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA, after PEFT's per-module patterns."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
