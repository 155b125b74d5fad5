"""eval.asr_mms on a real Wav2Vec2ForCTC with adapters, of random weights."""

from __future__ import annotations

import shutil

import pytest
import torch

from eval.asr import load_recognizer, recognizer_details
from tests.tiny_judges import tiny_mms, tones

ZULU, KYRGYZ = "abcdefghijklmnop", "абвгдежзиң"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_mms(tmp_path_factory.mktemp("mms") / "model", {"zul": ZULU, "kir": KYRGYZ})


@pytest.fixture(scope="module")
def recognizer(folder):
    return load_recognizer(f"mms:{folder}", "cpu")


@pytest.fixture(scope="module")
def clips():
    return [tones(samples, seed) for seed, samples in enumerate((16000, 9000, 24000, 4000))]


def test_each_language_is_written_by_its_own_adapter_in_its_own_letters(recognizer, clips):
    zulu, kyrgyz = recognizer.transcribe_all([clips[0]] * 2, ["zu", "ky"])
    assert zulu.text and set(zulu.text) <= set(ZULU + " ")
    assert kyrgyz.text and set(kyrgyz.text) <= set(KYRGYZ + " ")
    assert zulu.avg_logprob < 0 and zulu.compression_ratio > 0
    assert zulu.no_speech_prob is None and zulu.guessed is None
    assert recognizer.transcribe(clips[0], "zu") == zulu  # and back again


def test_words_are_transformers_own(recognizer, folder, clips):
    from transformers import AutoProcessor, Wav2Vec2ForCTC

    model = Wav2Vec2ForCTC.from_pretrained(
        folder, target_lang="zul", ignore_mismatched_sizes=True
    ).eval()
    processor = AutoProcessor.from_pretrained(folder, target_lang="zul")
    processor.tokenizer.set_target_lang("zul")
    inputs = processor(clips[0], sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        ids = model(**inputs).logits.argmax(-1)[0]
    expected = processor.decode(ids)
    for mark in ("<s>", "</s>", "<unk>"):
        expected = expected.replace(mark, "")
    assert recognizer.transcribe(clips[0], "zu").text == " ".join(expected.split())


def test_a_batch_of_padded_clips_writes_what_each_alone_does(recognizer, clips):
    langs = ["zu", "ky", "zu", "zu"]
    together = recognizer.transcribe_all(clips, langs)
    for clip, lang, transcript in zip(clips, langs, together, strict=True):
        alone = recognizer.transcribe(clip, lang)
        assert transcript.text == alone.text
        assert transcript.avg_logprob == pytest.approx(alone.avg_logprob, abs=1e-4)


def test_languages_are_those_with_alphabet_and_adapter(recognizer, folder, clips, tmp_path):
    assert recognizer.hears("zu") and recognizer.hears("ky")
    assert not recognizer.hears("xh") and not recognizer.hears("kab")
    assert recognizer.transcribe_all(clips[:1], ["xh"]) == [None]
    with pytest.raises(ValueError, match="does not hear language 'xh'"):
        recognizer.transcribe(clips[0], "xh")
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "adapter.kir.safetensors").unlink()
    assert not load_recognizer(f"mms:{copy}", "cpu").hears("ky")


def test_the_revision_covers_adapters(folder, tmp_path):
    details = recognizer_details(f"mms:{folder}")
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert recognizer_details(f"mms:{copy}")["revision"] == details["revision"]
    shutil.copy(copy / "adapter.kir.safetensors", copy / "adapter.zul.safetensors")
    assert recognizer_details(f"mms:{copy}")["revision"] != details["revision"]
    assert details["package"].startswith("transformers ") and details["precision"] == "fp32"


def test_what_is_no_mms_model_is_refused(folder, tmp_path):
    for spec, message in [
        (f"mms:{tmp_path}", "has no vocab.json"),
        ("mms:/no/such/folder", "neither a folder nor a hub name like facebook/mms-1b-all"),
        ("mms:no-slash", "neither a folder nor a hub name"),
    ]:
        with pytest.raises(FileNotFoundError, match=message):
            recognizer_details(spec)
    with pytest.raises(ValueError, match="fp16 recognition needs a GPU"):
        load_recognizer(f"mms:{folder}", "cpu", fp16=True)
    flat = shutil.copytree(folder, tmp_path / "flat")
    (flat / "vocab.json").write_text('{"<pad>": 0, "a": 1}')
    with pytest.raises(ValueError, match="has no adapters by language"):
        load_recognizer(f"mms:{flat}", "cpu")
