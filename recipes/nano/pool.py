"""Speech on the training device: shards in one flat tensor, batches by gathering, augmentation.

Everything is torch and stays on the device, so a small model never waits for a loader.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recipes.nano.data import NOISE_FLOOR


@dataclass
class Row:
    start: int
    samples: int
    text: str
    language: str
    voice: int


class SpeechPool:
    """All utterances of a shard folder that may still be growing; `refresh` takes in new shards."""

    def __init__(self, folder: str | Path, device: torch.device | str, capacity_hours: float):
        self.folder, self.device = Path(folder), torch.device(device)
        self.wav = torch.zeros(
            int(capacity_hours * 3600 * 24_000), dtype=torch.int16, device=self.device
        )
        self.used, self.rows, self.taken = 0, [], set()
        self.start = self.samples = self.voice = torch.zeros(0, dtype=torch.long)

    def refresh(self) -> int:
        """Take in shards not yet seen; returns how many utterances came."""
        before = len(self.rows)
        for meta in sorted(self.folder.glob("shard-*.json")):
            if meta in self.taken:
                continue
            wav = np.load(meta.with_suffix(".npy"), mmap_mode="r")
            if self.used + len(wav) > len(self.wav):
                break
            self.taken.add(meta)
            self.wav[self.used : self.used + len(wav)] = torch.from_numpy(np.array(wav)).to(
                self.device
            )
            table = json.loads(meta.read_text(encoding="utf-8"))
            for start, samples, text, language, voice in table["rows"]:
                self.rows.append(Row(self.used + start, samples, text, language, voice))
            self.used += len(wav)
        if len(self.rows) > before:
            for name in ("start", "samples", "voice"):
                column = torch.tensor([getattr(row, name) for row in self.rows], device=self.device)
                setattr(self, name, column)
        return len(self.rows) - before

    def wait(self, hours: float) -> None:
        """Block until at least `hours` of speech are in, or the folder is complete.

        Raises ValueError when the folder is complete and nothing of it fits.
        """
        while True:
            complete = (self.folder / "complete").exists()
            self.refresh()
            if complete and not self.rows:
                room = len(self.wav) / 24_000 / 3600
                raise ValueError(
                    f"{self.folder}: no shard fits {room:.2f} hours: give more --hours"
                )
            if self.hours >= hours or complete:
                return
            time.sleep(1)

    @property
    def hours(self) -> float:
        return self.used / 24_000 / 3600

    def gather(self, index: Tensor, samples: int, offset: Tensor | None = None) -> Tensor:
        """[B, samples] float32: each utterance from `offset` on, zeros after its end."""
        start = self.start[index]
        length = self.samples[index]
        if offset is not None:
            start, length = start + offset, length - offset
        at = torch.arange(samples, device=self.device)
        inside = at < length[:, None]
        position = (start[:, None] + at).clamp(max=len(self.wav) - 1)
        return self.wav[position].float() / 32767 * inside

    def crops(self, index: Tensor, samples: int) -> Tensor:
        """[B, samples] random windows; short utterances stand at a random place in silence."""
        room = self.samples[index] - samples
        offset = (torch.rand(len(index), device=self.device) * (room.abs() + 1)).long()
        offset = torch.where(room >= 0, offset, -offset)
        start = self.start[index]
        at = torch.arange(samples, device=self.device) + offset[:, None]
        inside = (at >= 0) & (at < self.samples[index][:, None])
        position = (start[:, None] + at).clamp(0, len(self.wav) - 1)
        return self.wav[position].float() / 32767 * inside


def add_floor(wav: Tensor) -> Tensor:
    """The faint noise that all recordings of the family carry."""
    return wav + torch.randn_like(wav) * NOISE_FLOOR


def augment(wav: Tensor, strength: float = 1.0) -> Tensor:
    """[B, n] -> [B, n]: room, equaliser, band limit, noise and level, each on a part of the batch.

    For the judges, so that they hear speech and not espeak's or a codec's fingerprint.
    """
    B, n = wav.shape
    device = wav.device

    def some(p: float) -> Tensor:
        return torch.rand(B, 1, device=device) < p * strength

    size = 1 << (n - 1).bit_length()
    spectrum = torch.fft.rfft(wav, size)
    hz = torch.linspace(0, 12_000, spectrum.shape[-1], device=device)
    # a room: direct sound and a decaying tail of noise, 20 to 120 ms long
    tail = 3_600
    decay = torch.rand(B, 1, device=device) * 0.03 + 0.005
    at = torch.arange(tail, device=device) / 24_000
    room = torch.randn(B, tail, device=device) * torch.exp(-at / decay)
    room = room / room.norm(dim=-1, keepdim=True) * (torch.rand(B, 1, device=device) * 0.6)
    room[:, 0] = 1.0
    spectrum = torch.where(some(0.3), spectrum * torch.fft.rfft(room, size), spectrum)
    # a smooth random equaliser of +-6 dB and a low-pass between 3 and 11 kHz
    bends = torch.nn.functional.interpolate(
        torch.randn(B, 1, 8, device=device) * 3, spectrum.shape[-1], mode="linear"
    )[:, 0]
    spectrum = torch.where(some(0.5), spectrum * 10 ** (bends / 20), spectrum)
    cut = torch.rand(B, 1, device=device) * 8_000 + 3_000
    spectrum = torch.where(some(0.3), spectrum / (1 + (hz / cut) ** 8), spectrum)
    wav = torch.fft.irfft(spectrum, size)[:, :n]
    # codec-like coarseness: magnitudes of a short spectrum jittered
    level = wav.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-5)
    snr = torch.rand(B, 1, device=device) * 32 + 8
    noise = torch.randn_like(wav)
    brown = torch.nn.functional.avg_pool1d(noise[:, None], 9, 1, 4)[:, 0] * 3
    noise = torch.where(some(0.5), brown, noise)
    wav = torch.where(some(0.6), wav + noise * level * 10 ** (-snr / 20), wav)
    gain = 10 ** ((torch.rand(B, 1, device=device) * 20 - 12) / 20)
    return (wav * gain).clamp(-1, 1)
