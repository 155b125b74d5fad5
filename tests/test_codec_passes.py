"""Which clips share a pass of the codec: few shapes, none longer than it may be."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from higgs_lab.codec_batches import batches, rounded


@pytest.mark.parametrize(
    ("seconds", "wanted"), [(0.5, 1), (1, 1), (15.1, 16), (16.1, 18), (33, 36), (65, 72)]
)
def test_lengths_are_few_and_little_longer(seconds, wanted):
    assert rounded(round(25 * seconds), 25) == 25 * wanted
    assert rounded(round(25 * seconds), 0) == round(25 * seconds)


def test_batches_of_planned_shapes_are_few_and_keep_to_their_room():
    lengths = [30, 26, 26, 51, 25, 1, 2, 3, 60]
    by_length: dict[int, list[int]] = {}
    for i, n in enumerate(lengths):
        by_length.setdefault(n, []).append(i)
    made = list(batches(dict(by_length), 300, ragged=True, second=25))
    assert sorted(i for part in made for i in part) == list(range(9))
    assert [len(part) for part in made] == [4, 4, 1]
    assert all(len(p) * rounded(max(lengths[i] for i in p), 25) <= 300 for p in made)
    assert [len(part) for part in batches(by_length, 300, ragged=True)] == [5, 4]
    # what is filled up needs no power of two
    made = batches(by_length, 300, ragged=True, second=25, fill=True)
    assert [len(part) for part in made] == [4, 5]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=99), st.integers(60, 999), st.booleans())
@example([20] * 50, 17 * 25, True)
@example([20] * 50, 10**15, True)  # no room is counted down
def test_no_pass_is_longer_than_it_may_be(lengths, most, fill):
    by_length: dict[int, list[int]] = {}
    for i, n in enumerate(lengths):
        by_length.setdefault(n, []).append(i)
    made = list(batches(by_length, most, ragged=True, second=25, fill=fill))
    assert sorted(i for part in made for i in part) == list(range(len(lengths)))
    for part in made:
        rows = rounded(len(part), 1) if fill else len(part)
        assert rows * rounded(max(lengths[i] for i in part), 25) <= most or len(part) == 1
