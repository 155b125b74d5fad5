"""The codec's fast networks are the model's own up to rounding, whatever shares a batch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from higgs_lab import codec_encoder, codec_fast
from higgs_lab.codec import Codec
from higgs_lab.codec_encoder import (
    _replaced,
    encode_semantic,
    extract_features,
    grouped_convolution,
    semantic_frames,
)
from higgs_lab.codec_fast import (
    _convolve_last,
    convolution_by_product,
    run_dac,
    stage_lengths,
)
from recipes.bench_codec import own_codes
from tests.tiny import voice_like


@pytest.fixture(scope="module")
def codec(nano) -> Codec:
    return Codec.from_pretrained(nano)


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
    with torch.autocast("cpu", torch.bfloat16):
        made = _convolve_last(conv, x)
    wanted = conv(x)
    assert made.stride(1) == 1 and made.shape == wanted.shape
    assert (made - wanted).norm() < 0.01 * wanted.norm()
    exact = _convolve_last(conv, x)  # a product
    assert exact.stride(1) == 1
    torch.testing.assert_close(exact, wanted)


@pytest.mark.parametrize("samples", [24_000, 24_001, 24_120, 24_121, 24_959, 24_960, 50_000])
def test_the_number_of_frames_is_known_beforehand(codec, samples):
    assert semantic_frames(codec.model, [samples]) == [len(codec.encode(voice_like(3)[:samples]))]


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
    made = codec_encoder._hubert(model, wavs, samples, for_gpu=for_gpu)
    for found, wav, n in zip(made, wavs, samples, strict=True):
        wanted = model._extract_semantic_features(wav[None, None, :n])[0]
        assert (found[: len(wanted)] - wanted).norm() < 1e-3 * wanted.norm()
    equal = codec_encoder._hubert(model, wavs, [samples[0]] * 2, for_gpu=for_gpu)
    wanted = model._extract_semantic_features(wavs[:, None])
    assert (equal - wanted).norm() < 1e-3 * wanted.norm()


def test_no_attention_is_made_anew_for_every_shape(codec, monkeypatch):
    """cuDNN's is, and torch prefers it in half precision."""
    seen, forward = [], codec.model.semantic_model.encoder.forward
    monkeypatch.setattr(
        codec.model.semantic_model.encoder,
        "forward",
        lambda *a, **k: seen.append(torch.backends.cuda.cudnn_sdp_enabled()) or forward(*a, **k),
    )
    for samples in (24_000, 20_000):  # without a mask, and with
        codec_encoder._hubert(codec.model, torch.zeros(1, 24_000), [samples])
    assert seen == [False, False] and torch.backends.cuda.cudnn_sdp_enabled()


def test_products_take_the_place_of_convolutions_in_exact_fp32_alone(monkeypatch):
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.float32, device=torch.device("cuda"))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert codec_fast._is_exact(on_gpu)
    assert not codec_fast._is_exact(SimpleNamespace(**vars(on_gpu) | {"dtype": torch.bfloat16}))
    with monkeypatch.context() as half:
        half.setattr(torch, "is_autocast_enabled", lambda device: True)
        assert not codec_fast._is_exact(on_gpu)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert not codec_fast._is_exact(on_gpu)


def test_another_hubert_is_refused(codec, monkeypatch):
    config = codec.model.config.semantic_model_config
    monkeypatch.setattr(config, "feat_extract_norm", "layer")
    with pytest.raises(ValueError, match="group norm"):
        codec_encoder._hubert(codec.model, torch.zeros(1, 24_000), [24_000])
    monkeypatch.setattr(codec, "_planned", lambda second: second)  # as on a GPU
    wav = voice_like(1.3)
    with pytest.raises(ValueError, match="precision=fp32"):
        codec.encode_batch([wav], precision="fp16")
    assert torch.equal(codec.encode(wav), own_codes(codec, wav))  # which it may still do


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
@pytest.mark.parametrize(("width", "dilation", "bias"), [(3, 1, True), (1, 1, False), (5, 3, True)])
def test_a_convolution_as_a_product(width, dilation, bias):
    conv = torch.nn.Conv1d(6, 4, width, 1, width // 2 * dilation, dilation, bias=bias)
    x = torch.randn(3, 6, 17, generator=torch.Generator().manual_seed(0))
    for laid in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        torch.testing.assert_close(convolution_by_product(conv, laid), conv(laid))


@torch.no_grad()
def test_the_semantic_encoder_by_products_is_the_models_own(codec):
    width = codec.model.encoder_semantic.conv.in_channels
    x = torch.randn(2, width, 30, generator=torch.Generator().manual_seed(0))
    wanted = codec.model.encoder_semantic(x)
    close = partial(torch.testing.assert_close, atol=1e-5 * float(wanted.abs().max()), rtol=1e-4)
    for for_gpu in (False, True):
        made = encode_semantic(codec.model, x, [30, 30], for_gpu)
        close(made, wanted)
        shorter = encode_semantic(codec.model, x, [30, 21], for_gpu)[1, :, :21]
        alone = codec.model.encoder_semantic(x[1:, :, :21])[0]
        close(shorter, alone)


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
