"""What tests of eval.run share: tiny judges, a small set, one way to run them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from eval import run
from higgs_lab.audio import write_wav
from higgs_lab.nano.judges import random_ecapa, random_whisper
from higgs_lab.runlog import read_jsonl


def tiny_judges(folder: Path) -> list[str]:
    """Options of eval.run for a recogniser and an encoder of random weights, written to folder."""
    whisper, ecapa = random_whisper(folder / "tiny.pt"), random_ecapa(folder / "ecapa")
    return ["--asr", str(whisper), "--speaker", str(ecapa), "--device", "cpu",
            "--cache", "none"]  # fmt: skip


def six_clips(folder: Path) -> Path:
    """Six clips of two speakers: buzzes at two pitches, each with its own rhythm."""
    lines = []
    for number in range(6):
        speaker, hz = ("ann", 210) if number % 2 else ("bob", 110)
        time_sec = np.arange(36000) / 24000
        rhythm = 0.6 + 0.4 * np.sin(2 * np.pi * (2 + number) * time_sec)
        wav = 0.2 * rhythm * np.sign(np.sin(2 * np.pi * hz * time_sec))
        write_wav(folder / f"c{number}.wav", wav, 24000)
        text = f"sentence {'abcdef'[number]} of the set"
        row = {"audio": f"c{number}.wav", "text": text, "speaker": speaker, "language": "en"}
        lines.append(json.dumps(row))
    (folder / "set.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "set.jsonl"


def go(judges, test_set, out, *more, model="human"):
    return run.main(["--model", model, "--set", str(test_set), "--out", str(out), *judges, *more])


def stage(out, name):
    return read_jsonl(Path(out) / f"{name}.jsonl")
