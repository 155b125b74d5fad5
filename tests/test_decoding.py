"""The engine behind `generate`: fused weights, slots refilled and moved, compiled steps."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest
import torch

from higgs_lab import decoding
from higgs_lab import generate as generating
from higgs_lab.adapter import attach_lora
from higgs_lab.decoding import Decoder
from higgs_lab.engine import Engine
from higgs_lab.generate import Sampling, generate, generate_each, generate_naive
from higgs_lab.prompt import render_prompt
from higgs_lab.sampling import RampState, SamplingTensors, next_row
from higgs_lab.slots import requests_of
from higgs_lab.vocab import EOC
from tests.tiny import random_codes, run_one, three_prompts, tiny_talker, tiny_vocab

GREEDY = Sampling(temperature=0.0, max_frames=14)


def same(a, b) -> bool:
    return (
        torch.equal(a.rows, b.rows)
        and torch.equal(a.codes, b.codes)
        and a.stop_reason == b.stop_reason
    )


@pytest.fixture(scope="module")
def talker():
    return tiny_talker(scale=6)


def assert_near(made, plain, atol: float) -> None:
    """Greedy speech of two ways, up to where rounding first chooses another id."""
    total = 0
    for a, b in zip(made, plain, strict=True):
        rows = min(len(a.rows), len(b.rows))
        differ = (a.rows[:rows] != b.rows[:rows]).any(dim=1).nonzero()
        rows = int(differ[0]) if len(differ) else rows
        total += rows
        torch.testing.assert_close(a.log_probs[:rows], b.log_probs[:rows], atol=atol, rtol=0)
    assert total > 10 * len(made)  # of 28 each


def ragged(count: int) -> tuple[list, list[Sampling]]:
    """Prompts of 4 to 60 positions, greedy and drawn, of both modes, caps of 1 to 13 frames."""
    vocab = tiny_vocab()
    prompts, settings = [], []
    for i in range(count):
        reference = random_codes(1 + 3 * i, i) if i % 3 == 1 else None
        prompts.append(render_prompt(vocab, "word " * (1 + i % 4), reference))
        mode = ("vllm", "sglang")[i % 2]
        temperature = 0.0 if i % 3 == 0 else 0.9
        settings.append(
            Sampling(temperature=temperature, seed=i, mode=mode, max_frames=1 + 5 * i % 13)
        )
    return prompts, settings


@pytest.fixture(scope="module")
def slow(talker):
    """The slow twin's speech of `ragged(9)`."""
    return [generate_naive(talker, p, s, True) for p, s in zip(*ragged(9), strict=True)]


@pytest.mark.parametrize("max_batch", [1, 2, 5, 64])
def test_a_slot_taken_over_by_the_next_prompt_changes_nothing(talker, slow, max_batch):
    made = generate(talker, *ragged(9), log_probs=True, max_batch=max_batch)
    for one, naive in zip(made, slow, strict=True):
        assert same(one, naive)
        torch.testing.assert_close(one.log_probs, naive.log_probs, atol=2e-4, rtol=1e-4)


def masked_attend(engine: Engine):
    """Attention that reads each slot up to its own length, as split-KV does; notes who shares."""
    engine.holders, engine.one_row, engine.few_rows = [], False, False

    def attend(q, keys, values, lengths, hidden, shared):
        assert hidden is None
        for slot, (holder, count) in enumerate(shared.T.tolist()):
            for cache in (keys, values):  # to the bit: which one is read is nobody's business
                assert torch.equal(cache[slot, :, :count], cache[holder, :, :count])
            if holder != slot:
                engine.holders.append((slot, holder))
        unseen = torch.arange(keys.shape[2]) >= lengths[:, None]
        hidden = torch.zeros(unseen.shape).masked_fill_(unseen, float("-inf"))[:, None, None]
        engine.split_kv = False
        out = Engine.attend(engine, q, keys, values, lengths, hidden)
        engine.split_kv = True
        return out

    return attend


