"""The codec is transformers' model with the bundled weights, strictly; batches change no code."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import HiggsAudioV2TokenizerConfig, HiggsAudioV2TokenizerModel

from higgs_lab.audio import audio_info, read_audio
from higgs_lab.checkpoint import CODEC_PREFIX, NativeFiles
from higgs_lab.codec import Codec, codec_config, codec_hash
from higgs_lab.precision import exact_float32
from higgs_lab.vocab import CODEC_CONFIG
from tests.tiny import random_codes, voice_like


@pytest.fixture(scope="module")
def codec(nano) -> Codec:
    return Codec.from_pretrained(nano)


@pytest.fixture(scope="module")
def bundled(nano) -> dict[str, torch.Tensor]:
    """The bundled tensors as stored, by the model's own names."""
    items = NativeFiles(nano).items(NativeFiles(nano).keys(CODEC_PREFIX))
    return {k.removeprefix(CODEC_PREFIX): v.clone() for k, v in items}


@pytest.fixture(scope="module")
def direct(bundled) -> HiggsAudioV2TokenizerModel:
    """transformers' model, built from the configuration and loaded without our code."""
    config = codec_config(bundled, CODEC_CONFIG)  # strict loading would refuse a wrong one
    model = HiggsAudioV2TokenizerModel(HiggsAudioV2TokenizerConfig(**config))
    state = {k: v.float() for k, v in bundled.items() if "masked_spec_embed" not in k}
    model.load_state_dict(state, strict=True)
    return model.eval()


def write_codec(path: Path, tensors: dict[str, torch.Tensor], prefix: str = CODEC_PREFIX) -> Path:
    path.mkdir(exist_ok=True)
    save_file({prefix + k: v.contiguous() for k, v in tensors.items()}, path / "model.safetensors")
    return path


