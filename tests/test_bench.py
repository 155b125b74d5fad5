"""serve.bench: the player, the schedule, the figures, and loads on a server with known manners.
(tests/serve measures the real one.)"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.bench import main
from serve.bench_report import SLICES, compare, delivered, percentile, summarise, table
from serve.consistency import Consistency
from serve.load import Load, Take, Target, closed_loop, open_loop, play, poisson_arrivals

PIECE_SEC, PIECES, SERVICE_SEC = 0.1, 3, 0.06


class Metered:
    """Speaks 0.3 s in three pieces over SERVICE_SEC, at most `places` at a time; pieces say which
    text they are of, and, where `forgetful`, how many requests were under way."""

    def __init__(self, places: int = 4, forgetful: bool = False):
        self.seen, self.most, self.now = [], 0, 0
        gate, lock, outer = threading.Semaphore(places), threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.seen.append(body)
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                try:
                    if "refuse" in body["input"]:
                        self.send_response(400)
                        self.end_headers()
                        self.wfile.write(b'{"error": {"message": "not this text"}}')
                        return
                    with gate:
                        self.send_response(200)
                        self.end_headers()
                        value = len(body["input"]) + (outer.now if forgetful else 0)
                        for _ in range(PIECES):
                            time.sleep(SERVICE_SEC / PIECES)
                            sound = np.full(int(24000 * PIECE_SEC), value, "<i2")
                            self.wfile.write(sound.tobytes())
                            self.wfile.flush()
                finally:
                    with lock:
                        outer.now -= 1

            def do_GET(self):
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128

        self.http = Server(("127.0.0.1", 0), Handler)
        self.target = Target("fake", f"http://127.0.0.1:{self.http.server_port}")
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def __enter__(self) -> Metered:
        return self

    def __exit__(self, *exc) -> None:
        self.http.shutdown()
        self.http.server_close()


def test_player_waits_for_late_pieces_and_counts_them():
    smooth = play([(1.0, 0.5), (1.4, 0.5), (1.9, 0.5)])
    assert (smooth.underruns, smooth.silent_sec, smooth.needed_sec) == (0, 0.0, 0.0)
    late = play([(1.0, 0.5), (1.8, 0.5), (2.4, 0.5)])  # dry at 1.5, then at 2.3
    assert late.underruns == 2
    assert late.silent_sec == pytest.approx(0.3 + 0.1)
    assert late.needed_sec == pytest.approx(0.4)  # the last piece: 1.4 s after the first, 1.0 heard
    assert play([]) == play([(3.0, 0.1)])


pieces = st.lists(
    st.tuples(st.floats(0, 2, allow_nan=False), st.floats(0.01, 1, allow_nan=False)), min_size=1
)


@given(pieces)
def test_the_delay_that_a_player_needs_is_just_enough(gaps):
    times = np.cumsum([gap for gap, _ in gaps])
    arrivals = list(zip(times.tolist(), (sec for _, sec in gaps), strict=True))
    needed = play(arrivals).needed_sec
    assert play(arrivals, needed + 1e-6).underruns == 0
    if needed > 1e-3:
        assert play(arrivals, needed - 1e-3).underruns > 0
    assert play(arrivals).silent_sec == pytest.approx(needed, abs=1e-6)  # without a delay


def test_arrivals_are_poisson_seeded_and_of_the_rate():
    due = poisson_arrivals(5.0, 4000, seed=1)
    assert np.array_equal(due, poisson_arrivals(5.0, 4000, seed=1))
    assert not np.array_equal(due, poisson_arrivals(5.0, 4000, seed=2))
    gaps = np.diff(due)
    assert due[0] == 0 and gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # exponential
    with pytest.raises(ValueError, match="rate"):
        poisson_arrivals(0, 5, 1)


def test_percentiles_are_values_that_were_measured():
    values = np.arange(1, 101) / 10
    assert [percentile(values, p) for p in (50, 95, 99)] == [5.0, 9.5, 9.9]
    assert percentile(np.array([3.0, 1.0]), 99) == 3.0


def load_of(first_audio: list[float], failed: int = 0) -> Load:
    takes = [
        Take(n, due=float(n), sent=float(n), arrivals=[(n + first, 1.0)], done=n + first + 0.1)
        for n, first in enumerate(first_audio)
    ]
    takes += [Take(len(takes) + n, due=0.0, done=1.0, error="500: broken") for n in range(failed)]
    return Load(takes, float(len(first_audio)))


def test_summary_counts_failures_and_leaves_them_out_of_the_times():
    summary = summarise(load_of([0.2] * 18 + [0.6, 0.8], failed=3), delay_sec=0.0)
    assert (summary["requests"], summary["failed"]) == (23, 3)
    assert summary["failures"] == {"500: broken": 3}
    first = summary["first_audio_sec"]
    assert first["p50"]["value"] == pytest.approx(0.2)
    assert first["p99"]["value"] == pytest.approx(0.8)
    assert first["p95"]["low"] <= first["p95"]["value"] <= first["p95"]["high"]
    assert summary["real_time_factor"]["p50"]["value"] == pytest.approx(0.3)
    rate = summary["audio_sec_per_sec"]
    assert rate["value"] == pytest.approx(1.0, rel=0.1) and rate["low"] <= 1.0 <= rate["high"]
    only_failures = summarise(load_of([], failed=2), delay_sec=0.0)
    assert only_failures["failed"] == 2 and only_failures["underrun_share"] is None
    level = {"server": "s", "load": "4 at a time", "summary": only_failures}
    assert "4 at a time  2         2" in table([level])


def test_delivered_sound_is_that_which_came_in_time():
    load = Load([Take(0, 0.0, arrivals=[(0.5, 2.0), (9.5, 4.0), (11.0, 8.0)], done=11.0)], 10.0)
    rates = delivered(load)
    assert len(rates) == SLICES and rates[0] == 2.0 and rates[9] == 4.0
    assert rates.mean() == pytest.approx(6.0 / 10.0)


def test_a_slower_server_is_seen_and_an_equal_one_is_not():
    rng = np.random.default_rng(0)
    base = (0.2 + 0.1 * rng.random(60)).tolist()
    same = compare(load_of(base), load_of((np.array(base) + 0.002 * rng.normal(size=60)).tolist()))
    assert not any(figure["differs"] for figure in same.values())
    slower = compare(load_of(base), load_of([1.5 * value for value in base]))
    assert slower["first_audio_sec p50"]["differs"]
    assert slower["first_audio_sec p50"]["ratio"] == pytest.approx(1.5, rel=0.02)
    assert slower["first_audio_sec p50"]["low"] > 1.3


def test_closed_loop_keeps_its_callers_busy_and_seeds_its_requests():
    with Metered(places=8) as server:
        load = closed_loop(server.target, ["One.", "Two, too."], concurrency=3, count=10, seed=5)
        assert server.most == 3
        assert sorted(body["seed"] for body in server.seen) == list(range(5, 15))
    assert [take.number for take in load.takes] == list(range(10))
    assert all(not take.error and len(take.arrivals) >= 1 for take in load.takes)
    assert all(take.audio_sec == pytest.approx(PIECES * PIECE_SEC) for take in load.takes)
    assert all(take.total_sec >= 0.9 * SERVICE_SEC for take in load.takes)
    assert load.end_sec <= max(take.done for take in load.takes)


def test_open_loop_shows_a_server_that_cannot_keep_up():
    """One place and twice the requests that it can take: they wait longer and longer, and the wait
    counts from the arrival."""
    with Metered(places=1) as server:
        load = open_loop(server.target, ["One."], 2 / SERVICE_SEC, count=30, seed=3)
        assert server.most > 5  # nobody waits with asking
    waits = [take.first_audio_sec for take in load.takes]
    assert np.mean(waits[-5:]) > np.mean(waits[:5]) + 5 * SERVICE_SEC
    assert summarise(load, 0.0)["client_lag_sec"] < 0.5 * max(waits)


def test_refused_requests_are_counted_with_the_servers_words():
    with Metered() as server:
        load = closed_loop(server.target, ["Fine.", "Please refuse."], concurrency=2, count=4)
    summary = summarise(load, 0.0)
    assert summary["failed"] == 2 and summary["failures"] == {"400: not this text": 2}


@pytest.mark.parametrize("forgetful", [False, True])
def test_sound_that_depends_on_the_company_is_inconsistent(forgetful, tmp_path):
    with Metered(places=16, forgetful=forgetful) as server:
        check = Consistency(["A text."], tmp_path, concurrency=8)
        found = check.run(server.target, dumps=None, float32=True)
        assert server.most == 8
        if forgetful:  # rounding excuses it, unless the server computes in float32
            assert check.run(server.target, dumps=None, float32=False)["ok"]
    assert found["ok"] is not forgetful
    assert (found["greedy"]["same_sound"] == 16) is not forgetful


def test_command_line_measures_two_servers_side_by_side(tmp_path):
    out = tmp_path / "bench"
    with Metered(places=8) as one, Metered(places=1) as two:
        command = [sys.executable, "-m", "serve.bench", "--out", str(out), "--api-key", "secret"]
        command += ["--url", one.target.url, "--url", two.target.url, "--name", "one"]
        command += ["--name", "two", "--concurrency", "4", "--rate", "20", "--requests", "16"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "bench.json").read_text())
    assert "secret" not in (out / "bench.json").read_text()
    assert [(level["server"], level["load"]) for level in result["levels"]] == [
        ("one", "4 at a time"), ("two", "4 at a time"),
        ("one", "20 a second"), ("two", "20 a second"),
    ]  # fmt: skip
    assert len(result["levels"][0]["takes"]) == 16 and len(result["levels"][0]["warm_up"]) == 4
    closed = result["comparisons"][0]
    assert (closed["first"], closed["second"]) == ("one", "two")
    assert closed["figures"]["first_audio_sec p50"]["low"] > 1.2  # one place for four callers
    assert closed["figures"]["audio_sec_per_sec"]["high"] < 0.8
    assert "two differs" in done.stdout and (out / "table.txt").read_text() == done.stdout
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--url"),
        (["--url", "http://127.0.0.1:9"], "nobody answers"),
        (["--export", "x", "--url", "http://127.0.0.1:9"], "--url"),
        (["--url", "http://127.0.0.1:9", "--profile", "throughput"], "--export"),
        (["--export", "nowhere"], "serve.export"),
        (["--export", "x", "--concurrency", "8", "--requests", "4"], "nothing to do"),
        (["--export", "x", "--rate", "0"], "positive"),
    ],
)
def test_bad_input_is_one_line(words, said, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", "--out", str(tmp_path), *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert said in ended.value.code and "\n" not in ended.value.code
