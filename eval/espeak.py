"""espeak-ng as a baseline system, in a process of its own.

The library crashes on some texts; hence the worker: `python -m eval.espeak` reads JSONL of text,
voice and path and writes wavs.
"""

from __future__ import annotations

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
from higgs_lab.espeak import RATE_HZ, synthesize
from higgs_lab.tags import strip_tags


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

    library, data = espeakng_loader.get_library_path(), Path(espeakng_loader.get_data_path()).parent
    for line in sys.stdin:
        job = json.loads(line)
        samples = synthesize(job["text"], job["voice"], library, data)
        if len(samples):
            write_wav(job["path"], samples.astype(np.float32) / 32768, RATE_HZ)
        print(job["path"], flush=True)


if __name__ == "__main__":
    main()