def clips(speech_dir) -> list[str]:
    lines = (speech_dir / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    return sorted({json.loads(line)["audio"] for line in lines})


# --- against transformers


@torch.no_grad()
def test_codes_and_waves_are_the_models_own(codec, direct):
    wav = voice_like(2.3)
    theirs = direct.encode(torch.from_numpy(wav)[None, None]).audio_codes
    codes = codec.encode(wav)
    assert torch.equal(codes, theirs[0].T)
    wave = direct.decode(theirs).audio_values[0, 0].numpy()
    np.testing.assert_allclose(codec.decode(codes), wave, atol=1e-6)


@torch.no_grad()
def test_real_speech_at_several_rates(codec, direct, speech_dir):
    """16, 22.05, 24 and 44.1 kHz, mono and stereo: T is 25 a second, decoding gives 960 T."""
    shortest: dict[tuple[int, int], tuple[float, Path]] = {}
    for name in clips(speech_dir):
        info = audio_info(speech_dir / name)
        kind = (info.sample_rate_hz, info.channels)
        shortest[kind] = min(shortest.get(kind, (1e9, Path())), (info.seconds, speech_dir / name))
    assert len({rate for rate, _ in shortest}) >= 3
    for seconds, path in shortest.values():
        wav = read_audio(path)[: 24000 * 4]
        codes = codec.encode(wav)
        assert abs(len(codes) - 25 * min(seconds, 4)) <= 1.5, path
        assert torch.equal(codes, direct.encode(torch.from_numpy(wav)[None, None]).audio_codes[0].T)
        assert codec.decode(codes[:20]).shape == (960 * 20,)
        assert len(codes.unique()) > 50, path  # sound, not one token over and over


# --- lengths


@pytest.mark.parametrize("samples", [24000, 24001, 24959, 24960, 47999, 50_000])
def test_trap15_lengths_come_from_frames(codec, samples):
    """T is ceil(n / 960) or one less; decoding gives exactly 960 T, never n."""
    codes = codec.encode(voice_like(samples / 24000)[:samples])
    assert codes.shape[1] == 8
    assert math.ceil(samples / 960) - len(codes) in (0, 1)
    wave = codec.decode(codes)
    assert (wave.shape, wave.dtype) == ((960 * len(codes),), np.float32)


def test_trap15_rates_of_the_v2_configuration(codec):
    assert (codec.sample_rate_hz, codec.samples_per_frame, codec.num_codebooks) == (24000, 960, 8)
    # transformers' own defaults are another codec
    default = HiggsAudioV2TokenizerConfig()
    assert default.acoustic_model_config.downsampling_ratios != [8, 5, 4, 2, 3]


@pytest.mark.parametrize("samples", [1, 400, 12_345, 23_999])
def test_trap21_clips_under_a_second_are_zero_padded_to_one(codec, samples):
    wav = voice_like(1.0)[:samples]
    padded = np.concatenate([wav, np.zeros(24000 - samples, np.float32)])
    codes = codec.encode(wav)
    assert len(codes) == 25
    assert torch.equal(codes, codec.encode(padded))


@pytest.mark.parametrize("frames", [0, 1, 3, 40])
def test_decoding_any_number_of_frames(codec, frames):
    wave = codec.decode(random_codes(frames))
    assert wave.shape == (960 * frames,)
    assert np.isfinite(wave).all()


# --- batches


@pytest.fixture(scope="module")
def mixed() -> list[np.ndarray]:
    """Three lengths, two clips each, and two under a second of different lengths."""
    seconds = [1.5, 1.1, 1.5, 2.0, 0.5, 1.1, 2.0, 0.7]
    return [voice_like(s, seed=i) for i, s in enumerate(seconds)]


def test_a_batch_gives_the_codes_of_one_by_one(codec, mixed):
    """Padding would change a quarter to half of all codes."""
    for batch, alone in zip(codec.encode_batch(mixed), map(codec.encode, mixed), strict=True):
        assert torch.equal(batch, alone)


@pytest.mark.parametrize("seconds", [0.1, 3.0])
def test_the_size_of_a_batch_changes_nothing(codec, mixed, seconds):
    whole = codec.encode_batch(mixed)
    for a, b in zip(whole, codec.encode_batch(mixed, max_batch_sec=seconds), strict=True):
        assert torch.equal(a, b)


def test_a_batch_of_real_speech(codec, speech_dir):
    """Four real clips, of which two pairs have one length."""
    waves = [read_audio(speech_dir / name) for name in clips(speech_dir)[:4]]
    waves = [w[:n] for w, n in zip(waves, [30_000, 40_000, 30_000, 40_000], strict=True)]
    for batch, alone in zip(codec.encode_batch(waves), map(codec.encode, waves), strict=True):
        assert torch.equal(batch, alone)


def test_a_batch_decodes_as_one_by_one(codec):
    codes = [random_codes(n, seed=i) for i, n in enumerate([12, 0, 20, 12, 1, 20])]
    for batch, alone in zip(codec.decode_batch(codes), map(codec.decode, codes), strict=True):
        np.testing.assert_allclose(batch, alone, atol=1e-5)  # a batch rounds otherwise
    small = codec.decode_batch(codes, max_batch_frames=1)
    assert [len(w) for w in small] == [960 * len(c) for c in codes]
    assert codec.decode_batch([]) == codec.encode_batch([]) == []


def test_tensors_and_arrays_give_the_same(codec):
    wav = voice_like(1.0)
    assert torch.equal(codec.encode(wav), codec.encode(torch.from_numpy(wav)))
    assert torch.equal(codec.encode(wav), codec.encode(wav.astype(np.float64)))


# --- strictness


def test_trap13_a_missing_tensor_is_named(bundled, tmp_path):
    spoilt = {k: v for k, v in bundled.items() if k != "quantizer.quantizers.3.project_out.weight"}
    with pytest.raises(ValueError, match="quantizers.3.project_out.weight"):
        Codec.from_pretrained(write_codec(tmp_path, spoilt))


def test_trap13_an_unknown_tensor_is_named(bundled, tmp_path):
    spoilt = bundled | {"quantizer.quantizers.8.project_out.weight": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"unknown.*quantizers.8.project_out.weight"):
        Codec.from_pretrained(write_codec(tmp_path, spoilt))


@pytest.mark.parametrize("present", [True, False])
def test_trap13_only_huberts_mask_may_be_extra(bundled, tmp_path, codec, present):
    tensors = {k: v for k, v in bundled.items() if present or "masked_spec_embed" not in k}
    assert Codec.from_pretrained(write_codec(tmp_path, tensors)).hash == codec.hash


def test_trap13_another_shape_is_refused(bundled, tmp_path):
    spoilt = bundled | {"fc.weight": torch.zeros(8, 8)}
    with pytest.raises(ValueError, match=r"'fc.weight' has shape \(8, 8\), the configuration says"):
        Codec.from_pretrained(write_codec(tmp_path, spoilt))


def test_trap13_a_checkpoint_without_codec_is_refused(tmp_path):
    """SGLang-Omni would load random weights, or another codec."""
    save_file({"body.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="bundles no codec.*export it again"):
        Codec.from_pretrained(tmp_path)


def test_trap13_tensors_of_another_tokenizer_are_refused(bundled, tmp_path):
    kept = {k: v for k, v in bundled.items() if not k.startswith("acoustic_encoder.")}
    with pytest.raises(ValueError, match="acoustic_encoder.conv1.weight"):
        Codec.from_pretrained(write_codec(tmp_path, kept))


def test_trap13_every_weight_is_the_bundled_one(codec, bundled):
    state = codec.model.state_dict()
    assert set(bundled) - set(state) == {"semantic_model.masked_spec_embed"}
    assert all(torch.equal(value, bundled[key].float()) for key, value in state.items())
    assert not any(t.is_meta for t in (*codec.model.parameters(), *codec.model.buffers()))


def test_trap14_codes_are_looked_up_in_embed_not_in_its_average(bundled, tmp_path, codec):
    """`embed_avg` looks like the codebook and is some times too large: noise instead of speech."""
    codes = random_codes(20)
    other = {k: (v * 7 + 1 if k.endswith("embed_avg") else v) for k, v in bundled.items()}
    wave = Codec.from_pretrained(write_codec(tmp_path / "avg", other)).decode(codes)
    np.testing.assert_array_equal(wave, codec.decode(codes))
    other = {k: (v * 4 if k.endswith(".embed") else v) for k, v in bundled.items()}
    wave = Codec.from_pretrained(write_codec(tmp_path / "embed", other)).decode(codes)
    assert not np.allclose(wave, codec.decode(codes), atol=1e-3)


def test_trap36_the_codec_is_frozen(codec):
    assert not any(p.requires_grad for p in codec.model.parameters())
    assert not codec.model.training


# --- the hash, folders and dtypes


def test_trap16_bundle_and_tokenizer_folder_are_one_codec(codec, tmp_path):
    """vLLM-Omni's clone encoder reads the folder: same hash, same codes, plain transformers."""
    codec.save_tokenizer_folder(tmp_path / "audio_tokenizer")
    folder = Codec.from_pretrained(tmp_path / "audio_tokenizer")
    assert folder.hash == codec.hash
    wav = voice_like(1.3)
    assert torch.equal(folder.encode(wav), codec.encode(wav))
    stored = load_file(tmp_path / "audio_tokenizer" / "model.safetensors")
    assert {v.dtype for v in stored.values()} == {torch.float32}
    plain, loading = HiggsAudioV2TokenizerModel.from_pretrained(
        tmp_path / "audio_tokenizer", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    codes = plain.eval().encode(torch.from_numpy(wav)[None, None]).audio_codes[0].T
    assert torch.equal(codes, codec.encode(wav))


def test_trap16_a_checkpoint_with_its_folder_is_the_same_codec(nano, codec, bundled, tmp_path):
    """An export carries audio_tokenizer/config.json: it gives sizes, not another identity."""
    path = write_codec(tmp_path / "export", bundled)
    codec.save_tokenizer_folder(path / "audio_tokenizer")
    assert Codec.from_pretrained(path).hash == codec.hash


def test_trap16_the_hash_sees_every_weight_and_rate(bundled, codec):
    config = codec_config(bundled, CODEC_CONFIG)
    assert codec_hash(config, bundled) == codec.hash
    key = "quantizer.quantizers.7.project_out.bias"
    nudged = bundled[key].clone()
    nudged[-1] += 0.5
    assert codec_hash(config, bundled | {key: nudged}) != codec.hash
    assert codec_hash(config | {"sample_rate": 16000}, bundled) != codec.hash
    renamed = {k.replace("fc1.", "fc9."): v for k, v in bundled.items()}
    assert codec_hash(config, renamed) != codec.hash


def test_trap16_a_codec_in_bf16_keeps_its_name_but_not_its_codes_guarantee(nano, codec, tmp_path):
    """The dtype is the caller's choice, the weights are the same; saving gives fp32 either way."""
    low = Codec.from_pretrained(nano, dtype=torch.bfloat16)
    assert (low.dtype, low.hash) == (torch.bfloat16, codec.hash)
    low.save_tokenizer_folder(tmp_path / "t")
    assert low.dtype == torch.bfloat16  # saving did not turn it into fp32
    assert Codec.from_pretrained(tmp_path / "t").hash == codec.hash


# --- bad input


@pytest.mark.parametrize(
    ("wav", "message"),
    [
        (np.zeros((2, 24000), np.float32), "mono.*down-mix"),
        (np.zeros(0, np.float32), "empty"),
        (np.array([0.0, np.nan] * 20_000, np.float32), "NaN"),
        (np.full(30_000, np.inf, np.float32), "infinite"),
    ],
)
def test_bad_waves_are_refused(codec, wav, message):
    with pytest.raises(ValueError, match=message):
        codec.encode(wav)


@pytest.mark.parametrize("special", [1024, 1025, -1])
def test_trap18_special_ids_are_not_decoded(codec, special):
    codes = random_codes(9)
    codes[4, 4] = special
    with pytest.raises(ValueError, match="undelay the rows first"):
        codec.decode(codes)
    with pytest.raises(ValueError, match="undelay"):
        codec.decode_batch([random_codes(9), codes])


@pytest.mark.parametrize("shape", [(8, 20), (20,), (1, 20, 8)])
def test_codes_of_another_shape_are_refused(codec, shape):
    with pytest.raises(ValueError, match=r"codes must be \[T, 8\]"):
        codec.decode(torch.zeros(shape, dtype=torch.long))


def test_a_truncated_codec_file_is_named(nano, tmp_path, bundled):
    path = write_codec(tmp_path / "cut", bundled)
    raw = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        Codec.from_pretrained(path)
    shutil.rmtree(path)


def test_trap16_no_tf32_and_no_autotuning_while_encoding():
    """What a training script has switched on for its own speed must not change codes."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    switches = [(cuda, "allow_tf32"), (cudnn, "allow_tf32"), (cudnn, "benchmark")]
    before = [getattr(place, name) for place, name in switches]
    try:
        for place, name in switches:
            setattr(place, name, True)
        with pytest.raises(KeyError), exact_float32():
            assert [getattr(place, name) for place, name in switches] == [False] * 3
            raise KeyError
        assert [getattr(place, name) for place, name in switches] == [True] * 3
    finally:
        for (place, name), value in zip(switches, before, strict=True):
            setattr(place, name, value)


def test_ragged_decoding_is_decoding_one_by_one(nano):
    """Lengths that share nothing, one frame and none among them; fp32 rounding alone differs."""
    codec = Codec.from_pretrained(nano)
    clips = [random_codes(n, seed=n) for n in (31, 1, 0, 12, 30, 7, 31)]
    made = codec.decode_batch(clips, max_batch_frames=100, ragged=True)
    for clip, wave in zip(clips, made, strict=True):
        wanted = codec.decode(clip)
        assert wave.shape == wanted.shape
        np.testing.assert_allclose(wave, wanted, atol=2e-5)


def test_other_precisions_are_asked_for_by_name(nano):
    codec = Codec.from_pretrained(nano)
    clip = random_codes(20, seed=1)
    fast, wanted = codec.decode_batch([clip], precision="bf16")[0], codec.decode(clip)
    assert 0 < np.linalg.norm(fast - wanted) < 0.1 * np.linalg.norm(wanted)
    wav = voice_like(1.5)
    agree = (codec.encode_batch([wav], precision="bf16")[0] == codec.encode(wav)).float().mean()
    assert 0.1 < agree < 1
    with pytest.raises(ValueError, match="choose fp32, tf32, fp16, bf16"):
        codec.encode_batch([wav], precision="int8")
