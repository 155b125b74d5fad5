"""eval.asr on a real openai-whisper model of random weights: it hears nothing, in the right way."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
import whisper

from eval.asr import (
    judge_of,
    load_recognizer,
    parse_spec,
    recognizer_details,
    recognizer_title,
    together,
)
from higgs_lab.nano.judges import random_whisper
from tests.tiny_judges import talkative_whisper, tiny_mms, tones


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return random_whisper(tmp_path_factory.mktemp("whisper") / "tiny.pt", seed=1)


@pytest.fixture(scope="module")
def recognizer(checkpoint):
    return load_recognizer(str(checkpoint), "cpu")


@pytest.fixture(scope="module")
def noise():
    return 0.1 * np.random.default_rng(0).normal(size=16000).astype(np.float32)


def test_the_builder_is_reproducible_and_the_official_loader_reads_it(checkpoint, tmp_path):
    again = random_whisper(tmp_path / "other_name.pt", seed=1)
    assert again.read_bytes() == checkpoint.read_bytes()
    assert random_whisper(tmp_path / "c.pt", seed=2).read_bytes() != checkpoint.read_bytes()
    model = whisper.load_model(str(checkpoint), device="cpu")
    assert model.is_multilingual and model.num_languages == 99
    assert checkpoint.stat().st_size < 3 << 20


def test_same_sound_same_words_and_all_figures(recognizer, noise):
    one, two = recognizer.transcribe(noise, "en"), recognizer.transcribe(noise, "en")
    assert one == two
    assert one.text and 0 <= one.no_speech_prob <= 1
    assert one.avg_logprob < 0 and one.compression_ratio > 0


def test_language_is_forced_greedy_and_without_fallback_or_prompt(recognizer, noise, monkeypatch):
    """What Whisper was asked, seen at its decoder: no guess, no sampling, no earlier text."""
    asked = []
    decode = recognizer.model.decode

    def spy(mel, options):
        asked.append(options)
        return decode(mel, options)

    monkeypatch.setattr(recognizer.model, "decode", spy, raising=False)
    monkeypatch.setattr(recognizer.model, "detect_language", None, raising=False)
    recognizer.transcribe(noise, "jv")
    (options,) = asked  # random weights repeat themselves: a fallback would have decoded again
    assert options.language == "jw" and options.temperature == 0 and options.fp16 is False
    assert options.task == "transcribe" and options.without_timestamps and not options.prompt
    asked.clear()
    recognizer.transcribe(np.tile(noise, 70), "de")
    assert len(asked) >= 3 and not any(o.prompt or o.without_timestamps for o in asked)


@pytest.mark.parametrize("ends", [True, False])
def test_a_filled_token_limit_is_told(checkpoint, noise, ends):
    """A model that never writes its end token fills the context, and words are lost."""
    recognizer = load_recognizer(str(checkpoint), "cpu")
    decoder = recognizer.model.decoder
    with torch.no_grad():  # logits become the row sums of the embedding, whatever was heard
        decoder.ln.weight.zero_()
        decoder.ln.bias.fill_(1.0)
        end_of_text = whisper.tokenizer.get_tokenizer(True).eot
        decoder.token_embedding.weight[end_of_text] = 100.0 if ends else -100.0
    assert recognizer.transcribe(noise, "en").cut is not ends


CLIPS = [tones(samples, seed) for seed, samples in enumerate(range(12000, 60000, 4000))]
LANGS = ["en", "de", "jv", "zh"] * 3
EXACT = ("text", "cut", "compression_ratio", "guessed")
CLOSE = ("avg_logprob", "no_speech_prob", "guessed_prob", "expected_prob")


@pytest.fixture(scope="module")
def talkative(tmp_path_factory):
    return talkative_whisper(tmp_path_factory.mktemp("talkative") / "t.pt")


def assert_same(one, other):
    assert [getattr(one, name) for name in EXACT] == [getattr(other, name) for name in EXACT]
    for name in CLOSE:
        assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-4)


def test_many_clips_at_once_give_openai_whispers_words(talkative):
    """Batched against openai-whisper's own loop, several languages in one batch, ends at will."""
    reference = load_recognizer(str(talkative), "cpu", batch=1)
    alone = [reference.transcribe(*pair) for pair in zip(CLIPS, LANGS, strict=True)]
    assert len({t.text for t in alone}) > 8
    assert any(t.cut for t in alone) and not all(t.cut for t in alone)
    for batch in (None, 5):
        batched = load_recognizer(str(talkative), "cpu", batch=batch).transcribe_all(CLIPS, LANGS)
        for one, other in zip(alone, batched, strict=True):
            assert_same(one, other)


