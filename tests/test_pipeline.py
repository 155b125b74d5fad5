"""Speech decoded while the rest is generated is speech generated and then decoded."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from higgs_lab.checkpoint import load_talker
from higgs_lab.codec import Codec
from higgs_lab.generate import Sampling, generate
from higgs_lab.pipeline import speak_each
from higgs_lab.prompt import render_prompt
from higgs_lab.vocab import Vocab


def test_waves_are_those_of_the_codes_and_codes_those_of_generate(nano):
    talker = load_talker(nano, dtype=torch.float32)
    codec, vocab = Codec.from_pretrained(nano), Vocab.from_pretrained(nano)
    prompts = [render_prompt(vocab, text) for text in ("One.", "Two words.", "Three.", "Four is.")]
    settings = [Sampling(seed=i, max_frames=n) for i, n in enumerate((20, 9, 14, 11))]
    spoken = list(speak_each(talker, codec, prompts, settings, max_batch=2, decode_together=3))
    assert sorted(index for index, _, _ in spoken) == [0, 1, 2, 3]
    wanted = generate(talker, prompts, settings, max_batch=2)  # as many mates round alike
    for index, made, wave in spoken:
        assert torch.equal(made.codes, wanted[index].codes)
        np.testing.assert_allclose(wave, codec.decode(made.codes), atol=2e-5)


def test_an_error_of_the_codec_reaches_the_caller(nano):
    talker = load_talker(nano, dtype=torch.float32)
    codec, vocab = Codec.from_pretrained(nano), Vocab.from_pretrained(nano)
    prompts = [render_prompt(vocab, "One.")]
    with pytest.raises(ValueError, match="choose fp32, tf32, fp16, bf16"):
        list(speak_each(talker, codec, prompts, Sampling(max_frames=8), precision="fp8"))
