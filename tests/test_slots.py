"""Slots of the static cache: how many there are, when they are kept, how many a step takes."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest

from higgs_lab import decoding, slots
from higgs_lab import generate as generating
from higgs_lab.decoding import Decoder, Running
from higgs_lab.engine import Engine
from higgs_lab.generate import generate, generate_naive
from higgs_lab.slots import requests_of
from tests.test_decoding import ragged, same
from tests.tiny import tiny_talker


@pytest.fixture(scope="module")
def talker():
    return tiny_talker(scale=6)


def test_slots_are_kept_for_the_next_call(talker):
    prompts, settings = ragged(4)
    generate(talker, prompts, settings)
    slots = generating._DECODERS[talker].slots
    again = generate(talker, prompts[:3], settings[:3])
    assert generating._DECODERS[talker].slots is slots
    generate(talker, prompts, [replace(s, max_frames=s.max_frames + 9) for s in settings])
    assert generating._DECODERS[talker].slots is slots  # though takes may last longer
    generate(talker, prompts, settings, log_probs=True)
    assert generating._DECODERS[talker].slots is not slots
    assert same(again[1], generate_naive(talker, prompts[1], settings[1]))


def test_slots_are_as_many_as_their_whole_length_fits(monkeypatch):
    """Caches of recorded steps have one of few lengths: a part more than what is needed."""
    monkeypatch.setattr(decoding, "_fitting", lambda engine, positions: 4000 // positions)
    prompts, settings = ragged(9)
    settings = [replace(s, max_frames=750) for s in settings]  # some 780 positions: in 1024
    requests, decoder = requests_of(prompts, settings, 8), Decoder(Engine(tiny_talker()))
    slots = decoder._slots(requests, 9, 4, False, graphs=True)
    assert (slots.size, slots.length) == (3, 256)
    slots = Decoder(decoder.engine)._slots(requests[1:2], 1, 4, False, graphs=True)
    assert (slots.size, slots.length) == (1, 1024)  # there is room twice: none need grow


def test_a_size_is_recorded_once_idle_slots_have_cost_as_much(talker):
    """On a GPU a call's end passes through many sizes, each for some steps."""
    decoder = Decoder(Engine(talker))
    requests = requests_of(*ragged(9), 8)
    decoder.slots = slots.Slots(decoder.engine, 64, 256, 300, False)
    two = {0: Running(requests[0], 200), 40: Running(requests[1], 200)}
    many = {n: Running(requests[2], 9) for n in range(49)}
    wasted: dict[int, int] = {}

    def size(busy, graphs=True, least=1) -> int:
        return decoder._size(busy, graphs, least, wasted)

    assert size(two, graphs=False) == size(two, False, 2) == 2
    assert size(many) == 64 and size(two) == 2  # SDPA has a recording for each length too
    decoder.engine.split_kv = True
    assert size(many) == 64
    most = -(-decoding.RECORD_ROWS // (decoding.STEPS * 62))
    assert [size(two) for _ in range(40)] == [64] * most + [2] * (40 - most)
    assert size({0: two[0]}) == 2  # the next larger that is there
    assert size({n: many[n] for n in range(20)}) == 64  # 24 would fit
    assert decoder._compact(two, 64) == 64 and sorted(two) == [0, 40]
    moved = two[40]
    assert decoder._compact(two, 2) == 2 and sorted(two) == [0, 1] and two[1] is moved
    wasted.clear()
    assert size(two) == 2  # what other calls have stepped does not count


def test_the_old_cache_is_free_before_the_new_one_is_made(talker, monkeypatch):
    decoder = Decoder(Engine(talker))
    requests = requests_of(*ragged(9), 8)
    old = weakref.ref(decoder._slots(requests[:1], 1, 1, False, False))
    seen = []
    monkeypatch.setattr(decoding, "_fitting", lambda *_: seen.append(old()) or 9)
    decoder._slots(requests, 9, 1, False, False)
    assert seen == [None] and decoder.slots.size == 9
