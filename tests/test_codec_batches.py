"""What shares a batch of the codec changes nothing but rounding; how far each precision is off."""

from __future__ import annotations

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import higgs_lab.codec
from higgs_lab.codec import Codec
from higgs_lab.codec_encoder import semantic_frames
from higgs_lab.precision import arithmetic
from recipes.bench_codec import own_codes, own_wave
from tests.test_codec_fast import agreement
from tests.tiny import random_codes, voice_like

# Under a second; whole frames, where the model pads nothing; and what it pads by half a frame.
SECONDS = [1.5, 0.5, 1.1, 1.04, 2.013, 24_200 / 24_000, 2.0, 1.5]


@pytest.fixture(scope="module")
def codec(nano) -> Codec:
    return Codec.from_pretrained(nano)


@pytest.fixture(scope="module")
def wavs() -> list[np.ndarray]:
    return [voice_like(s, seed=i) for i, s in enumerate(SECONDS)]


@pytest.fixture(scope="module")
def alone(codec, wavs) -> list[torch.Tensor]:
    return [codec.encode(wav) for wav in wavs]


# --- clips of different lengths together


def test_clips_of_any_length_share_a_batch(codec, wavs, alone):
    """As exact as fp32: a batch of equal lengths rounds otherwise, too."""
    assert agreement(codec.encode_batch(wavs, ragged=True), alone) >= 0.999


def test_neither_neighbours_nor_silence_behind_the_longest_change_a_clip(codec, wavs, alone):
    loud = [np.float32(0.9) * voice_like(2.9, seed=9)]
    made = codec.encode_batch([*wavs, *loud], max_batch_sec=9, ragged=True)
    assert agreement(made[:-1], alone) >= 0.999
    samples = [len(wav) for wav in wavs if len(wav) >= 24_000]
    batch = codec._batch([wav for wav in wavs if len(wav) >= 24_000], len(samples), 80_000)
    codes = codec._encode(batch, samples, "fp32")
    frames = semantic_frames(codec.model, samples)
    wanted = [one for one, wav in zip(alone, wavs, strict=True) if len(wav) >= 24_000]
    assert agreement([c[:n] for c, n in zip(codes, frames, strict=True)], wanted) >= 0.999


def test_what_fills_a_pass_up_is_silence(codec):
    batch = codec._batch([np.ones(5, np.float32), np.ones(3, np.float32)], 4, 7)
    assert torch.equal(batch.sum(1), torch.tensor([5.0, 3, 0, 0])) and batch[1, 3:].eq(0).all()


@pytest.mark.slow
def test_the_released_shape_shares_batches_too():
    from higgs_lab.nano.random_4b import _codec
    from higgs_lab.vocab import CODEC_CONFIG

    codec = Codec(_codec(CODEC_CONFIG, seed=0), "random")
    wavs = [voice_like(s, seed=i) for i, s in enumerate([1.0, 1.3, 1.04])]
    wanted = [codec.encode(wav) for wav in wavs]
    assert agreement(codec.encode_batch(wavs, ragged=True), wanted) >= 0.999


# --- precisions


def test_on_a_gpu_a_clip_alone_is_as_long_as_whole_seconds(codec, wavs, alone, monkeypatch):
    """cuDNN plans every new length for longer than the reference takes: few may come."""
    lengths, encode, decode = set(), codec._encode, codec._decode
    monkeypatch.setattr(codec, "_planned", lambda second: second)
    monkeypatch.setattr(
        codec, "_encode", lambda x, *rest: lengths.add(x.shape[-1] / 24_000) or encode(x, *rest)
    )
    monkeypatch.setattr(
        codec, "_decode", lambda x, *rest: lengths.add(x.shape[-1] / 25) or decode(x, *rest)
    )
    waves = [codec.decode(one) for one in alone]
    assert agreement([codec.encode(wav) for wav in wavs], alone) >= 0.999
    assert agreement(codec.encode_batch(wavs), alone) >= 0.999
    assert lengths == {1, 2, 3}
    monkeypatch.undo()
    for made, wanted in zip(waves, codec.decode_batch(alone), strict=True):
        np.testing.assert_allclose(made, wanted, atol=1e-5)


