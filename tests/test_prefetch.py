"""Packs made ahead: the same ones, the position of the last one taken, errors where they belong."""

from __future__ import annotations

import pytest
import torch

from higgs_lab.batches import PackedLoader
from higgs_lab.prefetch import Prefetch
from higgs_lab.prompt import render_example
from tests.tiny import random_codes, tiny_vocab

FRAMES = [9, 20, 14, 30, 11, 25, 8]


def build(index: int, epoch: int = 0):
    return render_example(tiny_vocab(), f"Text {index}.", random_codes(FRAMES[index], index))


LENGTHS = [len(build(i)) for i in range(len(FRAMES))]


def loader(build=build) -> PackedLoader:
    return PackedLoader(LENGTHS, build, 80, seed=3)


def test_the_same_packs_and_the_position_of_what_was_taken():
    straight = iter(loader())
    plain = [next(straight) for _ in range(8)]
    ahead = Prefetch(loader(), depth=3)
    for wanted in plain[:3]:
        assert torch.equal(next(ahead).rows, wanted.rows)
    state = ahead.state_dict()
    ahead.close()
    assert not ahead.thread.is_alive()
    again = loader()
    again.load_state_dict(state)
    resumed = Prefetch(again)
    for wanted in plain[3:]:
        assert torch.equal(next(resumed).rows, wanted.rows)
    resumed.close()


def test_an_error_is_raised_to_whoever_takes():
    def broken(index: int, epoch: int):
        raise ValueError("row 4 is broken")

    ahead = Prefetch(loader(broken))
    with pytest.raises(ValueError, match="row 4 is broken"):
        next(ahead)
    ahead.close()
