"""Packing: nothing lost, nothing cut, the same order on any number of ranks, resumable."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from higgs_lab.batches import PackedLoader, pack, plan_packs
from higgs_lab.prompt import render_example
from tests.tiny import random_codes, three_examples, tiny_vocab

COLUMNS = ("ids", "is_audio", "rows", "labels", "supervised")


def test_pack_lays_examples_end_to_end():
    examples = three_examples()
    batch = pack(examples)
    lengths = [len(e) for e in examples]
    assert batch.cu_seqlens.tolist() == [0, *itertools.accumulate(lengths)]
    assert batch.cu_seqlens.dtype == torch.int32
    assert (batch.max_seqlen, batch.real_positions, batch.num_documents) == (
        max(lengths),
        sum(lengths),
        3,
    )
    for name in COLUMNS:
        whole = torch.cat([getattr(e, name) for e in examples])
        assert torch.equal(getattr(batch, name)[0], whole), name
    expected = [i for n in lengths for i in range(n)]
    assert batch.position_ids[0].tolist() == expected


def test_padding_is_more_documents_without_loss_none_of_them_the_longest():
    examples = three_examples()
    real = sum(map(len, examples))
    batch = pack(examples, pad_to=real + 300)
    assert batch.ids.shape == (1, real + 300)
    bounds = batch.cu_seqlens.tolist()
    assert bounds[3] == real and bounds[-1] == real + 300
    longest = max(map(len, examples))
    assert batch.max_seqlen == longest == max(np.diff(bounds))
    assert (batch.real_positions, batch.num_documents, batch.max_seqlen) == (real, 3, longest)
    assert not batch.supervised[0, real:].any()
    assert not batch.is_audio[0, real:].any()
    starts = batch.position_ids[0] == 0
    assert starts.nonzero()[:, 0].tolist() == bounds[:-1]
    assert torch.equal(pack(examples, pad_to=real).ids, pack(examples).ids)


def test_what_does_not_fit_is_refused_not_cut():
    with pytest.raises(ValueError, match="more than pad_to=50"):
        pack(three_examples(), pad_to=50)
    with pytest.raises(ValueError, match="no examples"):
        pack([])


def test_moving_keeps_every_field():
    batch = pack(three_examples())
    moved = batch.to("cpu")
    for name in (*COLUMNS, "position_ids", "cu_seqlens"):
        assert torch.equal(getattr(moved, name), getattr(batch, name))
    assert (moved.max_seqlen, moved.real_positions) == (batch.max_seqlen, batch.real_positions)
    assert set(batch.inputs()).isdisjoint({"labels", "supervised"})


lengths_lists = st.lists(st.integers(1, 100), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(lengths=lengths_lists, budget=st.integers(100, 250), window=st.integers(1, 70))
def test_packs_hold_every_example_once_within_the_budget(lengths, budget, window):
    lengths = np.array(lengths)
    order = np.random.default_rng(0).permutation(len(lengths))
    packs = plan_packs(lengths, budget, order, window)
    assert sorted(i for p in packs for i in p) == list(range(len(lengths)))
    assert all(lengths[p].sum() <= budget for p in packs)
    if window >= len(lengths):  # first fit leaves at most one pack half empty
        sums = sorted(int(lengths[p].sum()) for p in packs)
        assert all(s > budget / 2 for s in sums[1:])


# --- the loader


def build(index: int, epoch: int):
    """An example that tells its index and epoch: codebook 0 of its first two rows."""
    codes = random_codes(8 + index % 5, index)
    codes[0, 0], codes[1, 0] = index, epoch
    return render_example(tiny_vocab(), "Hi.", codes)


LENGTHS = [len(build(i, 0)) for i in range(23)]


def loader(**changes) -> PackedLoader:
    return PackedLoader(LENGTHS, build, **({"budget_positions": 70, "seed": 5} | changes))


def seen(batch) -> list[tuple[int, int]]:
    """(index, epoch) of each document."""
    starts = [i for i in range(batch.ids.shape[1]) if batch.position_ids[0, i] == 0]
    found = []
    for start in starts[: batch.num_documents]:
        first = start + int(batch.supervised[0, start:].any(-1).int().argmax())
        found.append((int(batch.labels[0, first, 0]), int(batch.labels[0, first + 1, 0])))
    return found


def take(from_loader: PackedLoader, n: int) -> list[list[tuple[int, int]]]:
    return [seen(batch) for batch in itertools.islice(from_loader, n)]


def test_an_epoch_shows_every_example_and_the_next_in_another_order():
    one = loader()
    n = len(one.epoch_packs(0))
    first = [d for docs in take(one, n) for d in docs]
    assert sorted(first) == [(i, 0) for i in range(23)]
    second = [d for docs in take(one, len(one.epoch_packs(1))) for d in docs]
    assert sorted(second) == [(i, 1) for i in range(23)]
    assert [i for i, _ in first] != [i for i, _ in second]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_together_see_what_one_process_sees(world):
    """Step s of N ranks is packs N*s .. N*s+N-1 of one process that accumulates over N."""
    steps = 2 * len(loader(packs_per_step=world).epoch_packs(0)) // world
    alone = take(loader(packs_per_step=world), steps * world)
    ranks = [
        take(loader(rank=r, world_size=world, packs_per_step=world), steps) for r in range(world)
    ]
    dealt = [ranks[r][s] for s in range(steps) for r in range(world)]
    assert dealt == alone


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_epoch_holds_whole_steps(world):
    for packs_per_step in (1, 2, 4):
        one = loader(world_size=world, packs_per_step=packs_per_step)
        packs = one.epoch_packs(0)
        assert len(packs) % world == len(packs) % packs_per_step == 0
        assert {i for p in packs for i in p} == set(range(23))


@pytest.mark.parametrize("stop", [0, 1, 5, 11, 12, 13, 30])
def test_a_resumed_loader_goes_on_with_the_next_pack(stop):
    straight = take(loader(), 40)
    first = loader()
    take(first, stop)
    second = loader()
    second.load_state_dict(first.state_dict())
    assert take(second, 40 - stop) == straight[stop:]


def test_another_seed_is_another_order_and_refuses_the_state():
    assert take(loader(), 3) == take(loader(), 3)
    assert take(loader(seed=6), 3) != take(loader(), 3)
    with pytest.raises(ValueError, match="seed 6.*says 5"):
        loader().load_state_dict(loader(seed=6).state_dict())


def test_the_order_does_not_hang_on_global_random_states():
    torch.manual_seed(1)
    np.random.seed(1)
    first = take(loader(), 4)
    torch.manual_seed(2)
    np.random.seed(2)
    assert take(loader(), 4) == first


def test_padded_batches_have_one_static_shape():
    shapes = {tuple(b.ids.shape) for b in itertools.islice(iter(loader(pad=True)), 20)}
    assert shapes == {(1, 70)}


def test_too_long_examples_and_empty_sets_are_refused():
    with pytest.raises(ValueError, match="longer than the budget of 20.*longest has"):
        loader(budget_positions=20)
    with pytest.raises(ValueError, match="no training examples"):
        PackedLoader([], build, budget_positions=70)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_positions_not_clips(world_size):
    """Clips of 1 to 20 s: whoever gets few clips gets long ones."""
    rng = np.random.default_rng(0)
    lengths = (25 * rng.lognormal(1.3, 0.7, 4000)).clip(50, 600).astype(int)
    loader = PackedLoader(
        lengths, None, 4096, world_size=world_size, packs_per_step=world_size
    )  # fmt: skip
    packs = loader.epoch_packs(0)
    sums = np.array([sum(lengths[i] for i in members) for members in packs])
    assert sums.sum() / (len(packs) * 4096) > 0.97  # and so little of a padded pack is padding
    by_rank = sums.reshape(-1, world_size)
    assert (by_rank.max(1) / by_rank.mean(1)).mean() < 1.02  # they wait for the fullest each step
    clips = np.array([len(members) for members in packs]).reshape(-1, world_size)
    assert (clips.max(1) / clips.mean(1)).mean() > 1.05
