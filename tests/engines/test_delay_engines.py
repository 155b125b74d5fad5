"""The delay pattern and its inverse are the engines'."""

from __future__ import annotations

import pytest
import torch

from higgs_lab.delay import delay, skew, undelay

LENGTHS = [1, 2, 7, 8, 9, 50]


def random_codes(frames: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1024, (frames, 8), generator=generator)


@pytest.mark.parametrize("frames", LENGTHS)
def test_trap01_delay_is_vllm_omnis(vllm, frames):
    module = vllm["vllm_omni.model_executor.models.higgs_audio_v3.higgs_audio_v3_tokenizer"]
    codes = random_codes(frames)
    assert torch.equal(delay(codes), module.apply_delay_pattern(codes))


@pytest.mark.parametrize("frames", LENGTHS)
def test_trap01_delay_is_sglang_omnis(sglang, frames):
    module = sglang["sglang_omni.models.higgs_tts.utils"]
    codes = random_codes(frames)
    assert torch.equal(delay(codes), module.apply_delay_pattern(codes))


@pytest.mark.parametrize("frames", LENGTHS)
def test_inverse_is_vllm_omnis(vllm, frames):
    module = vllm["vllm_omni.model_executor.stage_input_processors.higgs_audio_v3"]
    codes = random_codes(frames)
    rows = delay(codes)
    assert torch.equal(module._revert_delay_pattern(rows.T).T, codes)
    assert torch.equal(undelay(rows), codes)
    noise = torch.randint(0, 1026, rows.shape)  # specials anywhere: the index alone
    assert torch.equal(module._revert_delay_pattern(noise.T).T, skew(noise))


@pytest.mark.parametrize("frames", LENGTHS)
def test_inverse_is_sglang_omnis(sglang, frames):
    module = sglang["sglang_omni.utils.codec_delay"]
    codes = random_codes(frames)
    assert torch.equal(module.reverse_delay_pattern(delay(codes)), codes)
    noise = torch.randint(0, 1026, (frames + 7, 8))
    assert torch.equal(module.reverse_delay_pattern(noise), skew(noise))


def test_special_ids_are_the_engines(vllm, sglang):
    from higgs_lab.vocab import BOC, EOC

    talker = vllm["vllm_omni.model_executor.models.higgs_audio_v3.higgs_audio_v3_talker"]
    utils = sglang["sglang_omni.models.higgs_tts.utils"]
    assert (talker.BOC_ID, talker.EOC_ID) == (utils.BOC_ID, utils.EOC_ID) == (BOC, EOC)


def test_trap03_action_mask_of_rl_is_not_our_label_mask(sglang, vocab):
    """SGLang-Omni's RL mask leaves out every EOC: trained with it, a model never learns to stop."""
    from higgs_lab.prompt import render_example

    utils = sglang["sglang_omni.models.higgs_tts.utils"]
    codes = random_codes(20)
    example = render_example(vocab, "Hello.", codes)
    ours = example.supervised[example.prompt_length - 1 :]
    actions = utils.delay_pattern_action_mask(delay(codes))
    assert int(actions.sum()) == 8 * 20 and int(ours.sum()) == 8 * 20 + 28
    assert torch.equal(ours & ~actions, delay(codes) == 1025)
    assert not (actions & ~ours).any()
