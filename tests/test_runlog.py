"""Run records: what survives a kill, a full disk, a resume."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors import SafetensorError

from higgs_lab.runlog import (
    Progress,
    RunLog,
    atomic_path,
    duration,
    provenance,
    read_jsonl,
    remove_leftovers,
    write_json_atomic,
)


def test_log_appends_lines_and_reads_them_back(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    with RunLog(path) as log:
        log.log(step=1, loss=np.float32(2.5), per_codebook=np.ones(2), who="Žižek", out=path)
        log.log(step=2, loss=float("nan"))
        assert log.rows()[0]["loss"] == 2.5  # flushed, not only buffered
    first, second = read_jsonl(path)
    assert first["per_codebook"] == [1.0, 1.0] and first["out"] == str(path)
    assert np.isnan(float(second["loss"]))
    for line in path.read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))


@pytest.mark.parametrize("tail", ['{"step": 3, "lo', '{"step": 3, "loss": 1}', "{" + "x" * 200_000])
def test_a_line_cut_by_a_kill_is_dropped_and_appending_goes_on(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + tail)
    with RunLog(path) as log:
        log.log(step=3)
    assert [row["step"] for row in read_jsonl(path)] == [1, 2, 3]


def test_reading_ignores_an_unfinished_tail_but_not_a_broken_middle(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"st')
    assert read_jsonl(path) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="m.jsonl:2: not a line of JSON"):
        read_jsonl(path)


def test_resuming_at_a_step_drops_what_will_be_written_again(tmp_path):
    with RunLog(tmp_path / "m.jsonl") as log:
        log.log(event="start")
        for step in range(5):
            log.log(step=step)
        log.cut_after(2)
        log.log(step=3, again=True)
    rows = read_jsonl(tmp_path / "m.jsonl")
    assert rows == [
        {"event": "start"},
        *({"step": s} for s in range(3)),
        {"step": 3, "again": True},
    ]


def test_a_process_killed_while_logging_leaves_whole_lines(tmp_path):
    path = tmp_path / "m.jsonl"
    code = (
        "from higgs_lab.runlog import RunLog\n"
        f"log = RunLog({str(path)!r})\n"
        "step = 0\n"
        "while True:\n    log.log(step=step, text='x' * 500); step += 1\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size > 20_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with RunLog(path) as log:
        steps = [row["step"] for row in log.rows()]
    assert len(steps) > 10 and steps == list(range(len(steps)))


def test_atomic_path_writes_files_and_folders(tmp_path):
    target = tmp_path / "deep" / "er" / "a.wav"
    for content in ("one", "two"):  # the second replaces the first
        with atomic_path(target) as temporary:
            assert temporary.suffix == ".wav" and temporary.parent == target.parent
            temporary.write_text(content)
            assert not target.exists() or target.read_text() == "one"
        assert target.read_text() == content
    folder = tmp_path / "folder"
    for content in ("one", "two"):
        with atomic_path(folder) as temporary:
            (temporary / "sub").mkdir(parents=True)
            (temporary / "sub" / content).write_text(content)
        assert [p.name for p in (folder / "sub").iterdir()] == [content]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "folder"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_error_leaves_the_old_and_nothing_else(tmp_path, kind):
    target = tmp_path / "out"
    with atomic_path(target) as temporary:
        temporary.mkdir() if kind == "folder" else temporary.write_text("old")
    with pytest.raises(KeyError), atomic_path(target) as temporary:
        if kind == "folder":
            temporary.mkdir()
            (temporary / "part").write_text("new")
        else:
            temporary.write_text("new")
        raise KeyError("boom")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert target.is_dir() or target.read_text() == "old"


def test_writing_nothing_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="nothing was written"), atomic_path(tmp_path / "x"):
        pass


def test_a_full_disk_is_explained_and_leaves_nothing(tmp_path):
    with pytest.raises(
        OSError, match="disk is full while writing .*x.json.*run the same"
    ) as caught:
        with atomic_path(tmp_path / "x.json") as temporary:
            temporary.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "free_mib"),
    [
        # word for word what safetensors and torch.save raised on a full disk
        (
            SafetensorError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            ),
            0,
        ),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), 0),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), 5000),
    ],
    ids=["safetensors", "torch", "quota"],
)
def test_a_full_disk_is_known_by_whatever_the_writer_raises(tmp_path, monkeypatch, error, free_mib):
    usage = shutil._ntuple_diskusage(10**10, 10**10, free_mib * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="disk is full while writing .*model"):
        with atomic_path(tmp_path / "model") as temporary:
            temporary.mkdir()
            raise error
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    for error in (RuntimeError("unexpected pos"), OSError(errno.EACCES, "denied"), ValueError()):
        with pytest.raises(type(error)) as caught, atomic_path(tmp_path / "model"):
            raise error
        assert caught.value is error


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the Linux device /dev/full")
def test_logging_to_a_full_device_is_explained(tmp_path):
    (tmp_path / "m.jsonl").symlink_to("/dev/full")
    log = RunLog(tmp_path / "m.jsonl")
    with pytest.raises(OSError, match="disk is full"):
        log.log(step=1)


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    (tmp_path / ".tmp-1-ab-model").mkdir()
    (tmp_path / ".tmp-1-cd-x.json").write_text("half")
    (tmp_path / "keep").write_text("whole")
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["keep"]


def test_provenance_names_code_versions_and_extras(tmp_path):
    record = provenance(codec_hash="abc", out=tmp_path)
    assert record["codec_hash"] == "abc" and record["out"] == str(tmp_path)
    assert record["versions"]["numpy"] == np.__version__
    assert record["git_commit"] is None or len(record["git_commit"]) == 40
    assert (record["git_commit"] is None) == (record["git_dirty"] is None)
    write_json_atomic(tmp_path / "provenance.json", record)
    assert json.loads((tmp_path / "provenance.json").read_text()) == record


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """Its only item is the time of the clock that Progress reads."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_progress_prints_share_rate_and_time_left(capsys, clock):
    with Progress(100, "clips", "encode", start=40, every_sec=5) as progress:
        clock[0] += 4
        progress.update(10)  # too soon for a line
        clock[0] += 6
        progress.update(12)
        clock[0] += 20
        progress.done = 90
        progress.update(10)
    lines = capsys.readouterr().err.splitlines()
    # 12 clips in the 6 s after the first update: 2 clips/s, 38 to go.
    assert lines[0] == "encode 62/100 clips (62 %), 2 clips/s, 19 s left"
    # In the end all the time counts, and what was done before a resume does not.
    assert lines[1:] == ["encode 100/100 clips (100 %), 2 clips/s, took 30 s"]  # said once
    with Progress(3, "clips", enabled=False) as progress:
        progress.update(3)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("start", [0, 500])