def test_on_a_gpu_ragged_clips_are_few_batches_of_few_shapes(codec, monkeypatch):
    """A GPU waits for the host: one pass of 17 clips, filled up to 18, instead of 16 and 1."""
    wavs = [voice_like(1.0 + i / 100, seed=i) for i in range(17)]
    wanted, shapes, encode = codec.encode_batch(wavs), [], codec._encode
    monkeypatch.setattr(codec, "_planned", lambda second: second)
    monkeypatch.setattr(codec, "_room_sec", lambda: 40)
    monkeypatch.setattr(
        codec, "_encode", lambda x, *a: shapes.append(tuple(x.shape)) or encode(x, *a)
    )
    made = codec.encode_batch(wavs, precision="tf32", ragged=True)
    new = [(1, 48_000)] * 3  # clips alone, for the shape is new
    assert shapes == [(18, 48_000), *new]
    assert agreement(made, wanted) >= 0.999
    assert agreement(codec.encode_batch(wavs, 8, "tf32", ragged=True), wanted) >= 0.999
    assert shapes[4:] == [(4, 48_000), *new, *[(4, 48_000)] * 3, (1, 24_000)]


@pytest.mark.parametrize(("free_gb", "seconds"), [(1, 30), (12.8, 200), (80, 400)])
def test_a_pass_takes_half_of_what_is_free(codec, monkeypatch, free_gb, seconds):
    """Another process may hold the rest of the card."""
    for name, found in [
        ("mem_get_info", (free_gb * 1e9 - 5e8, 80e9)),
        ("memory_reserved", 9e8),  # by torch, of which so much is in use:
        ("memory_allocated", 4e8),
    ]:
        monkeypatch.setattr(torch.cuda, name, lambda device, found=found: found)
    assert codec._room_sec() == pytest.approx(seconds)


def test_the_reference_is_the_models_own_code(codec, wavs, alone, monkeypatch):
    """On a CPU fp32 codes of clips of one length never go through what is new."""

    def refuse(*_, **__):
        raise AssertionError("the reference took the fast way")

    waves = codec.decode_batch(alone)
    for name in ("embed_clips", "run_dac"):
        monkeypatch.setattr(higgs_lab.codec, name, refuse)
    assert agreement(codec.encode_batch(wavs), alone) == 1
    for made, wanted in zip(codec.decode_batch(alone), waves, strict=True):
        np.testing.assert_array_equal(made, wanted)
    with pytest.raises(AssertionError, match="fast way"):
        codec.encode_batch(wavs, precision="tf32")
    # on a GPU even clips of whole seconds do, for cuDNN's part in the model's own is not trusted
    monkeypatch.setattr(codec, "_planned", lambda second: second)
    with pytest.raises(AssertionError, match="fast way"):
        codec.encode_batch([wavs[SECONDS.index(2.0)]])
    with pytest.raises(AssertionError, match="fast way"):
        codec.decode_batch([alone[0][:25]])


def test_how_far_each_precision_is_from_the_reference(codec, wavs, alone):
    """The quantiser's search is exact in all of them; under autocast it cost a third of the codes.

    TF32 is a GPU's; here its way is fp32's.
    """
    assert agreement(codec.encode_batch(wavs, precision="tf32"), alone) >= 0.999
    assert agreement(codec.encode_batch(wavs, precision="fp16", ragged=True), alone) >= 0.98
    assert agreement(codec.encode_batch(wavs, precision="bf16", ragged=True), alone) >= 0.8


def test_what_leaves_the_range_of_fp16_is_computed_again(codec):
    """Bits of a loud codec: without a second pass its waves would be infinite."""
    loud = Codec(copy.deepcopy(codec.model), "loud")
    loud.model.fc2.weight.mul_(1e5)
    wav, codes = voice_like(1.2), random_codes(12)
    wave = loud.decode_batch([codes], precision="fp16")[0]
    np.testing.assert_array_equal(wave, loud.decode_batch([codes], precision="tf32")[0])
    loud.model.acoustic_encoder.conv1.weight.mul_(1e7)
    made = loud.encode_batch([wav], precision="fp16")
    assert agreement(made, loud.encode_batch([wav], precision="tf32")) == 1


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
def test_what_was_switched_is_put_back_after_an_error(codec, wavs, monkeypatch, precision):
    def switches():
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        return (
            matmul.allow_tf32,
            cudnn.allow_tf32,
            cudnn.benchmark,
            torch.is_autocast_enabled("cpu"),
        )

    def fail(*_, **__):
        raise KeyError("HuBERT")

    monkeypatch.setattr(codec.model.semantic_model.feature_projection, "forward", fail)
    norm = codec.model.semantic_model.feature_extractor.conv_layers[0].layer_norm
    before = switches()
    with pytest.raises(KeyError, match="HuBERT"):
        codec.encode_batch(wavs, precision=precision, ragged=True)
    assert switches() == before
    assert "forward" not in vars(norm)