@pytest.mark.parametrize("record_rows", [None, 0, 8, 6000])
def test_the_gpu_schedule_gives_the_same(talker, monkeypatch, record_rows):
    """Several steps at a time, idle slots, masked cache lengths, fixed sizes, growth, moves: all
    that a GPU does but the recording itself. record_rows: of split-KV; None: SDPA."""
    steps = []

    def replay(self, *key):
        steps.append((*key[:2], self.length))
        self.step_once(*key)

    prompts, settings = ragged(9)
    settings = [replace(s, max_frames=3 + 4 * i) for i, s in enumerate(settings)]
    monkeypatch.setattr(decoding.Slots, "replay", replay)
    monkeypatch.setattr(decoding, "LENGTHS", (32, 48, 64, 96))
    monkeypatch.setattr(decoding, "_fitting", lambda *_: 4)  # no room to spare: the cache grows
    monkeypatch.setattr(decoding, "SIZES", (1, 2, 4, 8))
    monkeypatch.setattr(decoding, "ADMIT_STEPS", 1)
    engine = Engine(talker)
    if record_rows is not None:
        monkeypatch.setattr(decoding, "RECORD_ROWS", record_rows)
        engine.split_kv, engine.attend = True, masked_attend(engine)
    decoder = Decoder(engine)
    requests = requests_of(prompts, settings, 8)
    with torch.no_grad():
        made = dict(decoder.run(requests, 4, graphs="as on a GPU"))
    assert sorted(made) == list(range(9))
    for i, prompt in enumerate(prompts):
        assert same(made[i], generate_naive(talker, prompt, settings[i])), i
    sizes = {key[0] for key in steps}
    assert sizes > {4} or (record_rows == 6000 and sizes == {4})  # it shrank with the work
    assert len({key[1] for key in steps}) > 1  # and grew with the texts
    assert all(key[1] in decoding.LENGTHS for key in steps)
    assert len({key[2] for key in steps}) > 1  # and the cache with them


def test_a_gpu_lets_prompts_in_by_the_handful(talker, monkeypatch):
    """A pass over prompts costs some steps of all slots, so one free slot is not worth it."""
    admitted = []
    admit = decoding.Slots.admit
    monkeypatch.setattr(
        decoding.Slots, "admit", lambda self, *a: admitted.append(len(a[0])) or admit(self, *a)
    )
    monkeypatch.setattr(decoding.Slots, "replay", decoding.Slots.step_once)
    monkeypatch.setattr(decoding, "ADMIT_STEPS", 3)
    prompts, settings = ragged(9)
    settings = [replace(s, max_frames=4 + 8 * i) for i, s in enumerate(settings)]
    requests = requests_of(prompts, settings, 8)
    with torch.no_grad():
        made = dict(Decoder(Engine(talker)).run(requests, 4, graphs="as on a GPU"))
    assert len(made) == sum(admitted) == 9
    assert admitted[0] == 4 and len(admitted) < 6  # of 9 there would be one pass for each of 5


def test_a_gpu_has_steps_queued_while_the_host_is_busy(talker, slow, monkeypatch):
    """Steps, looks, results and prompts in their order; then a caller leaves with steps queued."""
    happened = []

    def noted(what, function):
        return lambda *args: happened.append(what) or function(*args)

    look = noted("l", Decoder._look)
    monkeypatch.setattr(decoding.Slots, "replay", noted("s", decoding.Slots.step_once))
    monkeypatch.setattr(decoding.Slots, "admit", noted("a", decoding.Slots.admit))
    monkeypatch.setattr(Decoder, "_look", lambda *args: noted("w", look(*args)))
    decoder = Decoder(Engine(talker))

    def run():
        for i, one in decoder.run(requests_of(*ragged(9), 8), 3, graphs="as on a GPU"):
            happened.append("r")
            yield i, one

    with torch.no_grad():
        for i, one in run():
            assert same(one, slow[i])
        order = "".join(happened)
        # a look is waited for, and results are handed out, behind the steps that come after
        assert re.fullmatch("a+s{4}l(a*s{1,4}lr*w)+r+", order), order
        assert re.search("as+lr+w", order) and order.count("r") == 9

        next(early := run())
        early.close()
        assert not decoder.slots.active.any()
        again = dict(run())
    assert all(same(again[i], slow[i]) for i in range(9))


