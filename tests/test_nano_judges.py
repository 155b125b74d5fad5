"""The packaged judges really hear and recognise, through the loaders of the large ones."""

from __future__ import annotations

import numpy as np
import pytest

from eval.asr import load_recognizer
from eval.normalize import normalize
from eval.speaker import cosine, load_encoder
from recipes.nano.measure import error_rate, for_judges, held_out
from recipes.nano.texts import LANGUAGES


@pytest.fixture(scope="module")
def recognizer():
    return load_recognizer("nano", "cpu")


@pytest.fixture(scope="module")
def encoder():
    return load_encoder("nano", "cpu")


def test_it_hears_every_language_of_the_family(recognizer):
    """Voices and texts that it was not trained on; recipes.nano.evaluate measures more of them."""
    clips = [clip for language in LANGUAGES for clip in held_out(language, 2, seed=7)]
    rate = error_rate(recognizer, [clip.wav for clip in clips], clips, "char")
    assert rate < 0.05


def test_languages_that_it_never_met_have_no_recogniser(recognizer):
    """Its vocabulary has tokens for 99; it would write the nearest words it knows."""
    assert all(recognizer.hears(language) for language in LANGUAGES)
    assert not recognizer.hears("pl") and not recognizer.hears("yue")
    assert recognizer.transcribe_all([np.zeros(16000, np.float32)], ["pl"]) == [None]


def test_the_language_is_forced(recognizer):
    """German numbers asked for as English are written in English letters, if in any words."""
    (clip,) = held_out("de", 1, seed=8)
    wav = for_judges(clip.wav)
    german = normalize(recognizer.transcribe(wav, "de").text, "de")
    english = normalize(recognizer.transcribe(wav, "en").text, "en")
    assert german == normalize(clip.text, "de") and english != german


@pytest.mark.parametrize("harm", ["noise", "truncation", "silence"])
def test_it_hears_what_is_wrong(recognizer, harm):
    """A judge that filled in what it expects would be of no use."""
    clips = held_out("en", 4, seed=9)
    spoilt = {
        "noise": lambda wav: wav + 0.3 * np.random.default_rng(0).normal(size=len(wav)),
        "truncation": lambda wav: wav[: len(wav) // 2],
        "silence": lambda wav: 1e-4 * np.random.default_rng(0).normal(size=len(wav)),
    }[harm]
    wavs = [spoilt(clip.wav).astype(np.float32) for clip in clips]
    assert error_rate(recognizer, wavs, clips, "word") > 0.3


def test_it_knows_voices_apart(encoder):
    """Held-out voices, different sentences: the nearest other clip is of the same voice."""
    clips = held_out("en", 12, seed=10, voices=["f2", "m3", "victor", "made8003"])
    vectors = [encoder.embed(for_judges(clip.wav)) for clip in clips]
    for i, clip in enumerate(clips):
        order = sorted(
            (j for j in range(len(clips)) if j != i),
            key=lambda j: -cosine(vectors[i], vectors[j]),
        )
        assert clips[order[0]].voice == clip.voice
