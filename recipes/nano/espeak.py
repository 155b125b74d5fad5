"""espeak-ng through ctypes: text in, 24 kHz samples out. One engine per process.

The library comes from the `espeakng-loader` wheel, from a folder named by `ESPEAK_NG` (an unpacked
wheel), or from the system. A second `espeak_Initialize` in one process hangs for ever, so the
engine is a per-process singleton; start worker processes before anything else touches it.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np

from recipes.nano.texts import ESPEAK_LANGUAGE
from recipes.nano.voices import build_data_folder, made_variant

ESPEAK_RATE_HZ = 22_050
SAMPLE_RATE_HZ = 24_000
_RATE, _VOLUME, _PITCH = 1, 2, 3
_SYNCHRONOUS, _CHARACTERS, _UTF8 = 2, 1, 1
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


def library_and_data() -> tuple[str, Path]:
    """Paths of the shared library and of the installed data folder."""
    if "ESPEAK_NG" in os.environ:
        folder = Path(os.environ["ESPEAK_NG"])
    else:
        try:
            import espeakng_loader
        except ImportError:
            for data in Path("/usr/lib").glob("*/espeak-ng-data"):
                return str(next(data.parent.glob("libespeak-ng.so*"))), data
            raise ImportError(
                "espeak-ng is missing: pip install espeakng-loader, or install Debian's "
                "libespeak-ng1 and espeak-ng-data"
            ) from None
        folder = Path(espeakng_loader.__file__).parent
    return str(folder / "libespeak-ng.so"), (folder / "espeak-ng-data").resolve()


class _Engine:
    def __init__(self) -> None:
        library, installed = library_and_data()
        scratch = Path(tempfile.gettempdir()) / f"nano-espeak-{os.getuid()}-{os.getpid()}"
        data = build_data_folder(installed, scratch / "espeak-ng-data")
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)
        self.variants = data / "voices" / "!v"
        self.lib = ctypes.CDLL(library)
        rate = self.lib.espeak_Initialize(_SYNCHRONOUS, 0, str(scratch).encode(), 0)
        if rate != ESPEAK_RATE_HZ:
            raise RuntimeError(f"espeak_Initialize returned {rate}, expected {ESPEAK_RATE_HZ}")
        self.pieces: list[np.ndarray] = []
        self.callback = _CALLBACK(self._receive)
        self.lib.espeak_SetSynthCallback(self.callback)
        self.voice: str | None = None

    def _receive(self, samples, count, _events) -> int:
        if samples and count > 0:
            self.pieces.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0

    def speak(self, text: str, language: str, variant: str, rate: int, pitch: int) -> np.ndarray:
        name = f"{ESPEAK_LANGUAGE.get(language, language)}+{variant}"
        if name != self.voice:
            # espeak-ng lists at most 350 voice files, at initialisation; a variant is read by its
            # path when it is chosen, so drawn ones are written after that.
            if variant.startswith("made") and not (self.variants / variant).exists():
                (self.variants / variant).write_text(made_variant(int(variant[4:])))
            if self.lib.espeak_SetVoiceByName(name.encode()) != 0:
                raise ValueError(f"espeak-ng has no voice {name!r}")
            self.voice = name
        self.lib.espeak_SetParameter(_RATE, rate, 0)
        self.lib.espeak_SetParameter(_PITCH, pitch, 0)
        self.pieces = []
        raw = text.encode() + b"\0"
        self.lib.espeak_Synth(raw, len(raw), 0, _CHARACTERS, 0, _UTF8, None, None)
        self.lib.espeak_Synchronize()
        return np.concatenate(self.pieces) if self.pieces else np.zeros(0, np.int16)


@lru_cache(maxsize=1)
def _engine() -> _Engine:
    return _Engine()


def speak(text: str, language: str, variant: str, rate: int = 170, pitch: int = 50) -> np.ndarray:
    """Speech at 24 kHz, float32 [n], trimmed to 60 ms of silence at both ends, RMS -23 dBFS.

    `rate` is in words per minute, `pitch` espeak's 0-99 (50 is the variant's own pitch).
    Raises ValueError when espeak-ng is silent for the text.
    """
    from scipy.signal import resample_poly

    wav = _engine().speak(text, language, variant, rate, pitch).astype(np.float32) / 32768
    loud = np.flatnonzero(np.abs(wav) > 0.004)
    if not len(loud):
        raise ValueError(f"espeak-ng is silent for {text!r} in {language}+{variant}")
    edge = round(0.06 * ESPEAK_RATE_HZ)
    wav = wav[max(loud[0] - edge, 0) : loud[-1] + edge]
    wav = np.pad(wav, (max(edge - loud[0], 0), 0))
    wav = resample_poly(wav, 160, 147).astype(np.float32)
    wav *= 10 ** (-23 / 20) / np.sqrt(np.mean(wav**2))
    return np.clip(wav, -1, 1)


def is_female(variant: str) -> bool:
    """Whether a variant says so; those that say nothing have the language's own male voice."""
    if variant.startswith("made"):
        text = made_variant(int(variant[4:]))
    else:
        text = (_engine().variants / variant).read_text(errors="replace")
    return "gender female" in text
