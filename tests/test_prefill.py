"""Passes over prompts: filled up for recording, and references copied from who speaks with them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from higgs_lab import decoding, prefill
from higgs_lab.decoding import Decoder
from higgs_lab.engine import Engine
from higgs_lab.generate import generate, generate_naive
from higgs_lab.prompt import Prompt, render_prompt
from higgs_lab.slots import Slots, reference_of, requests_of
from tests.test_decoding import GREEDY, masked_attend, ragged, same, voices
from tests.tiny import random_codes, tiny_talker, tiny_vocab


@pytest.fixture(scope="module")
def talker():
    return tiny_talker(scale=6)


@pytest.fixture(scope="module")
def slow_voices(talker):
    return [generate_naive(talker, p, s, True) for p, s in zip(*voices(12), strict=True)]


def test_short_passes_over_prompts_are_filled_up_for_recording(talker, monkeypatch):
    """All that a GPU does but the recording itself: what fills a pass up changes nothing."""
    rooms, bounds = [], []

    def replay(self, slots, room, span, longest, copies, compile):
        rooms.append(room)
        bounds.append(longest)
        assert span == room and not copies
        assert longest - 16 < self.ends.diff().max() <= longest
        self._pass(slots, room, span, longest, copies, compile)

    record_passes(monkeypatch, replay)
    decoder = Decoder(Engine(talker))
    requests = requests_of(*ragged(9), 8)
    slow = [generate_naive(talker, r.prompt, r.sampling) for r in requests]
    with torch.no_grad():
        for limit in (1, 2, 5):  # five at once are too many to be recorded
            decoder._slots(requests, limit, 4, False, True).passes.records = True
            made = dict(decoder.run(requests, limit, graphs=None))
            assert all(same(made[i], slow[i]) for i in range(9))
    assert {16, 48} <= set(rooms) and len(rooms) > 9 and len(set(bounds)) > 1


def record_passes(monkeypatch, replay) -> None:
    """Few short lengths, and replay in place of recorded passes."""
    monkeypatch.setattr(prefill.Passes, "_replay", replay)
    monkeypatch.setattr(prefill, "PASSES", (16, 48, 128))
    monkeypatch.setattr(prefill, "WHOLES", (64, 128))
    monkeypatch.setattr(prefill, "PASS_PROMPTS", 3)
    monkeypatch.setattr(prefill, "bound_of", lambda n: -(-n // 16) * 16)


def computed(monkeypatch) -> list[int]:
    """Positions of each pass from now on."""
    passes, run = [], Engine.prefill
    monkeypatch.setattr(
        Engine, "prefill", lambda self, x, *a: passes.append(len(x)) or run(self, x, *a)
    )
    return passes


@pytest.mark.parametrize("max_batch", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("recorded", [False, True])
def test_a_reference_is_computed_once_while_its_voice_speaks(
    talker, slow_voices, monkeypatch, max_batch, recorded
):
    passes, spans = computed(monkeypatch), []

    def replay(self, slots, room, span, longest, copies, compile):
        assert copies or span == room
        assert longest - 16 < self.ends.diff().max() <= longest
        spans.append((span, copies))
        self._pass(slots, room, span, longest, copies, compile)

    record_passes(monkeypatch, replay)
    decoder, requests = Decoder(Engine(talker)), requests_of(*voices(12), 8)
    with torch.no_grad():
        decoder._slots(requests, max_batch, 4, True, True).passes.records = recorded
        made = dict(decoder.run(requests, max_batch, log_probs=True, graphs=None))
    for i, wanted in enumerate(slow_voices):
        assert same(made[i], wanted)
        torch.testing.assert_close(made[i].log_probs, wanted.log_probs, atol=2e-4, rtol=1e-4)
    every = sum(len(r.prompt) - 1 for r in requests)
    held = {r.reference: r.shared for r in requests if r.shared}
    assert len(held) == 2 and min(held.values()) == 2 + 12 + 7
    repeated = sum(r.shared for r in requests) - sum(held.values())
    if recorded:
        assert any(copies for _, copies in spans) == (1 < max_batch < 64)
    elif max_batch == 1:
        assert sum(passes) == every  # its slot is the next one's
    elif max_batch >= 5:
        assert sum(passes) == every - repeated
    else:
        assert every - repeated <= sum(passes) < every


def test_slots_of_one_voice_read_its_reference_where_the_first_has_it(
    talker, slow_voices, monkeypatch
):
    """Whoever ends, moves or comes in: also when the first one has ended before the others."""
    monkeypatch.setattr(decoding.Slots, "replay", decoding.Slots.step_once)
    monkeypatch.setattr(decoding, "SIZES", (1, 2, 4, 8))
    monkeypatch.setattr(decoding, "RECORD_ROWS", 0)  # slots move
    monkeypatch.setattr(decoding, "ADMIT_STEPS", 1)
    engine = Engine(talker)
    engine.split_kv, engine.attend = True, masked_attend(engine)
    with torch.no_grad():
        made = dict(Decoder(engine).run(requests_of(*voices(12), 8), 5, graphs=True))
    assert all(same(made[i], wanted) for i, wanted in enumerate(slow_voices))
    assert len(engine.holders) > 50 and len(set(engine.holders)) > 3


def cut(prompt: Prompt, length: int) -> Prompt:
    return Prompt(prompt.ids[:length], prompt.is_audio[:length], prompt.rows[:length])


def test_prompts_that_end_with_their_reference_or_soon_behind_it(talker):
    """Of two equal ones the second copies all but what a pass and the step must have. It comes in
    alone, for one of another voice."""
    whole, other = (render_prompt(tiny_vocab(), "text", random_codes(12, i)) for i in range(2))
    behind = int(whole.is_audio.nonzero()[-1]) + 1
    for length in (behind, behind + 1, behind + 2):
        prompts = [cut(whole, length), other, cut(whole, length)]
        settings = [replace(GREEDY, max_frames=n) for n in (9, 3, 2)]
        made = generate(talker, prompts, settings, max_batch=2)
        assert all(same(one, generate_naive(talker, whole_, s)) for one, whole_, s in
                   zip(made, prompts, settings, strict=True))  # fmt: skip


def test_what_fills_a_copying_pass_up_stands_behind_all_of_it(talker, monkeypatch):
    """Texts longer than the reference, first in a pass; and prompts that fill a length just so."""
    spans, ends = [], []

    def replay(self, slots, room, span, longest, copies, compile):
        spans.append(span)
        self._pass(slots, room, span, longest, copies, compile)

    def prefill_(self, x, mine, whole, documents, *more):
        lengths = documents.cu_seqlens.diff()
        assert documents.max_seqlen >= lengths.max()
        ends.append(int(lengths.sum()))
        run(self, x, mine, whole, documents, *more)

    vocab, run = tiny_vocab(), Engine.prefill
    prompts = [render_prompt(vocab, "word " * n, random_codes(2, 0)) for n in (5, 4, 5, 4)]
    settings = [replace(GREEDY, max_frames=n) for n in (19, 5, 4, 3)]  # the others come in alone
    record_passes(monkeypatch, replay)
    monkeypatch.setattr(Engine, "prefill", prefill_)
    exact = sum(len(p) - 1 for p in prompts[:2])
    monkeypatch.setattr(prefill, "WHOLES", (exact, 128))
    for records in (True, False):
        decoder, requests = Decoder(Engine(talker)), requests_of(prompts, settings, 8)
        with torch.no_grad():
            decoder._slots(requests, 2, 4, False, True).passes.records = records
            made = dict(decoder.run(requests, 2, graphs=None))
        for i, prompt in enumerate(prompts):
            assert same(made[i], generate_naive(talker, prompt, settings[i])), (records, i)
    assert spans[0] == 128 and exact in ends


def test_recordings_of_passes_end_with_the_cache_that_they_write_to(talker):
    slots = Slots(Engine(talker), 2, 32, 8, False)
    slots.passes.recorded["any"] = slots.graphs["any"] = None
    slots.grow(32)
    assert slots.passes.recorded and slots.graphs
    slots.grow(48)
    assert not slots.passes.recorded and not slots.graphs


def test_references_are_shared_by_what_stands_in_them():
    """Not by their length, and whoever holds the tensors; without one there is nothing to share."""
    vocab, codes = tiny_vocab(), random_codes(5, 0)
    prompts = [
        render_prompt(vocab, "one", codes),
        render_prompt(vocab, "another text", codes.clone()),
        render_prompt(vocab, "one", random_codes(5, 1)),
        render_prompt(vocab, "one", codes, "said"),
        render_prompt(vocab, "one", codes, "sent"),
        render_prompt(vocab, "one"),
    ]
    prompts[1].ids = prompts[1].ids.masked_fill(prompts[1].is_audio, 7)  # which nobody reads
    a, b, c, d, e, none = map(reference_of, prompts)
    assert a == b and len({a, c, d, e}) == 4 and none == (0, b"")
    assert a[0] == 2 + 5 + 7 and a[0] < d[0] == e[0]
