"""Small recordings to prepare, and prepared data side by side."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import soundfile

from higgs_lab.prepared import load_prepared, prepared_info


def tone(
    path: Path, seed: int, sec: float = 1.2, sample_rate_hz: int = 24000, level: float = 0.1
) -> Path:
    """A recording of one random pitch with a tenth of noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(sec * sample_rate_hz)) / sample_rate_hz
    wav = np.sin(2 * np.pi * rng.uniform(100, 900) * t) + 0.1 * rng.standard_normal(len(t))
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, (level * wav).astype(np.float32), sample_rate_hz, subtype="FLOAT")
    return path


def write_source(folder: Path, rows: list[dict]) -> str:
    """The rows as a manifest in the folder."""
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_eight_clips(folder: Path) -> str:
    """A manifest of eight clips of two speakers; two of equal length, one at 44.1 kHz in stereo."""
    for n, sec in enumerate([1.2, 1.0, 1.2, 1.7, 1.31, 1.05, 1.5]):
        tone(folder / f"{n}.wav", n, sec)
    mono = tone(folder / "mono.wav", 7, 1.4, 44100)
    wav, rate = soundfile.read(mono)
    soundfile.write(folder / "7.flac", np.stack([wav, -0.2 * wav], axis=1), rate)
    mono.unlink()
    names = [f"{n}.wav" for n in range(7)] + ["7.flac"]
    rows = [
        {"audio": name, "text": f"Sentence number {n}.", "speaker": f"s{n % 2}", "language": "en"}
        for n, name in enumerate(names)
    ]
    rows[2] |= {"ref_audio": "0.wav", "ref_text": "Sentence number 0.", "id": "second"}
    rows[3] |= {"split": "dev"}
    return write_source(folder, rows)


def rows_of(data) -> list[dict]:
    return [data[i] for i in range(len(data))]


def assert_same_data(first: Path, second: Path) -> None:
    """Equal data, rejects and records, but for time and command."""
    for one, two in zip(rows_of(load_prepared(first)), rows_of(load_prepared(second)), strict=True):
        assert one.keys() == two.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])
    assert (first / "rejects.jsonl").read_bytes() == (second / "rejects.jsonl").read_bytes()
    infos = [prepared_info(path) for path in (first, second)]
    for info in infos:
        del info["provenance"], info["config"]
    assert infos[0] == infos[1]
