"""Cutting long texts in many scripts, capping their length, joining the sound."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from higgs_lab.tags import TAGS, parse_tags, strip_tags
from higgs_lab.text import join_waves, max_frames_for, speech_units, split_text


def _squeeze(text):
    return "".join(text.split())


@pytest.mark.parametrize(
    "sentences",
    [
        ["He paid 3.14 dollars.", "Then he left!", "Why?", "Nobody knows…", '"Stop."', "He ran."],
        ["Dr. Smith met Mrs. Jones at St. Paul.", "They talked."],
        ["J. R. R. Tolkien wrote it.", "So did I.", "We all did."],
        ["The U.S. Army came, e.g. by boat.", "See example.org for more."],
        ["Am 3. Mai kam er z.B. mit dem Zug.", "Das war gut."],
        ["He waited... and waited... for her.", "She came."],
        ["It was 1984.", "Then came 1985."],
        ["今天天气很好。", "我们去公园吧！", "你说什么？", "「好的。」", "他走了。"],
        ["これは長い文です。", "そうですか？", "はい！"],
        ["यह एक वाक्य है।", "दूसरा वाक्य॥", "तीसरा?"],
        ["هل هذا جيد؟", "نعم، هذا جيد.", "شكرا!"],
        ["یہ ایک جملہ ہے۔", "دوسرا؟"],
        ["Սա նախադասություն է։", "Երկրորդ։"],
        ["ይህ ዓረፍተ ነገር ነው።", "ሌላ፧"],
        ["Τι κάνεις σήμερα\u037e", "Πολύ καλά, ευχαριστώ."],
        ["¿Qué tal?", "¡Bien!", "Vale."],
        ["Он сказал: «Да.»", "Потом ушёл."],
        ["안녕하세요.", "반갑습니다!"],
    ],
    ids=lambda s: s[0][:12],
)
def test_sentences_are_found_in_many_scripts(sentences):
    """With a limit that fits each sentence but few of them together, every cut is a bound."""
    spaced = "" if sentences[0][0] in "今こ" else " "
    text = spaced.join(sentences)
    longest = max(20, max(map(speech_units, sentences)) + 1)
    chunks = split_text(text, int(longest) + 1)
    bounds = {_squeeze("".join(sentences[:i])) for i in range(1, len(sentences) + 1)}
    position = ""
    for chunk in chunks:
        position += _squeeze(chunk)
        assert position in bounds, chunks
    assert len(chunks) > 1


def test_short_text_stays_whole_and_empty_text_gives_nothing():
    assert split_text("Hello there. How are you?") == ["Hello there. How are you?"]
    assert split_text("") == [] and split_text(" \n ") == []
    with pytest.raises(ValueError, match="at least 20"):
        split_text("x", max_chars=5)


def test_long_sentences_fall_back_to_clauses_then_spaces_then_characters():
    clauses = split_text("one two three, four five six; seven eight nine ten, eleven", 30)
    assert all(chunk[-1] in ",;" for chunk in clauses[:-1]) and len(clauses) > 1
    words = split_text("word " * 30, 30)
    assert all(set(chunk.split()) == {"word"} for chunk in words)
    hard = split_text("x" * 100, 30)
    assert "".join(hard) == "x" * 100 and all(len(chunk) <= 30 for chunk in hard)


def test_numbers_with_commas_and_times_are_not_clauses():
    chunks = split_text("it cost 1,000,000 at 10:30 in the morning of that day", 60)
    assert any("1,000,000" in c for c in chunks) and any("10:30" in c for c in chunks)


def test_chunks_are_of_similar_size_so_that_no_word_is_left_over():
    """Plain filling would make 9 sentences + 1 word; a lone "Yes." is spoken badly."""
    text = " ".join(["This sentence has thirty chars."] * 9) + " Yes."
    sizes = [len(chunk) for chunk in split_text(text, 288)]
    assert len(sizes) == 2 and min(sizes) > 100


def test_wide_characters_count_for_the_time_they_take():
    assert len(split_text("天" * 300)) == 3
    assert speech_units("天") == 3 and speech_units("a") == 1 and speech_units("7") == 6


def test_combining_marks_and_joiners_stay_with_their_letter():
    for text in ("क्षत्रिय" * 40, "e\u0301" * 200, "👩\u200d👩\u200d👧" * 30, "각" * 90):
        for chunk in split_text(text, 40):
            assert chunk[0] not in "\u0301\u200d\u094d\u093f\u11a8" and chunk[-1] != "\u200d"


def test_leading_sentence_tags_are_carried_to_every_chunk():
    text = "<|emotion:anger|><|prosody:speed_fast|>" + "This is a sentence of words. " * 8
    chunks = split_text(text, 100)
    assert len(chunks) > 1
    assert all(c.startswith("<|emotion:anger|><|prosody:speed_fast|>This") for c in chunks)


def test_a_chunk_with_its_own_tag_overrides_only_that_category():
    text = "<|emotion:anger|><|prosody:speed_fast|>" + "a" * 90 + ". "
    text += "<|emotion:relief|>" + "b" * 90 + ". " + "c" * 90 + "."
    first, second, third = split_text(text, 100)
    assert second.startswith("<|prosody:speed_fast|><|emotion:relief|>bbb")
    assert third.startswith("<|emotion:anger|><|prosody:speed_fast|>ccc")


def test_spot_tags_stay_with_what_they_act_on_and_are_not_repeated():
    text = "<|sfx:cough|>Ahem. " + "Words and words again. " * 5 + "<|sfx:laughter|>Haha, no. " * 5
    chunks = split_text(text, 40)
    assert "".join(map(_squeeze, chunks)) == _squeeze(text)
    for chunk in chunks:
        for at in parse_tags(chunk):
            assert chunk[at.end : at.end + 4] in ("Ahem", "Haha")
    assert split_text("x" * 39 + "<|prosody:pause|> y", 40)[-1].endswith("<|prosody:pause|> y")


_words = st.sampled_from(
    [
        "word",
        "Dr.",
        "3.14",
        "你好。",
        "今天，",
        "नमस्ते।",
        "हिन्दी",
        "مرحبا؟",
        "Yes!",
        "J.",
        "etc.",
        "no,",
        "…",
    ]
    + [
        "\n",
        "\n\n",
        "x" * 50,
        "e\u0301" * 9,
        "ภาษาไทย",
        "안녕.",
        '"No."',
        "(so)",
        "«Да.»",
        "12.",
        "?!",
    ]
)
_tags = st.sampled_from([tag.literal for tag in TAGS if tag.placement == "here"])
_sentence_tags = st.sampled_from([tag.literal for tag in TAGS if tag.placement == "sentence"])


@settings(max_examples=150, deadline=None)
@given(st.lists(_words | _tags, max_size=40), st.sampled_from(["", " "]), st.integers(20, 120))
def test_splitting_loses_nothing(pieces, space, max_chars):
    text = space.join(pieces)
    chunks = split_text(text, max_chars)
    assert "".join(map(_squeeze, chunks)) == _squeeze(text)
    assert all(chunk == chunk.strip() != "" for chunk in chunks)
    assert sum(len(parse_tags(chunk)) for chunk in chunks) == len(parse_tags(text))


@settings(max_examples=80, deadline=None)
@given(st.lists(_words | _sentence_tags | _tags, max_size=30), st.integers(20, 120))
def test_splitting_tagged_text_keeps_all_words(pieces, max_chars):
    text = " ".join(pieces)
    chunks = split_text(text, max_chars)
    assert "".join(_squeeze(strip_tags(c)) for c in chunks) == _squeeze(strip_tags(text))


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=200), st.integers(20, 120))
def test_splitting_any_unicode_loses_nothing_and_keeps_the_limit(text, max_chars):
    chunks = split_text(text, max_chars)
    assert "".join(map(_squeeze, chunks)) == _squeeze(text)
    assert all(speech_units(c) <= max_chars for c in chunks if not parse_tags(c) and len(c) > 40)


def test_splitting_a_book_takes_no_time():
    text = "It was a sentence of some length, with a clause; it went on. " * 2000
    chunks = split_text(text)
    assert len(chunks) > 400 and max(map(len, chunks)) <= 300


def test_trap22_caps_leave_room_for_slow_speech_but_stop_runaways():
    sentence = "The birch canoe slid on the smooth planks."  # about 2.5 s
    assert 4 * 25 < max_frames_for("Yes.") < 6 * 25
    assert 5 * 25 < max_frames_for(sentence) < 15 * 25
    assert max_frames_for("今天天气很好。") > max_frames_for("abcdefg")
    assert max_frames_for("1984") > max_frames_for("year")
    assert max_frames_for("Yes.<|prosody:long_pause|>") - max_frames_for("Yes.") == 3 * 25
    assert max_frames_for(sentence, 50.0) == 2 * max_frames_for(sentence)


def test_real_speech_is_far_below_its_cap(speech_dir):
    from higgs_lab.audio import audio_info
    from higgs_lab.manifest import read_manifest

    for row in read_manifest(speech_dir / "manifest.jsonl"):
        assert audio_info(row.audio).seconds * 25 < 0.7 * max_frames_for(row.text), row.id


def test_join_cross_fades_without_clicks_or_level_jumps():
    ones = np.ones(2400, dtype=np.float32)
    joined = join_waves([ones, ones, ones], 24000, fade_sec=0.02)
    assert joined.dtype == np.float32 and len(joined) == 3 * 2400 - 2 * 480
    np.testing.assert_allclose(joined, 1.0, atol=1e-6)


def test_join_with_a_gap_fades_into_silence():
    ones = np.ones(2400, dtype=np.float32)
    joined = join_waves([ones, ones], 24000, gap_sec=0.1, fade_sec=0.01)
    assert len(joined) == 2 * 2400 + 2400
    assert not joined[2400:4800].any() and np.abs(np.diff(joined)).max() < 0.01


def test_join_of_one_none_and_tiny_clips():
    wave = np.arange(5, dtype=np.float64)
    assert join_waves([wave], 24000).tolist() == [0, 1, 2, 3, 4]
    assert join_waves([], 24000).shape == (0,)
    assert len(join_waves([wave, np.zeros(0), wave], 24000)) in range(6, 11)
    kept = wave.copy()
    join_waves([wave, wave], 24000)
    np.testing.assert_array_equal(wave, kept)


def test_text_imports_no_torch():
    code = "import sys, higgs_lab.text; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
