"""espeak-ng through ctypes: text in, 24 kHz samples out, the same ones every time.

espeak-ng remembers what it spoke: where the pitch's flutter stands, the count of cycles that
roughness goes by, its gain after a loud sample and the noise of breath all outlive an utterance,
and no call puts them back. So the library is loaded for every utterance, which takes a millisecond,
its noise is seeded, and it is unloaded behind it. Nothing of it is left between two calls, so
processes may be forked at any time, after `data_folder()` if they shall share it; two threads must
not speak at once.

The library comes from the `espeakng-loader` wheel, from a folder named by `ESPEAK_NG` (an unpacked
wheel), or from the system.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import tempfile
import zlib
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


def _load(library: str) -> ctypes.CDLL:
    """The library as it is before the first word.

    Where it is in the process already, which is somebody else's doing or that of a system that does
    not unload, this is a copy of it.
    """
    try:
        held = ctypes.CDLL(library, mode=os.RTLD_NOLOAD)
    except OSError:
        return ctypes.CDLL(library)
    ctypes.CDLL(None).dlclose(ctypes.c_void_p(held._handle))  # the look counts as a use
    with tempfile.NamedTemporaryFile(suffix=Path(library).suffix) as copy:
        shutil.copyfile(library, copy.name)
        return ctypes.CDLL(copy.name)


def _synthesize(text: str, voice: str, rate: int, pitch: int) -> np.ndarray:
    """int16 [n] at 22,050 Hz, by an engine that never spoke before."""
    libc, pieces = ctypes.CDLL(None), []

    @_CALLBACK
    def receive(samples, count, _events) -> int:
        if samples and count > 0:
            pieces.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0

    data = str(data_folder().parent).encode()
    lib = _load(library_and_data()[0])
    try:
        hz = lib.espeak_Initialize(_SYNCHRONOUS, 0, data, 0)
        if hz != ESPEAK_RATE_HZ:
            raise RuntimeError(f"espeak_Initialize returned {hz}, expected {ESPEAK_RATE_HZ}")
        lib.espeak_SetSynthCallback(receive)
        if lib.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice!r}")
        lib.espeak_SetParameter(_RATE, rate, 0)
        lib.espeak_SetParameter(_PITCH, pitch, 0)
        # Every clip has a breath of its own. 1.51 draws it from libc, 1.52 from a generator of its
        # own, which it seeds with the time.
        seed = zlib.crc32(f"{voice} {rate} {pitch} {text}".encode())
        libc.srand(seed)
        if hasattr(lib, "espeak_ng_SetRandSeed"):
            lib.espeak_ng_SetRandSeed(ctypes.c_long(seed))
        raw = text.encode() + b"\0"
        lib.espeak_Synth(raw, len(raw), 0, _CHARACTERS, 0, _UTF8, None, None)
        lib.espeak_Synchronize()
    finally:
        lib.espeak_Terminate()  # also ends the thread that runs the library's code
        libc.dlclose(ctypes.c_void_p(lib._handle))
    return np.concatenate(pieces) if pieces else np.zeros(0, np.int16)


def speak(text: str, language: str, variant: str, rate: int = 170, pitch: int = 50) -> np.ndarray:
    """Speech at 24 kHz, float32 [n], trimmed to 60 ms of silence at both ends, RMS -23 dBFS.

    A function of its arguments, whatever was spoken before and in which process. `rate` is in words
    per minute, `pitch` espeak's 0-99 (50 is the variant's own pitch).
    Raises ValueError when espeak-ng is silent for the text or has no such voice.
    """
    from scipy.signal import resample_poly

    _variant_file(variant)
    voice = f"{ESPEAK_LANGUAGE.get(language, language)}+{variant}"
    wav = _synthesize(text, voice, rate, pitch).astype(np.float32) / 32768
    loud = np.flatnonzero(np.abs(wav) > 0.004)
    if not len(loud):
        raise ValueError(f"espeak-ng is silent for {text!r} in {voice}")
    edge = round(0.06 * ESPEAK_RATE_HZ)
    wav = wav[max(loud[0] - edge, 0) : loud[-1] + edge]
    wav = np.pad(wav, (max(edge - loud[0], 0), 0))
    wav = resample_poly(wav, 160, 147).astype(np.float32)
    wav *= 10 ** (-23 / 20) / np.sqrt(np.mean(wav**2))
    return np.clip(wav, -1, 1)


def is_female(variant: str) -> bool:
    """Whether a variant says so; those that say nothing have the language's own male voice."""
    return "gender female" in _variant_file(variant).read_text(errors="replace")
