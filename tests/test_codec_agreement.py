"""On a GPU the first batch of a shape must give three of its clips the codes they have alone."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import higgs_lab.codec_encoder
from higgs_lab.codec import Codec
from higgs_lab.codec_encoder import semantic_frames
from tests.test_codec_fast import agreement
from tests.tiny import voice_like

SECONDS = [1.5, 0.5, 1.1, 1.04, 2.013, 24_200 / 24_000, 2.0, 1.5]


@pytest.fixture(scope="module")
def wavs() -> list[np.ndarray]:
    return [voice_like(s, seed=i) for i, s in enumerate(SECONDS)]


@pytest.fixture
def codec(nano, monkeypatch) -> Codec:
    """As on a GPU, but computing on the CPU."""
    codec = Codec.from_pretrained(nano)
    monkeypatch.setattr(codec, "_planned", lambda second: second)
    monkeypatch.setattr(codec, "_room_sec", lambda: 40)
    return codec


def spoil(codec: Codec, monkeypatch, change) -> list[tuple[int, str]]:
    """Has `change(codes, lengths)` alter what batches are encoded as; (clips, precision) of all."""
    encode, calls = codec._encode, []

    def spoiled(batch, lengths, precision):
        calls.append((len(batch), precision))
        made = encode(batch, lengths, precision)
        if made is not None and len(batch) > 1:
            made = made.clone()
            change(made, lengths)
        return made

    monkeypatch.setattr(codec, "_encode", spoiled)
    return calls


def rows(*which: int):
    def change(codes, lengths):
        for i in which:
            codes[i] = (codes[i] + 1) % 1024

    return change


def test_a_batch_that_a_gpu_computes_wrongly_is_encoded_one_by_one(codec, wavs, monkeypatch):
    """As cuDNN did of 16 clips of 3 s on a H100: 93 % of their codes were of other sounds."""
    alone = [codec.encode(wav) for wav in wavs]
    calls = spoil(codec, monkeypatch, lambda codes, _: codes.add_(int(len(codes) == 8)))
    with pytest.warns(UserWarning, match="8 clips of 72000 samples are wrong together") as told:
        made = codec.encode_batch(wavs, ragged=True)
    assert told[0].filename == __file__
    assert agreement(made, alone) >= 0.999
    made = codec.encode_batch(wavs, ragged=True)  # known by now, without another warning
    assert agreement(made, alone) >= 0.999
    sizes = [size for size, _ in calls]
    assert sizes == [8, *[1] * 8, *[1] * 8]  # three clips alone are not encoded again
    codec.encode_batch(wavs[:4], ragged=True)
    codec.encode_batch(wavs[:4], ragged=True)
    assert [size for size, _ in calls[17:]] == [4, 1, 1, 1, 4]


@pytest.mark.parametrize("which", [0, 4, 7])
def test_one_wrong_clip_is_seen_at_either_end_and_in_the_middle(codec, wavs, monkeypatch, which):
    spoil(codec, monkeypatch, rows(which))
    with pytest.warns(UserWarning, match="wrong together"):
        codec.encode_batch(wavs, ragged=True)


def test_what_no_clip_has_is_not_compared(codec, monkeypatch):
    """Rows that fill the batch up, and what lies behind a clip's end."""

    def change(codes, lengths):
        for row, n in zip(codes, semantic_frames(codec.model, lengths), strict=True):
            row[n:] += 1
        codes[17:] += 1

    calls = spoil(codec, monkeypatch, change)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codec.encode_batch([voice_like(1 + i / 40, seed=i) for i in range(17)], ragged=True)
    assert calls == [(18, "fp32"), *[(1, "fp32")] * 3]


def test_what_no_clip_has_is_not_encoded_alone(codec, monkeypatch):
    calls = spoil(codec, monkeypatch, rows(0))
    with pytest.warns(UserWarning, match="17 clips of .* are wrong together"):
        codec.encode_batch([voice_like(1 + i / 40, seed=i) for i in range(17)], ragged=True)
    assert calls == [(18, "fp32"), *[(1, "fp32")] * 17]


@pytest.mark.parametrize(("changed", "wrong"), [(0.3, False), (0.7, True)])
def test_rounding_is_not_an_error(codec, wavs, monkeypatch, changed, wrong):
    """bf16 moves a fifth of the codes; what cuDNN computed wrongly shared one of 14."""

    def change(codes, lengths):
        codes[:, : int(changed * codes.shape[1])] += 1

    spoil(codec, monkeypatch, change)
    equal = [voice_like(2.0, seed=i) for i in range(4)]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        codec.encode_batch(equal, ragged=True)
    assert bool(found) is wrong


def test_every_precision_and_way_through_hubert_is_looked_at(codec, wavs, monkeypatch):
    """Clips as long as the batch take HuBERT without a mask: other kernels, of the same shape."""
    calls = spoil(codec, monkeypatch, rows())
    equal, cut = (
        [voice_like(2.0, seed=i) for i in range(2)],
        [voice_like(1.9, seed=i) for i in (0, 1)],
    )
    for clips in (equal, cut):
        for precision in ("fp32", "bf16"):
            codec.encode_batch(clips, precision=precision, ragged=True)
            codec.encode_batch(clips, precision=precision, ragged=True)
            assert calls == [(2, precision), (1, precision), (1, precision), (2, precision)]
            calls.clear()


def test_acoustic_shapes_are_one_for_a_shape_of_wavs(codec, monkeypatch):
    """The model pads some lengths by half a frame at both ends, which would be another width."""
    widths, run = set(), higgs_lab.codec_encoder.run_dac
    monkeypatch.setattr(
        higgs_lab.codec_encoder,
        "run_dac",
        lambda net, x, *a, **k: widths.add(x.shape[-1]) or run(net, x, *a, **k),
    )
    for seconds in (1.04, 1.1, 1.5, 2.0):
        codec.encode(voice_like(seconds))
    assert len(widths) == 1


def test_what_leaves_the_range_of_fp16_is_compared_in_tf32(codec, monkeypatch):
    codec.model.acoustic_encoder.conv1.weight.mul_(1e7)
    calls = spoil(codec, monkeypatch, rows(0))
    with pytest.warns(UserWarning, match="codes alone, tf32") as told:
        made = codec.encode_batch(
            [voice_like(1.2, seed=i) for i in (0, 1)], precision="fp16", ragged=True
        )
    assert calls == [(2, "fp16"), (2, "tf32"), (1, "tf32"), (1, "tf32")]
    assert told[0].filename == __file__
    assert (
        agreement(
            made,
            [codec.encode_batch([voice_like(1.2, seed=i)], precision="tf32")[0] for i in (0, 1)],
        )
        == 1
    )


def test_a_codec_with_another_hubert_goes_one_by_one(codec, wavs, monkeypatch):
    """What its own code makes of a batch is not trusted on a GPU."""
    monkeypatch.setattr(codec.model.config.semantic_model_config, "feat_extract_norm", "layer")
    calls = spoil(codec, monkeypatch, rows())
    codec.encode_batch([wavs[0], wavs[-1], wavs[0]])
    assert calls == [(1, "fp32")] * 3
