"""What a waveform says about itself, without a model: times, level, pitch.

Loudness is ITU-R BS.1770-4's (pyloudnorm, with De Man's form of the filter, which holds at any
sample rate). Pitch is Boersma's autocorrelation (SpeechBrain): of 14 recordings of read speech the
median was within 1 % of Praat's in 12 and within 5.1 % in the others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SILENCE_DBFS = -50.0  # a 20 ms frame below this level is silence
FULL_SCALE = 0.999  # samples from here on are clipped
LOUDNESS_SEC = 0.4  # one gating block of BS.1770; shorter clips have no loudness

F0_HZ = (60.0, 500.0)
F0_RATE_HZ = 16000  # more would only cost time
F0_WINDOW_SEC, F0_STEP_SEC = 0.04, 0.01
VOICED = 0.7  # of the window's energy repeats after one period
# Two periods repeat as well as one, so the shorter is taken; more than Praat's 0.01 since lags are
# whole samples here, and the double may fit these better.
OCTAVE_COST = 0.03
F0_SEC = 30.0  # of a long clip
MIN_VOICED_FRAMES = 10


@dataclass(frozen=True)
class AudioFacts:
    """What a waveform says about itself."""

    seconds: float
    active_sec: float  # time in frames above SILENCE_DBFS
    leading_sec: float  # silence before the first such frame; all of it in a silent clip
    trailing_sec: float
    loudness_lufs: float | None  # None in a silent or very short clip
    clipped_share: float  # samples at full scale
    f0_hz: float | None = None  # median pitch of the voiced frames; None where hardly any is
    f0_spread_st: float | None = None  # half the range of the middle 68 % of frames, in semitones

    @property
    def spoken_sec(self) -> float:
        """From the first sound to the last."""
        return max(0.0, self.seconds - self.leading_sec - self.trailing_sec)


def audio_facts(wav: np.ndarray, sample_rate_hz: int) -> AudioFacts:
    """Durations, level, clipping and pitch of a mono waveform [n] in [-1, 1]."""
    wav = np.asarray(wav, dtype=np.float32)
    seconds = len(wav) / sample_rate_hz
    active, frame = _active_frames(wav, sample_rate_hz)
    if len(active) == 0:
        return AudioFacts(seconds, 0.0, seconds, 0.0, None, 0.0)
    first, last = active[0] * frame, min(len(wav), (active[-1] + 1) * frame)
    f0_hz, f0_spread_st = pitch(wav[first:last], sample_rate_hz)
    return AudioFacts(
        seconds=seconds,
        active_sec=len(active) * frame / sample_rate_hz,
        leading_sec=float(first / sample_rate_hz),
        trailing_sec=float((len(wav) - last) / sample_rate_hz),
        loudness_lufs=loudness(wav, sample_rate_hz),
        clipped_share=float((np.abs(wav) >= FULL_SCALE).mean()),
        f0_hz=f0_hz,
        f0_spread_st=f0_spread_st,
    )


def active_sec(wav: np.ndarray, sample_rate_hz: int) -> float:
    """Time in 20 ms frames above SILENCE_DBFS of a mono waveform [n]."""
    active, frame = _active_frames(wav, sample_rate_hz)
    return len(active) * frame / sample_rate_hz


def loudness(wav: np.ndarray, sample_rate_hz: int) -> float | None:
    """Gated loudness in LUFS of a mono waveform [n]; None below one block or in silence."""
    import pyloudnorm

    if len(wav) <= LOUDNESS_SEC * sample_rate_hz:
        return None
    meter = pyloudnorm.Meter(sample_rate_hz, filter_class="DeMan", block_size=LOUDNESS_SEC)
    value = meter.integrated_loudness(wav.astype(np.float64))
    return float(value) if np.isfinite(value) else None


def pitch(wav: np.ndarray, sample_rate_hz: int) -> tuple[float | None, float | None]:
    """Median F0 in Hz and its spread in semitones of a mono waveform [n]; None if unvoiced.

    The spread is half the distance from the 16th to the 84th percentile: a standard deviation of
    what is normally distributed, which a few octave errors do not move.
    """
    import torch

    from higgs_lab.audio import resample

    wav = resample(wav[: int(F0_SEC * sample_rate_hz)], sample_rate_hz, F0_RATE_HZ)
    window, step = round(F0_WINDOW_SEC * F0_RATE_HZ), round(F0_STEP_SEC * F0_RATE_HZ)
    if len(wav) < window:
        return None, None
    frames = torch.from_numpy(np.array(wav, dtype=np.float32))[None].unfold(-1, window, step)
    shortest, longest = (round(F0_RATE_HZ / hz) for hz in reversed(F0_HZ))
    lags = torch.arange(shortest, longest + 1)
    repeats = _autocorrelate()(frames)[0, :, lags]  # [frames, lags]
    best = (repeats - OCTAVE_COST * torch.log2(lags / shortest)).argmax(-1, keepdim=True)
    voiced = repeats.gather(-1, best)[:, 0] > VOICED
    voiced &= frames[0].square().mean(-1) > 10 ** (SILENCE_DBFS / 10)
    f0_hz = F0_RATE_HZ / lags[best[voiced, 0]].numpy()
    if len(f0_hz) < MIN_VOICED_FRAMES:
        return None, None
    low, middle, high = np.percentile(f0_hz, [16, 50, 84])
    return float(middle), float(6 * np.log2(high / low))


@functools.cache
def _autocorrelate() -> Callable:
    from speechbrain.processing.vocal_features import autocorrelate

    from higgs_lab.nano.judges import forget_redirects

    forget_redirects()
    return autocorrelate


def _active_frames(wav: np.ndarray, sample_rate_hz: int) -> tuple[np.ndarray, int]:
    """Numbers of the frames above SILENCE_DBFS, and samples per frame."""
    frame = max(1, round(0.02 * sample_rate_hz))
    padded = np.pad(wav, (0, -len(wav) % frame)).reshape(-1, frame).astype(np.float64)
    return np.flatnonzero((padded**2).mean(axis=1) > 10 ** (SILENCE_DBFS / 10)), frame
