"""eval.acoustics: known sounds have known times, levels and pitches."""

from __future__ import annotations

import numpy as np
import pytest

from eval.acoustics import audio_facts, loudness, pitch
from higgs_lab.audio import read_audio

RATE = 24000


def buzz(hz: float | np.ndarray, seconds: float = 2.0, rate: int = RATE) -> np.ndarray:
    """A voice-like wave of ten harmonics at a pitch, or along one."""
    hz = np.broadcast_to(hz, int(seconds * rate))
    phase = 2 * np.pi * np.cumsum(hz) / rate
    return 0.1 * sum(np.sin(n * phase) / n for n in range(1, 11)).astype(np.float32)


def test_times_are_those_of_the_sound():
    tone = buzz(220, 1.0, 16000)
    facts = audio_facts(np.concatenate([np.zeros(8000), tone, np.zeros(4000)]), 16000)
    assert facts.seconds == pytest.approx(1.75)
    assert facts.leading_sec == pytest.approx(0.5, abs=0.02)
    assert facts.trailing_sec == pytest.approx(0.25, abs=0.02)
    assert facts.active_sec == facts.spoken_sec == pytest.approx(1.0, abs=0.04)
    assert audio_facts(np.ones(16000), 16000).clipped_share == 1.0
    assert facts.clipped_share == 0


def test_silence_and_faint_hiss_have_no_active_time_and_no_other_measure():
    hiss = 10 ** (-60 / 20) * np.random.default_rng(0).normal(size=16000)
    for wav in (np.zeros(16000), hiss):
        facts = audio_facts(wav, 16000)
        assert facts.active_sec == 0 and facts.leading_sec == 1.0
        assert facts.loudness_lufs is facts.f0_hz is facts.f0_spread_st is None
    assert audio_facts(np.zeros(0), 16000).seconds == 0


@pytest.mark.parametrize("rate", [16000, 22050, 24000, 44100, 48000])
def test_loudness_is_that_of_the_recommendation_at_any_rate(rate):
    """EBU Tech 3341: 997 Hz at full scale in one channel is -3.01 LUFS."""
    tone = np.sin(2 * np.pi * 997 * np.arange(3 * rate) / rate)
    assert loudness(tone, rate) == pytest.approx(-3.01, abs=0.06)
    # Pauses are gated out: twice the silence, the same loudness.
    spaced = np.concatenate([tone, np.zeros(3 * rate)])
    assert loudness(spaced, rate) == pytest.approx(loudness(tone, rate), abs=0.5)
    assert loudness(0.5 * tone, rate) == pytest.approx(loudness(tone, rate) - 6.02, abs=0.01)
    assert loudness(tone[: rate // 4], rate) is None


@pytest.mark.parametrize("hz", [70.0, 110.0, 210.0, 330.0, 450.0])
def test_pitch_is_found_without_octave_errors(hz):
    f0_hz, spread_st = pitch(buzz(hz), RATE)
    assert f0_hz == pytest.approx(hz, rel=0.02) and spread_st < 0.3


def test_spread_is_that_of_the_melody():
    """A glide over an octave: 68 % of it is 8.2 semitones, half of that 4.1."""
    f0_hz, spread_st = pitch(buzz(np.geomspace(100, 200, 2 * RATE)), RATE)
    assert f0_hz == pytest.approx(141, rel=0.03) and spread_st == pytest.approx(4.1, abs=0.3)


def test_noise_has_no_pitch():
    noise = 0.1 * np.random.default_rng(0).normal(size=RATE)
    assert pitch(noise, RATE) == (None, None)
    assert pitch(noise[:100], RATE) == (None, None)


def test_pitch_of_real_voices_is_praats(speech_dir):
    """Medians that Praat (parselmouth 0.4.7, 60 to 500 Hz) gives for the same files."""
    praat = {"en_man": 133, "en_woman": 216, "spk1_snt1": 208, "spk1_snt5": 190, "spk2_snt2": 115}
    for name, hz in praat.items():
        wav = read_audio(speech_dir / f"{name}.wav", RATE)
        assert audio_facts(wav, RATE).f0_hz == pytest.approx(hz, rel=0.04), name
