"""The benches run with what a bare GPU machine has, and no row takes the others with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from recipes import bench_codec, bench_generate, bench_prepare, bench_train
from recipes.bench import Bench, arguments, timed

ROOT = Path(__file__).resolve().parent.parent
# Not on a bare GPU machine; None in sys.modules makes their import fail.
ABSENT = (
    "soundfile soxr datasets omegaconf bitsandbytes jiwer whisper speechbrain wandb liger_kernel"
).split()
SMALL = {
    "bench_train": "--part speed,data --positions 900 --plain-batch 2 --clips 12 "
    "--only plain,selective,data",
    "bench_generate": "--batches 2 --texts 2 --frames 8 --only plain,wav",
    "bench_codec": "--clip-sec 1 --batch 1 --only bf16",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_bench_needs_no_sound_or_data_library(nano, tmp_path, name):
    block = f"import sys, runpy; sys.modules.update(dict.fromkeys({ABSENT!r}))\n"
    run = f"runpy.run_module('recipes.{name}', run_name='__main__', alter_sys=True)"
    file = tmp_path / "rows.json"
    options = [*SMALL[name].split(), "--size", "nano", "--row-sec", "0", "--out", str(file)]
    code = block + f"sys.argv = ['{name}', *{options!r}]\n" + run
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=280,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) >= 2 and not [row for row in rows if "note" in row], done.stdout
    column = {"bench_train": "positions/s"}.get(name, "audio-s/s")
    assert all(row[column] > 0 for row in rows if "times" not in row)


def bench(tmp_path: Path, *options: str) -> Bench:
    args = arguments("").parse_args([*options, "--size", "nano", "--out", str(tmp_path / "b.json")])
    return Bench(args, ["speed"])


@pytest.mark.parametrize(
    ("module", "wanted"),
    [(bench_train, True), (bench_generate, False), (bench_codec, False), (bench_prepare, False)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_peak_is_measured_and_told_where_a_column_has_shares_of_it(
    nano, tmp_path, capsys, module, wanted
):
    args = arguments("").parse_args(["--size", "nano", "--out", str(tmp_path / "b.json")])
    made = Bench(args, module.COLUMNS)
    made.row("one", lambda: {})
    printed = capsys.readouterr().out
    assert ("TFLOP/s" in printed) == ("share of peak" in printed) == wanted
    assert ("peak_tflops" in json.loads((tmp_path / "b.json").read_text())) == wanted


def test_a_row_that_fails_is_noted_and_the_next_is_measured(nano, tmp_path, capsys):
    def full():
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    def broken():
        raise RuntimeError("a kernel said no")

    made = bench(tmp_path)
    made.row("large", full)
    made.row("odd", broken)
    made.row("ours", lambda: {"speed": 6.0})
    made.row("plain", lambda: {"speed": 2.0})
    made.multiples("speed", [("ours", "plain"), ("ours", "large")])
    notes = [row.get("note") for row in json.loads((tmp_path / "b.json").read_text())["rows"]]
    assert notes[:3] == ["out of memory", "failed: RuntimeError: a kernel said no", None]
    printed = capsys.readouterr().out
    assert "| large | out of memory |" in printed and "ours: 3.00 times plain" in printed
    assert "times large" not in printed


def test_a_bench_keeps_its_budget_and_takes_the_rows_asked_for(nano, tmp_path):
    made = bench(tmp_path, "--seconds", "0", "--only", "ours")
    assert "left out" in made.row("ours", lambda: {"speed": 1.0})["note"]
    assert made.row("plain", lambda: {"speed": 1.0}) is None


def test_few_seconds_are_shared_and_rows_they_do_not_reach_for_are_named(
    nano, tmp_path, capsys, monkeypatch
):
    made, clock, shares = bench(tmp_path, "--seconds", "20"), [0.0], {}
    made.began = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def row(name: str, takes: float, least: float):
        def measure() -> dict:
            shares[name] = made.row_sec
            clock[0] += takes
            return {"speed": 1.0, "spare_sec": takes - least}

        return name, measure

    rows = [row("encode a", 10, 8), row("decode a", 4, 2), row("encode b", 9, 8)]
    made.share([*rows, row("decode b", 5, 2)])
    # A quarter of 20 s, a third of the 10 left; of the last 6 s encoding needs 8, decoding 2.
    assert shares == {"encode a": 5, "decode a": pytest.approx(10 / 3), "decode b": 6}
    printed = capsys.readouterr().out
    assert "| encode b | left out: 6 s left |" in printed
    assert "1 of 4 rows left out, --seconds 20 are too few for them: encode b" in printed
    assert clock[0] < 20


def test_timing_counts_no_warm_up():
    calls = []
    found = timed(lambda i: calls.append(i) or 5.0, row_sec=0, warm=2, least=3)
    assert calls == [0, 1, 2, 3, 4] and found["steps"] == 3 and found["per_sec"] > 0


def test_what_a_row_takes_at_least_is_known_from_what_it_could_have_spared(
    nano, tmp_path, monkeypatch
):
    """Of a codec's row: a pass of 2 s first, then 5 s of passes where one would have done."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def call(items: list) -> list:
        clock[0] += len(items)
        return items

    made = bench(tmp_path)
    made.row_sec = 5.0
    for single in (False, True):
        clock[0] = 0.0
        found, cells = bench_codec.measured(made, call, ["a", "b"], 20.0, single)
        assert found == ["a", "b"] and cells["audio-s/s"] == pytest.approx(10.0)
        assert clock[0] == 8 and cells["spare_sec"] == pytest.approx(4.0)
