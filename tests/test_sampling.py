"""The sampling ladder and both engines' state machines, on their own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from higgs_lab.delay import delay, undelay
from higgs_lab.sampling import (
    ENGINE_DEFAULTS,
    RampState,
    Sampling,
    SamplingTensors,
    advance,
    codes_from_rows,
    draw_keys,
    keep_probabilities,
    mask_logits,
    sample,
    uniforms,
)
from higgs_lab.vocab import BOC, EOC
from tests.tiny import K, V, random_codes

MODES = ["vllm", "sglang"]

# --- state machines


def play(script: torch.Tensor, mode: str, rows: int = 60):
    """Rows that a model emits which wants script[i] (its last row for ever) at step i."""
    state, emitted = RampState.start(1), []
    for i in range(rows):
        want = script[min(i, len(script) - 1)]
        logits = torch.zeros(1, K, V)
        logits[0, torch.arange(K), want] = 5.0
        picked = mask_logits(logits, state, mode).argmax(-1)
        row, state = advance(picked, state, mode)
        emitted.append(row[0])
        if bool(state.done):
            return torch.stack(emitted), True
    return torch.stack(emitted), False


@pytest.mark.parametrize("frames", [8, 9, 30])
def test_trap19_a_trained_staircase_ends_in_both_modes(frames):
    """vLLM-Omni emits T+8 rows and drops the last frame, SGLang-Omni T+7 and keeps all."""
    codes = random_codes(frames)
    rows, ended = play(delay(codes), "sglang")
    assert ended
    assert torch.equal(rows, delay(codes))
    assert torch.equal(codes_from_rows(rows, "sglang"), codes)
    assert torch.equal(undelay(rows), codes)
    rows, ended = play(delay(codes), "vllm")
    assert ended
    assert len(rows) == frames + 8
    assert torch.equal(codes_from_rows(rows, "vllm"), codes)


def test_trap19_trimming_the_wrong_stream_is_visible():
    """One frame too few or one of junk: 40 ms at the end of every clip."""
    codes = random_codes(12)
    theirs = {mode: play(delay(codes), mode)[0] for mode in MODES}
    assert len(codes_from_rows(theirs["sglang"], "vllm")) == 11
    assert len(codes_from_rows(theirs["vllm"], "sglang")) == 13


def test_vllm_locks_one_codebook_a_row_without_being_asked():
    """A model that never says EOC but once: the engine closes the other codebooks itself."""
    script = delay(random_codes(30))
    script = torch.where(script == EOC, 5, script)
    script[12, 0] = EOC
    rows, ended = play(script, "vllm")
    assert ended
    assert len(rows) == 12 + 8
    for extra in range(1, 8):
        assert rows[12 + extra].eq(EOC).tolist() == [c < extra for c in range(K)]


def test_sglang_never_closes_codebooks_itself():
    """The same model in SGLang-Omni: seven more rows are counted, EOC stands in codebook 0 only."""
    script = delay(random_codes(30))
    script = torch.where(script == EOC, 5, script)
    script[12, 0] = EOC
    rows, ended = play(script, "sglang")
    assert ended
    assert len(rows) == 12 + 7
    assert int((rows == EOC).sum()) == 1


def test_trap20_sglang_ignores_an_eoc_in_the_ramp_up():
    """So a clip of 5 frames comes out with 8, three of them junk; vLLM-Omni ends right."""
    codes = random_codes(5)
    rows, ended = play(delay(codes), "sglang")
    assert ended
    heard = codes_from_rows(rows, "sglang")
    assert len(heard) == 8
    assert torch.equal(heard[:5], codes)
    rows, ended = play(delay(codes), "vllm")
    assert ended
    assert torch.equal(codes_from_rows(rows, "vllm"), codes)


@pytest.mark.parametrize("mode", MODES)
def test_trap22_a_model_that_never_stops_is_cut_by_the_cap_alone(mode):
    rows, ended = play(torch.full((1, K), 9), mode)
    assert not ended
    for i in range(8):
        assert rows[i].eq(BOC).tolist() == [c > i for c in range(K)]
    assert not (rows[8:] >= BOC).any()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), sharp=st.sampled_from([0.0, 3.0, 30.0]))
def test_vllm_rows_are_never_out_of_grammar(seed, sharp):
    """Whatever the logits: BOC only above the diagonal, EOC only as a staircase from codebook 0."""
    generator = torch.Generator().manual_seed(seed)
    state, rows = RampState.start(1), []
    for _ in range(40):
        logits = sharp * torch.randn(1, K, V, generator=generator)
        logits[..., EOC] += 4
        row, state = advance(mask_logits(logits, state, "vllm").argmax(-1), state, "vllm")
        rows.append(row[0])
        if bool(state.done):
            break
    rows = torch.stack(rows)
    end = int(rows[:, 0].eq(EOC).int().argmax()) if bool((rows[:, 0] == EOC).any()) else len(rows)
    for i, row in enumerate(rows):
        locked = max(i - end, 1 if i == end else 0)
        assert row.eq(EOC).tolist() == [c < locked for c in range(K)]
        if i <= min(end, 7):
            assert row.eq(BOC).tolist() == [c > i for c in range(K)]
    assert bool(state.done) == (len(rows) == end + 8)


def test_rows_of_requests_do_not_mix_in_the_state():
    """Two requests at different places of the ramp, advanced together and alone."""
    picked = torch.tensor([[EOC] + [5] * 7, [3] * 8])
    a = RampState(torch.tensor([7]), torch.tensor([-1]), torch.tensor([False]))
    b = RampState(torch.tensor([2]), torch.tensor([-1]), torch.tensor([False]))
    both = RampState(
        *(torch.cat(pair) for pair in zip(vars(a).values(), vars(b).values(), strict=True))
    )
    for mode in MODES:
        rows, after = advance(picked, both, mode)
        for i, state in enumerate((a, b)):
            row, alone = advance(picked[i : i + 1], state, mode)
            assert torch.equal(rows[i], row[0])
            for name in ("delay", "countdown", "done"):
                assert getattr(after, name)[i] == getattr(alone, name)[0]


# --- sampling


def one(**changes) -> SamplingTensors:
    knobs = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0} | changes
    return SamplingTensors.of([Sampling(**knobs)], V, "cpu")


def kept(logits: torch.Tensor, **changes) -> dict[int, float]:
    """{id: probability} after temperature, top-k and top-p."""
    probs, ids = keep_probabilities(logits.expand(1, K, V), one(**changes))
    pairs = zip(ids[0, 0].tolist(), probs[0, 0].tolist(), strict=True)
    total = float(probs[0, 0].sum())
    return {i: p / total for i, p in pairs if p > 0}


FOUR = torch.full((V,), float("-inf"))
FOUR[[3, 10, 20, 30]] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {3: 0.4, 10: 0.3, 20: 0.2, 30: 0.1}),
        ({"top_k": 2}, {3: 4 / 7, 10: 3 / 7}),
        ({"top_k": 1}, {3: 1.0}),
        ({"top_p": 0.35}, {3: 1.0}),
        ({"top_p": 0.5}, {3: 4 / 7, 10: 3 / 7}),  # the one that crosses the threshold stays
        ({"top_p": 0.85}, {3: 4 / 9, 10: 3 / 9, 20: 2 / 9}),
        ({"top_p": 1e-6}, {3: 1.0}),
        ({"top_k": 3, "top_p": 0.5}, {3: 4 / 7, 10: 3 / 7}),  # p of what k left: .44, .33, .22
        ({"temperature": 0.5}, {3: 16 / 30, 10: 9 / 30, 20: 4 / 30, 30: 1 / 30}),
        ({"temperature": 0.5, "top_p": 0.6}, {3: 16 / 25, 10: 9 / 25}),  # temperature comes first
    ],
)
def test_temperature_then_top_k_then_top_p(changes, expected):
    assert kept(FOUR, **changes) == pytest.approx(expected, abs=1e-5)


def test_draws_have_the_distribution_that_was_kept():
    logits = FOUR.expand(1, K, V)
    counts = torch.zeros(V)
    options = one(temperature=0.5, top_k=3)
    for step in range(1500):
        counts += torch.bincount(sample(logits, options, step)[0], minlength=V)
    share = counts / counts.sum()
    for i, p in {3: 16 / 29, 10: 9 / 29, 20: 4 / 29}.items():
        assert float(share[i]) == pytest.approx(p, abs=0.015)
    assert int(counts[30]) == 0


def test_draws_of_seeds_steps_and_codebooks_are_independent():
    """A poor mix would make all codebooks, steps or seeds move together."""
    seeds = torch.tensor([0, 1, 2, 42, -1, 2**40])
    keys = draw_keys(seeds, K)
    u = torch.stack([uniforms(keys, step) for step in range(4000)])  # [steps, seeds, K]
    assert float(u.min()) >= 0 and float(u.max()) < 1
    assert float((u.mean(0) - 0.5).abs().max()) < 0.02
    assert float((u.var(0) - 1 / 12).abs().max()) < 0.005
    flat = u.flatten(1).T - 0.5  # 48 streams
    near = torch.cat([flat[:, 1:], flat[:, :-1]])  # each beside itself a step later
    correlation = torch.corrcoef(near) - torch.eye(len(near))
    assert float(correlation.abs().max()) < 0.08
    assert len(u.flatten().unique()) > 0.98 * u.numel()


def test_one_codebook_of_a_row_does_not_tell_another():
    """Independent softmaxes: the same logits in all codebooks give differing draws."""
    drawn = sample(torch.zeros(1, K, V), one(), 0)[0]
    assert len(drawn.unique()) >= 7


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(-(2**62), 2**62), step=st.integers(0, 4000))
def test_a_draw_hangs_on_seed_step_and_codebook_alone(seed, step):
    mates = torch.tensor([5, seed, 9])
    alone = draw_keys(torch.tensor([seed]), K)
    assert torch.equal(uniforms(draw_keys(mates, K), step)[1], uniforms(alone, step)[0])


def test_ties_are_broken_the_same_whatever_the_mates_knobs_are():
    """bf16 logits tie often, and a batch's top-k is as wide as its widest member's."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, K, V, generator=generator).mul(2).bfloat16().float()
    logits = (logits * 2).round() / 2  # ties everywhere
    mine = {"temperature": 1.0, "top_k": 20, "top_p": 0.9}
    for seed in range(30):
        alone = SamplingTensors.of([Sampling(**mine, seed=seed)], V, "cpu")
        for mate in ({"top_k": 0}, {"top_k": 50}, {"top_k": 1}, {"temperature": 0.0}):
            pair = SamplingTensors.of([Sampling(**mine, seed=seed), Sampling(**mate)], V, "cpu")
            two = torch.cat([logits, logits])
            for step in range(3):
                assert torch.equal(sample(two, pair, step)[0], sample(logits, alone, step)[0])


