"""Both engines' state machines, step by step, and what their vocoder stages make of our rows."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from higgs_lab.delay import delay
from higgs_lab.generate import RampState, advance, codes_from_rows, mask_logits
from higgs_lab.vocab import BOC, EOC

TALKER = "vllm_omni.model_executor.models.higgs_audio_v3.higgs_audio_v3_talker"
STAGE = "vllm_omni.model_executor.stage_input_processors.higgs_audio_v3"


def vllm_talker(vllm, batch: int):
    """vLLM-Omni's own talker class with its sampler buffers, and without weights."""
    cls = vllm[TALKER].HiggsAudioV3TalkerForConditionalGeneration
    talker = cls.__new__(cls)
    nn.Module.__init__(talker)
    talker.num_codebooks, talker.codebook_size = 8, 1026
    talker._decode_last_codes = torch.full((batch, 8), BOC)
    talker._decode_has_codes = torch.ones(batch, dtype=torch.bool)
    talker._decode_delay_count = torch.zeros(batch, dtype=torch.long)
    talker._decode_eoc_countdown = torch.full((batch,), -1)
    talker._decode_generation_done = torch.zeros(batch, dtype=torch.bool)
    talker._codebook_index_cache = {}
    talker._last_audio_gpu_staging = talker._last_audio_host_staging = None
    return talker


