"""The family's judges: a recogniser that hears its domain, an encoder that knows voices apart.

`nano_whisper` is openai-whisper's own architecture and checkpoint format, `nano_ecapa` a folder of
SpeechBrain's ECAPA-TDNN: both go through the loaders of whisper-large and of the VoxCeleb encoder.
The trained weights are packaged in `assets/`. The `random_*` twins hear nothing; tests of code
paths use them.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

from higgs_lab.nano import ASSETS, packing
from higgs_lab.runlog import atomic_path

# The multilingual tokenizer's size with 99 languages (all but large-v3, which adds Cantonese).
WHISPER_VOCAB = 51865

# Same shape as speechbrain/spkrec-ecapa-voxceleb's file, but for the sizes and for the paths: with
# no paths named, the files are looked for beside this one, wherever the folder is moved to.
_ECAPA_YAML = """\
# {title}. Load with
# speechbrain.inference.speaker.EncoderClassifier.from_hparams(source=THIS_FOLDER)
n_mels: {input_size}
out_n_neurons: 2
lin_neurons: {lin_neurons}

compute_features: !new:speechbrain.lobes.features.Fbank
    n_mels: !ref <n_mels>

mean_var_norm: !new:speechbrain.processing.features.InputNormalization
    norm_type: sentence
    std_norm: False

embedding_model: !new:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN
    input_size: !ref <n_mels>
    channels: {channels}
    kernel_sizes: {kernel_sizes}
    dilations: {dilations}
    groups: [1, 1, 1, 1, 1]
    attention_channels: {attention_channels}
    res2net_scale: {res2net_scale}
    se_channels: {se_channels}
    lin_neurons: !ref <lin_neurons>

classifier: !new:speechbrain.lobes.models.ECAPA_TDNN.Classifier
    input_size: !ref <lin_neurons>
    out_neurons: !ref <out_n_neurons>

modules:
    compute_features: !ref <compute_features>
    mean_var_norm: !ref <mean_var_norm>
    embedding_model: !ref <embedding_model>
    classifier: !ref <classifier>

pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
        embedding_model: !ref <embedding_model>
        classifier: !ref <classifier>
"""
RANDOM_SIZES = dict(
    input_size=80,
    channels=[16, 16, 16, 16, 48],
    kernel_sizes=[5, 3, 3, 3, 1],
    dilations=[1, 2, 3, 4, 1],
    attention_channels=16,
    lin_neurons=32,
    res2net_scale=4,
    se_channels=16,
)


def write_whisper(path: str | Path) -> None:
    """The trained recogniser as a checkpoint that `whisper.load_model(path)` reads (41 MB)."""
    _write_checkpoint(packing.expand_whisper(ASSETS / "whisper.safetensors"), path)


def write_ecapa(folder: str | Path) -> None:
    """The trained encoder as a folder that `EncoderClassifier.from_hparams` reads."""
    file = ASSETS / "ecapa.safetensors"
    sizes = json.loads(packing.metadata(file)["sizes"])
    _write_encoder(folder, "higgs_lab's nano ECAPA", sizes, packing.unpack(file))


def random_whisper(path: str | Path, seed: int = 0) -> Path:
    """Write an openai-whisper checkpoint of random weights; `whisper.load_model(path)` reads it.

    One layer of 16 dimensions, multilingual vocabulary, a text context of 64 tokens (so at most 32
    are written per window); about 2 MB. Returns the path.
    """
    import torch
    from whisper.model import ModelDimensions, Whisper

    dims = dict(n_mels=80, n_vocab=WHISPER_VOCAB, n_audio_ctx=1500, n_text_ctx=64)
    for side in ("audio", "text"):
        dims |= {f"n_{side}_state": 16, f"n_{side}_head": 2, f"n_{side}_layer": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Whisper(ModelDimensions(**dims))
        for parameter in model.parameters():  # Whisper leaves two tables uninitialised
            torch.nn.init.normal_(parameter, std=0.3)
    # The published files hold fp16 too; load_model copies it into fp32 parameters.
    weights = {name: tensor.half() for name, tensor in model.state_dict().items()}
    _write_checkpoint({"dims": dims, "model_state_dict": weights}, path)
    return Path(path)


def _write_checkpoint(checkpoint: dict, path: str | Path) -> None:
    import torch

    # Through memory: torch writes the file's own (temporary) name into it, and the same weights
    # should give the same bytes.
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def random_ecapa(folder: str | Path, seed: int = 0) -> Path:
    """Write a SpeechBrain ECAPA-TDNN folder of random weights (32 dimensions; about 0.1 MB).

    `EncoderClassifier.from_hparams(source=folder)` reads it. Returns the folder.
    """
    _write_encoder(folder, "Speaker embedding with random weights", RANDOM_SIZES, seed=seed)
    return Path(folder)


def _write_encoder(
    folder: str | Path, title: str, sizes: dict, weights: dict | None = None, seed: int = 0
) -> None:
    """weights: of the embedding model; random ones from `seed` without."""
    import torch
    from hyperpyyaml import load_hyperpyyaml

    text = _ECAPA_YAML.format(title=title, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = load_hyperpyyaml(text)
    forget_redirects()
    if weights is not None:
        missing, extra = parts["embedding_model"].load_state_dict(weights, strict=False)
        missing = [name for name in missing if not name.endswith("num_batches_tracked")]
        if missing or extra:
            raise ValueError(f"the packaged encoder lacks {missing} and has {extra} too much")
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        (temporary / "hyperparams.yaml").write_text(text, encoding="utf-8")
        for name in ("embedding_model", "classifier"):
            torch.save(parts[name].state_dict(), temporary / f"{name}.ckpt")


def forget_redirects() -> None:
    """Take SpeechBrain's lazy stand-ins for renamed modules out of sys.modules.

    Anything that looks at all loaded modules (hypothesis, debuggers, some of torch's tools) makes
    them import what they stand for, k2 and flair among them, and fails where those are missing.
    """
    from speechbrain.utils.importutils import LazyModule

    for name, module in list(sys.modules.items()):
        if issubclass(type(module), LazyModule):
            sys.modules.pop(name, None)  # another thread may do the same
