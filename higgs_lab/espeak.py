"""espeak-ng through ctypes, the same samples for the same words every time.

espeak-ng remembers what it spoke: where the pitch's flutter stands, the count of cycles that
roughness goes by, its gain after a loud sample and the noise of breath all outlive an utterance,
and no call puts them back. So the library is loaded for every utterance, which takes a millisecond,
its noise is seeded, and it is unloaded behind it. Nothing of it is left between two calls. Two
threads must not speak at once.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

RATE_HZ = 22_050
_RATE, _PITCH = 1, 3
_SYNCHRONOUS, _CHARACTERS, _UTF8 = 2, 1, 1
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


def synthesize(
    text: str,
    voice: str,
    library: str,
    data: Path | str,
    seed: int = 0,
    rate: int | None = None,
    pitch: int | None = None,
) -> np.ndarray:
    """int16 [n] at RATE_HZ, by an engine that never spoke before; [0] where it is silent.

    library: path of libespeak-ng; data: the folder that holds `espeak-ng-data`; rate in words per
    minute, pitch 0-99, none: the voice's own. Raises ValueError for a voice that it does not have,
    RuntimeError when it does not start.
    """
    libc, pieces = ctypes.CDLL(None), []

    @_CALLBACK
    def receive(samples, count, _events) -> int:
        if samples and count > 0:
            pieces.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0

    lib = _load(library)
    try:
        hz = lib.espeak_Initialize(_SYNCHRONOUS, 0, str(data).encode(), 0)
        if hz != RATE_HZ:
            raise RuntimeError(f"espeak_Initialize returned {hz}, expected {RATE_HZ}")
        lib.espeak_SetSynthCallback(receive)
        if lib.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice!r}")
        for parameter, value in ((_RATE, rate), (_PITCH, pitch)):
            if value is not None:
                lib.espeak_SetParameter(parameter, value, 0)
        # 1.51 draws noise from libc, 1.52 from a generator of its own, seeded with the time
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
