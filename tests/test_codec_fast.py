"""The codec's fast networks are the model's own up to rounding, whatever shares a batch."""

from __future__ import annotations

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch

import higgs_lab.codec
from higgs_lab import codec_fast
from higgs_lab.codec import Codec, batches, rounded
from higgs_lab.codec_fast import (
    _convolve_last,
    _replaced,
    extract_features,
    grouped_convolution,
    run_dac,
    semantic_frames,
    stage_lengths,
)
from higgs_lab.precision import arithmetic
from recipes.bench_codec import own_codes, own_wave
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


def agreement(made: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    assert [m.shape for m in made] == [w.shape for w in wanted]
    return float((torch.cat(made) == torch.cat(wanted)).float().mean())


# --- the networks


@torch.no_grad()
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("part", "steps"), [("acoustic_encoder", 4321), ("acoustic_decoder", 13)])
def test_dacs_networks_are_the_models_own(codec, monkeypatch, part, steps, channels_last):
    net = getattr(codec.model, part)
    run = partial(run_dac, net, channels_last=channels_last)
    convolve, taken = codec_fast._convolve_last, []
    monkeypatch.setattr(
        codec_fast, "_convolve_last", lambda conv, x: taken.append(conv) or convolve(conv, x)
    )
    x = torch.randn(2, net.conv1.in_channels, steps, generator=torch.Generator().manual_seed(0))
    wanted = net(x)
    close = partial(torch.testing.assert_close, atol=1e-4 * float(wanted.abs().max()), rtol=1e-4)
    close(run(x, [steps, steps]), wanted)
    all_of_them = [m for m in net.modules() if hasattr(m, "kernel_size")]
    one_channel = part == "acoustic_encoder"  # its first convolution: a product
    assert len(taken) == (len(all_of_them) - one_channel if channels_last else 0)
    assert stage_lengths(net, steps)[-1] == wanted.shape[-1]
    # the second clip ends sooner; what stands behind its end is not seen
    shorter = run(x, [steps, steps - 5])
    end = stage_lengths(net, steps - 5)[-1]
    close(shorter[0], wanted[0])
    close(shorter[1, :, :end], net(x[1:, :, : steps - 5])[0])


