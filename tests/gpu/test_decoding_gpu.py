"""Recorded and compiled steps against the slow twin; on a CPU compiled ones alone."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from higgs_lab.decoding import Decoder, Running
from higgs_lab.engine import Engine
from higgs_lab.generate import Sampling, generate, generate_naive
from higgs_lab.slots import Slots, requests_of
from tests.test_decoding import assert_near, ragged, same, voices
from tests.tiny import tiny_talker

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("count", [1, 9])
def test_steps_give_the_slow_twins_speech(compile, count, monkeypatch):
    monkeypatch.setattr("higgs_lab.decoding.RECORD_ROWS", 0)  # all sizes at the end
    talker = tiny_talker(scale=6).to(DEVICE)
    prompts, settings = ragged(count)
    made = generate(talker, prompts, settings, max_batch=4, compile=compile)
    for one, prompt, wanted in zip(made, prompts, settings, strict=True):
        assert same(one, generate_naive(talker, prompt, wanted))


@pytest.mark.gpu
def test_a_cache_that_grows_is_recorded_anew(monkeypatch):
    """Past 256 positions, and again past 384: old recordings know old addresses."""
    monkeypatch.setattr("higgs_lab.decoding._fitting", lambda *_: 2)  # or it would not need to
    talker = tiny_talker(scale=6).to(DEVICE)
    prompts, _ = ragged(2)
    settings = [Sampling(seed=i, max_frames=400) for i in range(2)]
    made = generate(talker, prompts, settings)
    assert max(len(p) + len(one.rows) for p, one in zip(prompts, made, strict=True)) > 384
    for one, prompt, wanted in zip(made, prompts, settings, strict=True):
        assert same(one, generate_naive(talker, prompt, wanted))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU waits for itself")
@pytest.mark.parametrize("compile", [False, True])
def test_prompts_are_let_in_and_results_taken_without_waiting_for_the_gpu(compile):
    """Its steps go on meanwhile: nothing may wait, such as a copy of memory that is not pinned."""
    engine = Engine(tiny_talker().to(DEVICE, torch.bfloat16))
    slots, requests = Slots(engine, 4, 256, 32, False), requests_of(*voices(3), 8)
    decoder = Decoder(engine)
    decoder.slots = slots
    try:
        for mode in ("default", "error"):  # at first kernels are tried and compiled
            torch.cuda.set_sync_debug_mode(mode)
            with torch.no_grad():
                slots.admit([0, 2], requests[:2], compile)
                slots.admit([3], requests[2:], compile, [0])
                slots.move([3], [1])
                busy = {
                    slot: Running(request, 5)
                    for slot, request in zip((0, 2, 1), requests, strict=True)
                }
                look = decoder._look(busy, 3)
                results = decoder._take(busy, [0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    look()
    assert [one.left for one in busy.values()] == [5, 5] and len(list(results)) == 1
    assert slots.active.tolist() == [False, True, True, False]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU records nothing")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    ("make", "which", "limit"),
    [
        (ragged, range(6), 2),
        (ragged, (*range(20), 400, 499), 22),
        (voices, range(12), 3),
        (partial(voices, frames=90), range(90), 40),
    ],
)
def test_recorded_passes_over_prompts_give_the_same(make, which, limit, compile):
    """Of few short prompts; of many, two of which have 1,200 and 1,500 frames of reference; of some
    and of many that share references."""
    talker = tiny_talker(scale=6).to(DEVICE).half()
    prompts, _ = make(max(which) + 1)
    prompts = [prompts[i] for i in which]
    settings = [Sampling(temperature=0.0, max_frames=20)] * len(prompts)
    requests = requests_of(prompts, settings, 8)
    decoder, found = Decoder(Engine(talker)), []
    with torch.no_grad():
        for recorded in (False, True, True, True):
            decoder._slots(requests, limit, 4, True, True).passes.records = recorded
            made = dict(decoder.run(requests, limit, log_probs=True, compile=compile))
            found.append([made[i] for i in range(len(prompts))])
    assert any(graph is not None for graph in decoder.slots.passes.recorded.values())
    for again in found[1:]:
        assert_near(again, found[0], atol=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_steps_are_recorded_on_the_talkers_own_card():
    talker = tiny_talker(scale=6).to("cuda:1")
    prompts, settings = ragged(3)
    made = generate(talker, prompts, settings)
    for one, prompt, wanted in zip(made, prompts, settings, strict=True):
        assert same(one, generate_naive(talker, prompt, wanted))
