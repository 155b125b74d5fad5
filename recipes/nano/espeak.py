"""espeak-ng's voices for the nano family: text in, 24 kHz samples out, the same ones every time.

Processes may be forked at any time, after `data_folder()` if they shall share it; two threads must
not speak at once (`higgs_lab.espeak`).

The library comes from the `espeakng-loader` wheel, from a folder named by `ESPEAK_NG` (an unpacked
wheel), or from the system.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np

from higgs_lab.espeak import RATE_HZ, synthesize
from recipes.nano.texts import ESPEAK_LANGUAGE
from recipes.nano.voices import build_data_folder, made_variant

SAMPLE_RATE_HZ = 24_000


def library_and_data() -> tuple[str, Path]:
    """Paths of the shared library and of the installed data folder."""
    if "ESPEAK_NG" in os.environ:
        folder = Path(os.environ["ESPEAK_NG"])
        found = sorted(folder.glob("libespeak-ng.[sd]*"))  # .so, .dylib
        if not found:
            raise ImportError(f"ESPEAK_NG={folder} holds no libespeak-ng: name an unpacked wheel")
        return str(found[0]), (folder / "espeak-ng-data").resolve()
    try:
        import espeakng_loader
    except ImportError:
        for data in Path("/usr/lib").glob("*/espeak-ng-data"):
            return str(next(data.parent.glob("libespeak-ng.so*"))), data
        raise ImportError(
            "espeak-ng is missing: pip install espeakng-loader, or install Debian's "
            "libespeak-ng1 and espeak-ng-data"
        ) from None
    return espeakng_loader.get_library_path(), Path(espeakng_loader.get_data_path()).resolve()


@lru_cache(maxsize=1)
def data_folder() -> Path:
    """The engine's data with room for drawn variants, made once a process.

    Processes forked after the first call share it, and the one that made it removes it.
    """
    scratch = Path(tempfile.mkdtemp(prefix="nano-espeak-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    return build_data_folder(library_and_data()[1], scratch / "espeak-ng-data")


def _variant_file(variant: str) -> Path:
    path = data_folder() / "voices" / "!v" / variant
    if variant.startswith("made") and not path.exists():
        with tempfile.NamedTemporaryFile("w", dir=data_folder(), delete=False) as file:
            file.write(made_variant(int(variant[4:])))
        os.replace(file.name, path)  # whole at once: another process may be about to read it
    return path


def speak(text: str, language: str, variant: str, rate: int = 170, pitch: int = 50) -> np.ndarray:
    """Speech at 24 kHz, float32 [n], trimmed to 60 ms of silence at both ends, RMS -23 dBFS.

    A function of its arguments, whatever was spoken before and in which process. `rate` is in words
    per minute, `pitch` espeak's 0-99 (50 is the variant's own pitch).
    Raises ValueError when espeak-ng is silent for the text or has no such voice.
    """
    from scipy.signal import resample_poly

    _variant_file(variant)
    voice = f"{ESPEAK_LANGUAGE.get(language, language)}+{variant}"
    seed = zlib.crc32(f"{voice} {rate} {pitch} {text}".encode())  # each clip has its own breath
    library, data = library_and_data()[0], data_folder().parent
    wav = synthesize(text, voice, library, data, seed, rate, pitch).astype(np.float32) / 32768
    loud = np.flatnonzero(np.abs(wav) > 0.004)
    if not len(loud):
        raise ValueError(f"espeak-ng is silent for {text!r} in {voice}")
    edge = round(0.06 * RATE_HZ)
    wav = wav[max(loud[0] - edge, 0) : loud[-1] + edge]
    wav = np.pad(wav, (max(edge - loud[0], 0), 0))
    wav = resample_poly(wav, 160, 147).astype(np.float32)
    wav *= 10 ** (-23 / 20) / np.sqrt(np.mean(wav**2))
    return np.clip(wav, -1, 1)


def is_female(variant: str) -> bool:
    """Whether a variant says so; those that say nothing have the language's own male voice."""
    return "gender female" in _variant_file(variant).read_text(errors="replace")
