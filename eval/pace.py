"""How fast each stage went on this machine, kept beside the caches: a plan can then tell time."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

FILE = "pace.jsonl"
LEAST_SEC = 1.0  # of work; less says nothing about much


class Pace:
    """Seconds of sound per second of work of one stage; appended to the folder's file when closed.

    stage: "speak", "hear" or "voices"; who: the system or judge that works. folder: None keeps
    nothing.
    """

    def __init__(self, folder: str | Path | None, stage: str, who: str, device: str | None):
        self._path = None if folder is None else Path(folder) / FILE
        self._row = {"stage": stage, "who": who, "device": device_name(device)}
        self._sound_sec = self._took_sec = 0.0

    @contextlib.contextmanager
    def measured(self) -> Iterator[list[float]]:
        """Time a piece of work; the durations of its clips are appended to what this yields."""
        begin, sounds = time.monotonic(), []
        yield sounds
        self._took_sec += time.monotonic() - begin
        self._sound_sec += sum(sounds)

    def __enter__(self) -> Pace:
        return self

    def __exit__(self, kind, *exc) -> None:
        if kind is not None or self._path is None or self._took_sec < LEAST_SEC:
            return
        row = self._row | {"sound_sec": self._sound_sec, "took_sec": self._took_sec}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def known_pace(folder: str | Path | None, stage: str, who: str, device: str | None) -> float | None:
    """Seconds of sound per second of the last such work here, or None."""
    path = None if folder is None else Path(folder) / FILE
    if path is None or not path.is_file():
        return None
    wanted, found = {"stage": stage, "who": who, "device": device_name(device)}, None
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):  # a line that a kill cut
            row = json.loads(line)
            if all(row[key] == value for key, value in wanted.items()) and row["sound_sec"] > 0:
                found = row["sound_sec"] / row["took_sec"]
    return found


def device_name(device: str | None) -> str:
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        return "CPU"
    return torch.cuda.get_device_name(device)
