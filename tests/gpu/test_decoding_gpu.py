"""Recorded and compiled steps against the slow twin; on a CPU compiled ones alone."""

from __future__ import annotations

import pytest
import torch

from higgs_lab.generate import generate, generate_naive
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