def test_the_first_clip_which_waits_for_loading_foretells_nothing(clock, start):
    progress = Progress(start + 101, "clips", start=start)
    clock[0] += 60  # loads, compiles
    progress.update()
    assert progress.line().endswith("%)")  # not "1 h 40 min left"
    clock[0] += 2
    progress.update(4)
    assert progress.line().endswith("%)")  # nor from the little that came since
    clock[0] += 38
    progress.update(16)
    assert progress.line().endswith("%), 0.5 clips/s, 2 min 40 s left")  # 20 in 40 s, 80 to go


def test_clips_that_come_all_at_once_are_not_taken_for_a_fast_rate(clock):
    progress = Progress(32, "clips")
    for batch in range(3):
        clock[0] += 20
        for _ in range(8):
            clock[0] += 0.5
            progress.update()
            if batch == 0:
                assert "left" not in progress.line()
    # 23 clips in the 51.5 s since the first
    assert progress.line() == "24/32 clips (75 %), 0.447 clips/s, 18 s left"


def test_looking_at_the_work_of_others_is_no_first_update(clock):
    progress = Progress(10, "clips", start=2)
    progress.update(0)
    clock[0] += 30
    progress.update()
    assert progress.line() == "3/10 clips (30 %)"


def test_durations_are_readable():
    assert [duration(s) for s in (0, 59.2, 155, 11_100)] == [
        "0 s",
        "1 min 00 s",
        "2 min 35 s",
        "3 h 05 min",
    ]


def test_runlog_imports_no_torch():
    code = "import sys, higgs_lab.runlog, higgs_lab.config; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
