"""eval.asr on a real openai-whisper model of random weights: it hears nothing, in the right way."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
import whisper

from eval.asr import load_recognizer, recognizer_details
from higgs_lab.nano.judges import random_whisper


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