@pytest.mark.parametrize("mode, sight", [("vllm", 7), ("sglang", 6)])
@pytest.mark.parametrize("steps", [3, 4, 6, 11])
def test_an_end_is_in_sight_before_it_comes(mode, sight, steps, monkeypatch):
    """A look tells of ends so many rows ahead, and is two parts of steps old when those that it
    tells of are queued; more than half as many steps at a time, and some are idle."""
    talker = tiny_talker(scale=6)
    with torch.no_grad():
        talker.codebooks.weight[EOC] *= 2
    monkeypatch.setattr(decoding, "STEPS", steps)
    taken = []

    def replay(self, *key):
        taken.append(key[0])
        self.step_once(*key)

    monkeypatch.setattr(decoding.Slots, "replay", replay)
    prompts = [three_prompts()[i % 3] for i in range(6)]
    settings = [Sampling(seed=i, mode=mode, max_frames=40) for i in range(6)]
    requests, decoder = requests_of(prompts, settings, 8), Decoder(Engine(talker))
    with torch.no_grad():
        made = dict(decoder.run(requests, 1, graphs="as on a GPU"))
        lost = len(taken) - sum(len(one.rows) for one in made.values())
        together = dict(decoder.run(requests, 4, graphs="as on a GPU"))
    ended = [one.stop_reason == "eoc" for one in made.values()]
    assert any(ended) and not all(ended)
    most = max(0, 2 * steps - 1 - sight) * sum(ended)
    assert lost <= most and (lost > 0 or steps <= 6)
    for i, prompt in enumerate(prompts):
        assert same(made[i], generate_naive(talker, prompt, settings[i]))
        assert same(made[i], together[i])


def voices(count: int, frames: int = 12) -> tuple[list, list[Sampling]]:
    """`ragged` settings; prompts of two voices in turn, one with its words, and of none.

    Both are as long. All tensors are each prompt's own.
    """
    vocab, prompts = tiny_vocab(), []
    for i in range(count):
        text = "word " * (1 + i % 4)
        if i % 5 == 4:
            prompts.append(render_prompt(vocab, text))
        else:
            said = "what was said" if i % 2 else None
            prompts.append(render_prompt(vocab, text, random_codes(frames, i % 2), said))
    return prompts, ragged(count)[1]


@pytest.fixture(scope="module")
def slow_voices(talker):
    return [generate_naive(talker, p, s, True) for p, s in zip(*voices(12), strict=True)]


def test_one_trace_serves_all_blocks_prompts_and_batches(talker, slow, slow_voices, monkeypatch):
    """What torch.compile makes of the functions, without a C++ compiler."""
    from torch._dynamo.utils import counters

    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: compile(f, backend="aot_eager", **options)
    )
    torch._dynamo.reset()
    counters.clear()
    prompts, settings = ragged(9)

    def speak(decoder: Decoder, which: list[int], max_batch: int) -> None:
        requests = requests_of([prompts[i] for i in which], [settings[i] for i in which], 8)
        with torch.no_grad():
            for i, one in decoder.run(requests, max_batch, compile=True):
                assert same(one, slow[which[i]])

    decoder = Decoder(Engine(talker))
    speak(decoder, list(range(9)), 4)
    # prompts into the cache, a row into it, the rest of a block, the choice of a row
    many = counters["stats"]["unique_graphs"]
    assert many == 4
    speak(decoder, [1, 7, 2, 4, 8], 3)
    speak(decoder, [7, 0, 5], 2)
    with torch.no_grad():  # and passes that copy
        made = dict(decoder.run(requests_of(*voices(12), 8), 4, compile=True))
    assert all(same(made[i], wanted) for i, wanted in enumerate(slow_voices))
    assert counters["stats"]["unique_graphs"] == many
    speak(Decoder(decoder.engine), [3], 1)
    assert counters["stats"]["unique_graphs"] == many + 4  # the rest of a block in two
    torch._dynamo.reset()


def test_results_come_as_they_end_and_a_caller_may_leave(talker, slow):
    prompts, settings = ragged(6)
    order = [i for i, _ in generate_each(talker, prompts, settings, max_batch=2)]
    assert sorted(order) == list(range(6)) and order != sorted(order)
    for _ in itertools.islice(generate_each(talker, prompts, settings, max_batch=2), 1):
        inside = generate(talker, prompts[:2], settings[:2])  # while the other is under way
    assert same(inside[0], slow[0])
    takes = generate_each(talker, prompts, settings, max_batch=2)
    next(takes)
    takes.close()
    left = generating._DECODERS[talker]  # with what it has recorded
    again = dict(generate_each(talker, prompts, settings, max_batch=2))
    assert all(same(again[i], slow[i]) for i in range(6))
    assert generating._DECODERS[talker] is left


