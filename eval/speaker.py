"""Voices: waveform at 16 kHz in, a unit vector out; cosines between them.

SpeechBrain's ECAPA-TDNN, by hub name or folder. Cosines of different encoders live on different
scales and are never comparable: the encoder's name and revision go into every result. Training
references mined with one encoder should be scored with another.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from higgs_lab.nano.judges import forget_redirects

SAMPLE_RATE_HZ = 16000
MIN_SAMPLES = 1600  # 0.1 s; shorter clips give too few frames to pool


class SpeakerEncoder:
    """A SpeechBrain encoder on its device. name: as the user gave it."""

    def __init__(self, model, name: str):
        self.model, self.name = model, name

    def embed(self, wav: np.ndarray) -> np.ndarray:
        """Unit-length embedding [E] of mono float32 [n] at 16 kHz, n >= 1600 (0.1 s)."""
        import torch

        if len(wav) < MIN_SAMPLES:
            raise ValueError(
                f"a clip of {len(wav) / SAMPLE_RATE_HZ:.3f} s is too short for a voice; "
                f"{MIN_SAMPLES / SAMPLE_RATE_HZ} s is the least"
            )
        with torch.inference_mode():
            batch = torch.from_numpy(np.ascontiguousarray(wav, dtype=np.float32))[None]
            vector = self.model.encode_batch(batch).reshape(-1).float().cpu().numpy()
        return unit(vector)


def encoder_details(spec: str) -> dict:
    """Name and revision of an encoder, found without loading it (a hub name is downloaded)."""
    return {"name": spec, "revision": _resolve(spec)[1]}


def encoder_title(details: dict) -> str:
    """Column title: without the encoder's name and revision a similarity means nothing."""
    return f"{Path(details['name'].split('@')[0]).name}@{details['revision'][:8]}"


def load_encoder(spec: str, device: str | None = None) -> SpeakerEncoder:
    """Load a SpeechBrain encoder from a folder or a hub name ("org/name" or "org/name@revision").

    The folder is only read; nothing is written into it or into the working folder. A hyperparams
    file is code that SpeechBrain runs: load only folders that you trust.

    Raises FileNotFoundError for a folder without hyperparams.yaml, and says what was looked for.
    """
    import torch
    from speechbrain.inference.classifiers import EncoderClassifier

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder, _ = _resolve(spec)
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
    return SpeakerEncoder(model, spec)


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
        if not (path / "hyperparams.yaml").is_file():
            raise FileNotFoundError(
                f"encoder folder {spec} has no hyperparams.yaml: give a SpeechBrain model folder"
            )
        return path.resolve(), _hash(path)
    if spec.startswith(("/", ".", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", spec):
        raise FileNotFoundError(
            f"encoder {spec!r} is neither a folder nor a hub name like "
            "speechbrain/spkrec-ecapa-voxceleb"
        )
    from huggingface_hub import snapshot_download

    name, _, wanted = spec.partition("@")
    patterns = ["*.yaml", "*.ckpt", "*.txt"]
    folder = Path(snapshot_download(name, revision=wanted or None, allow_patterns=patterns))
    return folder, folder.name[:16]  # the snapshot folder is named by its commit


def _hash(folder: Path) -> str:
    """First 16 hex digits of a sha256 over the model files, names included."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".yaml", ".ckpt", ".txt") and file.is_file():
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
