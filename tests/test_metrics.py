"""eval.metrics: error counts are jiwer's, failures are all wrong, nothing vanishes from a mean."""

from __future__ import annotations

import jiwer
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.acoustics import AudioFacts
from eval.metrics import char_errors, loops, score_clip, summarise, word_errors

FINE = AudioFacts(2.0, 1.8, 0.1, 0.1, -25.0, 0.0)
FRENCH = {"guessed": "fr", "guessed_prob": 0.97, "expected_prob": 0.01}
words = st.lists(st.sampled_from("a b c der dir हिन्दी был".split()), max_size=12).map(" ".join)


def clip(text="one two three four", heard="one two three four", lang="en", audio=FINE, **kw):
    return {"language": lang} | score_clip(text, heard, lang, audio=audio, **kw)


@settings(max_examples=200, deadline=None)
@given(words.filter(bool), words)
def test_word_and_char_rates_equal_jiwers_on_the_same_strings(reference, hypothesis):
    by_word, by_char = word_errors(reference, hypothesis), char_errors(reference, hypothesis)
    assert by_word.errors / by_word.units == pytest.approx(jiwer.wer(reference, hypothesis))
    assert by_char.errors / by_char.units == pytest.approx(jiwer.cer(reference, hypothesis))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(words.filter(bool), words), min_size=1, max_size=8))
def test_corpus_rate_of_a_summary_equals_jiwers_corpus_rate(pairs):
    scores = [clip(reference, hypothesis) for reference, hypothesis in pairs]
    valid = [(r, h) for (r, h), s in zip(pairs, scores, strict=True) if s["failure"] is None]
    if valid:
        block = summarise(scores)["overall"]
        assert block["error_valid"]["value"] == pytest.approx(
            jiwer.wer([r for r, _ in valid], [h for _, h in valid])
        )


def test_insertions_deletions_and_substitutions_are_told_apart():
    score = clip("a b c d", "x b c d e f")
    assert (score["substitutions"], score["deletions"], score["insertions"]) == (1, 0, 2)
    score = clip("a b c d", "a d")
    assert (score["substitutions"], score["deletions"], score["insertions"]) == (0, 2, 0)


def test_an_empty_reference_raises():
    with pytest.raises(ValueError, match="reference is empty"):
        word_errors("", "a")
    with pytest.raises(ValueError, match="no words are left of '\\?!'"):
        clip("?!")


@pytest.mark.parametrize(
    ("failure", "options"),
    [
        ("missing", dict(audio=None, heard="")),
        ("empty", dict(audio=AudioFacts(0.1, 0.1, 0, 0, -20.0, 0))),
        ("silent", dict(audio=AudioFacts(3.0, 0.0, 3.0, 0, None, 0))),
        ("runaway", dict(audio=AudioFacts(30.0, 29.0, 0, 0, -20.0, 0))),
        ("runaway", dict(hit_cap=True)),
        ("loop", dict(heard="one two three four " + "three four " * 4)),
        ("wrong_language", dict(heard="won to tree for", transcript=FRENCH)),
    ],
)
def test_a_failed_clip_has_all_its_words_wrong_whatever_was_heard(failure, options):
    """A recogniser hallucinates on silence; a perfect text from a runaway clip is no success."""
    score = clip(**options)
    assert score["failure"] == failure
    assert score["errors"] == score["units"] == 4
    assert score["char_errors"] == score["chars"]
    summary = summarise([score, clip()])["overall"]
    assert summary["error"]["value"] == pytest.approx(0.5)
    assert summary["error_valid"]["value"] == 0
    assert summary["failed"] == summary["failures"][failure] == 1


def test_a_language_guess_fails_a_clip_only_if_sure_and_if_the_words_are_wrong_too():
    """Sister languages are guessed as one another; clips of a word or two as anything."""
    understood = clip(transcript=FRENCH)
    assert understood["failure"] is None and understood["flags"] == ["other_language"]
    for unsure in ({"guessed_prob": 0.7}, {"expected_prob": 0.2}, {"guessed": "en"}):
        score = clip(heard="won to tree for", transcript=FRENCH | unsure)
        assert score["failure"] is None and score["flags"] == []
    assert clip(heard="won to tree for", transcript={"guessed": None})["failure"] is None