def test_fused_weights_are_the_modules_own():
    """No copy: a step of training is heard at once, and moved weights are fused anew."""
    talker, prompt = tiny_talker(scale=6), three_prompts()[1]
    names = list(talker.state_dict())
    before = {k: v.clone() for k, v in talker.state_dict().items()}
    first = generate(talker, [prompt], GREEDY)[0]
    assert list(talker.state_dict()) == names
    assert all(torch.equal(v, before[k]) for k, v in talker.state_dict().items())
    attention = talker.model.layers[0].self_attn
    assert (
        attention.q_proj.weight.untyped_storage().data_ptr()
        == attention.k_proj.weight.untyped_storage().data_ptr()
    )
    decoder = generating._DECODERS[talker]
    with torch.no_grad():
        for parameter in talker.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    second = generate(talker, [prompt], GREEDY)[0]
    assert generating._DECODERS[talker] is decoder
    assert not same(first, second) and same(second, generate_naive(talker, prompt, GREEDY))
    talker.load_state_dict(before, assign=True)
    assert same(generate(talker, [prompt], GREEDY)[0], first)
    assert generating._DECODERS[talker] is not decoder
    run_one(talker, prompt).sum().backward()
    assert all(p.grad is not None for p in attention.parameters())


def test_an_adapter_that_is_not_merged_goes_through_the_modules():
    talker, prompts = tiny_talker(scale=6), three_prompts()
    model = attach_lora(talker, rank=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    assert not Engine.supports(model) and not Engine.supports(talker)
    made = list(generate_each(model, prompts, GREEDY, max_batch=2))
    assert [i for i, _ in made] == [0, 1, 2]
    for i, one in made:
        assert same(one, generate_naive(model, prompts[i], GREEDY))


def test_what_the_functions_are_not_is_refused():
    assert Engine.supports(tiny_talker())
    assert not Engine.supports(tiny_talker(attention_bias=True))
    assert not Engine.supports(tiny_talker(hidden_act="gelu"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not Engine.supports(tiny_talker())
    half = tiny_talker().bfloat16()
    assert Engine.supports(half)
    assert len(generate(half, three_prompts(), GREEDY)) == 3


def test_all_modes_greedy_and_drawn_may_be_compiled_in_one_process(monkeypatch):
    """More traces of one function than torch.compile's limit of 8."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **more: compile(f, backend="eager", **more))
    torch._dynamo.reset()
    engine = Engine(tiny_talker())
    both = ("vllm", "sglang")
    for size, draw, modes in itertools.product((1, 2), (False, True), (both, both[:1], both[1:])):
        options = SamplingTensors.of([Sampling()] * size, 1026, "cpu")
        named = {mode: torch.ones(size, dtype=torch.bool) for mode in modes}
        row, *_ = engine.compiled(next_row, size)(
            torch.zeros(size, 8, 1026), options, RampState.start(size), 0, named, draw
        )
        assert row.shape == (size, 8)
    torch._dynamo.reset()


def test_what_the_compiler_refuses_runs_as_it_is(monkeypatch):
    def refuses(function, **options):
        def call(*args):
            raise torch._dynamo.exc.Unsupported("no such method")

        return call

    monkeypatch.setattr(torch, "compile", refuses)
    talker, prompts = tiny_talker(scale=6), three_prompts()
    settings = [Sampling(seed=i, max_frames=10) for i in range(3)]
    with pytest.warns(UserWarning, match="torch.compile refuses .*no such method"):
        made = generate(talker, prompts, settings, compile=True)
    for one, prompt, setting in zip(made, prompts, settings, strict=True):
        assert same(one, generate_naive(talker, prompt, setting))


def test_what_was_recorded_outlives_a_call_under_autocast():
    talker, setting = tiny_talker(), Sampling(temperature=0.0, max_frames=3)
    generate(talker, three_prompts(), setting)
    decoder = generating._DECODERS[talker]
    with torch.autocast("cpu", torch.bfloat16):
        assert len(generate(talker, three_prompts(), setting)) == 3
    assert generating._DECODERS[talker] is decoder


def test_a_changed_module_is_heard():
    talker, setting = tiny_talker(scale=6), Sampling(temperature=0.0, max_frames=6)
    prompt = three_prompts()[0]
    generate(talker, [prompt], setting)

    class Zero(torch.nn.Module):
        def forward(self, weight):
            return 0 * weight

    down = talker.model.layers[0].mlp.down_proj
    torch.nn.utils.parametrize.register_parametrization(down, "weight", Zero())
    with torch.no_grad():
        assert same(generate(talker, [prompt], setting)[0], generate_naive(talker, prompt, setting))
