"""The Python API: one call speaks, batches change nothing, long texts keep one voice."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import higgs_lab
from higgs_lab.adapter import attach_lora, base_fingerprint, save_adapter
from higgs_lab.audio import write_wav
from higgs_lab.checkpoint import load_talker
from higgs_lab.generate import Sampling, generate
from higgs_lab.prompt import render_prompt
from higgs_lab.speech import default_batch_size, default_precision
from higgs_lab.text import join_waves, max_frames_for, split_text
from tests.tiny import random_codes, voice_like

FEW = Sampling(max_frames=10)


@pytest.fixture(scope="module")
def higgs(nano):
    return higgs_lab.load(nano)


def test_a_text_becomes_a_wave_and_its_story(higgs):
    wav, info = higgs.speak("Hello there.", sampling=FEW, seed=3)
    assert (wav.dtype, wav.ndim) == (np.float32, 1)
    assert len(wav) == 960 * info.frames == 960 * len(info.codes)
    assert info.seconds == pytest.approx(info.frames / 25)
    assert (info.seed, info.chunks, len(info.generations)) == (3, ["Hello there."], 1)
    assert info.stop_reason in ("eoc", "max_frames")
    np.testing.assert_allclose(wav, higgs.codec.decode(info.codes), atol=1e-6)


def test_the_codec_decodes_in_the_precision_that_is_asked_for(nano, monkeypatch):
    higgs = higgs_lab.load(nano, decode_precision="bf16")
    decode, asked = higgs.codec.decode_batch, []
    monkeypatch.setattr(
        higgs.codec, "decode_batch", lambda *a, **k: asked.append(k["precision"]) or decode(*a, **k)
    )
    wav, info = higgs.speak("Hello.", sampling=FEW)
    assert asked == ["bf16"]
    monkeypatch.undo()
    exact = higgs.codec.decode(info.codes)
    assert 0 < np.linalg.norm(wav - exact) < 0.05 * np.linalg.norm(exact)
    devices = torch.device("cpu"), torch.device("cuda")
    assert [default_precision(device) for device in devices] == ["fp32", "fp16"]
    assert [default_batch_size(device) for device in devices] == [16, 64]
    with pytest.raises(ValueError, match="decode_precision=int8: choose fp32, tf32"):
        higgs_lab.load(nano, decode_precision="int8")
    with pytest.raises(ValueError, match="decode_precision=fp16 is for a CUDA GPU"):
        higgs_lab.load(nano, device="cpu", decode_precision="fp16")


def test_it_is_the_parts_put_together(higgs):
    """The prompt, the sampler and the codec of the library, nothing else."""
    _, info = higgs.speak("Hello.", sampling=FEW, seed=5)
    prompt = render_prompt(higgs.vocab, "Hello.")
    wanted = Sampling(max_frames=10, seed=5)
    assert torch.equal(generate(higgs.talker, [prompt], wanted)[0].codes, info.codes)


def test_a_list_gives_what_its_texts_give_alone(higgs):
    texts = ["One.", "Two, a little longer.", "Three!", "Four?", "One."]
    seeds = [1, 2, 3, 4, 1]
    together = higgs.speak(texts, sampling=FEW, seed=seeds, batch_size=3)
    for text, seed, (wav, info) in zip(texts, seeds, together, strict=True):
        alone, its_info = higgs.speak(text, sampling=FEW, seed=seed)
        assert torch.equal(info.codes, its_info.codes)
        np.testing.assert_allclose(wav, alone, atol=1e-5)  # a batch rounds otherwise
    assert torch.equal(together[0][1].codes, together[4][1].codes)
    assert higgs.speak([]) == []


def test_trap23_two_seeds_are_two_takes(higgs):
    a, b, c = (higgs.speak("Hello.", sampling=FEW, seed=s)[1].codes for s in (1, 2, 1))
    assert torch.equal(a, c)
    assert not torch.equal(a, b)


def test_a_reference_may_be_a_file_a_wave_or_codes(higgs, tmp_path):
    wav = voice_like(1.2)
    write_wav(tmp_path / "ref.wav", wav, 24000)
    from higgs_lab.audio import read_audio

    stored = read_audio(tmp_path / "ref.wav")
    codes = higgs.codec.encode(stored)
    takes = [
        higgs.speak("Hi.", ref, "What I said.", sampling=FEW)[1].codes
        for ref in (
            tmp_path / "ref.wav",
            str(tmp_path / "ref.wav"),
            stored,
            codes,
            torch.from_numpy(stored),
        )
    ]
    assert all(torch.equal(take, takes[0]) for take in takes)
    plain = higgs.speak("Hi.", sampling=FEW)[1].codes
    without_text = higgs.speak("Hi.", codes, sampling=FEW)[1].codes
    assert not torch.equal(plain, takes[0])
    assert not torch.equal(without_text, takes[0])


def test_each_text_may_have_its_own_reference(higgs):
    refs = [random_codes(30, 1), None, random_codes(30, 2)]
    said = ["First.", None, None]
    together = higgs.speak(["Hi."] * 3, refs, said, sampling=FEW)
    for ref, text, (_, info) in zip(refs, said, together, strict=True):
        assert torch.equal(info.codes, higgs.speak("Hi.", ref, text, sampling=FEW)[1].codes)


LONG = " ".join(f"This is sentence number {i} of a long text." for i in range(8))


def test_a_long_text_is_cut_and_joined(higgs):
    wav, info = higgs.speak(LONG, sampling=FEW, max_chars=80)
    assert info.chunks == split_text(LONG, max_chars=80)
    assert len(info.chunks) > 3
    parts = [higgs.codec.decode(g.codes) for g in info.generations]
    # parts of one length are decoded together, which rounds otherwise; a third of a 16-bit step
    np.testing.assert_allclose(wav, join_waves(parts, 24000), atol=1e-5)
    assert torch.equal(info.codes, torch.cat([g.codes for g in info.generations]))
    assert info.seconds == len(wav) / 24000


def test_without_a_reference_the_first_chunk_lends_its_voice(higgs):
    """Else each chunk would be another speaker."""
    _, info = higgs.speak(LONG, sampling=FEW, seed=3, max_chars=80)
    first = info.generations[0].codes
    prompt = render_prompt(higgs.vocab, info.chunks[2], first, info.chunks[0])
    wanted = Sampling(max_frames=10, seed=3 + 2 * 1_000_003)
    assert torch.equal(generate(higgs.talker, [prompt], wanted)[0].codes, info.generations[2].codes)
    ref = random_codes(30)
    _, info = higgs.speak(LONG, ref, "Said.", sampling=FEW, seed=3, max_chars=80)
    prompt = render_prompt(higgs.vocab, info.chunks[2], ref, "Said.")
    assert torch.equal(generate(higgs.talker, [prompt], wanted)[0].codes, info.generations[2].codes)


def test_trap22_a_runaway_is_cut_by_the_length_of_its_text(nano, higgs):
    """Random weights never stop by themselves: the cap of the text does it, and is reported."""
    torch.manual_seed(0)
    talker = load_talker(nano)
    with torch.no_grad():
        for parameter in talker.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02)
    lost = higgs_lab.speech.Higgs(talker, higgs.codec, higgs.vocab, higgs.checkpoint)
    wanted = Sampling(mode="sglang", temperature=0.0)
    _, info = lost.speak("Hi.", sampling=wanted)
    assert info.stop_reason == "max_frames"
    assert info.frames == max_frames_for("Hi.", 25.0) < 200


def test_each_text_comes_when_it_has_ended(higgs):
    """Not when all have: a short text does not wait for the chunks of a long one before it."""
    texts = [LONG, "One.", "Two.", LONG]
    refs, seeds = [None, None, random_codes(30), random_codes(30)], [1, 2, 3, 4]
    options = dict(sampling=FEW, seed=seeds, batch_size=2, max_chars=80)
    each = list(higgs.speak_each(texts, refs, **options))
    assert sorted(i for i, _, _ in each) == [0, 1, 2, 3]
    assert each[-1][0] == 0  # its later chunks waited for the voice of the first
    for i, wav, info in each:
        alone, its_info = higgs.speak(texts[i], refs[i], None, FEW, seeds[i], max_chars=80)
        assert torch.equal(info.codes, its_info.codes) and info.chunks == its_info.chunks
        np.testing.assert_allclose(wav, alone, atol=2e-5)


@pytest.mark.parametrize("bad", ["", "   ", "a<|audio|>b", "<|emotion:joy|>Hi."])
def test_bad_text_is_refused_before_anything_is_spoken(higgs, monkeypatch, bad):
    monkeypatch.setattr("higgs_lab.pipeline.generate_each", None)  # speaking at all would fail
    with pytest.raises(ValueError, match="text"):
        higgs.speak_each(["Good.", bad])


def test_lists_must_be_as_long_as_the_texts(higgs):
    with pytest.raises(ValueError, match="seed has 3 entries for 2 texts"):
        higgs.speak(["a", "b"], seed=[1, 2, 3])
    with pytest.raises(ValueError, match="ref_audio has 1 entries for 2 texts"):
        higgs.speak(["a", "b"], ref_audio=[None])


def test_a_transcript_without_audio_is_refused(higgs):
    with pytest.raises(ValueError, match="ref_text"):
        higgs.speak("Hi.", ref_text="Who?")


def test_a_missing_reference_is_named(higgs, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.wav"):
        higgs.speak("Hi.", ref_audio=tmp_path / "nothing.wav")


# --- loading


def test_loading_by_name_and_in_another_dtype(nano, higgs):
    low = higgs_lab.load("nano", dtype="bfloat16", device="cpu")
    assert (low.checkpoint.name, low.checkpoint.path) == ("nano", nano)
    assert {p.dtype for p in low.talker.parameters()} == {torch.bfloat16}
    assert low.codec.dtype == torch.float32
    assert {p.dtype for p in higgs.talker.parameters()} == {torch.float32}  # fast on a CPU
    assert not low.talker.training
    assert low.sample_rate_hz == 24000
    wav, info = low.speak("Hi.", sampling=FEW)
    assert len(wav) == 960 * info.frames


def test_an_adapter_is_merged_in(nano, higgs, tmp_path):
    model = attach_lora(load_talker(nano, dtype=torch.float32), "attention", rank=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    save_adapter(model, tmp_path / "run" / "adapter", {"fingerprint": base_fingerprint(nano)})
    tuned = higgs_lab.load("nano", adapter=tmp_path / "run")
    assert type(tuned.talker) is type(higgs.talker)
    spoken = tuned.speak("Hello.", sampling=FEW)[1].codes
    assert not torch.equal(spoken, higgs.speak("Hello.", sampling=FEW)[1].codes)
    save_adapter(model, tmp_path / "other", {"base": "x/y", "fingerprint": "0" * 16})
    with pytest.raises(ValueError, match="trained on x/y"):
        higgs_lab.load("nano", adapter=tmp_path / "other")


def test_what_is_no_checkpoint_is_refused(nano, tmp_path):
    for dtype in ("bf16", "load"):
        with pytest.raises(ValueError, match=f"dtype '{dtype}' is none of torch's"):
            higgs_lab.load(nano, dtype=dtype)
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        higgs_lab.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no directory on this disk"):
        higgs_lab.load("missing-folder")
