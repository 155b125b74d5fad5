"""Audio files: real ones read right, bad ones refused with the reason."""

import errno
import io
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from higgs_lab import runlog
from higgs_lab.audio import audio_info, measure_levels, read_audio, resample, write_wav


def _sine(hz, sample_rate_hz, sec=1.0, amplitude=0.5):
    t = np.arange(int(sec * sample_rate_hz)) / sample_rate_hz
    return (amplitude * np.sin(2 * np.pi * hz * t)).astype(np.float32)


def io_source(path: Path):
    """The same bytes as a clip inside a data set has them."""

    class Inside:
        def open(self, mode="r"):
            return io.BytesIO(path.read_bytes())

    return Inside()


def _rms(wav):
    return float(np.sqrt(np.mean(wav.astype(np.float64) ** 2)))


def test_trap17_stereo_44100_is_mixed_down_and_resampled(tmp_path):
    left, right = _sine(440, 44100, 2.0), _sine(1000, 44100, 2.0)
    path = tmp_path / "stereo.wav"
    soundfile.write(path, np.stack([left, right], axis=1), 44100, subtype="FLOAT")
    wav = read_audio(path)
    assert wav.dtype == np.float32 and wav.shape == (48000,)
    # Both channels at half their level, each at its own pitch and in its own time.
    expected = (_sine(440, 24000, 2.0) + _sine(1000, 24000, 2.0)) / 2
    assert _rms(wav[500:-500] - expected[500:-500]) < 1e-3
    assert audio_info(path).channels == 2 and audio_info(path).seconds == 2.0


def test_six_channels_are_averaged(tmp_path):
    wav = np.zeros((24000, 6), dtype=np.float32)
    wav[:, 4] = _sine(300, 24000)
    soundfile.write(tmp_path / "six.wav", wav, 24000, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "six.wav"), wav[:, 4] / 6, atol=1e-7)


@pytest.mark.parametrize("from_hz", [8000, 16000, 22050, 44100, 48000, 96000])
def test_resampling_keeps_duration_pitch_and_level(from_hz):
    out = resample(_sine(1000, from_hz, 2.0), from_hz, 24000)
    assert abs(len(out) - 48000) <= 1
    assert _rms(out[500:47500] - _sine(1000, 24000, 2.0)[500:47500]) < 1e-3


def test_resampling_filters_what_the_lower_rate_cannot_hold():
    assert _rms(resample(_sine(13_500, 48000, 2.0), 48000, 24000)[500:-500]) < 1e-3


def test_same_rate_is_left_alone(tmp_path):
    wav = _sine(440, 24000)
    assert resample(wav, 24000, 24000) is wav
    write_wav(tmp_path / "a.wav", wav, 24000)
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav"), wav, atol=1 / 32767)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.wav does not exist: check the path"):
        read_audio(tmp_path / "nowhere.wav")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        audio_info(str(tmp_path))


def test_text_named_wav_is_refused(tmp_path):
    path = tmp_path / "text.wav"
    path.write_text("This is not audio at all, whatever its name says.")
    for read in (read_audio, audio_info):
        with pytest.raises(ValueError, match="text.wav cannot be read as audio.*ffmpeg"):
            read(path)


def test_empty_files_are_refused(tmp_path):
    (tmp_path / "zero_bytes.wav").write_bytes(b"")
    with pytest.raises(ValueError, match="zero_bytes.wav.*the file is empty"):
        read_audio(tmp_path / "zero_bytes.wav")
    soundfile.write(tmp_path / "zero_samples.wav", np.zeros(0, dtype=np.float32), 24000)
    for read in (read_audio, audio_info):
        with pytest.raises(ValueError, match="zero_samples.wav has no samples"):
            read(tmp_path / "zero_samples.wav")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinite_samples_are_refused_with_their_place(tmp_path, value):
    wav = _sine(440, 24000)
    wav[12000:12002] = value
    soundfile.write(tmp_path / "bad.wav", wav, 24000, subtype="FLOAT")
    with pytest.raises(ValueError, match="bad.wav has 2 NaN or infinite samples, .* at 0.500 s"):
        read_audio(tmp_path / "bad.wav")


def test_a_ten_hour_clip_is_refused_by_its_header(tmp_path):
    """The file is sparse: 10 hours of zeros that take no room and must not be read."""
    path, samples = tmp_path / "ten_hours.wav", 10 * 3600 * 24000
    header = b"RIFF" + struct.pack("<I", 36 + 2 * samples) + b"WAVEfmt "
    header += struct.pack("<IHHIIHH", 16, 1, 1, 24000, 48000, 2, 16)
    header += b"data" + struct.pack("<I", 2 * samples)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 2 * samples)
    begin = time.monotonic()
    with pytest.raises(ValueError, match="lasts 10 h 00 min, more than the 10 min 00 s allowed"):
        read_audio(path)
    assert time.monotonic() - begin < 1
    assert audio_info(path).seconds == 36000