def test_threads_of_other_precisions_wait_for_each_other():
    """Switches are the process's: an encoder met TF32, which then stayed on for good."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    cpu, before = torch.device("cpu"), (matmul.allow_tf32, cudnn.allow_tf32)
    inside, leave = threading.Event(), threading.Event()

    def decode():
        with arithmetic("tf32", cpu):
            inside.set()
            leave.wait(1)

    def encode():
        inside.wait(1)
        with arithmetic("fp32", cpu):
            leave.set()
            time.sleep(0.05)
            return matmul.allow_tf32, cudnn.allow_tf32

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.submit(decode), pool.submit(encode)
        threading.Timer(0.1, leave.set).start()
    assert second.result() == (False, False) and first.exception() is None
    assert (matmul.allow_tf32, cudnn.allow_tf32) == before


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_decoding_leaves_matmul_as_compiled_code_of_other_threads_knows_it(tf32, precision):
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, tf32
    try:
        guard = torch._C._dynamo.guards.GlobalStateGuard()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with arithmetic(precision, device, convolutions_alone=True):
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                assert guard.check(), guard.reason()
    finally:
        matmul.allow_tf32 = before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("precision", "codes_kept"), [("fp32", 0.999), ("tf32", 0.98), ("fp16", 0.98)]
)
def test_the_released_shape_on_a_gpu(precision, codes_kept):
    """HuBERT counts there, which nano's codec does not listen to."""
    from higgs_lab.nano.random_4b import _codec
    from higgs_lab.vocab import CODEC_CONFIG

    codec = Codec(_codec(CODEC_CONFIG, seed=0).cuda(), "random")
    wavs = [voice_like(s, seed=i) for i, s in enumerate([1.0, 3.3, 1.04, 2.5])]
    wanted = [own_codes(codec, wav) for wav in wavs]
    for ragged in (False, True):
        made = codec.encode_batch(wavs, precision=precision, ragged=ragged)
        assert agreement(made, wanted) >= codes_kept


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
def test_what_shares_a_batch_on_a_gpu_is_what_it_is_alone(precision, recwarn):
    """cuDNN's convolution of 16 clips of 3 s, or 8 of 5 s, took 75 GiB and was wrong in fp32."""
    from higgs_lab.nano.random_4b import _codec
    from higgs_lab.vocab import CODEC_CONFIG

    codec = Codec(_codec(CODEC_CONFIG, seed=0).cuda(), "random")
    kept = 0.999 if precision == "fp32" else 0.98
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for count, seconds in [(16, 3), (8, 5), (32, 2), (4, 15)]:
        wavs = [voice_like(seconds, seed=i) for i in range(count)]
        alone = [codec.encode_batch([wav], precision=precision)[0] for wav in wavs]
        for ragged in (False, True):
            assert agreement(codec.encode_batch(wavs, None, precision, ragged), alone) >= kept
        waves = [codec.decode_batch([one], precision=precision)[0] for one in alone]
        for cut in (0, 1):  # frames of all but the first
            codes = [one[: len(one) - cut * (i > 0)] for i, one in enumerate(alone)]
            made = codec.decode_batch(codes, precision=precision, ragged=True)
            for one, wanted in zip(made, waves, strict=True):
                wanted = wanted[: len(one) - cut * 4000]  # what the cut is not heard in
                deviation = np.linalg.norm(one[: len(wanted)] - wanted)
                assert deviation <= 0.01 * np.linalg.norm(wanted)
    assert torch.cuda.max_memory_allocated() < 8 * 2**30
    assert not [w for w in recwarn if "wrong together" in str(w.message)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("precision", "codes_kept", "deviation"),
    [("fp32", 0.999, 1e-4), ("tf32", 0.97, 1e-2), ("fp16", 0.97, 1e-2), ("bf16", 0.8, 0.05)],
)
def test_precisions_on_a_gpu(nano, wavs, precision, codes_kept, deviation):
    codec = Codec.from_pretrained(nano, "cuda")
    codes = [own_codes(codec, wav) for wav in wavs]
    made = codec.encode_batch(wavs, precision=precision, ragged=True)
    assert agreement(made, codes) >= codes_kept
    wanted = np.concatenate([own_wave(codec, one) for one in codes])
    made = np.concatenate(codec.decode_batch(codes, ragged=True, precision=precision))
    assert np.linalg.norm(made - wanted) <= deviation * np.linalg.norm(wanted)
