"""eval.work: processes share a ledger without doing anything twice, also when one of them dies."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eval.work import Cache, Ledger, Locks, chunks, rank

ROOT = Path(__file__).resolve().parent.parent
KEYS = [(f"c{n}", 0) for n in range(20)]
# Takes batches of four; each takes a while, and says when it has begun.
WORKER = """
import sys, time
from eval.work import Ledger, chunks
keys = [(f"c{n}", 0) for n in range(20)]
with Ledger(sys.argv[1]) as ledger:
    for batch in ledger.claim(chunks(keys, 4)):
        print("at work", flush=True)
        time.sleep(float(sys.argv[3]))
        ledger.append([{"id": id, "take": take, "by": sys.argv[2]} for id, take in batch])
"""


def worker(path, name, sec=0.05):
    command = [sys.executable, "-c", WORKER, str(path), name, str(sec)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_processes_share_the_batches_and_do_each_once(tmp_path):
    path = tmp_path / "stage.jsonl"
    workers = [worker(path, name) for name in "abc"]
    assert all(w.wait(timeout=60) == 0 for w in workers)
    rows = lines(path)
    assert sorted((row["id"], row["take"]) for row in rows) == sorted(KEYS)
    # A batch is one process's, whole.
    by = {row["id"]: row["by"] for row in rows}
    assert all(len({by[id] for id, _ in batch}) == 1 for batch in chunks(KEYS, 4))


def test_the_batch_of_a_killed_process_is_taken_over(tmp_path):
    path = tmp_path / "stage.jsonl"
    dying = worker(path, "dying", sec=60)
    dying.stdout.readline()  # it holds its first batch
    other = worker(path, "other")
    while len(lines(path) if path.exists() else ()) < 16:  # all but that batch
        time.sleep(0.02)
    assert other.poll() is None  # it waits for the batch that is at work elsewhere
    dying.send_signal(signal.SIGKILL)
    dying.wait()
    assert other.wait(timeout=30) == 0
    assert sorted(row["id"] for row in lines(path)) == sorted(id for id, _ in KEYS)
    assert {row["by"] for row in lines(path)} == {"other"}


def test_a_line_cut_by_a_kill_is_written_again_and_its_batch_is_given_whole(tmp_path):
    path = tmp_path / "stage.jsonl"
    path.write_text('{"id": "a", "take": 0, "x": 1}\n{"id": "b", "ta')
    with Ledger(path) as ledger:
        batches = list(ledger.claim([[("a", 0), ("b", 0)], [("c", 0)]]))
        assert batches == [[("a", 0), ("b", 0)], [("c", 0)]]
        ledger.append([{"id": id, "take": 0, "x": 2} for id in "ab"])
        assert ledger.rows["a", 0]["x"] == 1  # the first row of a key counts
        assert list(ledger.claim([[("a", 0), ("b", 0)]])) == []
    assert lines(path) == [{"id": "a", "take": 0, "x": 1}, {"id": "b", "take": 0, "x": 2}]


def test_another_batch_size_elsewhere_waits_where_it_overlaps(tmp_path):
    path = tmp_path / "stage.jsonl"
    busy = worker(path, "busy", sec=60)
    busy.stdout.readline()  # holds positions 0 to 3
    try:
        with Ledger(path) as ledger:
            first = next(iter(ledger.claim(chunks(KEYS, 3))))
        assert first == KEYS[6:9]  # 0 to 2 and 3 to 5 overlap
    finally:
        busy.kill()
        busy.wait()


def test_a_row_that_is_none_is_named_with_its_file(tmp_path):
    path = tmp_path / "stage.jsonl"
    path.write_text('{"id": "a", "take": 0}\n{"ID": "b"}\n')
    with pytest.raises(ValueError, match='stage.jsonl: b\'{"ID": "b"}\' is no row of this stage'):
        Ledger(path)


def test_the_cache_goes_by_the_sound_and_the_judge_not_by_its_name(tmp_path):
    details = {"name": "here/a.pt", "revision": "1", "options": "greedy"}
    with Cache(tmp_path, "heard", details, ("sha256", "language")) as kept:
        assert kept.get("s", "en") is None
        kept.put([{"sha256": "s", "language": "en", "text": "hello"}])
        assert kept.get("s", "en") == {"text": "hello"} and kept.get("s", "de") is None
    with Cache(tmp_path, "heard", details | {"name": "b.pt"}, ("sha256", "language")) as kept:
        assert kept.get("s", "en") == {"text": "hello"}
    for change in ({"revision": "2"}, {"options": "beam"}):
        with Cache(tmp_path, "heard", details | change, ("sha256", "language")) as kept:
            assert kept.get("s", "en") is None
    with Cache(None, "heard", details, ("sha256", "language")) as kept:
        kept.put([{"sha256": "s", "language": "en", "text": "hello"}])
        assert kept.get("s", "en") is None


def test_a_place_is_held_by_one_process(tmp_path):
    locks = Locks(tmp_path / "lock")
    code = "import sys; from eval.work import Locks; sys.exit(not Locks(sys.argv[1]).take(3))"

    def free() -> bool:
        command = [sys.executable, "-c", code, str(tmp_path / "lock")]
        return subprocess.run(command, cwd=ROOT).returncode == 0

    with locks.held(3):
        assert not free()
    assert free()
    locks.close()


def test_ranks_come_from_the_launcher(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert rank() == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert rank() == (3, 4)
