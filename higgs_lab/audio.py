"""Audio files in and out: mono float32 at the rate asked for, or an error that says what to do.

Reading is libsndfile (wav, flac, ogg, mp3), resampling is soxr's HQ filter, down-mixing is the mean
of the channels: the serving engines would feed the first channel only, or flatten the two.
"""

import contextlib
import io
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from higgs_lab.runlog import atomic_path, duration

MAX_SEC = 600.0  # longest clip read whole unless the caller says otherwise


class AudioSource(Protocol):
    """Where audio comes from: a Path, or a clip inside a data set that opens like one."""

    def open(self, mode: str = "r") -> BinaryIO: ...


@dataclass(frozen=True)
class AudioInfo:
    sample_rate_hz: int
    channels: int
    samples: int  # per channel
    seconds: float


def audio_info(path: str | AudioSource) -> AudioInfo:
    """Rate, channels and length from the file's header, without reading the samples.

    Raises FileNotFoundError, or ValueError for a file that is no audio or has no samples.
    """
    with _open(path) as file:
        return _info(path, file)


def read_audio(
    path: str | AudioSource, sample_rate_hz: int = 24000, max_sec: float | None = MAX_SEC
) -> np.ndarray:
    """A clip as mono float32 [n] at `sample_rate_hz`. Channels are averaged.

    max_sec: longer clips are refused by their header, before anything is read; None reads all.

    Raises FileNotFoundError for a missing file, ValueError for a file that is no audio, has no
    samples, is too long, or holds NaN or infinite samples.
    """
    with _open(path) as file:
        info = _info(path, file)
        if max_sec is not None and info.seconds > max_sec:
            raise ValueError(
                f"{path} lasts {duration(info.seconds)}, more than the {duration(max_sec)} allowed "
                "here: cut it into utterances (or raise max_sec)"
            )
        wav = file.read(dtype="float32", always_2d=True)
    if len(wav) == 0:
        raise ValueError(f"{path} has no samples: record it again or leave it out")
    bad = ~np.isfinite(wav).all(axis=1)
    if bad.any():
        raise ValueError(
            f"{path} has {int(bad.sum())} NaN or infinite samples, the first at "
            f"{int(bad.argmax()) / info.sample_rate_hz:.3f} s: write the file again"
        )
    mono = wav[:, 0] if wav.shape[1] == 1 else wav.mean(axis=1)
    return resample(mono, info.sample_rate_hz, sample_rate_hz)


@dataclass(frozen=True)
class Levels:
    """What a listener would complain about, and what a fine-tune learns as style."""

    peak: float  # largest absolute sample
    clipped_share: float  # share of samples at full scale
    level_dbfs: float  # RMS of the speech, pauses left out; -inf for a silent clip
    lead_silence_sec: float
    tail_silence_sec: float


def measure_levels(wav: np.ndarray, sample_rate_hz: int) -> Levels:
    """Levels of mono samples [n]. Speech is each 20 ms frame within 35 dB of the loudest one."""
    samples = np.abs(np.asarray(wav, dtype=np.float64))
    frame = max(1, round(0.02 * sample_rate_hz))
    padded = np.pad(samples, (0, -len(samples) % frame)).reshape(-1, frame)
    power = (padded**2).mean(axis=1)
    speech = np.flatnonzero(power > max(power.max(initial=0.0) * 10**-3.5, 1e-8))  # -80 dBFS
    if len(speech) == 0:
        seconds = len(samples) / sample_rate_hz
        return Levels(float(samples.max(initial=0.0)), 0.0, float("-inf"), seconds, seconds)
    return Levels(
        peak=float(samples.max()),
        clipped_share=float((samples >= 0.999).mean()),
        level_dbfs=float(10 * np.log10(power[speech].mean())),
        lead_silence_sec=speech[0] * frame / sample_rate_hz,
        tail_silence_sec=max(0.0, (len(samples) - (speech[-1] + 1) * frame) / sample_rate_hz),
    )


def resample(wav: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """Mono samples [n] at another rate, float32 [about n * to_hz / from_hz]; soxr HQ."""
    wav = np.ascontiguousarray(wav, dtype=np.float32)
    if from_hz == to_hz or len(wav) == 0:
        return wav
    import soxr

    return soxr.resample(wav, from_hz, to_hz, quality="HQ").astype(np.float32, copy=False)


def write_wav(path: str | Path, wav: np.ndarray, sample_rate_hz: int) -> None:
    """Write mono samples [n] as 16-bit PCM; samples beyond ±1 are clipped. Atomic.

    Raises ValueError for no samples, more than one dimension, NaN or infinities.
    """
    wav = np.asarray(wav, dtype=np.float32)
    if wav.ndim != 1 or wav.size == 0:
        raise ValueError(
            f"{path}: cannot write samples of shape {wav.shape}; expected mono [n > 0]"
        )
    if not np.isfinite(wav).all():
        raise ValueError(f"{path}: not written, the samples hold NaN or infinities")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate_hz)
        samples = np.floor(wav * 32768).clip(-32768, 32767)  # as libsndfile does
        file.writeframes(samples.astype("<i2").tobytes())
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


@contextlib.contextmanager
def _open(path: str | AudioSource) -> Iterator:
    """An opened sound file; errors name the path and what to do."""
    import soundfile

    path = Path(path) if isinstance(path, str) else path
    if isinstance(path, Path) and not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"audio file {path} {what}: check the path")
    with path.open("rb") as raw:
        try:
            if isinstance(path, Path):  # libsndfile reads by itself
                file = soundfile.SoundFile(raw.fileno(), closefd=False)
            else:  # it asks Python for every few kB: a wait for the interpreter each
                file = soundfile.SoundFile(raw)
        except soundfile.LibsndfileError as error:
            empty = raw.seek(0, io.SEEK_END) == 0
            detail = "the file is empty" if empty else error.error_string.strip(". ")
            raise ValueError(
                f"{path} cannot be read as audio ({detail}): wav, flac, ogg and mp3 can; convert "
                f"others first, for example: ffmpeg -i {path} out.wav"
            ) from error
        with file:
            yield file


def _info(path: str | AudioSource, file) -> AudioInfo:
    if file.frames == 0:
        raise ValueError(f"{path} has no samples: record it again or leave it out")
    return AudioInfo(file.samplerate, file.channels, file.frames, file.frames / file.samplerate)
