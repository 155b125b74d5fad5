"""The bench of prepare reads and encodes real mixed files, and says who waited for whom."""

from __future__ import annotations

import json
import sys
from collections import Counter

import pytest
import soundfile

from recipes import bench_prepare


def test_mixed_recordings_are_made_read_and_encoded(nano, tmp_path, capsys):
    folder, out = tmp_path / "clips", tmp_path / "rows.json"
    options = ["--hours", "0.01", "--folder", str(folder), "--out", str(out), "--size", "nano"]
    bench_prepare.main([*options, "--only", "alone,make,decode ogg,headers,at once,command"])
    rows = {row["method"]: row for row in json.loads(out.read_text())["rows"]}
    assert len(rows) == 6 and not [row for row in rows.values() if "note" in row], rows
    files = sorted(file for file in folder.iterdir() if file.suffix != ".jsonl")
    kinds = Counter(file.suffix for file in files)
    assert set(kinds) == {".wav", ".flac", ".ogg"}
    infos = [soundfile.info(file) for file in files]
    assert len({info.samplerate for info in infos}) >= 2
    assert sum(info.duration for info in infos) == pytest.approx(36, abs=15)
    both = rows["read and encode at once"]
    assert 0 < both["codec s"] + both["waited s"] <= both["seconds"]
    assert both["hours/min"] == pytest.approx(both["audio-s/s"] / 60)
    printed = capsys.readouterr().out
    assert "is the bottleneck: of" in printed
    assert not (folder / "prepared").exists()  # the next run measures it again


def test_without_a_sound_library_the_codec_is_measured_alone(nano, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)  # as on a bare GPU machine
    bench = bench_prepare.main(["--hours", "0.002", "--folder", str(tmp_path), "--size", "nano"])
    codec, made = bench.rows
    assert codec["audio-s/s"] > 0 and "left out: " in made["note"] and "soundfile" in made["note"]