@torch.no_grad()
@pytest.mark.parametrize(("steps", "padding"), [(30, 27), (36, 27), (5, 27), (60, 30), (70, 0)])
def test_what_is_far_dilated_is_taken_apart(steps, padding):
    conv = torch.nn.Conv1d(256, 4, 7, padding=padding, dilation=9, bias=False)
    x = torch.randn(2, steps, 256, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    made = _convolve_last(conv, x)
    assert made.stride(1) == 1
    torch.testing.assert_close(made, conv(x))


@pytest.mark.parametrize("samples", [24_000, 24_001, 24_120, 24_121, 24_959, 24_960, 50_000])
def test_the_number_of_frames_is_known_beforehand(codec, samples):
    assert semantic_frames(codec.model, [samples]) == [len(codec.encode(voice_like(3)[:samples]))]


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


@torch.no_grad()
@pytest.mark.parametrize("channels_last", [False, True])
def test_huberts_features_are_of_each_clip_alone(codec, channels_last):
    extractor = codec.model.semantic_model.feature_extractor
    first = extractor.conv_layers[0].conv
    (width,), (stride,) = first.kernel_size, first.stride
    wavs = torch.from_numpy(np.stack([voice_like(0.4, seed=i) for i in range(2)])).float()
    samples = [wavs.shape[1], wavs.shape[1] - 1234]
    lengths = [(n - width) // stride + 1 for n in samples]
    run = partial(extract_features, extractor, channels_last=channels_last)
    close = partial(torch.testing.assert_close, atol=2e-5, rtol=1e-4)
    wanted = extractor(wavs)
    close(run(wavs, lengths=lengths[:1] * 2), wanted)
    made, shorter = run(wavs, lengths=lengths), extractor(wavs[1:, : samples[1]])
    close(made[0], wanted[0])
    close(made[1, :, : shorter.shape[2]], shorter[0])
    with torch.autocast("cpu", torch.bfloat16):
        half = run(wavs, lengths=lengths)[0]
    assert (half.float() - wanted[0]).norm() < 0.03 * wanted[0].norm()


@torch.no_grad()
def test_huberts_features_do_not_hear_a_constant(codec):
    """Sums of squares would, of ten seconds in half precision most of all."""
    extractor = codec.model.semantic_model.feature_extractor
    first = extractor.conv_layers[0].conv
    wav = torch.from_numpy(0.1 * voice_like(10, seed=1)).float()[None]
    lengths = [(wav.shape[1] - first.kernel_size[0]) // first.stride[0] + 1]
    run = partial(extract_features, extractor, lengths=lengths, channels_last=True)
    wanted = run(wav)
    torch.testing.assert_close(run(wav + 0.5), wanted, atol=1e-3, rtol=1e-2)
    assert run(torch.full_like(wav, 0.5)).isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        half = run(wav + 0.5)
    assert (half.float() - wanted).norm() < 0.03 * wanted.norm()


@torch.no_grad()
@pytest.mark.parametrize("for_gpu", [False, True])
def test_huberts_hidden_states_are_of_each_clip_alone(codec, for_gpu):
    """Looked at here: nano's codec multiplies them by zero, so that its codes would not tell."""
    model, rate = codec.model, codec.sample_rate_hz
    samples = [2 * rate, round(1.3 * rate)]
    wavs = torch.zeros(2, samples[0])
    for wav, n, seed in zip(wavs, samples, (0, 1), strict=True):
        wav[:n] = torch.from_numpy(voice_like(2, seed=seed))[:n]
    made = codec_fast._hubert(model, wavs, samples, for_gpu=for_gpu)
    for found, wav, n in zip(made, wavs, samples, strict=True):
        wanted = model._extract_semantic_features(wav[None, None, :n])[0]
        assert (found[: len(wanted)] - wanted).norm() < 1e-3 * wanted.norm()
    equal = codec_fast._hubert(model, wavs, [samples[0]] * 2, for_gpu=for_gpu)
    wanted = model._extract_semantic_features(wavs[:, None])
    assert (equal - wanted).norm() < 1e-3 * wanted.norm()


def test_another_hubert_is_refused(codec, monkeypatch):
    config = codec.model.config.semantic_model_config
    monkeypatch.setattr(config, "feat_extract_norm", "layer")
    with pytest.raises(ValueError, match="group norm"):
        codec_fast._hubert(codec.model, torch.zeros(1, 24_000), [24_000])
    monkeypatch.setattr(codec, "_planned", lambda second: second)  # as on a GPU
    wav = voice_like(1.3)
    with pytest.raises(ValueError, match="precision=fp32"):
        codec.encode_batch([wav], precision="fp16")
    assert torch.equal(codec.encode(wav), own_codes(codec, wav))  # which it may still do


@pytest.mark.parametrize(
    ("seconds", "wanted"), [(0.5, 1), (1, 1), (15.1, 16), (16.1, 18), (33, 36), (65, 72)]
)
def test_lengths_are_few_and_little_longer(seconds, wanted):
    assert rounded(round(25 * seconds), 25) == 25 * wanted
    assert rounded(round(25 * seconds), 0) == round(25 * seconds)


def test_batches_of_planned_shapes_are_few_and_keep_to_their_room():
    lengths = [30, 26, 26, 51, 25, 1, 2, 3, 60]
    by_length: dict[int, list[int]] = {}
    for i, n in enumerate(lengths):
        by_length.setdefault(n, []).append(i)
    made = list(batches(dict(by_length), 300, ragged=True, second=25))
    assert sorted(i for part in made for i in part) == list(range(9))
    assert [len(part) for part in made] == [4, 4, 1]
    assert all(len(p) * rounded(max(lengths[i] for i in p), 25) <= 300 for p in made)
    assert [len(part) for part in batches(by_length, 300, ragged=True)] == [5, 4]
    # what is filled up needs no power of two
    made = batches(by_length, 300, ragged=True, second=25, fill=True)
    assert [len(part) for part in made] == [4, 5]


@torch.no_grad()
def test_other_threads_see_modules_as_they_are(codec):
    module = codec.model.semantic_model.feature_extractor.conv_layers[0].layer_norm
    x = torch.randn(2, module.num_channels, 50, generator=torch.Generator().manual_seed(0))
    wanted = module(x)
    with _replaced({module: torch.neg}), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(module, x).result(), wanted)
        assert torch.equal(module(x), -x)
    assert torch.equal(module(x), wanted)


@torch.no_grad()
def test_huberts_grouped_convolution_is_products(codec):
    conv = codec.model.semantic_model.encoder.pos_conv_embed.conv
    assert conv.groups > 1 and conv.kernel_size[0] > 1
    x = torch.randn(3, conv.in_channels, 41, generator=torch.Generator().manual_seed(0))
    wanted = conv(x)
    torch.testing.assert_close(grouped_convolution(conv, x), wanted, atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        half = grouped_convolution(conv, x)
    assert half.dtype == torch.bfloat16
    assert (half.float() - wanted).norm() < 0.01 * wanted.norm()


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
    assert shapes == [(18, 48_000)]
    assert agreement(made, wanted) >= 0.999
    assert agreement(codec.encode_batch(wavs, 8, "tf32", ragged=True), wanted) >= 0.999
    assert shapes[1:] == [(4, 48_000)] * 4 + [(1, 24_000)]


def test_the_reference_is_the_models_own_code(codec, wavs, alone, monkeypatch):
    """On a CPU fp32 codes of clips of one length never go through what is new."""

    def refuse(*_):
        raise AssertionError("the reference took the fast way")

    waves = codec.decode_batch(alone)
    for name in ("embed_clips", "run_dac"):
        monkeypatch.setattr(higgs_lab.codec, name, refuse)
    assert agreement(codec.encode_batch(wavs), alone) == 1
    for made, wanted in zip(codec.decode_batch(alone), waves, strict=True):
        np.testing.assert_array_equal(made, wanted)
    with pytest.raises(AssertionError, match="fast way"):
        codec.encode_batch(wavs, precision="tf32")


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
