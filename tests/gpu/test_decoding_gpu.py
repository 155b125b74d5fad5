"""Recorded and compiled steps against the slow twin; on a CPU compiled ones alone."""

from __future__ import annotations

import pytest
import torch

from higgs_lab.generate import Sampling, generate, generate_naive
from tests.test_decoding import ragged, same
from tests.tiny import tiny_talker

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("count", [1, 9])
def test_steps_give_the_slow_twins_speech(compile, count):
    talker = tiny_talker(scale=6).to(DEVICE)
    prompts, settings = ragged(count)
    made = generate(talker, prompts, settings, max_batch=4, compile=compile)
    for one, prompt, wanted in zip(made, prompts, settings, strict=True):
        assert same(one, generate_naive(talker, prompt, wanted))


@pytest.mark.gpu
def test_a_cache_that_grows_is_recorded_anew():
    """Past 256 positions, and again past 384: old recordings know old addresses."""
    talker = tiny_talker(scale=6).to(DEVICE)
    prompts, _ = ragged(2)
    settings = [Sampling(seed=i, max_frames=400) for i in range(2)]
    made = generate(talker, prompts, settings)
    assert max(len(p) + len(one.rows) for p, one in zip(prompts, made, strict=True)) > 384
    for one, prompt, wanted in zip(made, prompts, settings, strict=True):
        assert same(one, generate_naive(talker, prompt, wanted))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_steps_are_recorded_on_the_talkers_own_card():
    talker = tiny_talker(scale=6).to("cuda:1")
    prompts, settings = ragged(3)
    made = generate(talker, prompts, settings)
    for one, prompt, wanted in zip(made, prompts, settings, strict=True):
        assert same(one, generate_naive(talker, prompt, wanted))
