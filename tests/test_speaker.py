"""eval.speaker on a real SpeechBrain ECAPA of random weights."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import torch

from eval.speaker import (
    centroid,
    check_independent,
    cosine,
    encoder_details,
    encoder_title,
    load_encoder,
    unit,
)
from higgs_lab.nano.judges import random_ecapa
from tests.tiny_judges import tiny_mms, tiny_wavlm, tones


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_ecapa(tmp_path_factory.mktemp("encoder") / "ecapa", seed=1)


@pytest.fixture(scope="module")
def encoder(folder):
    return load_encoder(str(folder), "cpu")


def tone(hz: float, seconds: float = 1.0) -> np.ndarray:
    time = np.arange(int(16000 * seconds)) / 16000
    return (0.3 * np.sign(np.sin(2 * np.pi * hz * time))).astype(np.float32)


def test_the_builder_is_reproducible(folder, tmp_path):
    again = random_ecapa(tmp_path / "again", seed=1)
    assert encoder_details(str(again))["revision"] == encoder_details(str(folder))["revision"]
    other = random_ecapa(tmp_path / "other", seed=2)
    assert encoder_details(str(other))["revision"] != encoder_details(str(folder))["revision"]


def test_embeddings_are_unit_vectors_that_depend_on_the_sound(encoder):
    low, high = encoder.embed(tone(120)), encoder.embed(tone(400))
    assert low.shape == (32,) and np.linalg.norm(low) == pytest.approx(1, abs=1e-5)
    assert np.array_equal(low, encoder.embed(tone(120)))
    assert cosine(low, low) == pytest.approx(1) and cosine(low, high) < 0.99999


def test_embedding_equals_speechbrains_own(encoder, folder, tmp_path):
    from speechbrain.inference.classifiers import EncoderClassifier

    plain = EncoderClassifier.from_hparams(str(folder), savedir=str(tmp_path / "scratch"))
    expected = plain.encode_batch(torch.from_numpy(tone(200))[None])[0, 0].numpy()
    assert np.allclose(encoder.embed(tone(200)), expected / np.linalg.norm(expected), atol=1e-6)


def test_loading_writes_nothing_into_source_or_working_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted((p.name, p.stat().st_mtime_ns, p.is_symlink()) for p in folder.iterdir())
    os.chmod(folder, 0o500)
    try:
        load_encoder(str(folder), "cpu").embed(tone(200))
    finally:
        os.chmod(folder, 0o700)
    after = sorted((p.name, p.stat().st_mtime_ns, p.is_symlink()) for p in folder.iterdir())
    assert after == before
    assert list(tmp_path.iterdir()) == []


def test_a_local_copy_of_a_published_encoder_needs_no_network(folder, tmp_path, monkeypatch):
    """Published files say `pretrained_path: speechbrain/...` and load their weights from there."""
    copy = tmp_path / "spkrec"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    text = (copy / "hyperparams.yaml").read_text()
    text = "pretrained_path: speechbrain/spkrec-ecapa-voxceleb\n" + text
    text += "    paths:\n" + "".join(
        f"        {name}: !ref <pretrained_path>/{name}.ckpt\n"
        for name in ("embedding_model", "classifier")
    )
    (copy / "hyperparams.yaml").write_text(text)
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)  # any use would fail
    assert np.array_equal(
        load_encoder(str(copy), "cpu").embed(tone(200)),
        load_encoder(str(folder), "cpu").embed(tone(200)),
    )


def test_loaded_modules_can_all_be_looked_at(encoder):
    """SpeechBrain leaves stand-ins in sys.modules that import k2 when touched, and fail."""
    loaded = [m for name, m in sys.modules.items() if name.split(".")[0] == "speechbrain"]
    assert loaded  # not all modules: transformers 5.13 has such stand-ins too, for torchvision
    for module in loaded:
        getattr(module, "no_such_attribute", None)


def test_the_column_title_names_encoder_and_revision():
    details = {"name": "speechbrain/spkrec-ecapa-voxceleb@main", "revision": "0123456789abcdef"}
    assert encoder_title(details) == "spkrec-ecapa-voxceleb@01234567"


def test_centroid_is_the_direction_of_the_mean():
    a, b = np.array([2.0, 0.0]), np.array([0.0, 3.0])
    assert centroid([a, b]) == pytest.approx(np.array([1, 1]) / np.sqrt(2))
    with pytest.raises(ValueError, match="no clips"):
        centroid([])
    with pytest.raises(ValueError, match="no direction"):
        unit(np.zeros(3))
    with pytest.raises(ValueError, match="no direction"):
        cosine(a, np.array([np.nan, 1.0]))


def test_bad_sources_and_clips_say_what_is_wanted(encoder, tmp_path):
    with pytest.raises(FileNotFoundError, match="has neither hyperparams.yaml nor config.json"):
        load_encoder(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub name"):
        load_encoder("/no/such/folder")
    with pytest.raises(ValueError, match="too short for a voice"):
        encoder.embed(np.ones(100, dtype=np.float32))


@pytest.fixture(scope="module")
def wavlm(tmp_path_factory):
    return tiny_wavlm(tmp_path_factory.mktemp("wavlm") / "tiny-sv")


def test_wavlm_embeds_as_transformers_does(wavlm):
    from transformers import Wav2Vec2FeatureExtractor, WavLMForXVector

    encoder, wav = load_encoder(str(wavlm), "cpu"), tones(24000)
    inputs = Wav2Vec2FeatureExtractor.from_pretrained(wavlm)(
        wav, sampling_rate=16000, return_tensors="pt"
    )
    with torch.inference_mode():
        model = WavLMForXVector.from_pretrained(wavlm).eval()
        expected = model(inputs.input_values).embeddings[0].numpy()
    assert np.allclose(encoder.embed(wav), expected / np.linalg.norm(expected), atol=1e-6)
    assert not np.allclose(encoder.embed(wav), encoder.embed(tones(24000, seed=1)), atol=1e-4)


def test_wavlm_takes_its_shortest_clip_and_refuses_a_shorter_one(wavlm):
    """Its layers reach over many frames; SpeechBrain's do not."""
    encoder = load_encoder(str(wavlm), "cpu")
    assert 0.1 < encoder.min_samples / 16000 < 0.5
    assert np.isfinite(encoder.embed(tones(encoder.min_samples))).all()
    with pytest.raises(ValueError, match="too short for a voice"):
        encoder.embed(tones(encoder.min_samples - 1))


