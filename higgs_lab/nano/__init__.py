"""The embedded family: small models in the exact formats of the large ones, for a laptop CPU.

`nano_checkpoint()` writes a native Higgs TTS 3 directory into the cache and returns its path; the
name "nano" works wherever a hub name works, through the same code.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

SOURCES = ("build.py", "tokenizer.py")


def cache_folder() -> Path:
    """$HIGGS_LAB_CACHE, or higgs_lab in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HIGGS_LAB_CACHE") or Path(base) / "higgs_lab")


def nano_checkpoint(cache_dir: str | Path | None = None) -> Path:
    """Native directory of the nano checkpoint, built once and kept; returns its path.

    The folder's name holds a hash of what it is built from, so a new release never finds an old
    one, and it appears whole or not at all.
    """
    here = Path(__file__).parent
    digest = hashlib.sha256(b"".join((here / name).read_bytes() for name in SOURCES)).hexdigest()
    path = Path(cache_dir or cache_folder()) / f"nano-{digest[:12]}"
    if not path.is_dir():
        from higgs_lab.nano.build import write_checkpoint

        write_checkpoint(path)
    return path
