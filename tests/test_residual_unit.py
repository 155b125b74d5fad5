"""DAC's residual unit as one kernel: in Triton's interpreter, and on a GPU."""

from __future__ import annotations

import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch
from transformers.models.dac.modeling_dac import DacDecoder

from tests.test_decode_attention import run

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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [32, 64, 128, 256])
def test_the_kernel_on_a_gpu(channels, dtype):
    from higgs_lab.residual_unit import example, residual_unit, runs_for, unit_in_torch

    given = example(channels, torch.device("cuda"), dtype, 4_001)
    assert runs_for(given[0], given[1])
    inside = given[2].any(1, keepdim=True)
    for a, b in zip(residual_unit(*given), unit_in_torch(*given), strict=True):
        a, b = (a * inside).float(), (b * inside).float()
        assert float((a - b).norm() / b.norm()) < (1e-3 if dtype == torch.float16 else 8e-3)
