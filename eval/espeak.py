"""espeak-ng as a baseline system, in a process of its own.

The library crashes on some texts, and hangs for ever when it is initialised where somebody else in
the process has done so already; hence the worker: `python -m eval.espeak` reads JSONL of text,
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

    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="higgs-lab-espeak-") as folder:
        jobs = [
            {
                "text": strip_tags(request.row.text),
                "voice": language(request.row.language).espeak,
                "path": str(Path(folder) / f"{number}.wav"),
            }
            for number, request in enumerate(requests)
        ]
        crashes = _speak_all([job for job in jobs if job["voice"]])
        took_sec = (time.monotonic() - begin) / len(requests)
        clips = []
        for request, job in zip(requests, jobs, strict=True):
            path = Path(job["path"])
            if job["voice"] is None:
                reason = f"espeak-ng has no voice for {request.row.language}"
                clips.append(Spoken(error=reason, unsupported=True))
            elif not path.is_file():
                reason = crashes.get(job["path"], "was silent")
                clips.append(Spoken(error=f"espeak-ng {reason}"))
            else:
                clips.append(Spoken(read_audio(path, RATE_HZ), RATE_HZ, took_sec=took_sec))
    return clips


def _speak_all(jobs: Sequence[dict]) -> dict[str, str]:
    """Speak jobs in a child process -> what went wrong, by path.

    espeak-ng 1.52 overflows a buffer on some texts and takes its process down; that clip has
    failed, and the next process goes on behind it.
    """
    # The child must find `eval` however this process did.
    root = str(Path(__file__).resolve().parent.parent)
    code = f"import sys; sys.path.insert(0, {root!r}); from eval.espeak import main; main()"
    crashes: dict[str, str] = {}
    while jobs:
        done = subprocess.run(
            [sys.executable, "-c", code],
            input="\n".join(json.dumps(job) for job in jobs),
            text=True,
            capture_output=True,
        )
        if done.returncode == 0:
            break
        spoken = done.stdout.count("\n")
        if done.returncode > 0 or spoken >= len(jobs):  # an error of ours or of the installation
            raise RuntimeError(f"espeak-ng failed: {done.stderr.strip()[-500:]}")
        said = done.stderr.strip().splitlines()
        crashes[jobs[spoken]["path"]] = f"crashed: {said[-1] if said else done.returncode}"
        jobs = jobs[spoken + 1 :]
    return crashes


def main() -> None:
    import espeakng_loader

    from higgs_lab.audio import write_wav

    data = str(Path(espeakng_loader.get_data_path()).parent)
    for line in sys.stdin:
        job = json.loads(line)
        samples = _samples(job["text"], job["voice"], espeakng_loader.get_library_path(), data)
        if len(samples):
            write_wav(job["path"], samples.astype(np.float32) / 32768, RATE_HZ)
        print(job["path"], flush=True)


def _samples(text: str, voice: str, library_path: str, data: str) -> np.ndarray:
    """int16 [n] at RATE_HZ, the same whatever the batch holds.

    The flutter of the pitch, gain and noise go on from one utterance to the next and no call puts
    them back, so each has the library to itself.
    """
    library, pieces = ctypes.CDLL(library_path), []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def receive(samples, count, _events) -> int:
        if samples and count > 0:
            pieces.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0

    rate = library.espeak_Initialize(2, 0, data.encode(), 0)  # 2: synchronous
    if rate != RATE_HZ:
        raise RuntimeError(f"espeak_Initialize returned {rate}, expected {RATE_HZ}")
    library.espeak_ng_SetRandSeed(ctypes.c_long(0))  # seeded with the time otherwise
    library.espeak_SetSynthCallback(receive)
    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        raise RuntimeError(f"espeak-ng has no voice {voice!r}")
    raw = text.encode() + b"\0"
    library.espeak_Synth(raw, len(raw), 0, 1, 0, 1, None, None)  # characters; UTF-8
    library.espeak_Synchronize()
    library.espeak_Terminate()
    ctypes.CDLL(None).dlclose(ctypes.c_void_p(library._handle))
    return np.concatenate(pieces) if pieces else np.zeros(0, np.int16)


if __name__ == "__main__":
    main()
