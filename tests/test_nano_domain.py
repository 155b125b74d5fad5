"""What the nano family is trained on: texts and voices with splits that hold."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from recipes.nano.data import NOISE_FLOOR, TAGS, draw_utterance, make_shard, speak_tagged
from recipes.nano.texts import LANGUAGES, NUMBER, draw_text, split_of
from recipes.nano.voices import DEMO_VOICE, GENUINE, HELD_OUT_GENUINE, all_voices, made_variant


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


def test_tags_are_heard_and_a_shard_says_the_same_again(tmp_path):
    pytest.importorskip("espeakng_loader")
    rng = random.Random(1)
    text = "The small dog sleeps."
    plain = len(speak_tagged(text, "en", "m1", random.Random(1)))
    slow = len(speak_tagged("<|prosody:speed_slow|>" + text, "en", "m1", random.Random(1)))
    fast = len(speak_tagged("<|prosody:speed_fast|>" + text, "en", "m1", random.Random(1)))
    assert slow > 1.15 * plain and fast < 0.9 * plain
    assert any(draw_utterance("en", rng, "train").startswith(TAGS) for _ in range(40))
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        make_shard((tmp_path / folder, 0, 3, "test"))
    a, b = (
        json.loads((tmp_path / folder / "shard-00003.json").read_text(encoding="utf-8"))["rows"]
        for folder in ("a", "b")
    )
    assert [row[2:] for row in a] == [row[2:] for row in b] and len(a) > 100
    loud = np.abs(np.load(tmp_path / "a" / "shard-00003.npy") / 32767)
    assert loud.max() <= 1 and NOISE_FLOOR < loud.std()