def test_insertions_beyond_the_reference_count_and_no_failure_hides_them():
    score = clip(heard="one two three four and five more words here")
    assert score["failure"] is None and score["errors"] == 5 and score["units"] == 4


def test_a_baseline_that_does_not_claim_a_language_is_neither_good_nor_bad():
    summary = summarise([clip(), clip(audio=None, heard=None, no_baseline=True, lang="sw")])
    swahili = summary["languages"]["sw"]
    assert swahili["no_baseline"] == 1 and swahili["failed"] == 0 and swahili["error"] is None
    assert summary["overall"]["error"]["value"] == 0 and summary["overall"]["clips"] == 2


def test_leaving_a_clip_out_is_not_better_than_speaking_it_badly():
    spoken_badly = [clip(), clip(heard="one two three five")]
    not_spoken = [clip(), clip(audio=None, heard="")]
    rates = [summarise(s)["overall"]["error"]["value"] for s in (spoken_badly, not_spoken)]
    assert rates[0] < rates[1]


def test_a_long_recording_by_a_human_makes_room_for_a_long_clip():
    slow = AudioFacts(9.0, 8.0, 0, 0, -20.0, 0)
    assert clip(audio=slow)["failure"] == "runaway"
    assert clip(audio=slow, human=AudioFacts(5.0, 4.0, 0, 0, -20.0, 0))["failure"] is None


def test_repetition_in_the_text_itself_is_no_loop():
    assert loops("no no no no no".split(), "no".split())
    assert not loops("no no no no no".split(), "no no no no no".split())
    assert not loops("a b c d e f g h".split(), "a".split())
    assert loops("x a b a b a b a b".split(), "x a b".split())
    assert not loops([], [])


def test_char_languages_count_characters_and_no_spaces():
    score = clip("今天天气很好", "今天 天气 真好", "zh")
    assert (score["unit"], score["units"], score["errors"]) == ("char", 6, 1)
    block = summarise([score])["overall"]
    assert block["error"]["value"] == block["cer"]["value"] == pytest.approx(1 / 6)


def test_a_wrong_vowel_sign_is_an_error():
    assert clip("हिन्दी", "हिन्दि", "hi")["errors"] == 1


def test_control_tags_are_not_words():
    score = clip("<|emotion:anger|>one <|prosody:pause|>two three four")
    assert score["reference"] == "one two three four" and score["errors"] == 0


def test_without_a_recogniser_there_is_no_rate_but_failures_still_count():
    summary = summarise([clip(heard=None), clip(heard=None, audio=None)])["overall"]
    assert summary["error"] is None and summary["judged"] == 0
    assert summary["clips"] == 2 and summary["failed"] == 1


def test_an_empty_set_raises():
    with pytest.raises(ValueError, match="the set is empty"):
        summarise([])


def test_over_languages_the_headline_is_the_mean_of_their_rates():
    scores = [clip() for _ in range(3)] + [clip("ein zwei", "ein drei", "de")]
    summary = summarise(scores)
    assert summary["languages"]["en"]["error"]["value"] == 0
    assert summary["languages"]["de"]["error"]["value"] == 0.5
    assert summary["overall"]["error"]["value"] == pytest.approx(0.25)


def test_utterance_figures():
    rates = [clip(), clip(heard="one two three"), clip(heard="a b c d e f g h")]
    block = summarise(rates)["overall"]
    assert block["utterance_median"] == 0.25
    assert block["utterance_mean_capped"] == pytest.approx((0 + 0.25 + 1) / 3)
    assert block["utterances_over_half"] == pytest.approx(1 / 3)


