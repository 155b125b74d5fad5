"""LoRA on the talker through PEFT: presets, merging, and the two checks that catch silent failure.

An adapter folder is a standard PEFT one (`adapter_config.json`, `adapter_model.safetensors`; keys
`base_model.model.model.layers.N...`) plus `higgs_lab.json`, which says what base it belongs to.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor

from higgs_lab.checkpoint import NativeFiles, to_talker_key
from higgs_lab.prompt import Prompt
from higgs_lab.runlog import atomic_path, write_json_atomic
from higgs_lab.talker import Talker

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]

# preset -> LoraConfig arguments. The audio table is not factored but trained whole, as one module:
# embedding and head stay one tensor inside PEFT's copy, while a LoRA on one side of a tied pair
# would leave the other behind (huggingface/peft#2018).
TARGETS: dict[str, dict] = {
    "attention": {"target_modules": ATTENTION},
    "attention_mlp": {"target_modules": ATTENTION + MLP},
    "attention_mlp_table": {"target_modules": ATTENTION + MLP, "modules_to_save": ["codebooks"]},
}
META = "higgs_lab.json"


def attach_lora(
    talker: Talker,
    preset: str = "attention_mlp",
    rank: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    use_rslora: bool = False,
    seed: int = 0,
) -> PeftModel:
    """Freeze the talker and add a fresh LoRA, which changes no logit until trained.

    What trains is fp32 whatever the talker's dtype: an optimiser's steps on a bf16 table would be
    rounded away. Raises ValueError for an unknown preset.
    """
    if preset not in TARGETS:
        raise ValueError(f"unknown LoRA preset {preset!r}; there are {', '.join(TARGETS)}")
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, use_rslora=use_rslora, **TARGETS[preset]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(talker, config)
    for parameter in model.parameters():
        if parameter.requires_grad:  # PEFT raises lora_A and lora_B itself, the table not
            parameter.data = parameter.data.float()
    return model


def trainable_names(model: torch.nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def base_fingerprint(path: str | Path) -> str:
    """16 hex digits that tell a base from another: its text_config and a row of each tensor.

    A row of each, since a merged LoRA changes every layer and leaves the tables as they were; not
    all of them, since that would read 8 GB.
    """
    path = Path(path)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))["text_config"]
    keep = sorted((k, v) for k, v in config.items() if not k.startswith("_"))
    digest = hashlib.sha256(json.dumps(keep).encode())
    files = NativeFiles(path)
    for key in sorted(k for k in files.keys() if to_talker_key(k) is not None):
        digest.update(key.encode())
        digest.update(files.first_row(key).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def save_adapter(model: PeftModel, out: str | Path, meta: dict) -> None:
    """Write the adapter folder; atomic. meta: base name, revision, fingerprint, codec hash, ..."""
    with atomic_path(Path(out)) as temporary:
        name = meta.get("base")
        model.peft_config["default"].base_model_name_or_path = name
        model.save_pretrained(str(temporary), save_embedding_layers=False)
        (temporary / "README.md").unlink(missing_ok=True)  # PEFT's template, empty
        # PEFT writes a set, in another order each time: the same adapter must be the same file
        config = json.loads((temporary / "adapter_config.json").read_text(encoding="utf-8"))
        config["target_modules"] = sorted(config["target_modules"])
        write_json_atomic(temporary / "adapter_config.json", config)
        write_json_atomic(temporary / META, meta)


def find_adapter(path: str | Path) -> Path:
    """The adapter folder itself, of a run directory, or of a hub name org/name@revision."""
    folder = Path(path)
    for candidate in (folder, folder / "adapter"):
        if (candidate / "adapter_config.json").is_file():
            return candidate
    inside = [file.parent for file in folder.glob("*/adapter_config.json")]
    if len(inside) == 1:  # other trainers name the folder otherwise
        return inside[0]
    repo, _, revision = str(path).partition("@")
    if not folder.exists() and repo.count("/") == 1 and not repo.startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(repo, revision=revision or None))
        except Exception as error:  # the hub raises a dozen kinds; all mean: not there
            raise FileNotFoundError(
                f"adapter {str(path)!r}: no folder, and the hub says {error}"
            ) from error
    raise FileNotFoundError(
        f"{folder} holds no adapter_config.json (nor does {folder / 'adapter'}): give a run "
        "directory of recipes/finetune.py or a PEFT adapter folder"
    )


def read_meta(adapter: str | Path) -> dict:
    """What `save_adapter` noted, {} for adapters of other trainers."""
    file = Path(adapter) / META
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def check_base(adapter: str | Path, base: str | Path) -> None:
    """Raise ValueError when the adapter was trained on another base than `base`."""
    meta = read_meta(adapter)
    trained_on = meta.get("fingerprint")
    if trained_on and trained_on != (here := base_fingerprint(base)):
        raise ValueError(
            f"adapter {adapter} was trained on {meta.get('base')}@{meta.get('revision')} "
            f"(fingerprint {trained_on}), but {base} has fingerprint {here}: "
            "load it on its own base"
        )


def load_adapter(talker: Talker, path: str | Path, base: str | Path | None = None) -> PeftModel:
    """Attach a saved adapter for inference; base: the talker's directory, to refuse a stranger's.

    Raises ValueError when the adapter does not fit, naming the first tensor that does not.
    """
    folder = find_adapter(path)
    if base is not None:
        check_base(folder, base)
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: the adapter folder is incomplete")
    loaded = set(NativeFiles(folder).keys())  # first, as it names a file that is cut
    try:
        model = PeftModel.from_pretrained(talker, str(folder))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"adapter {folder} does not fit this model: {error}") from error
    expected = {name.replace(".default", "") for name, _ in adapter_parameters(model)}
    if loaded != expected:
        odd = sorted(loaded ^ expected)[0]
        state = "unknown to" if odd in loaded else "missing for"
        raise ValueError(f"adapter {folder}: {odd!r} is {state} this model")
    return model.eval()


def adapter_parameters(model: PeftModel) -> list[tuple[str, Tensor]]:
    """(name, tensor) of everything an adapter holds, names as in the saved file plus `.default`."""
    marks = ("lora_", "modules_to_save.")
    found = []
    for name, value in model.state_dict().items():
        if any(mark in name for mark in marks) and "original_module" not in name:
            found.append((name.replace("modules_to_save.default.", ""), value))
    return found


@torch.no_grad()
def merge_lora(model: PeftModel) -> Talker:
    """Fold the adapter into the weights: in fp32, then one cast to the stored dtype.

    In bf16 a delta smaller than 1/256 of a weight would vanish (facts trap 37). Consumes `model`.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            base = module.get_base_layer()
            dtype = base.weight.dtype
            module.float()
            module.merge(safe_merge=True)
            base.to(dtype)
    talker = model.unload()
    talker.fused = None  # its matrices hold the weights as they were, and the adapter beside them
    talker.codebooks.to(talker.model.embed_tokens.weight.dtype)  # a trained table is fp32
    return talker


