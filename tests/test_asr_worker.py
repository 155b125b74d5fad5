"""eval.asr_worker: real worker processes, well and badly behaved."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from eval.asr import load_recognizer, recognizer_details
from eval.asr_worker import WorkerRecognizer
from tests.conftest import ROOT
from tests.tiny_judges import tones

WORKERS = ROOT / "eval" / "workers"
CLIPS = [tones(samples, seed) for seed, samples in enumerate((16000, 8000, 12000))]
HELLO = json.dumps({"name": "w", "revision": "1"})


def command(folder: Path, source: str) -> str:
    """A worker of one's own, beside the helper that it imports."""
    script = folder / "my_worker.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(WORKERS)!r})\n{source}")
    return f"{sys.executable} {script}"


@pytest.fixture
def worker(tmp_path):
    started = []

    def start(source: str, **options) -> WorkerRecognizer:
        started.append(WorkerRecognizer(command(tmp_path, source), "mine", **options))
        return started[-1]

    yield start
    for one in started:
        one.close()


SHORT = """
import wave
from worker import serve
def load():
    print("loading")  # a library that prints must not spoil the answers
    def transcribe(requests):
        return [f"{r['language']} {r['iso3']} {r['omniasr']} {wave.open(r['audio']).getnframes()}"
                for r in requests]
    return transcribe
serve(load, "counter", "7", ["zu", "xho"], batch=2)
"""


def test_clips_go_out_and_words_come_back_in_order(worker):
    recognizer = worker(SHORT)
    heard = recognizer.transcribe_all(CLIPS, ["zu", "xh", "zu"])
    assert [t.text for t in heard] == [
        "zu zul zul_Latn 16000", "xh xho xho_Latn 8000", "zu zul zul_Latn 12000",
    ]  # fmt: skip
    assert recognizer.transcribe(CLIPS[1], "zu").text == "zu zul zul_Latn 8000"
    assert recognizer.hears("xh") and not recognizer.hears("de")
    assert recognizer.transcribe_all(CLIPS[:1], ["de"]) == [None]
    assert recognizer.hello["name"] == "counter" and recognizer.hello["revision"] == "7"


def test_details_are_what_the_worker_says_and_cost_no_loading(tmp_path):
    spec = "worker:" + command(tmp_path, SHORT.replace('print("loading")', "raise SystemExit(3)"))
    details = recognizer_details(spec)
    assert (details["package"], details["revision"]) == ("counter", "7")


def test_figures_of_an_answer_are_kept_and_a_clip_may_fail_alone(worker):
    source = """
from worker import serve
def transcribe(requests):
    if len(requests) > 1: raise RuntimeError("no batches")
    if requests[0]["id"] == "1": raise OSError("broken clip")
    return [{"text": " a a ", "avg_logprob": -0.5, "guessed": "xho_Latn", "guessed_prob": 0.9}]
serve(lambda: transcribe, "w", "1")
"""
    one, two, three = worker(source).transcribe_all(CLIPS, ["zu"] * 3)
    assert one.text == three.text == "a a" and one.avg_logprob == -0.5
    assert one.guessed == "xh" and one.guessed_prob == 0.9 and one.error == ""
    assert one.expected_prob is None
    assert two.text == "" and two.error == "OSError: broken clip"


def test_a_worker_that_can_hear_nothing_is_an_error_not_a_bad_score(worker):
    source = """
from worker import serve
def transcribe(requests): raise RuntimeError("no GPU")
serve(lambda: transcribe, "w", "1")
"""
    with pytest.raises(ValueError, match="could hear none of 3 clips, one because: .*no GPU"):
        worker(source).transcribe_all(CLIPS, ["zu"] * 3)


def test_the_example_hears_what_the_package_hears(tmp_path):
    """A real recogniser behind the contract: openai-whisper on a checkpoint of random weights."""
    from higgs_lab.nano.judges import random_whisper

    checkpoint = random_whisper(tmp_path / "tiny.pt", seed=1)
    spec = f"worker:{sys.executable} {WORKERS / 'whisper_worker.py'} {checkpoint}"
    remote, here = load_recognizer(spec), load_recognizer(str(checkpoint), "cpu")
    # As the worker gets it: 16 bits.
    clips = [(np.round(clip * 32767) / 32768).astype(np.float32) for clip in CLIPS]
    heard = remote.transcribe_all(clips, ["en", "jv", "de"])
    remote.close()
    expected = here.transcribe_all(clips, ["en", "jv", "de"])
    assert [t.text for t in heard] == [t.text for t in expected]
    assert remote.hello["revision"] == "tiny.pt"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("print('Loading checkpoint shards')", "printed 'Loading checkpoint shards', which is no"),
        ("print('[1, 2]')", "printed '\\[1, 2\\]', which is no JSON object"),
        ("print('{\"name\": 3}')", "must name it"),
        ("import nothing_like_this", "ended before .*exit status 1.*No module named"),
        ("import time; time.sleep(60)", "took more than 1 s to say its name"),
    ],
)
def test_a_worker_that_does_not_say_its_name(tmp_path, source, message):
    limit_sec = 1 if "sleep" in source else 60
    with pytest.raises(ValueError, match=f"(?s)my_worker.py'.*{message}"):
        WorkerRecognizer(command(tmp_path, source), "mine", hello_sec=limit_sec)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ("print('42 % done')", "printed '42 % done', which is no JSON"),
        ('print(\'{"id": "99", "text": ""}\')', "whose id was never asked"),
        ('print(\'{"id": "0", "text": "a"}\\n{"id": "0", "text": "b"}\')', "answered twice"),
        ('print(\'{"id": "0"}\')', "neither a text nor an error"),
        ('print(\'{"id": "0", "text": "a", "avg_logprob": "x"}\')', "figures are no numbers"),
        ("sys.exit('out of memory')", "(?s)ended before .*exit status 1.*out of memory"),
        ("import os; os.kill(os.getpid(), 9)", "exit status -9"),
        ("import time; sys.stdout.flush(); time.sleep(60)", "took more than 1 s to answer"),
    ],
)
def test_a_worker_that_answers_garbage_or_dies(worker, reply, message):
    source = f"import sys\nprint({HELLO!r}, flush=True)\nsys.stdin.readline()\n{reply}\n"
    recognizer = worker(source, answer_sec=1 if "sleep" in reply else 60)
    with pytest.raises(ValueError, match=message):
        recognizer.transcribe_all(CLIPS[:2], ["zu", "zu"])


def test_a_worker_ends_with_its_recogniser_even_if_it_does_not_listen(worker, monkeypatch):
    recognizer = worker(f"import time\nprint({HELLO!r}, flush=True)\ntime.sleep(600)")
    process = recognizer._worker._process
    wait = process.wait
    monkeypatch.setattr(process, "wait", lambda limit=None: wait(limit and 0.1))
    begin = time.monotonic()
    recognizer.close()
    assert process.poll() is not None and time.monotonic() - begin < 5


def test_commands_that_cannot_be_started():
    with pytest.raises(ValueError, match="cannot be started"):
        load_recognizer("worker:/no/such/command --here")
    with pytest.raises(ValueError, match="write worker:COMMAND"):
        load_recognizer("worker:")
