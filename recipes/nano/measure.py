"""What the family's figures are made of: speech that no part was trained on, and its measures."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from eval.metrics import char_errors, word_errors
from eval.normalize import normalize
from higgs_lab.audio import resample
from recipes.nano.data import NOISE_FLOOR, speak_tagged
from recipes.nano.espeak import SAMPLE_RATE_HZ, is_female
from recipes.nano.texts import draw_text
from recipes.nano.voices import all_voices

JUDGE_HZ = 16_000
MAX_F0_SEMITONES = 2.0  # between a voice and the distractors it is confused with


@dataclass(frozen=True)
class Figure:
    """One line of the table. value and target are shares or rates; at_least: which side is good."""

    part: str
    measure: str
    value: float
    target: float | None = None
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target


@dataclass(frozen=True)
class Clip:
    wav: np.ndarray  # float32 [n] at 24 kHz, with the family's noise floor
    text: str
    language: str
    voice: str


def held_out(language: str, count: int, seed: int, voices: list[str] | None = None) -> list[Clip]:
    """Clips of test texts in test voices, each voice in turn."""
    names = voices or [voice.name for voice in all_voices() if voice.split == "test"]
    rng, noise = random.Random(f"{seed}-{language}"), np.random.default_rng(seed)
    clips = []
    for i in range(count):
        text, voice = draw_text(language, rng, "test"), names[i % len(names)]
        wav = speak_tagged(text, language, voice, rng)
        wav = wav + noise.normal(0, NOISE_FLOOR, len(wav)).astype(np.float32)
        clips.append(Clip(wav, text, language, voice))
    return clips


def for_judges(wav: np.ndarray) -> np.ndarray:
    """At the rate that recognisers and encoders hear."""
    return resample(wav, SAMPLE_RATE_HZ, JUDGE_HZ)


def errors(
    recognizer, wavs: list[np.ndarray], clips: list[Clip], unit: str
) -> tuple[np.ndarray, np.ndarray]:
    """What is heard in each of `wavs` against the texts of `clips`: (errors [n], units [n]), the
    unit being a "word" or a "char"."""
    heard = recognizer.transcribe_all(
        [for_judges(wav) for wav in wavs], [clip.language for clip in clips]
    )
    found = []
    for transcript, clip in zip(heard, clips, strict=True):
        pair = (
            normalize(clip.text, clip.language),
            normalize(transcript.text, clip.language),
        )
        if unit == "char":
            pair = tuple(text.replace(" ", "") for text in pair)
        found.append((word_errors if unit == "word" else char_errors)(*pair))
    return np.array([f.errors for f in found]), np.array([f.units for f in found])


def error_rate(recognizer, wavs: list[np.ndarray], clips: list[Clip], unit: str) -> float:
    """Corpus error, of `errors`."""
    wrong, units = errors(recognizer, wavs, clips, unit)
    return float(wrong.sum() / units.sum())


def confusable(a: str, b: str, f0: dict[str, float]) -> bool:
    """Of the same sex and within two semitones."""
    apart = abs(12 * np.log2(f0[a] / f0[b]))
    return a != b and is_female(a) == is_female(b) and apart <= MAX_F0_SEMITONES


def median_f0(wavs: list[np.ndarray], low_hz: float = 60, high_hz: float = 400) -> float:
    """Median pitch over frames whose autocorrelation has a clear peak."""
    found = []
    size, hop = 1200, 600
    low, high = int(SAMPLE_RATE_HZ / high_hz), int(SAMPLE_RATE_HZ / low_hz)
    for wav in wavs:
        for start in range(0, len(wav) - size, hop):
            frame = wav[start : start + size] - wav[start : start + size].mean()
            power = float(frame @ frame)
            if power < size * 1e-4:
                continue
            corr = np.correlate(frame, frame, "full")[size - 1 :]
            corr = corr / (power * np.linspace(1, 1 / size, size))  # shorter overlaps, less sum
            lag = low + int(corr[low : min(high, size // 2)].argmax())
            if corr[lag] > 0.7:
                found.append(SAMPLE_RATE_HZ / lag)
    return float(np.median(found)) if found else float("nan")


def equal_error_rate(same: np.ndarray, other: np.ndarray) -> float:
    """Where false accepts equal false rejects."""
    thresholds = np.sort(np.concatenate([same, other]))
    accept = np.array([(other >= t).mean() for t in thresholds])
    reject = np.array([(same < t).mean() for t in thresholds])
    at = np.abs(accept - reject).argmin()
    return float((accept[at] + reject[at]) / 2)