@contextmanager
def adapter_off(model: PeftModel):
    """Inside, the model is its base."""
    with model.disable_adapter():
        yield


@torch.no_grad()
def probe_logits(model: torch.nn.Module, prompt: Prompt) -> Tensor:
    """fp32 logits [P, K, V] of a prompt."""
    device = next(model.parameters()).device
    batch = (prompt.ids[None], prompt.is_audio[None], prompt.rows[None])
    return model(*(t.to(device) for t in batch)).logits[0].float().cpu()


def adapter_effect(model: PeftModel, prompt: Prompt) -> float:
    """Largest change of a logit that the adapter makes on a probe.

    Raises ValueError when there is none: an adapter that does nothing is a common silent failure
    (keys that match nothing, lora_B still zero).
    """
    with adapter_off(model):
        before = probe_logits(model, prompt)
    effect = float((probe_logits(model, prompt) - before).abs().max())
    if effect == 0:
        raise ValueError(
            "the adapter has no effect: no logit of the probe changes. Was it trained, and do its "
            "keys match the model?"
        )
    return effect


def merge_parity(adapter_logits: Tensor, merged_logits: Tensor) -> dict[str, float]:
    """How far a merged model is from its adapter, on the same probe: logits [P, K, V].

    max_abs: largest logit difference; kl: mean KL divergence per softmax, in nats.
    """
    log_p, log_q = adapter_logits.log_softmax(-1), merged_logits.log_softmax(-1)
    return {
        "max_abs": float((adapter_logits - merged_logits).abs().max()),
        "kl": float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
    }
