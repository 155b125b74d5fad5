"""Voices: waveform at 16 kHz in, a unit vector out; cosines between them.

SpeechBrain's ECAPA-TDNN, or a WavLM with an x-vector head (eval.speaker_wavlm), by hub name or
folder. Cosines of different encoders live on different scales and are never comparable: the
encoder's name and revision go into every result. References mined with one encoder are scored with
another (`check_independent`): the first would find its own choice good.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from higgs_lab.nano.judges import forget_redirects
from higgs_lab.runlog import files_hash

SAMPLE_RATE_HZ = 16000
_MODEL_FILES = (".yaml", ".ckpt", ".txt", ".json", ".safetensors", ".bin")


class SpeakerEncoder:
    """What all encoders do. name: as the user gave it; min_samples: the shortest clip."""

    name: str
    min_samples: int

    def embed(self, wav: np.ndarray) -> np.ndarray:
        """Unit-length embedding [E] of mono float32 [n] at 16 kHz, n >= min_samples."""
        if len(wav) < self.min_samples:
            raise ValueError(
                f"a clip of {len(wav) / SAMPLE_RATE_HZ:.3f} s is too short for a voice; "
                f"{self.min_samples / SAMPLE_RATE_HZ} s is the least"
            )
        return unit(self._vector(np.ascontiguousarray(wav, dtype=np.float32)))

    def _vector(self, wav: np.ndarray) -> np.ndarray:
        raise NotImplementedError


class EcapaEncoder(SpeakerEncoder):
    """A SpeechBrain encoder on its device."""

    min_samples = 1600  # 0.1 s; shorter clips give too few frames to pool

    def __init__(self, model, name: str):
        self.model, self.name = model, name

    def _vector(self, wav: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            return self.model.encode_batch(torch.from_numpy(wav)[None]).reshape(-1).cpu().numpy()


def encoder_details(spec: str) -> dict:
    """Name and revision of an encoder, found without loading it (a hub name is downloaded)."""
    return {"name": spec, "revision": _resolve(spec)[1]}


def encoder_title(details: dict) -> str:
    """Column title: without the encoder's name and revision a similarity means nothing."""
    return f"{Path(details['name'].split('@')[0]).name}@{details['revision'][:8]}"


def check_independent(scorer: dict, mined_with: str) -> None:
    """Refuse an encoder that also chose the references. scorer: `encoder_details` of it.

    mined_with: the other's name or folder. Raises ValueError if it is the same model: by its hub
    name, or, of a folder, by its files.
    """
    if mined_with.partition("@")[0] != scorer["name"].partition("@")[0]:
        local = mined_with == "nano" or Path(mined_with).is_dir()
        if not local or encoder_details(mined_with)["revision"] != scorer["revision"]:
            return
    raise ValueError(
        f"the references were mined with {mined_with}, which is the encoder that scores: it finds "
        "its own choice similar. Score with another one (--speaker)"
    )


def load_encoder(spec: str, device: str | None = None) -> SpeakerEncoder:
    """Load an encoder from a folder or a hub name ("org/name" or "org/name@revision").

    A SpeechBrain folder is only read; nothing is written into it or into the working folder. Its
    hyperparams file is code that SpeechBrain runs: load only folders that you trust.

    Raises FileNotFoundError for a folder of neither kind, ValueError for a model of another class.
    """
    from higgs_lab.device import chosen_device

    device = str(chosen_device(device))
    folder, _ = _resolve(spec)
    if (folder / "hyperparams.yaml").is_file():
        return _load_ecapa(folder, spec, device)
    from eval.speaker_wavlm import load_wavlm

    # Of a hub model only the small files are here yet.
    is_hub = spec != "nano" and not Path(spec).is_dir()
    return load_wavlm(folder, spec, {"revision": folder.name} if is_hub else {}, device)


def _load_ecapa(folder: Path, spec: str, device: str) -> EcapaEncoder:
    from speechbrain.inference.classifiers import EncoderClassifier

    # Published files name their hub repository in `pretrained_path`; left alone, loading a local
    # copy would go to the network for the weights.
    text = (folder / "hyperparams.yaml").read_text(encoding="utf-8")
    overrides = {}
    if re.search(r"^pretrained_path\s*:", text, re.MULTILINE):
        overrides["pretrained_path"] = str(folder)
    # SpeechBrain links every file into a folder of its own before loading; give it one to throw
    # away. (Its default is ./pretrained_models in some versions.)
    with tempfile.TemporaryDirectory(prefix="higgs-lab-encoder-") as scratch:
        model = EncoderClassifier.from_hparams(
            source=str(folder),
            savedir=scratch,
            overrides=overrides,
            run_opts={"device": device},
        )
    forget_redirects()
    model.eval()
    return EcapaEncoder(model, spec)


def unit(vector: np.ndarray) -> np.ndarray:
    """The vector at length one. Raises ValueError for zeros or NaN, which have no direction."""
    vector = np.asarray(vector, dtype=np.float32)
    length = float(np.linalg.norm(vector))
    if not np.isfinite(length) or length == 0:
        raise ValueError(f"an embedding of length {length} has no direction")
    return vector / length


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(unit(a) @ unit(b))


def centroid(vectors: Sequence[np.ndarray]) -> np.ndarray:
    """The voice of several clips: mean of their unit vectors, at length one. [E]"""
    if len(vectors) == 0:
        raise ValueError("no clips to take a centroid of")
    return unit(np.mean([unit(vector) for vector in vectors], axis=0))


def _resolve(spec: str) -> tuple[Path, str]:
    """Folder and revision of a folder, hub name or "nano"."""
    path = Path(spec)
    if spec == "nano":
        from higgs_lab.nano import nano_ecapa

        path = nano_ecapa()
    if path.is_dir():
        if not any((path / name).is_file() for name in ("hyperparams.yaml", "config.json")):
            raise FileNotFoundError(
                f"encoder folder {spec} has neither hyperparams.yaml nor config.json: give a "
                "SpeechBrain or a WavLM model's folder"
            )
        return path.resolve(), _hash(path)
    if spec.startswith(("/", ".", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", spec):
        raise FileNotFoundError(
            f"encoder {spec!r} is neither a folder nor a hub name like "
            "speechbrain/spkrec-ecapa-voxceleb"
        )
    from huggingface_hub import snapshot_download

    name, _, wanted = spec.partition("@")
    # All of a SpeechBrain model; of a transformers model what tells its class.
    patterns = ["*.yaml", "*.ckpt", "*.txt", "*config.json"]
    folder = Path(snapshot_download(name, revision=wanted or None, allow_patterns=patterns))
    return folder, folder.name[:16]  # the snapshot folder is named by its commit


def _hash(folder: Path) -> str:
    return files_hash((p for p in folder.iterdir() if p.suffix in _MODEL_FILES), folder)