def test_rounding_noise_does_not_change_draws():
    """Batched and single passes differ in the last bit, which is no reason for another code."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, K, V, generator=generator).round()  # hundreds of equal ones
    noise = [1e-6 * torch.rand(1, K, V, generator=generator) for _ in range(2)]
    options, differing = one(), 0
    for step in range(200):
        a, b = (sample(logits + n, options, step) for n in noise)
        differing += int((a != b).sum())
    assert differing <= 2  # of 1600


def test_greedy_takes_the_best_whatever_the_seed():
    logits = torch.randn(1, K, V)
    for seed in range(5):
        assert torch.equal(sample(logits, one(temperature=0.0, seed=seed), 3), logits.argmax(-1))
    assert Sampling(mode="sglang", top_k=1).greedy
    assert Sampling(mode="sglang", temperature=1e-5).greedy
    assert not Sampling(mode="vllm", top_k=1).greedy  # yet its one candidate is the best
    assert torch.equal(sample(logits, one(top_k=1), 0), logits.argmax(-1))


def test_trap23_defaults_are_the_engines():
    assert ENGINE_DEFAULTS["vllm"] == {"temperature": 1.0, "top_p": 0.95, "top_k": 50, "seed": 42}
    assert Sampling() == Sampling.of_engine("vllm")
    sglang = Sampling.of_engine("sglang", seed=9)
    assert (sglang.temperature, sglang.top_p, sglang.top_k, sglang.seed) == (0.8, 0.8, 30, 9)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"max_frames": 0},
        {"mode": "hf"},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": float("nan")},
    ],
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError, match="sampling needs|is unknown"):
        Sampling(**bad)


def test_an_unknown_mode_of_an_engine_is_refused():
    with pytest.raises(ValueError, match="'hf' is unknown; there are vllm, sglang"):
        Sampling.of_engine("hf")