def test_similarity_is_averaged_over_the_clips_that_have_one():
    scores = [clip() | {"sim_ref": 0.5}, clip("other words") | {"sim_ref": 0.7}, clip()]
    block = summarise(scores)["overall"]["sim_ref"]
    assert block["value"] == pytest.approx(0.6) and block["n"] == 2


def test_flags_do_not_fail_a_clip():
    heard = {"no_speech_prob": 0.9, "compression_ratio": 3.0, "cut": True, "error": "no memory"}
    score = clip("on the 9th", "on the ninth", transcript=heard)
    assert set(score["flags"]) == {
        "digits", "no_speech", "repetitive", "transcript_cut", "recogniser_error"
    }  # fmt: skip
    assert score["failure"] is None and score["errors"] == 1


def test_duration_ratio_compares_speech_without_the_silence_around_it():
    human = AudioFacts(4.0, 1.8, 1.0, 1.2, -25.0, 0.0)
    assert clip(human=human)["duration_ratio"] == pytest.approx(1.0)


def test_a_click_has_no_speaking_rate():
    assert "letters_per_sec" not in clip(audio=AudioFacts(0.04, 0.04, 0, 0, None, 0.0))
    assert clip()["letters_per_sec"] == pytest.approx(15 / 1.8)


def test_the_summary_holds_medians_of_what_the_sound_says():
    low, high = (
        AudioFacts(2.0, 1.6, lead, 0.1, -25.0, 0.0, 120.0 + lead, 2.0) for lead in (0.1, 0.3)
    )
    block = summarise([clip(audio=low), clip(audio=high), clip(audio=None, heard="")])["overall"]
    assert block["leading_sec_median"] == pytest.approx(0.2)
    assert block["f0_hz_median"] == pytest.approx(120.2) and block["f0_spread_st_median"] == 2.0
    assert block["loudness_lufs_median"] == -25.0 and block["duration_ratio_median"] is None
    assert block["letters_per_sec_median"] == pytest.approx((15 / 1.8 + 15 / 1.6) / 2)


def test_over_languages_similarity_is_their_mean_and_each_take_has_its_error():
    rows = []
    for code, voice, count in (("en", 0.9, 6), ("de", 0.5, 2)):
        for number in range(count):
            for take in range(2):
                row = score_clip("one two", "one two" if take else "one", code, audio=FINE)
                row |= {"language": code, "take": take, "sim_target": voice, "sim_ref": None}
                rows.append(row | {"reference": f"text {number}"})
    overall = summarise(rows)["overall"]
    assert overall["sim_target"]["value"] == pytest.approx(0.7) and overall["sim_target"]["n"] == 16
    assert overall["error_by_take"] == pytest.approx([0.5, 0.0])
    assert summarise([r for r in rows if r["take"]])["overall"]["error_by_take"] is None


def test_a_loop_is_one_of_words_also_where_a_protocol_counts_characters():
    def failure(text: str, heard: str, lang: str = "en") -> str | None:
        normalizer = "omnivoice-fleurs"
        return score_clip(text, heard, lang, normalizer=normalizer, audio=FINE)["failure"]

    assert failure("it cost 10,000,000 pounds", "it cost 10000000 pounds") is None
    again = " and the river is long"  # longer than a block of characters that is looked for
    assert failure("and the river is long", "and the river is long" + 4 * again) == "loop"
    assert failure("今天天气好", "今天天气好" + 4 * "天气好", "zh") == "loop"
    assert failure("卖了一千万", "卖了10000000", "zh") is None


def test_of_one_language_the_headline_is_its_row():
    """Other draws of the bootstrap gave the same clips two intervals on one page."""
    heard = ("one two", "one", "two", "one three", "four", "one two three")
    rows = [
        score_clip("one two", text, "en", audio=FINE)
        | {"language": "en", "reference": f"text {n}", "sim_target": 0.1 * n}
        for n, text in enumerate(heard)
    ]
    summary = summarise(rows)
    overall, row = summary["overall"], summary["languages"]["en"]
    assert {name: overall[name] for name in row} == row and row["error"]["low"] is not None
    assert "error_by_take" not in row
