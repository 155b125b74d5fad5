"""The embedded family: small models in the exact formats of the large ones, for a laptop CPU.

`nano_checkpoint()` writes a native Higgs TTS 3 directory into the cache and returns its path,
`nano_whisper()` and `nano_ecapa()` the judges; the name "nano" works wherever a hub name works,
through the same code.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
# What the family speaks and hears; others are beyond it, whatever its vocabulary has a token for.
LANGUAGES = ("en", "de", "es", "fr", "it", "ru", "el", "hi", "zh")
ASSETS = HERE / "assets"  # packaged weights, see packing.py


def cache_folder() -> Path:
    """$HIGGS_LAB_CACHE, or higgs_lab in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HIGGS_LAB_CACHE") or Path(base) / "higgs_lab")


def nano_checkpoint(cache_dir: str | Path | None = None) -> Path:
    """Native directory of the nano checkpoint, built once and kept; returns its path."""
    from higgs_lab.nano import build

    packaged = ("assets/codec.safetensors", "assets/talker.safetensors")
    sources = ("build.py", "tokenizer.py", "packing.py", *packaged)
    return _cached("nano", sources, build.write_checkpoint, cache_dir)


def nano_whisper(cache_dir: str | Path | None = None) -> Path:
    """Checkpoint file that `whisper.load_model` reads, unpacked once and kept; its path."""
    from higgs_lab.nano.judges import write_whisper

    sources = ("packing.py", "judges.py", "assets/whisper.safetensors")
    return _cached("whisper", sources, write_whisper, cache_dir, suffix=".pt")


def nano_ecapa(cache_dir: str | Path | None = None) -> Path:
    """Folder that `EncoderClassifier.from_hparams(source=...)` reads; returns its path."""
    from higgs_lab.nano.judges import write_ecapa

    sources = ("packing.py", "judges.py", "assets/ecapa.safetensors")
    return _cached("ecapa", sources, write_ecapa, cache_dir)


def _cached(
    name: str, sources: tuple[str, ...], build: Callable, cache_dir: str | Path | None, suffix=""
) -> Path:
    """Path of what `build(path)` writes. It does so whole or not at all.

    The name holds a hash of what it is built from, so a new release never finds an old one.
    """
    digest = hashlib.sha256(b"".join((HERE / source).read_bytes() for source in sources))
    path = Path(cache_dir or cache_folder()) / f"{name}-{digest.hexdigest()[:12]}{suffix}"
    if not path.exists():
        build(path)
    return path
