"""What the nano family is trained on: texts and voices with splits that hold."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from higgs_lab.espeak import RATE_HZ
from recipes.nano.data import (
    NOISE_FLOOR,
    TAGS,
    draw_utterance,
    make_shard,
    make_shards,
    speak_tagged,
)
from recipes.nano.espeak import speak
from recipes.nano.texts import LANGUAGES, NUMBER, draw_text, split_of
from recipes.nano.voices import (
    DEMO_VOICE,
    GENUINE,
    HELD_OUT_GENUINE,
    WHISPERS,
    all_voices,
    made_variant,
)
from tests.conftest import ROOT


@pytest.mark.parametrize("language", NUMBER)
def test_every_number_has_words_of_its_own(language):
    """Digits carry no language, so they never occur; two numbers never sound alike."""
    words = [NUMBER[language](n) for n in range(10_000)]
    assert len(set(words)) == len(words)
    assert not any(c.isdigit() for text in words for c in text)


@pytest.mark.parametrize(
    "language, number, words",
    [
        ("en", 1215, "one thousand two hundred fifteen"),
        ("de", 4321, "viertausenddreihunderteinundzwanzig"),
        ("es", 2101, "dos mil ciento uno"),
        ("fr", 1980, "mille neuf cent quatre-vingts"),
        ("fr", 271, "deux cent soixante et onze"),
        ("it", 1023, "mille ventitré"),
        ("ru", 2941, "две тысячи девятьсот сорок один"),
        ("el", 116, "εκατόν δεκαέξι"),
        ("el", 100, "εκατό"),
        ("hi", 1999, "एक हज़ार नौ सौ निन्यानवे"),
        ("zh", 1001, "一千零一"),
        ("zh", 14, "十四"),
    ],
)
def test_numbers_are_written_as_people_do(language, number, words):
    assert NUMBER[language](number) == words


def test_splits_share_no_text_and_no_voice():
    rng = random.Random(0)
    for language in LANGUAGES:
        drawn = {split: {draw_text(language, rng, split) for _ in range(60)} for split in
                 ("train", "test")}  # fmt: skip
        assert not drawn["train"] & drawn["test"]
        assert all(split_of(text) == "test" for text in drawn["test"])
    splits = {}
    for voice in all_voices():
        splits.setdefault(voice.split, set()).add(voice.name)
    assert not splits["train"] & (splits["test"] | splits["demo"])
    assert splits["demo"] == {DEMO_VOICE} and set(HELD_OUT_GENUINE) <= splits["test"]
    assert set(GENUINE) - set(HELD_OUT_GENUINE) <= splits["train"]


def test_drawn_voices_are_all_different_and_always_the_same():
    texts = [made_variant(n) for n in range(200)]
    assert len(set(texts)) == 200 and texts == [made_variant(n) for n in range(200)]
    assert {f"gender {g}" in t for t in texts[::2] for g in ("male",)} == {True}


def test_whispers_are_drawn_for_training_alone():
    names = {f"made{number}" for number in WHISPERS}
    assert {voice.split for voice in all_voices() if voice.name in names} == {"train"}
    assert names <= {voice.name for voice in all_voices()}
    texts = [made_variant(number).splitlines() for number in WHISPERS]
    assert all([line for line in text if "voicing" in line] == ["voicing 0"] for text in texts)
    assert sum("klatt 6" in text for text in texts) == len(WHISPERS) // 2
    assert "voicing 0" not in made_variant(0) + made_variant(9000)


def test_tags_are_heard():
    pytest.importorskip("espeakng_loader")
    rng = random.Random(1)
    text = "The small dog sleeps."
    plain = len(speak_tagged(text, "en", "m1", random.Random(1)))
    slow = len(speak_tagged("<|prosody:speed_slow|>" + text, "en", "m1", random.Random(1)))
    fast = len(speak_tagged("<|prosody:speed_fast|>" + text, "en", "m1", random.Random(1)))
    assert slow > 1.15 * plain and fast < 0.9 * plain
    assert any(draw_utterance("en", rng, "train").startswith(TAGS) for _ in range(40))


def test_shards_hold_the_hours_asked_for_and_are_the_same_again(tmp_path):
    """In another process, and after other speech."""
    pytest.importorskip("espeakng_loader")
    hours, (forked, here) = 0.17, (tmp_path / "forked", tmp_path / "here")
    make_shards(forked, hours, 2, 0, "test")
    samples = sum(len(np.load(shard)) for shard in forked.glob("*.npy"))
    assert samples / 24_000 / 3600 == pytest.approx(hours, rel=0.1)
    here.mkdir()
    speak("Something else.", "en", "f3")
    make_shard((here, 0, 1, "test"))
    for name in ("shard-00001.json", "shard-00001.npy"):
        assert (here / name).read_bytes() == (forked / name).read_bytes()
    assert len(json.loads((here / "shard-00001.json").read_text("utf-8"))["rows"]) > 100
    loud = np.abs(np.load(here / "shard-00001.npy") / 32767)
    assert loud.max() <= 1 and NOISE_FLOOR < loud.std()


CLIPS = [  # flutter, roughness, breath and a gain that clipped would all be carried on
    ("The small dog sleeps.", "en", DEMO_VOICE, 160, 50),
    ("Двадцать один красный дом.", "ru", "f3", 170, 68),
    ("The small dog sleeps.", "en", "f3", 170, 50),
    ("The small dog sleeps.", "en", "f3", 171, 50),
    ("一千零一", "zh", "made0003", 140, 32),
    ("Seven red birds sing in the old garden.", "en", "grandpa", 240, 50),
]
SAY = """
import hashlib, json, sys
from recipes.nano.espeak import speak
for clip in json.load(sys.stdin):
    print(hashlib.sha256(speak(*clip).tobytes()).hexdigest())
"""


def test_a_clip_is_the_same_whatever_was_spoken_before():
    """Twice, in another order and in a process of its own, which loads a folder's library."""
    loader = pytest.importorskip("espeakng_loader")
    first = [hashlib.sha256(speak(*clip).tobytes()).hexdigest() for clip in CLIPS]
    assert len(set(first)) == len(CLIPS)
    for order in (CLIPS, CLIPS[::-1], CLIPS[1::2]):
        for clip in order:
            assert hashlib.sha256(speak(*clip).tobytes()).hexdigest() == first[CLIPS.index(clip)]
    folder = {"ESPEAK_NG": str(Path(loader.__file__).parent)}
    said = subprocess.run(
        [sys.executable, "-c", SAY],
        input=json.dumps(CLIPS[::-1]),
        env=folder | os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.split() == first[::-1]


def test_a_clip_is_the_same_beside_anothers_engine():
    """A process may hold espeak-ng for its own ends; initialised again it would hang for ever."""
    loader = pytest.importorskip("espeakng_loader")
    before = speak(*CLIPS[0])
    other = ctypes.CDLL(loader.get_library_path())
    try:
        folder = str(Path(loader.get_data_path()).parent).encode()
        assert other.espeak_Initialize(2, 0, folder, 0) == RATE_HZ
        assert np.array_equal(speak(*CLIPS[0]), before)
        assert np.array_equal(speak(*CLIPS[0]), before)
    finally:
        other.espeak_Terminate()
        ctypes.CDLL(None).dlclose(ctypes.c_void_p(other._handle))