def test_tokens_of_a_batch_are_whisper_decodes_tokens_also_when_clips_leave_it(talkative):
    recognizer = load_recognizer(str(talkative), "cpu")
    languages = ["en", "de", "jw", "zh"] * 3
    decoded = recognizer._decoder.decode(recognizer.mels(CLIPS), languages)
    lengths = [len(one.tokens) for one in decoded]
    assert min(lengths) < 8 < 16 < sorted(lengths)[len(CLIPS) // 2] <= max(lengths) == 32
    for clip, language, one in zip(CLIPS, languages, decoded, strict=True):
        options = whisper.DecodingOptions(language=language, without_timestamps=True, fp16=False)
        mel = whisper.log_mel_spectrogram(clip, 80, padding=480000)[:, : len(clip) // 160]
        expected = recognizer.model.decode(whisper.pad_or_trim(mel, 3000), options)
        assert one.tokens == expected.tokens
        assert one.no_speech_prob == pytest.approx(expected.no_speech_prob, abs=1e-6)
        total = expected.avg_logprob * (len(expected.tokens) + 1)
        assert one.sum_logprob == pytest.approx(total, abs=1e-3)


def test_what_the_loop_hears_in_several_passes_is_left_to_it(tmp_path, monkeypatch):
    """Clips over 30 s, and timestamps that nobody asked for."""
    path = talkative_whisper(tmp_path / "stamps.pt", timestamps=1.0)
    recognizer = load_recognizer(str(path), "cpu")
    clips, langs = [*CLIPS, tones(31 * 16000)], [*LANGS, "en"]
    alone = [recognizer.transcribe(*pair) for pair in zip(clips, langs, strict=True)]
    passes = []
    loop = recognizer.transcribe
    monkeypatch.setattr(recognizer, "transcribe", lambda *a: passes.append(1) or loop(*a))
    for one, other in zip(alone, recognizer.transcribe_all(clips, langs), strict=True):
        assert_same(one, other)
    assert 2 <= len(passes) < len(clips)


def test_an_english_only_model_hears_english_and_guesses_nothing(tmp_path):
    path = talkative_whisper(tmp_path / "english.pt", multilingual=False)
    recognizer = load_recognizer(str(path), "cpu")
    heard = recognizer.transcribe_all(CLIPS[:3], ["en", "de", "en"])
    assert heard[1] is None and heard[0] == recognizer.transcribe(CLIPS[0], "en")
    assert heard[0].guessed is None and heard[0].expected_prob is None


def test_the_guessed_language_is_openai_whispers(talkative):
    recognizer = load_recognizer(str(talkative), "cpu")
    heard = recognizer.transcribe(CLIPS[0], "de")
    _, probs = recognizer.model.detect_language(recognizer.mels(CLIPS[:1])[0])
    assert heard.guessed_prob == pytest.approx(max(probs.values()), abs=1e-6)
    assert heard.expected_prob == pytest.approx(probs["de"], abs=1e-6)
    assert heard.guessed == {"jw": "jv"}.get(max(probs, key=probs.get), max(probs, key=probs.get))


def test_half_precision_keeps_the_words_that_are_no_close_call(talkative):
    from eval.asr_greedy import GreedyDecoder, in_precision

    whole = load_recognizer(str(talkative), "cpu")
    mels, languages = whole.mels(CLIPS), ["en"] * len(CLIPS)
    model = in_precision(load_recognizer(str(talkative), "cpu").model, torch.bfloat16)
    half = GreedyDecoder(model, torch.bfloat16).decode(mels, languages)
    exact = whole._decoder.decode(mels, languages)
    assert all(len(one.tokens) <= 32 for one in half)
    first = [a.tokens[:1] == b.tokens[:1] for a, b in zip(half, exact, strict=True)]
    assert sum(first) > len(CLIPS) / 2


def test_languages_are_those_of_the_checkpoint(recognizer, noise):
    assert recognizer.hears("de") and recognizer.hears("jv") and recognizer.hears("zh")
    assert not recognizer.hears("yue")  # the hundredth token came with large-v3
    assert not recognizer.hears("zu")
    with pytest.raises(ValueError, match="no token for language 'zu'"):
        recognizer.transcribe(noise, "zu")


def test_details_name_the_weights(checkpoint):
    details = recognizer_details(str(checkpoint))
    assert details["revision"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:16]
    assert details["precision"] == "fp32"
    assert recognizer_details("large-v3")["revision"] == "e5b1a55b89c1367d"  # nothing downloaded


def test_what_is_no_recogniser_is_refused_with_what_would_be(tmp_path, checkpoint):
    with pytest.raises(FileNotFoundError, match="'whisper-xl' is no checkpoint file.*large-v3"):
        recognizer_details("whisper-xl")
    text = tmp_path / "text.pt"
    text.write_text("not a checkpoint")
    with pytest.raises(ValueError, match="not an openai-whisper checkpoint"):
        load_recognizer(str(text), "cpu")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="'dims' and 'model_state_dict'"):
        load_recognizer(str(tmp_path / "other.pt"), "cpu")
    with pytest.raises(ValueError, match="fp16 recognition needs a GPU"):
        load_recognizer(str(checkpoint), "cpu", fp16=True)


def test_a_spec_names_who_hears_what():
    routes = parse_spec("auto, omniasr=worker:run --a=1,2, zu=mms:folder, whisper=x.pt")
    assert routes == {
        "": "auto", "omniasr": "worker:run --a=1,2", "zu": "mms:folder", "whisper": "x.pt",
    }  # fmt: skip
    assert judge_of(routes, "zul") == "mms:folder"  # by any of its names
    assert judge_of(routes, "de") == "x.pt"
    assert judge_of(routes, "xh") == "worker:run --a=1,2"
    assert judge_of(parse_spec("large-v3"), "xh") == "large-v3"
    only = parse_spec("zu=mms, en=large-v3")
    assert [judge_of(only, code) for code in ("zu", "en", "de")] == ["mms", "large-v3", "none"]


def test_auto_takes_whisper_where_the_table_trusts_it_and_mms_elsewhere():
    from eval.languages import LANGUAGES

    auto = parse_spec("auto")
    for row in LANGUAGES.values():
        judge = judge_of(auto, row.code)
        if row.recognizer == "whisper":
            assert judge == "large-v3"
        elif row.mms:
            assert judge == "mms:facebook/mms-1b-all"
        else:
            assert judge == ("large-v3" if row.whisper else "none")
    claimed = [row.code for row in LANGUAGES.values() if row.tier]
    assert sum(judge_of(auto, code) == "none" for code in claimed) <= 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("large-v3, tlh=mms", "'tlh' has no row"),
        ("zu=mms, zu=large-v3", "zu is given twice"),
        ("large-v3, omniasr=worker:x", "omniasr= says what 'auto' takes; begin with 'auto,'"),
        ("", "write a name"),
    ],
)
def test_a_spec_that_cannot_be_meant_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_spec(spec)