def test_max_sec_is_the_callers_choice(tmp_path):
    write_wav(tmp_path / "a.wav", _sine(440, 24000, 2.0), 24000)
    with pytest.raises(ValueError, match="lasts 2 s, more than the 1 s allowed"):
        read_audio(tmp_path / "a.wav", max_sec=1.0)
    assert len(read_audio(tmp_path / "a.wav", max_sec=None)) == 48000


def test_audio_inside_a_data_set_is_read_like_a_file():
    class Clip:
        def open(self, mode="r"):
            buffer = io.BytesIO()
            soundfile.write(buffer, _sine(440, 24000), 24000, format="FLAC")
            buffer.seek(0)
            return buffer

    assert read_audio(Clip()).shape == (24000,)


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg"])
def test_a_file_is_read_without_asking_python_for_its_parts(tmp_path, monkeypatch, kind):
    """Each time it asks it waits for the interpreter, and the thread that feeds a GPU for it."""
    path = tmp_path / f"a.{kind}"
    soundfile.write(path, _sine(440, 44100, 3.0), 44100)
    read = []

    class Watched(io.FileIO):
        def readinto(self, buffer):
            read.append(len(buffer))
            return super().readinto(buffer)

    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode: io.BufferedReader(Watched(self, mode)))
    wav = read_audio(path)
    assert not read
    monkeypatch.setattr(Path, "open", opened)
    np.testing.assert_array_equal(wav, read_audio(io_source(path)))


def test_write_clips_and_rounds_to_16_bit(tmp_path):
    write_wav(tmp_path / "a.wav", np.array([0.0, 2.0, -2.0]), 24000)
    data, rate = soundfile.read(tmp_path / "a.wav", dtype="int16")
    assert data.tolist() == [0, 32767, -32768] and rate == 24000
    assert soundfile.info(tmp_path / "a.wav").subtype == "PCM_16"


@pytest.mark.parametrize("wav", [np.zeros(0), np.zeros((2, 9)), np.array([0.0, np.nan])])
def test_write_refuses_what_is_no_audio_and_leaves_nothing(tmp_path, wav):
    with pytest.raises(ValueError, match="a.wav"):
        write_wav(tmp_path / "a.wav", wav, 24000)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_wav(tmp_path / "a.wav", _sine(440, 24000), 24000)
    before = (tmp_path / "a.wav").read_bytes()
    monkeypatch.setattr(runlog.Path, "write_bytes", full)
    with pytest.raises(OSError, match="disk is full while writing .*a.wav"):
        write_wav(tmp_path / "a.wav", _sine(880, 24000), 24000)
    assert [p.name for p in tmp_path.iterdir()] == ["a.wav"]
    assert (tmp_path / "a.wav").read_bytes() == before


def test_real_speech_at_every_rate(speech_dir):
    rates = set()
    for path in sorted(p for p in Path(speech_dir).iterdir() if p.suffix in (".wav", ".flac")):
        info, wav = audio_info(path), read_audio(path)
        rates.add(info.sample_rate_hz)
        assert abs(len(wav) / 24000 - info.seconds) < 0.001
        assert 0.001 < _rms(wav) < 0.5
    assert rates == {16000, 22050, 24000, 44100}


def test_trap32_levels_clipping_and_edge_silence_are_measured():
    quiet = np.zeros(12000, dtype=np.float32)
    wav = np.concatenate([quiet, _sine(440, 24000, 2.0), quiet, quiet])
    levels = measure_levels(wav, 24000)
    assert levels.level_dbfs == pytest.approx(20 * np.log10(0.5 / np.sqrt(2)), abs=0.1)
    assert levels.lead_silence_sec == pytest.approx(0.5, abs=0.02)
    assert levels.tail_silence_sec == pytest.approx(1.0, abs=0.02)
    assert levels.clipped_share == 0 and levels.peak == pytest.approx(0.5, abs=1e-3)
    clipped = measure_levels(np.clip(3 * wav, -1, 1), 24000)
    assert 0.2 < clipped.clipped_share < 0.5 and clipped.peak == 1
    silent = measure_levels(quiet, 24000)
    assert silent.level_dbfs == -np.inf and silent.lead_silence_sec == 0.5
