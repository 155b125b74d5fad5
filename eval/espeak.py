"""espeak-ng as a baseline system, in a process of its own.

The library hangs for ever when it is initialised twice in one process, and somebody else in this
process may have done so already; hence the worker: `python -m eval.espeak` reads JSONL of text,
voice and path and writes wavs.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.languages import language
from higgs_lab.tags import strip_tags

RATE_HZ = 22050


def version() -> str:
    """Version of the package that brings espeak-ng. Raises ImportError with the fix."""
    try:
        return f"espeakng-loader {importlib.metadata.version('espeakng-loader')}"
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError("--model espeak needs: pip install espeakng-loader") from error


def speak(requests: Sequence) -> list:
    """Speak a batch of systems.Request, control tags left out; a system of eval.systems."""
    from eval.systems import Spoken
    from higgs_lab.audio import read_audio

    voices = [language(request.row.language).espeak for request in requests]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="higgs-lab-espeak-") as folder:
        paths = [Path(folder) / f"{number}.wav" for number in range(len(requests))]
        lines = [
            json.dumps({"text": strip_tags(r.row.text), "voice": voice, "path": str(path)})
            for r, voice, path in zip(requests, voices, paths, strict=True)
            if voice
        ]
        # The child must find `eval` however this process did.
        root = str(Path(__file__).resolve().parent.parent)
        code = f"import sys; sys.path.insert(0, {root!r}); from eval.espeak import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code], input="\n".join(lines), text=True, capture_output=True
        )
        if done.returncode:
            raise RuntimeError(f"espeak-ng failed: {done.stderr.strip()[-500:]}")
        took_sec = (time.monotonic() - begin) / len(requests)
        clips = []
        for request, voice, path in zip(requests, voices, paths, strict=True):
            if voice is None:
                reason = f"espeak-ng has no voice for {request.row.language}"
                clips.append(Spoken(error=reason, unsupported=True))
            elif not path.is_file():
                clips.append(Spoken(error="espeak-ng was silent"))
            else:
                clips.append(Spoken(read_audio(path, RATE_HZ), RATE_HZ, took_sec=took_sec))
    return clips


def main() -> None:
    import espeakng_loader

    from higgs_lab.audio import write_wav

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    data = Path(espeakng_loader.get_data_path()).parent
    rate = library.espeak_Initialize(2, 0, str(data).encode(), 0)  # 2: synchronous
    if rate != RATE_HZ:
        raise RuntimeError(f"espeak_Initialize returned {rate}, expected {RATE_HZ}")
    pieces: list[np.ndarray] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def receive(samples, count, _events) -> int:
        if samples and count > 0:
            pieces.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0

    library.espeak_SetSynthCallback(receive)
    for line in sys.stdin:
        job = json.loads(line)
        pieces.clear()
        if library.espeak_SetVoiceByName(job["voice"].encode()) != 0:
            raise RuntimeError(f"espeak-ng has no voice {job['voice']!r}")
        raw = job["text"].encode() + b"\0"
        library.espeak_Synth(raw, len(raw), 0, 1, 0, 1, None, None)  # characters; UTF-8
        library.espeak_Synchronize()
        if pieces:
            write_wav(job["path"], np.concatenate(pieces).astype(np.float32) / 32768, RATE_HZ)


if __name__ == "__main__":
    main()