def test_several_recognisers_hear_one_set_one_at_a_time(talkative, tmp_path):
    mms = tiny_mms(tmp_path / "mms", {"zul": "abcdefgh"})
    spec = f"{talkative}, zu=mms:{mms}"
    router = load_recognizer(spec, "cpu")
    heard = router.transcribe_all(CLIPS[:4], ["zu", "en", "kab", "zu"])
    assert_same(heard[1], load_recognizer(str(talkative), "cpu").transcribe(CLIPS[1], "en"))
    alone = load_recognizer(f"mms:{mms}", "cpu").transcribe(CLIPS[0], "zu")
    assert heard[0].text == alone.text
    assert heard[2] is None and heard[3].text
    assert router.hears("zu") and router.hears("en") and not router.hears("kab")
    assert together(spec, "en") == together(spec, "de") != together(spec, "zu")
    details = recognizer_details(spec, languages=["zu", "en"])
    assert set(details["routes"]) == {"zu", "en"} and details["name"] == spec
    assert details["routes"]["zu"].startswith("mms@") and "fp32" in details["routes"]["en"]
    other = recognizer_details(f"{talkative}, zu={talkative}", languages=["zu", "en"])
    assert other["revision"] != details["revision"]
    router.close()


def test_titles_are_short_and_name_the_weights(talkative):
    assert recognizer_title(recognizer_details("large-v3")).startswith("large-v3@e5b1a55b (openai")
    assert recognizer_title(recognizer_details(str(talkative))).startswith("t.pt@")
    auto = recognizer_details(f"auto, whisper={talkative}", languages=["en"])
    assert recognizer_title(auto) == "auto" and auto["routes"]["en"].startswith("t.pt@")


def test_a_workers_revision_stays_whole_so_that_two_are_told_apart():
    """A title stands for its judge where several share a run, in caches and in comparisons."""
    worker = {"name": "worker:x", "package": "whisper", "precision": "its own"}
    first, second = (
        recognizer_title(worker | {"revision": name}) for name in ("large-v3", "large-v3-turbo")
    )
    assert first != second and "large-v3-turbo" in second
    assert "@e5b1a55b " in recognizer_title(worker | {"revision": "e5b1a55b89c1367d"})
