"""The Triton kernels on a GPU: against SDPA, recorded, and as what the engine chooses."""

from __future__ import annotations

import pytest
import torch

from higgs_lab.engine import Engine
from higgs_lab.generate import Sampling, generate
from tests.test_decode_attention import CASES, shared_is_read, tensors, wanted
from tests.test_decoding import assert_near, ragged
from tests.tiny import tiny_talker

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [*CASES, (32, 8, 128, (1, 250, 64, 65) * 8, None)])
def test_a_recording_follows_the_lengths(case, dtype):
    from higgs_lab.decode_attention import decode_attention

    q, keys, values, lengths = tensors(case, dtype, "cuda")
    now = torch.ones_like(lengths)
    decode_attention(q, keys, values, now, case[-1])  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = decode_attention(q, keys, values, now, case[-1])
    now.copy_(lengths)
    graph.replay()
    error = (found.float() - wanted(q, keys, values, lengths)).norm()
    assert error < 0.01 * found.float().norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_slots_share_is_read_where_one_has_it(dtype):
    assert shared_is_read(dtype, "cuda")


def test_a_cache_of_more_than_2_31_elements():
    from higgs_lab.decode_attention import decode_attention

    slots = 2**31 // (8 * 4096 * 128) + 1
    keys, values = torch.zeros(2, slots, 8, 4096, 128, dtype=torch.bfloat16, device="cuda")
    q = torch.randn(slots, 32, 128, device="cuda").bfloat16()
    values[-1, :, :3] = 3
    lengths = torch.full((slots,), 4, device="cuda")
    found = decode_attention(q, keys, values, lengths)
    assert bool((found[-1] == 2.25).all()) and not bool(found[:-1].any())


def test_the_engine_takes_them_in_half_precision_alone(recwarn):
    assert not Engine(tiny_talker().cuda()).split_kv
    for dtype in (torch.bfloat16, torch.float16):
        assert Engine(tiny_talker().cuda().to(dtype)).split_kv
    assert not [w for w in recwarn if "Triton" in str(w.message)]


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("count", [1, 5])
def test_log_probs_are_those_of_sdpa(compile, count, monkeypatch):
    """Greedy speech, compiled or not, up to where rounding first chooses another id."""
    talker = tiny_talker(scale=6).cuda().half()
    prompts, _ = ragged(count)
    setting = Sampling(temperature=0.0, max_frames=20)
    made = generate(talker, prompts, setting, log_probs=True, compile=compile)
    monkeypatch.setattr("higgs_lab.engine.split_kv_runs", lambda *_: False)
    talker.load_state_dict({k: v.clone() for k, v in talker.state_dict().items()}, assign=True)
    plain = generate(talker, prompts, setting, log_probs=True)
    assert_near(made, plain, atol=0.02)