def test_wavlm_is_told_apart_by_its_weights_and_names_its_column(wavlm, tmp_path):
    details = encoder_details(str(wavlm))
    assert encoder_title(details) == f"tiny-sv@{details['revision'][:8]}"
    assert encoder_details(str(tiny_wavlm(tmp_path / "other", seed=1))) != details
    again = encoder_details(str(tiny_wavlm(tmp_path / "again")))
    assert again["revision"] == details["revision"]


def test_another_transformers_model_is_no_encoder(tmp_path):
    folder = tiny_mms(tmp_path / "mms", {"eng": "ab"})
    with pytest.raises(ValueError, match="is a Wav2Vec2ForCTC, not a WavLMForXVector"):
        load_encoder(str(folder), "cpu")


def test_the_encoder_that_mined_references_does_not_score(folder, wavlm, tmp_path):
    """Known by its hub name at any revision, a folder by its files wherever it lies."""
    ecapa = encoder_details(str(folder))
    copy = random_ecapa(tmp_path / "copy", seed=1)
    for miner in (str(folder), str(copy)):
        with pytest.raises(ValueError, match="mined with .* Score with another one"):
            check_independent(ecapa, miner)
    for miner in (str(wavlm), "org/some-other-encoder"):
        check_independent(ecapa, miner)
    hub = {"name": "org/ecapa@main", "revision": "1"}
    with pytest.raises(ValueError, match="mined with org/ecapa@v2"):
        check_independent(hub, "org/ecapa@v2")
