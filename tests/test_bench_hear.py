"""eval.bench_hear: it measures the same work on both sides, also where packages are missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from eval import bench_hear
from tests.conftest import ROOT

# What a bare machine lacks; then the whole measurement, tiny.
BARE = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name in ("numba", "tiktoken") else find(name)
from eval import bench_hear
bench_hear.main(["--size", "tiny", "--device", "cpu", "--clips", "3", "--reference-clips", "2",
                 "--tokens", "9", "--seconds", "1", "--json", sys.argv[1],
                 "--precisions", "fp32", "bf16"])
assert "numba.core" not in sys.modules and "tiktoken.core" not in sys.modules
"""


def test_both_sides_write_the_same_tokens_also_without_numba_and_tiktoken(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", BARE, str(tmp_path / "hear.json")],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "stand-ins for packages not installed: numba, tiktoken" in run.stdout
    reference, fp32, bf16 = json.loads((tmp_path / "hear.json").read_text())["rows"]
    assert (reference["path"], reference["clips"]) == ("openai-whisper, one by one", 2)
    assert fp32["same"] == [2, 2] and fp32["clips"] == 3 and fp32["distinct"] > 1
    expected = fp32["clips_per_sec"] / reference["clips_per_sec"]
    assert fp32["speedup"] == pytest.approx(expected)
    assert bf16["precision"] == "bf16" and bf16["same"][1] == 2
    assert run.stdout.count("| batches of 128 |") == 2


def test_the_stand_in_tokenizer_is_tiktokens():
    import whisper.tokenizer as tokenizer

    real = tokenizer.get_encoding("multilingual", num_languages=100)
    mine = bench_hear.Encoding(
        "mine", explicit_n_vocab=real.n_vocab, pat_str=real._pat_str,
        mergeable_ranks=real._mergeable_ranks, special_tokens=real._special_tokens,
    )  # fmt: skip
    for text in (
        " ",
        " -",
        "♪♪♪",
        "「",
        "Hello, it's 12:30!  ",
        "हिन्दी भाषा",
        "今天天气很好",
        "été",
    ):
        assert mine.encode(text) == real.encode(text)
        assert mine.decode(real.encode(text)) == text
    assert mine.eot_token == real.eot_token and mine.special_tokens_set == real.special_tokens_set
    assert mine.encode_single_token("<|de|>") == real.encode_single_token("<|de|>")


def test_clips_are_in_memory_and_all_differ():
    one, two = bench_hear.random_clips(2, 5.0)
    assert len(one) == len(two) == 80000 and one.dtype == "float32"
    assert abs(one - two).max() > 0.1 and abs(one).max() < 1
