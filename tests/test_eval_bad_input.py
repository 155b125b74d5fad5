"""Bad input to eval.run: one line says what to do, nothing is dropped, what was done is kept."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile

from eval import hear, run
from higgs_lab.runlog import read_jsonl

# A recogniser that writes what the manifest says, as one that hears everything would.
HEARS = """
import json, sys
print(json.dumps({"name": "all", "revision": "1"}), flush=True)
for number, line in enumerate(sys.stdin):
    request = json.loads(line)
    text = ANSWER
    print(json.dumps({"id": request["id"], "text": text}), flush=True)
"""


def worker(folder: Path, answer: str) -> str:
    script = folder / "worker.py"
    script.write_text(HEARS.replace("ANSWER", answer))
    return f"worker:{sys.executable} {script}"


def tone(seconds: float = 1.0, rate: int = 24000) -> np.ndarray:
    return 0.2 * np.sign(np.sin(2 * np.pi * 150 * np.arange(int(seconds * rate)) / rate))


def manifest(folder: Path, rows: list[dict]) -> Path:
    path = folder / "set.jsonl"
    path.write_text("".join(json.dumps({"language": "en"} | row) + "\n" for row in rows))
    return path


def go(folder: Path, asr: str, model: str = "human", *more: str) -> dict:
    return run.main(
        ["--model", model, "--set", str(folder / "set.jsonl"), "--asr", asr, "--speaker", "none",
         "--device", "cpu", "--cache", "none", "--out", str(folder / "out"), *more]
    )  # fmt: skip


def stage(folder: Path, name: str) -> list[dict]:
    return read_jsonl(folder / "out" / f"{name}.jsonl")


def test_a_recogniser_that_writes_nothing_has_heard_no_word(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(), 24000)
    manifest(tmp_path, [{"audio": "a.wav", "text": "one two three", "id": "a"}])
    block = go(tmp_path, worker(tmp_path, '""'))["languages"]["en"]
    assert block["error"]["value"] == 1 and block["deletions"] == 1 and block["failed"] == 0


def test_clips_of_all_rates_and_channels_are_one_sound(tmp_path):
    rows = []
    for rate, channels in ((8000, 1), (16000, 1), (22050, 2), (44100, 2), (48000, 1)):
        wav = np.stack([tone(1.0, rate)] * channels, axis=1)
        soundfile.write(tmp_path / f"{rate}.wav", wav, rate)
        rows.append({"audio": f"{rate}.wav", "text": f"text of {rate}", "id": str(rate)})
    manifest(tmp_path, rows)
    frames = "str(__import__('wave').open(request['audio']).getnframes())"
    go(tmp_path, worker(tmp_path, frames))
    assert {row["text"] for row in stage(tmp_path, "transcripts")} == {"16000"}
    scores = stage(tmp_path, "scores")
    for name, tolerance in (("seconds", 1e-3), ("loudness_lufs", 0.7), ("f0_hz", 2.0)):
        values = [row[name] for row in scores]
        assert max(values) - min(values) <= tolerance, name


def test_unreadable_recordings_count_and_the_others_go_on(tmp_path):
    soundfile.write(tmp_path / "good.wav", tone(), 24000)
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 24000)
    (tmp_path / "text.wav").write_text("no sound")
    rows = [
        {"audio": f"{name}.wav", "text": f"the {name} clip", "id": name}
        for name in ("good", "none", "text")
    ]
    manifest(tmp_path, rows)
    block = go(tmp_path, worker(tmp_path, '"the good clip"'))["languages"]["en"]
    assert block["clips"] == block["judged"] == 3 and block["failures"]["missing"] == 2
    errors = {row["id"]: row["error"] for row in stage(tmp_path, "scores")}
    assert errors["good"] == "" and "cannot be read as audio" in errors["text"]
    assert "has no samples" in errors["none"]
    assert block["error"]["value"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "?!"}], "set.jsonl:1, field text: '\\?!' has no words"),
        ([{"text": "Hi.", "language": "tlh"}], "set.jsonl:1, field language: .*'tlh' has no row"),
        ([{"text": "Hi."}, {"text": "Hi."}], "set.jsonl:2: the same text, speaker and audio as"),
        ([{"text": "A.", "id": "x"}, {"text": "B.", "id": "x"}], "set.jsonl:2.*'x'"),
    ],
)
def test_a_set_that_cannot_be_scored_is_refused_before_anything_is_spoken(tmp_path, rows, message):
    manifest(tmp_path, rows)
    with pytest.raises(SystemExit, match=message) as refusal:
        go(tmp_path, "none")
    assert len(str(refusal.value).splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", ["human", "codec:nano"])
def test_a_set_without_recordings_has_no_human_row(tmp_path, model, nano):
    manifest(tmp_path, [{"text": "one two three"}])
    with pytest.raises(SystemExit, match="set.jsonl has no recordings"):
        go(tmp_path, "none", model)


def test_a_worker_that_prints_garbage_stops_the_run_which_then_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(hear, "CPU_BATCH", 2)
    for number in range(6):
        soundfile.write(tmp_path / f"{number}.wav", tone(1 + number / 10), 24000)
    texts = [f"clip number {word}" for word in "a b c d e f".split()]
    manifest(tmp_path, [{"audio": f"{n}.wav", "text": text} for n, text in enumerate(texts)])
    broken = worker(tmp_path, '"ok" if number < 4 else print("Traceback", flush=True)')
    with pytest.raises(SystemExit, match="printed 'Traceback', which is no JSON"):
        go(tmp_path, broken)
    kept = stage(tmp_path, "transcripts")
    assert len(kept) == 4
    mended = worker(tmp_path, '"ok"')
    assert mended == broken  # the same command, mended
    summary = go(tmp_path, mended)
    assert summary["overall"]["judged"] == 6
    assert stage(tmp_path, "transcripts")[:4] == kept


class Server(BaseHTTPRequestHandler):
    """Speaks `left` clips, then breaks down."""

    left = 0
    asked: list[str] = []

    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Server.left -= 1
        if Server.left < 0:
            self.connection.close()  # it died: no status, no answer
            return
        Server.asked.append(body["input"])
        buffer = io.BytesIO()
        soundfile.write(buffer, tone(), 24000, format="WAV", subtype="PCM_16")
        self.send_response(200)
        self.end_headers()
        self.wfile.write(buffer.getvalue())

    def log_message(self, *args):
        pass


def test_a_server_that_dies_mid_run_is_gone_on_with_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("serve.client.time.sleep", lambda seconds: None)
    texts = [f"clip number {word}" for word in "a b c d e f g".split()]
    manifest(tmp_path, [{"text": text} for text in texts])
    service = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=service.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{service.server_port}"
    Server.left, Server.asked = 5, []
    try:
        with pytest.raises(SystemExit, match="same command.* goes on where it stopped"):
            go(tmp_path, "none", url, "--batch", "2")
        assert len(stage(tmp_path, "speech")) == 4  # of the batch in flight nothing is kept
        before = list(Server.asked)
        Server.left = 100
        summary = go(tmp_path, "none", url, "--batch", "2")
    finally:
        service.shutdown()
    assert summary["overall"]["clips"] == 7 and summary["overall"]["failed"] == 0
    # What was spoken is not asked for again, but for the batch in flight.
    assert sorted(Server.asked[len(before) :]) == sorted(
        text for text in texts if text not in before[:4]
    )


def test_that_a_worker_did_not_hear_a_language_is_not_kept(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(), 24000)
    manifest(tmp_path, [{"audio": "a.wav", "text": "one two three", "id": "a"}])
    judge, script = worker(tmp_path, '"one two three"'), tmp_path / "worker.py"
    able = script.read_text()
    script.write_text(able.replace('"revision": "1"', '"revision": "1", "languages": ["zu"]'))
    kept = "--cache", str(tmp_path / "cache")
    assert go(tmp_path, judge, "human", *kept)["overall"]["judged"] == 0
    script.write_text(able)
    again = go(tmp_path, judge, "human", *kept, "--out", str(tmp_path / "again"))
    assert again["overall"]["error"]["value"] == 0


def test_a_long_text_is_heard_to_its_end_and_a_runaway_is_not(tmp_path):
    text = "a sentence of a long story that goes on and on " * 40  # about two minutes
    for name, seconds in (("long", 150), ("runaway", 150)):
        soundfile.write(tmp_path / f"{name}.wav", tone(seconds, 16000), 16000)
    manifest(tmp_path, [{"text": text, "id": "long"}, {"text": "a word", "id": "runaway"}])
    frames = "str(__import__('wave').open(request['audio']).getnframes() // 16000)"
    go(tmp_path, worker(tmp_path, frames), "wavs:" + str(tmp_path))
    heard = {row["id"]: row["text"] for row in stage(tmp_path, "transcripts")}
    assert heard == {"long": "150", "runaway": "120"}


def test_a_run_is_not_continued_with_another_prompt_of_the_same_name(tmp_path):
    for name, seconds in (("a", 1.0), ("prompt", 1.5)):
        soundfile.write(tmp_path / f"{name}.wav", tone(seconds), 24000)
    manifest(tmp_path, [{"audio": "a.wav", "text": "one", "ref_audio": "prompt.wav"}])
    go(tmp_path, "none")
    soundfile.write(tmp_path / "prompt.wav", 0.5 * tone(1.5), 24000)
    with pytest.raises(SystemExit, match="other settings:\n  set.references: was"):
        go(tmp_path, "none")


def test_a_finished_run_of_a_server_is_reported_again_when_that_is_down(tmp_path, monkeypatch):
    monkeypatch.setattr("serve.client.time.sleep", lambda seconds: None)
    manifest(tmp_path, [{"text": "clip number one"}])
    service = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=service.serve_forever, daemon=True).start()
    url, Server.left = f"http://127.0.0.1:{service.server_port}", 100
    monkeypatch.setattr("serve.client.list_models", lambda *args: ["base"])
    before = go(tmp_path, "none", url)
    monkeypatch.setattr("serve.client.list_models", lambda *args: ["exports/x"])
    with pytest.raises(SystemExit, match="system.serves: was \\['base'\\], now \\['exports/x'\\]"):
        go(tmp_path, "none", url)
    monkeypatch.undo()
    service.shutdown()
    service.server_close()
    assert go(tmp_path, "none", url)["overall"] == before["overall"]


def test_what_a_killed_writer_left_of_a_batch_keeps_its_sound(tmp_path):
    """The batch is spoken again, by a server perhaps in other words: rows and files must agree."""
    for id, rate in (("a", 24000), ("b", 16000)):
        soundfile.write(tmp_path / f"{id}.wav", tone(1.0, rate), rate)
    manifest(tmp_path, [{"text": "one", "id": "a"}, {"text": "two", "id": "b"}])
    script = tmp_path / "speaker.py"
    script.write_text(
        "import sys, random, wave\n"
        "with wave.open(sys.argv[1], 'wb') as file:\n"
        "    file.setparams((1, 2, 24000, 0, 'NONE', ''))\n"
        "    file.writeframes(random.randbytes(48000))\n"
    )
    speaker = f"cmd:{sys.executable} {script} {{out}} {{seed}}"
    go(tmp_path, "none", speaker)
    path = tmp_path / "out" / "speech.jsonl"
    kept = path.read_text().splitlines()[0]
    path.write_text(kept + "\n")
    go(tmp_path, "none", speaker)
    for row in stage(tmp_path, "speech"):
        data = (tmp_path / "out" / row["audio"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == row["sha256"]
