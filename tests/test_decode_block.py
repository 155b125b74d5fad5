"""The Triton blocks of a decode step against the engine's own, in Triton's interpreter on a CPU."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import torch
import torch.nn.functional as F

from higgs_lab.decode_trial import trial
from higgs_lab.engine import Engine
from tests.test_decode_attention import run, speech
from tests.tiny import tiny_talker

SIZES = dict(hidden_size=128, intermediate_size=128, num_attention_heads=4, head_dim=32)
POSITIONS = (0, 3, 39, 17, 8)
# rows, rows of the matrix, length of a sum
CASES = [(1, 100, 256), (5, 130, 1280), (16, 64, 512), (17, 64, 384), (64, 200, 128)]
# of one row: matrix rows and sum, the last two of which leave a rest behind two powers of two
ROW_CASES = [(6, 128), (100, 384), (130, 1280), (600, 2560), (10, 896), (34, 1408)]


def relative(found, wanted) -> float:
    found, wanted = found.float(), wanted.float()
    return float((found - wanted).norm() / wanted.norm())


def product(case, dtype, device="cpu"):
    random = torch.Generator(device).manual_seed(0)
    M, N, K = case
    shapes = ((M, K), (N, K))
    return [torch.randn(s, generator=random, device=device).to(dtype) * K**-0.25 for s in shapes]


def row_errors(case, dtype, device="cpu") -> list[float]:
    """Products of one row, plain and behind a norm: how far they are off."""
    from higgs_lab.decode_row import normed_product
    from higgs_lab.decode_row import product as row_product

    x, weight = product((1, *case), dtype, device)
    random = torch.Generator(device).manual_seed(1)
    norm = torch.rand(case[1], generator=random, device=device).to(dtype)
    parts = torch.randn(3, 1, case[1], generator=random, device=device)
    errors = [relative(row_product(x, weight).sum(0), x.float() @ weight.float().T)]
    for more in (None, parts):
        total = x if more is None else (x + more.sum(0)).to(dtype)
        h = F.rms_norm(total.float(), case[1:], norm.float(), 1e-6)
        wanted = h @ weight.float().T
        summed, made = normed_product(x, more, norm, 1e-6, weight, gated=False)
        errors += [relative(summed, total), relative(made[0], wanted)]
        gate, up = wanted.chunk(2, dim=-1)
        made = normed_product(x, more, norm, 1e-6, weight, gated=True)[1]
        errors.append(relative(made, (F.silu(gate) * up).to(dtype)))
    return errors


def both(dtype, device="cpu", count=5) -> list[dict]:
    """Two blocks for rows at different positions, in slots of a larger cache: Triton's, ours."""
    from higgs_lab.decode_block import decode_blocks

    talker = tiny_talker(scale=6, **SIZES).to(device, dtype)
    engine, room = Engine(talker), 48
    random = torch.Generator(device).manual_seed(0)
    position = torch.tensor(POSITIONS, device=device).repeat(-(-count // 5))[:count]
    x = torch.randn(count, 128, generator=random, device=device).to(dtype)
    shape = (2, 2, count + 1, 2, room, 32)  # blocks, keys and values
    cache = torch.randn(shape, generator=random, device=device).to(dtype)
    rope, slot = engine.rope(room), torch.arange(count, device=device)
    cos, sin = rope[0][position, None], rope[1][position, None]
    at = torch.arange(room, device=device)
    hidden = torch.zeros(count, room, dtype=dtype, device=device)
    hidden = hidden.masked_fill_(at > position[:, None], float("-inf"))[:, None, None]
    engine.split_kv = False
    with torch.no_grad():
        ours = {"x": x.clone(), "cache": cache.clone()}
        for layer, (keys, values) in zip(engine.layers, ours["cache"], strict=True):
            q = engine.cached_project(ours["x"], layer, cos, sin, keys, values, slot, position)
            seen = (keys[:count], values[:count], position + 1, hidden)
            engine.finish(ours["x"], engine.attend(q, *seen), layer, engine.feed_forward)
        ours["logits"] = engine.logits(ours["x"])
        new = {"x": x, "cache": cache}
        blocks = (engine.layers, engine.norm, engine.eps)
        found = decode_blocks(x, *blocks, list(cache), rope, position)
        new["logits"] = engine.logits(found, normed=True)
    if count == 1:  # which is not overwritten
        del new["x"], ours["x"]
    return [new, ours]


def interpreted() -> None:
    """Runs in a process of its own, for Triton must know at its import that it shall interpret."""
    from higgs_lab import decode_block
    from higgs_lab.decode_block import gated, linear

    found = {"linear": [], "gated": [], "mates": True, "blocks": []}
    found["row"] = [
        [row_errors(case, d) for d in (torch.float32, torch.float16)] for case in ROW_CASES
    ]
    for case in CASES:
        x, weight = product(case, torch.float16)
        parts = linear(x, weight)
        wanted = x.float() @ weight.float().T
        found["linear"].append(relative(parts.sum(0), wanted))
        gate, up = wanted.chunk(2, dim=-1)
        found["gated"].append(relative(gated(x, weight), F.silu(gate) * up))
        found["mates"] &= torch.equal(parts[:, -1:], linear(x[-1:], weight))
    for dtype in (torch.float32, torch.float16):
        pairs = [both(dtype), both(dtype, count=1)]
        found["blocks"].append([relative(new[n], ours[n]) for new, ours in pairs for n in ours])
    engine = Engine(tiny_talker(scale=6, **SIZES).half())
    found["trial"] = [[trial(engine, rows) for rows in (1, 3, 17)]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("higgs_lab.decode_block.gated", lambda x, weight: x[:, :1] + gated(x, weight))
        found["trial"].append(trial(engine))
    with pytest.MonkeyPatch.context() as patch:  # all look at the first position alone
        attend = decode_block.decode_attention
        patch.setattr(
            decode_block, "decode_attention", lambda *a, **k: attend(*a[:3], a[3].clamp(max=1), **k)
        )
        found["trial"].append(trial(engine, 1))
    rotated = []
    with pytest.MonkeyPatch.context() as patch:
        rotate = decode_block.rotate
        patch.setattr(
            decode_block, "rotate", lambda p, *a: rotated.append(len(p[0])) or rotate(p, *a)
        )
        given = [
            dict(blocks=(True, True)),
            dict(blocks=(True, True), share=True),
            dict(blocks=(True, False), limit=1),
            dict(blocks=(False, True), limit=1),
        ]
        found["spoken"] = [speech(**one, **SIZES)[0] for one in given]
        rotated.clear()
        found["spoken"].append(speech(blocks=(True, True), most=1, record_rows=9, **SIZES)[0])
    found["rotated"] = sorted(set(rotated))
    print(json.dumps(found))


@pytest.fixture(scope="module")
def found():
    return run("interpreted", "tests.test_decode_block")


def test_parts_add_up_to_the_product(found):
    assert len(found["linear"]) == len(CASES)
    assert all(error < 1e-6 for error in found["linear"])  # a NaN is not


def test_products_of_one_row_behind_its_sum_and_norm(found):
    for fp32, fp16 in found["row"]:
        assert all(error < 1e-5 for error in fp32)
        assert all(error < 1e-3 for error in fp16)  # sums and products are rounded once


def test_gate_and_up_are_multiplied_where_they_are_summed(found):
    assert all(error < 5e-4 for error in found["gated"])  # rounded once, to fp16


def test_a_rows_sums_do_not_depend_on_its_mates(found):
    assert found["mates"]


def test_blocks_are_the_engines(found):
    fp32, fp16 = found["blocks"]  # rows, caches, logits
    assert all(error < 1e-5 for error in fp32)
    assert all(error < 5e-3 for error in fp16)


def test_a_trial_tells_right_from_wrong(found):
    right, *wrong = found["trial"]
    assert len(right) == 3 and all(error < 0.01 for error in right)
    assert all(error > 0.05 for error in wrong)  # a product of several rows, attention of one


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        ({}, None),
        ({1: 0.2}, "blocks of a single row are wrong here"),
        ({1: None}, "blocks of a single row do not run, .*: no room"),
        ({64: 0.2}, "blocks of few rows are wrong here"),
        ({17: float("nan")}, "blocks of few rows are wrong here"),
        ({3: None}, "blocks of few rows do not run, .*: no room"),
    ],
)
def test_blocks_that_a_trial_finds_wrong_are_not_used(errors, said, monkeypatch):
    """One row and several have kernels of their own: either may fail, and neither is tried before
    it is asked for."""
    pytest.importorskip("triton")
    tried = []

    def trial(engine, rows: int) -> float:
        tried.append(rows)
        if errors.get(rows, 0.0) is None:
            raise RuntimeError("no room")
        return errors.get(rows, 0.01)

    monkeypatch.setattr("higgs_lab.decode_trial.trial", trial)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    engine = Engine(tiny_talker(**SIZES).half())
    engine.split_kv = True
    one, few = 1 not in errors, not set(errors) - {1}
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        assert engine.by_blocks(1) == one and tried == [1]
        assert [engine.by_blocks(rows) for rows in (2, 64, 65)] == [few, few, False]
        asked = list(tried)
        assert engine.by_blocks(1) == one and tried == asked and tried.count(3) == 1
    texts = [str(one.message) for one in found]
    assert len(texts) == bool(said) and (not said or re.search(said, texts[0]))


def test_speech_is_the_slow_twins(found):
    """With the blocks for all rows, of one reference, too; for a single row and where that is not
    theirs; and with the rotation alone, of more rows than they take.
    """
    assert found["spoken"] == [[True] * 3] * 5 and found["rotated"] == [2]


def test_splits_fill_a_gpu_and_no_more():
    pytest.importorskip("triton")
    from higgs_lab.decode_block import PROGRAMS, TILE, splits_of

    for rows, length in [(6144, 2560), (2560, 4096), (2560, 9728), (8208, 2560)]:
        programs = splits_of(rows, length) * -(-rows // TILE)
        assert 0.7 * PROGRAMS < programs <= PROGRAMS
    assert splits_of(128, 512) == 2  # of two chunks each


def test_sizes_that_do_not_divide_are_left_to_the_engine():
    pytest.importorskip("triton")
    from higgs_lab.decode_block import fits

    assert fits(2560, 9728, 32, 128)
    assert not fits(2560, 9700, 32, 128) and not fits(64, 96, 4, 16)
