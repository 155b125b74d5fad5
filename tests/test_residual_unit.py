"""DAC's residual unit as one kernel: in Triton's interpreter, and on a GPU."""

from __future__ import annotations

import importlib.util
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.models.dac.modeling_dac import DacDecoder, DacResidualUnit

from tests.test_decode_attention import run
from tests.tiny import voice_like

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no Triton here")


def interpreted() -> None:
    """Runs in a process of its own, for Triton must know at its import that it shall interpret."""
    from higgs_lab.residual_unit import SIZES, example, residual_unit, unit_in_torch

    errors = {}
    for channels in SIZES:
        steps = SIZES[channels][0] + 11  # two programs a clip, the second's last steps not there
        given = example(channels, torch.device("cpu"), torch.float32, steps)
        found, wanted = residual_unit(*given), unit_in_torch(*given)
        inside = given[2].any(1, keepdim=True)
        errors[channels] = [
            float(((a - b) * inside).norm() / (b * inside).norm())
            for a, b in zip(found, wanted, strict=True)
        ]
        behind = float((found[0] * ~inside).abs().max())
        assert behind == 0, behind
        assert residual_unit(*given[:-1], False)[1] is None
    print(json.dumps({"errors": errors, "decoder": decoder()}))


@torch.no_grad()
def decoder() -> list[float]:
    """How far DAC's decoder with the kernel is from DAC's own, for a clip alone and a shorter one
    beside it; and how many units were the kernel's."""
    from higgs_lab import codec_fast, residual_unit

    sizes = dict(hidden_size=8, decoder_hidden_size=64, upsampling_ratios=[4, 3])
    net = DacDecoder(SimpleNamespace(**sizes)).eval()
    random = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        if parameter.ndim == 3 and parameter.shape[0] != 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=random)
    codec_fast._fused_unit_runs = lambda unit, active: active.shape[1] in residual_unit.SIZES
    own, taken = residual_unit.residual_unit, []
    residual_unit.residual_unit = lambda *given: taken.append(1) or own(*given)
    x = torch.randn(2, 8, 31, generator=random)
    made = codec_fast.run_dac(net, x, [31, 20], channels_last=True)
    wanted = net.conv1(x[1:, :, :20]), net.conv1(x[:1])
    found = []
    for clip, whole in zip((made[1:], made[:1]), wanted, strict=True):
        for block in net.block:
            whole = block(whole)
        whole = net.conv2(net.snake1(whole))
        found.append(float((clip[..., : whole.shape[-1]] - whole).abs().max() / whole.abs().max()))
    return [*found, len(taken)]


@pytest.fixture(scope="module")
def found() -> dict:
    return run("interpreted", "tests.test_residual_unit")


def test_the_kernel_is_the_unit_for_every_width(found):
    errors = [error for pair in found["errors"].values() for error in pair]
    assert len(errors) == 8 and max(errors) < 1e-5


def test_a_decoder_with_it_is_dacs_own(found):
    alone, shorter, taken = found["decoder"]
    assert max(alone, shorter) < 1e-4
    assert taken == 3  # the units of 32 channels; those of 16 are too narrow


def test_it_is_taken_where_it_is_right_and_worth_it(monkeypatch):
    from higgs_lab import residual_unit

    asked = []
    monkeypatch.setattr(residual_unit, "_runs", lambda *given: asked.append(given) or True)

    def taken(shape=(4, 64, 1 << 17), is_cuda=True, dilation=9, **changed) -> bool:
        unit = DacResidualUnit(8, dilation)
        for name, value in changed.items():
            setattr(unit.conv1, name, value)
        active = SimpleNamespace(shape=shape, is_cuda=is_cuda, device="cuda", dtype="half")
        return residual_unit.runs_for(unit, active)

    assert taken() and asked == [("cuda", "half", 64)]
    assert not taken(is_cuda=False)
    assert not taken(shape=(4, 16, 1 << 20)) and not taken(shape=(4, 512, 1 << 15))  # widths
    assert taken(shape=(1, 64, 1 << 18)) and not taken(shape=(1, 64, (1 << 18) - 1))
    assert not taken(shape=(1, 64, 1 << 25))  # numbers of 32 bits
    assert not taken(kernel_size=(5,)) and not taken(padding=(0,))


def test_a_trial_draws_no_random_number_of_the_caller():
    from higgs_lab.residual_unit import example

    torch.manual_seed(0)
    wanted = torch.rand(1)
    torch.manual_seed(0)
    example(32, torch.device("cpu"), torch.float32)
    assert torch.equal(torch.rand(1), wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [32, 64, 128, 256])
def test_the_kernel_on_a_gpu(channels, dtype, monkeypatch):
    from higgs_lab.residual_unit import example, residual_unit, runs_for, unit_in_torch

    given = example(channels, torch.device("cuda"), dtype, 4_001)
    assert not runs_for(given[0], given[1])  # not worth a compilation
    monkeypatch.setattr("higgs_lab.residual_unit.LEAST", 0)
    assert runs_for(given[0], given[1])
    inside = given[2].any(1, keepdim=True)
    for a, b in zip(residual_unit(*given), unit_in_torch(*given), strict=True):
        a, b = (a * inside).float(), (b * inside).float()
        assert float((a - b).norm() / b.norm()) < (1e-3 if dtype == torch.float16 else 8e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("precision", "deviation"), [("fp16", 2e-3), ("bf16", 0.02)])
def test_the_released_shape_decodes_and_encodes_with_it(precision, deviation, monkeypatch):
    from higgs_lab import residual_unit
    from higgs_lab.codec import Codec
    from higgs_lab.nano.random_4b import _codec
    from higgs_lab.vocab import CODEC_CONFIG
    from recipes.bench_codec import own_codes, own_wave

    own, widths = residual_unit.residual_unit, []
    monkeypatch.setattr(residual_unit, "LEAST", 0)
    monkeypatch.setattr(
        residual_unit, "residual_unit", lambda *a: widths.append(a[1].shape[1]) or own(*a)
    )
    codec = Codec(_codec(CODEC_CONFIG, seed=0).cuda(), "random")
    random = torch.Generator().manual_seed(0)
    codes = [torch.randint(0, 1024, (n, 8), generator=random) for n in (75, 31, 60)]
    waves = codec.decode_batch(codes, ragged=True, precision=precision)
    assert sorted(set(widths)) == [32, 64, 128, 256] and len(widths) == 12 * 2
    for made, clip in zip(waves, codes, strict=True):
        wanted = own_wave(codec, clip)
        assert np.linalg.norm(made - wanted) <= deviation * np.linalg.norm(wanted)
    widths.clear()
    clips = [voice_like(s, seed=i) for i, s in enumerate([1.0, 3.3, 2.5])]
    made = codec.encode_batch(clips, precision=precision, ragged=True)
    assert sorted(set(widths)) == [64, 128, 256]
    wanted = torch.cat([own_codes(codec, wav) for wav in clips])
    kept = (torch.cat(made) == wanted).float().mean()
    assert kept >= (0.98 if precision == "fp16" else 0.85)