def logits_that_end(batch: int, step: int, seed: int) -> torch.Tensor:
    """Random logits, with special ids likely, so that ends come early, late and by surprise."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    logits = torch.randn(batch, 8, 1026, generator=generator)
    logits[..., EOC] += torch.randn(batch, 8, generator=generator) * 3
    logits[..., BOC] += torch.randn(batch, 8, generator=generator) * 3
    return logits


@pytest.mark.parametrize("seed", range(6))
def test_vllm_mode_is_vllm_omnis_masks_and_state_step_by_step(vllm, seed):
    batch = 16
    talker, state = vllm_talker(vllm, batch), RampState.start(batch)
    index = torch.arange(batch)
    alive = torch.ones(batch, dtype=torch.bool)
    ended_at = set()
    for step in range(60):
        logits = logits_that_end(batch, step, seed)
        masked = mask_logits(logits, state, "vllm")
        theirs = logits.clone()
        talker._apply_delay_pattern_masking_batched(theirs, index, all_rows=True)
        assert torch.equal(masked[alive], theirs[alive]), step
        picked = masked.argmax(-1)
        row, state = advance(picked, state, "vllm")
        talker._update_delay_state_batched(
            picked, index, batch, picked.device, code_row_mask=alive, all_rows=True
        )
        assert torch.equal(row[alive], talker._decode_last_codes[alive]), step
        staged = talker._last_audio_host_staging[:batch].long()
        assert torch.equal(row[alive], staged[alive, :8])
        done = staged[:, 9].bool() & alive
        assert torch.equal(state.done & alive, done), step
        ended_at |= {step} if done.any() else set()
        alive &= ~done
    assert len(ended_at) > 3 and min(ended_at) < 15  # ends of many kinds were seen


def test_vllm_mode_on_codes_that_break_the_masks(vllm):
    """The state machine itself, fed with ids that masking would have forbidden."""
    batch = 64
    talker, state = vllm_talker(vllm, batch), RampState.start(batch)
    index, alive = torch.arange(batch), torch.ones(batch, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    for step in range(40):
        picked = torch.randint(0, 1024, (batch, 8), generator=generator)
        special = torch.rand(batch, 8, generator=generator) < 0.03
        picked = torch.where(special, EOC, picked)
        row, state = advance(picked, state, "vllm")
        talker._update_delay_state_batched(
            picked, index, batch, picked.device, code_row_mask=alive, all_rows=True
        )
        assert torch.equal(row[alive], talker._decode_last_codes[alive]), step
        done = talker._last_audio_host_staging[:batch, 9].bool() & alive
        assert torch.equal(state.done & alive, done), step
        alive &= ~done


@pytest.mark.parametrize("seed", range(6))
def test_sglang_mode_is_sglang_omnis_step(sglang, seed):
    batch = 16
    sampler = sglang["sglang_omni.models.higgs_tts.sampler"]
    theirs = [sampler.HiggsSamplerState(num_codebooks=8) for _ in range(batch)]
    state = RampState.start(batch)
    alive = torch.ones(batch, dtype=torch.bool)
    for step in range(60):
        logits = logits_that_end(batch, step, seed)
        assert torch.equal(mask_logits(logits, state, "sglang"), logits)  # it masks nothing
        row, state = advance(logits.argmax(-1), state, "sglang")
        for i in alive.nonzero()[:, 0].tolist():
            expected = sampler.step(logits[i], theirs[i], temperature=0.0)
            assert torch.equal(row[i], expected), (step, i)
            assert bool(state.done[i]) == theirs[i].generation_done, (step, i)
            alive[i] = not theirs[i].generation_done
    assert not alive.all()


def scripted_rows(codes: torch.Tensor, mode: str) -> torch.Tensor:
    """Rows that the mode emits when a model predicts the delayed `codes` perfectly."""
    script, state, rows = delay(codes), RampState.start(1), []
    while not bool(state.done[0]):
        wanted = script[min(len(rows), len(script) - 1)]
        logits = torch.zeros(1, 8, 1026)
        logits[0, torch.arange(8), wanted] = 10
        row, state = advance(mask_logits(logits, state, mode).argmax(-1), state, mode)
        rows.append(row[0])
        assert len(rows) < 200
    return torch.stack(rows)


@pytest.mark.parametrize("frames", [8, 9, 30])
def test_trap19_talker2code2wav_turns_our_rows_into_our_codes(vllm, frames):
    codes = torch.randint(0, 1024, (frames, 8), generator=torch.Generator().manual_seed(frames))
    rows = scripted_rows(codes, "vllm")
    assert len(rows) == frames + 8
    assert torch.equal(codes_from_rows(rows, "vllm"), codes)
    prompt = vllm[STAGE].talker2code2wav([_talker_output(rows)])[0]
    flat = torch.tensor(prompt["prompt_token_ids"])
    assert torch.equal(flat.reshape(8, -1).T, codes)


@pytest.mark.parametrize("frames", [8, 9, 30])
def test_trap19_sglang_vocoder_turns_our_rows_into_our_codes(sglang, frames):
    codes = torch.randint(0, 1024, (frames, 8), generator=torch.Generator().manual_seed(frames))
    rows = scripted_rows(codes, "sglang")
    assert len(rows) == frames + 7
    assert torch.equal(codes_from_rows(rows, "sglang"), codes)
    assert torch.equal(_sglang_codes(sglang, rows), codes)


def test_trap18_special_ids_become_zero_never_1023(vllm, sglang):
    rows = torch.randint(0, 1026, (40, 8), generator=torch.Generator().manual_seed(0))
    assert (rows >= BOC).any()
    prompt = vllm[STAGE].talker2code2wav([_talker_output(rows)])[0]
    flat = torch.tensor(prompt["prompt_token_ids"])
    assert torch.equal(flat.reshape(8, -1).T, codes_from_rows(rows, "vllm"))
    assert torch.equal(_sglang_codes(sglang, rows), codes_from_rows(rows, "sglang"))


def test_trap20_targets_below_eight_frames_end_differently_in_the_engines(vllm, sglang):
    """SGLang-Omni ignores an EOC in the ramp-up rows, so we refuse to train on such clips."""
    codes = torch.randint(0, 1024, (3, 8))
    assert len(scripted_rows(codes, "vllm")) == 3 + 8
    assert len(scripted_rows(codes, "sglang")) > 3 + 7


def test_generated_rows_of_both_modes_decode_to_the_same_codes_over_there(
    vllm, sglang, vocab, nano_path
):
    """A real model's greedy and sampled rows, through each engine's own vocoder front end."""
    from higgs_lab.checkpoint import load_talker
    from higgs_lab.generate import Sampling, generate
    from higgs_lab.prompt import render_prompt

    talker = load_talker(nano_path, dtype=torch.float32)
    prompts = [render_prompt(vocab, "Hello."), render_prompt(vocab, "A longer one, too.")]
    for mode in ("vllm", "sglang"):
        for temperature in (0.0, 1.0):
            sampling = Sampling(mode=mode, temperature=temperature, max_frames=20)
            for result in generate(talker, prompts, sampling):
                if mode == "vllm":
                    prompt = vllm[STAGE].talker2code2wav([_talker_output(result.rows)])[0]
                    theirs = torch.tensor(prompt["prompt_token_ids"]).reshape(8, -1).T
                else:
                    theirs = _sglang_codes(sglang, result.rows)
                assert torch.equal(theirs, result.codes)


def _talker_output(rows: torch.Tensor):
    output = SimpleNamespace(multimodal_output={"codes": {"audio": rows}})
    return SimpleNamespace(finished=True, outputs=[output])


def _sglang_codes(sglang, rows: torch.Tensor) -> torch.Tensor:
    """What SGLang-Omni's vocoder hands to its codec for these rows."""
    module = sglang["sglang_omni.models.higgs_tts.vocoder_scheduler"]
    vocoder = SimpleNamespace(codec=SimpleNamespace(decode=lambda codes: codes))
    decode = module.HiggsStreamingVocoderScheduler.decode_delayed_rows
    return decode(vocoder, list(rows), num_codebooks=8, codebook_size=1026).long()
