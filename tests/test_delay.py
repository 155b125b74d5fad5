"""The delay pattern: exact cells, exact inverse, stepwise as whole, no special id let through."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from higgs_lab.delay import DelayCursor, delay, skew, undelay
from higgs_lab.generate import codes_from_rows
from higgs_lab.vocab import BOC, EOC
from tests.tiny import random_codes

B, E = BOC, EOC
shapes = st.tuples(st.integers(0, 40), st.integers(1, 10), st.integers(0, 2**31))


def codes_of(T: int, K: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 1024, (T, K), generator=torch.Generator().manual_seed(seed))


def test_trap01_fixture_of_four_codebooks_and_three_frames():
    """Facts §3.1: no all-BOC first row, no all-EOC last row."""
    codes = torch.tensor([[10 * t + c for c in range(4)] for t in range(3)])
    assert delay(codes).tolist() == [
        [0, B, B, B],
        [10, 1, B, B],
        [20, 11, 2, B],
        [E, 21, 12, 3],
        [E, E, 22, 13],
        [E, E, E, 23],
    ]


@pytest.mark.parametrize("T", [0, 1, 7, 8, 100])
def test_undelay_inverts_delay(T):
    codes = random_codes(T, seed=T)
    rows = delay(codes)
    assert rows.shape == (T + 7 if T else 0, 8)
    assert torch.equal(undelay(rows), codes)
    assert int((rows == B).sum()) == int((rows == E).sum()) == (28 if T else 0)


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_undelay_inverts_delay_for_any_shape(shape):
    codes = codes_of(*shape)
    rows = delay(codes)
    assert torch.equal(undelay(rows), codes)
    T, K, _ = shape
    # column c: c x BOC, the codes, (K-1-c) x EOC
    for c in range(K if T else 0):
        assert rows[:, c].tolist() == [B] * c + codes[:, c].tolist() + [E] * (K - 1 - c)


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_stepwise_is_whole_in_both_directions(shape):
    codes = codes_of(*shape)
    rows, K = delay(codes), shape[1]
    forward = DelayCursor(K)
    stepped = [forward.push_frame(frame) for frame in codes]
    stepped += forward.finish()
    assert [r.tolist() for r in stepped] == rows.tolist()
    back = DelayCursor(K)
    frames = [back.push_row(row) for row in rows]
    assert all(frame is None for frame in frames[: K - 1])
    assert [f.tolist() for f in frames[K - 1 :]] == codes.tolist()


@pytest.mark.parametrize("special", [BOC, EOC, -1, -100, 1026])
@pytest.mark.parametrize("cell", [(0, 0), (3, 2), (9, 7)])
def test_trap18_a_leaked_special_raises_and_is_never_clipped(special, cell):
    codes = random_codes(10)
    rows = delay(codes)
    t, c = cell
    rows[t + c, c] = special
    with pytest.raises(ValueError, match=f"id {special} at frame {t}, codebook {c} "):
        undelay(rows)
    cursor = DelayCursor(8)
    with pytest.raises(ValueError, match=f"id {special}"):
        for row in rows:
            cursor.push_row(row)


@pytest.mark.parametrize("mode", ["vllm", "sglang"])
def test_trap18_in_generated_rows_specials_become_zero_never_1023(mode):
    """A clamp would turn EOC into 1023, a valid code and a click."""
    rows = torch.full((12, 8), EOC)
    rows[2, 2] = 77
    codes = codes_from_rows(rows, mode)
    assert codes[0, 2] == 77
    assert int(codes.sum()) == 77
    assert not (codes == 1023).any()


def test_trap18_cells_outside_the_codes_may_hold_anything():
    """What stands above and below a codebook's codes is padding: the inverse never reads it."""
    codes = random_codes(9)
    rows = delay(codes)
    padding = (rows == B) | (rows == E)
    assert torch.equal(undelay(rows.masked_fill(padding, 5)), codes)


def test_rows_that_hold_no_whole_frame_are_refused():
    with pytest.raises(ValueError, match="7 rows of 8 codebooks hold no whole frame"):
        undelay(torch.zeros(7, 8, dtype=torch.long))
    assert len(skew(torch.zeros(7, 8, dtype=torch.long))) == 0


def test_delaying_twice_is_refused():
    with pytest.raises(ValueError, match="already delayed"):
        delay(delay(random_codes(5)))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(8, dtype=torch.long), r"\[T, K\]"),
        (torch.zeros(1, 3, 8, dtype=torch.long), r"\[T, K\]"),
        (torch.zeros(3, 8), "integers"),
        (torch.full((3, 8), -1), "0..1023"),
        (torch.full((3, 8), 1024), "0..1023"),
        # too narrow for 1025 or without arithmetic in torch: say so, instead of overflowing
        (torch.zeros(3, 8, dtype=torch.uint8), "int16"),
        (torch.zeros(3, 8, dtype=torch.uint16), "int16"),
        (torch.zeros(3, 8, dtype=torch.bool), "int16"),
    ],
)
def test_what_is_no_codes_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        delay(bad)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_dtype_is_kept(dtype):
    codes = random_codes(4).to(dtype)
    assert delay(codes).dtype == undelay(delay(codes)).dtype == dtype
