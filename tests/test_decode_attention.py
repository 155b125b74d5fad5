"""The Triton kernels against SDPA, on a CPU in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.conftest import ROOT

# query heads, key-value heads, head width, lengths, splits
CASES = [
    (4, 4, 16, (1, 1), 1),
    (4, 2, 16, (1, 130, 64), 1),
    (4, 1, 32, (65, 1, 128, 7), 2),
    (4, 2, 128, (200, 1), 4),
    (2, 2, 16, (3, 300), 16),
]


def wanted(q, keys, values, lengths) -> torch.Tensor:
    """SDPA in fp32, one slot after another."""
    groups = q.shape[1] // keys.shape[1]
    found = []
    for one, key, value, length in zip(q, keys, values, lengths, strict=True):
        seen = (t[:, :length].float().repeat_interleave(groups, dim=0) for t in (key, value))
        found.append(F.scaled_dot_product_attention(one.float()[:, None], *seen)[:, 0])
    return torch.stack(found)


def tensors(case, dtype, device="cpu"):
    """q, and caches cut out of larger ones, in which NaN stands wherever nobody may look."""
    heads, kv_heads, width, lengths, _ = case
    random = torch.Generator(device).manual_seed(0)
    q = torch.randn(len(lengths), heads, width, generator=random, device=device).to(dtype)
    shape = (len(lengths) + 2, kv_heads, 320, width)
    caches = torch.randn(2, *shape, generator=random, device=device).to(dtype)
    for slot, length in enumerate(lengths):
        caches[:, slot, :, length:] = float("nan")
    lengths = torch.tensor(lengths, device=device)
    return q, *(cache[: len(lengths), :, :310] for cache in caches), lengths


def sharing(dtype, device="cpu") -> tuple[list, torch.Tensor, torch.Tensor]:
    """Slots that begin as another does, the table that says so, and a mask [slots, 1, C, 1] of what
    is then read there: whole blocks of 64 positions."""
    q, keys, values, lengths = tensors((4, 2, 32, (200, 150, 90, 200), 1), dtype, device)
    table = torch.tensor([[0, 0, 2, 2], [0, 130, 0, 70]], device=device)
    at = torch.arange(keys.shape[2], device=device)
    begins = (at < table[1][:, None])[:, None, :, None]
    keys, values = (torch.where(begins, t[table[0]], t) for t in (keys, values))
    read = (at < table[1][:, None] // 64 * 64)[:, None, :, None]
    return [q, keys, values, lengths], table, read


def interpreted() -> None:
    """Runs in a process of its own, for Triton must know at its import that it shall interpret."""
    from higgs_lab.decode_attention import decode_attention

    errors = []
    for case in CASES:
        for dtype in (torch.float32, torch.float16):
            inputs = tensors(case, dtype)
            found = decode_attention(*inputs, case[-1])
            assert found.dtype == dtype
            errors.append(float((found.float() - wanted(*inputs)).abs().max()))
    inputs = tensors(CASES[1], torch.float16)
    together = decode_attention(*inputs, 2)
    alone = [decode_attention(*(t[i : i + 1] for t in inputs), 2) for i in range(3)]
    print(json.dumps({"errors": errors, "mates": torch.equal(together, torch.cat(alone)),
                      "shared": shared_is_read()}))  # fmt: skip


def shared_is_read(dtype=torch.float16, device="cpu") -> bool:
    """Whether what slots share is read where the other has it, for their own is NaN: to the bit."""
    from higgs_lab.decode_attention import decode_attention

    (q, *caches, lengths), table, read = sharing(dtype, device)
    spoiled = [t.masked_fill(read, float("nan")) for t in caches]
    return all(
        torch.equal(
            decode_attention(q, *spoiled, lengths, splits, shared=table),
            decode_attention(q, *caches, lengths, splits),
        )
        for splits in (1, 2, 4)
    )


def spoken() -> None:
    print(json.dumps([*speech(limit=3), speech(share=True)[0]]))


def speech(
    blocks: tuple[bool, bool] = (False, False),
    most: int = 64,
    limit: int = 2,
    record_rows: int = 0,
    share: bool = False,
    **sizes,
) -> tuple[list, list]:
    """Speech as on a GPU: idle slots, moves, growth. Which takes are the slow twin's, and of each
    recording how many slots, up to which position, and how many positions there are.

    blocks: whether Triton's are a single row's, and those of up to `most`. limit: spoken at once.
    share: of prompts with one reference, which nobody may read but where the first of them has it.
    """
    from higgs_lab import decode_attention, decode_block, decoding
    from higgs_lab.decoding import Decoder
    from higgs_lab.engine import Engine
    from higgs_lab.generate import generate_naive
    from higgs_lab.slots import requests_of
    from tests.test_decoding import ragged, same, voices
    from tests.tiny import tiny_talker

    decoding.LENGTHS, decoding.SIZES, decoding.STEPS = (32, 48, 96), (1, 2, 4), 4
    decoding.RECORD_ROWS = record_rows
    decoding._fitting = lambda *_: limit  # no room to spare: the cache grows
    decode_attention.MAX_SPLITS = 2  # the interpreter is slow
    decode_attention.BLOCK = 16 if share else 64
    decode_block.MAX_ROWS = most
    keys, read = set(), 0

    def replay(self, *key):
        nonlocal read
        keys.add((*key[:2], self.length))
        own = [
            t[slot, :, : count // 16 * 16]
            for slot, (holder, count) in enumerate(self.begins.T.tolist())
            for t in (t for pair in self.cache for t in pair)
            if holder != slot and share
        ]
        saved, read = [t.clone() for t in own], read + len(own)
        for tensor in own:
            tensor.fill_(float("nan"))
        self.step_once(*key)
        for tensor, value in zip(own, saved, strict=True):
            tensor.copy_(value)

    decoding.Slots.replay = replay
    talker = tiny_talker(scale=6, **sizes)
    prompts, settings = voices(3) if share else ragged(3)
    settings = [replace(s, max_frames=1 + 2 * i) for i, s in enumerate(settings)]
    engine = Engine(talker)
    engine.split_kv, (engine.one_row, engine.few_rows) = True, blocks
    with torch.no_grad():
        made = dict(Decoder(engine).run(requests_of(prompts, settings, 8), limit, graphs=True))
    assert bool(read) == share
    twins = [generate_naive(talker, *pair) for pair in zip(prompts, settings, strict=True)]
    return [same(made[i], twin) for i, twin in enumerate(twins)], sorted(keys)


def version(module) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split(".")[:2])


def run(name: str, module: str = "tests.test_decode_attention"):
    """What a function prints as its last line, run in Triton's interpreter."""
    triton = pytest.importorskip("triton")
    if version(triton) < (3, 7) and version(np) >= (2, 4):
        pytest.skip("Triton's interpreter reads numpy 2.4's arrays from 3.7 on")
    code = f"from {module} import {name}; {name}()"
    env = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_it_is_sdpa_over_each_slots_own_length():
    found = run("interpreted")
    assert len(found["errors"]) == 2 * len(CASES)
    assert all(error < 1e-5 for error in found["errors"][0::2])  # fp32; a NaN is not
    assert all(error < 2e-3 for error in found["errors"][1::2])  # fp16
    assert found["mates"] and found["shared"]


def test_speech_is_the_slow_twins_with_one_recording_a_batch_size():
    same, keys, shared = run("spoken")
    assert shared == [True] * 3
    assert same == [True] * 3
    assert len({size for size, *_ in keys}) > 1 and len({room for *_, room in keys}) > 1
    # so that keys differ by their size alone until the cache grows
    assert all(length == room for _, length, room in keys)


def test_splits_fill_a_gpu_and_no_more():
    pytest.importorskip("triton")
    from higgs_lab.decode_attention import PROGRAMS, splits_of

    assert [splits_of(n, 8) for n in (1, 2, 4, 16, 64, 256)] == [16, 16, 8, 2, 1, 1]
    assert all(splits_of(n, 8) * n * 8 <= PROGRAMS for n in range(1, 33))
