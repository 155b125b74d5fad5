"""eval.systems: every kind of speaker through the same door."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from eval.systems import Request, fingerprint, open_system, request_seed
from higgs_lab.audio import read_audio, write_wav
from higgs_lab.manifest import Utterance


def row(id, text="Hello there.", **fields) -> Utterance:
    return Utterance(**({"audio": None, "text": text, "id": id, "language": "en"} | fields))


def tone(folder: Path, name: str, seconds: float = 1.2) -> Path:
    path = folder / name
    write_wav(path, 0.1 * np.sin(np.arange(int(24000 * seconds)) * 0.05), 24000)
    return path


def test_human_is_the_sets_own_audio(tmp_path):
    system = open_system("human")
    audio = tone(tmp_path, "a.wav")
    spoken, missing = system.start()([Request(row("a", audio=audio), 0), Request(row("b"), 0)])
    assert spoken.audio == audio and spoken.error == ""
    assert missing.audio is None and missing.error == "the row has no audio"
    assert not system.random


def test_wavs_are_found_by_id_also_in_folders_and_a_missing_one_is_told(tmp_path):
    (tmp_path / "sub").mkdir()
    one, two = tone(tmp_path, "a.wav"), tone(tmp_path / "sub", "b.flac.wav")
    two.rename(two.with_name("b.wav"))
    speak = open_system(f"wavs:{tmp_path}").start()
    a, b, c = speak([Request(row(id), 0) for id in ("a", "sub/b", "c")])
    assert (a.audio, b.audio) == (one, two.with_name("b.wav"))
    assert "no file c.wav" in c.error
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_system(f"wavs:{tmp_path}/none")
    with pytest.raises(ValueError, match=f"write --model wavs:{tmp_path}"):
        open_system(str(tmp_path))


def test_wavs_are_told_apart_by_what_they_hold_not_by_their_folder(tmp_path):
    folders = [tmp_path / name / "wavs" for name in ("a", "b")]
    for folder in folders:
        folder.mkdir(parents=True)
        tone(folder, "1.wav")
    one, two = (open_system(f"wavs:{folder}") for folder in folders)
    assert one.name == two.name and one.details == two.details
    write_wav(folders[1] / "1.wav", np.zeros(int(24000 * 1.2)), 24000)  # as long as before
    assert open_system(f"wavs:{folders[1]}").details != one.details


def test_options_that_a_system_would_ignore_are_refused():
    with pytest.raises(ValueError, match="--adapter goes with a checkpoint"):
        open_system("human", adapter="x")
    with pytest.raises(ValueError, match="takes no sampling options.*temperature"):
        open_system("human", sampling={"temperature": 1})
    with pytest.raises(ValueError, match="unknown sampling option 'heat'.*temperature"):
        open_system("nano", sampling={"heat": 1})
    with pytest.raises(ValueError, match="unknown option 'heat'"):
        open_system("http://127.0.0.1:9", sampling={"heat": 1})


def test_a_requests_seed_is_its_own():
    seeds = {request_seed(seed, id) for seed in (0, 1) for id in ("a", "b")}
    assert len(seeds) == 4 and all(0 <= seed < 2**31 for seed in seeds)
    assert request_seed(0, "a") == request_seed(0, "a")


def test_checkpoint_speaks_the_same_alone_and_in_a_batch(nano, tmp_path):
    system = open_system("nano", sampling={"max_frames": 12}, device="cpu")
    speak = system.start()
    voice = tone(tmp_path, "voice.wav")
    requests = [Request(row("a"), 1), Request(row("b", "Other words.", ref_audio=voice,
                ref_text="Hm."), 2)]  # fmt: skip
    batch = speak(requests)
    alone = [speak([request])[0] for request in requests]
    for one, other in zip(batch, alone, strict=True):
        assert one.sample_rate_hz == 24000 and one.took_sec > 0
        assert len(one.wav) == len(other.wav) and np.allclose(one.wav, other.wav, atol=1e-4)
    assert batch[0].hit_cap == (len(batch[0].wav) == 12 * 960)
    assert system.details["weights"] == fingerprint(nano)
    assert system.details["sampling"]["max_frames"] == 12 and "seed" not in system.details


def test_a_text_that_cannot_be_spoken_fails_alone(nano):
    speak = open_system("nano", sampling={"max_frames": 3}, device="cpu").start()
    made = speak([Request(row(id, "<|audio|>" if id == "c" else "Word."), 1) for id in "abcde"])
    assert [bool(one.error) for one in made] == [False, False, True, False, False]
    assert all(one.error or len(one.wav) > 0 for one in made)
    assert "control token" in made[2].error and made[2].wav is None


def test_a_gpu_is_given_more_texts_than_it_speaks_at_once(nano, monkeypatch):
    """So that whoever ends makes room for the next; a CPU gains nothing by it."""
    assert open_system("nano", device="cpu").batch == 16
    assert open_system("nano", device="cpu", batch=3).batch == 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    asked = []

    class Voice:
        sample_rate_hz = 24000

        def speak(self, texts, batch_size, **options):
            asked.append((len(texts), batch_size))
            return [(np.zeros(9, np.float32), SimpleNamespace(stop_reason="eoc")) for _ in texts]

    monkeypatch.setattr("higgs_lab.load", lambda *a, **k: Voice())
    for batch, wanted in ((None, (128, 64)), (8, (16, 8))):
        system = open_system("nano", device="cuda", batch=batch)
        system.start()([Request(row(str(i)), i) for i in range(system.batch)])
        assert asked[-1] == wanted


def test_fingerprint_tells_retrained_weights_apart(tmp_path):
    weights = tmp_path / "model.safetensors"
    big = bytearray(4 << 20)
    weights.write_bytes(big)
    before = fingerprint(tmp_path)
    big[2 << 20] = 1
    weights.write_bytes(big)
    assert fingerprint(tmp_path) != before
    with pytest.raises(FileNotFoundError, match="no .safetensors"):
        fingerprint(tmp_path / "none")


class SpeechServer(BaseHTTPRequestHandler):
    """A speech server's manners: health, wav for a request, 400 for one it does not like."""

    asked: list = []

    serves = "base"

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        if self.path == "/v1/models":
            data = [{"id": self.serves, "object": "model", "created": time.time()}]
            self.wfile.write(json.dumps({"object": "list", "data": data}).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        refused = "refuse" in body["input"]
        broken = "Break down" in body["input"]
        self.send_response(400 if refused else 500 if broken else 200)
        self.end_headers()
        if refused:
            self.wfile.write(b'{"error": {"message": "not this text"}}')
        elif "silence" not in body["input"]:
            buffer = BytesIO()
            wav = np.full(12000, 0.001 * (body["seed"] % 100))
            soundfile.write(buffer, wav, 24000, format="WAV", subtype="PCM_16")
            self.wfile.write(buffer.getvalue())

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    SpeechServer.asked = []
    service = ThreadingHTTPServer(("127.0.0.1", 0), SpeechServer)
    threading.Thread(target=service.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{service.server_port}"
    service.shutdown()


def test_server_gets_text_reference_and_seed_and_answers_in_order(server, tmp_path):
    voice = tone(tmp_path, "voice.wav")
    system = open_system(server, sampling={"temperature": 0.5}, batch=3)
    rows = [row(str(i), f"Text {i}.", ref_audio=voice, ref_text="Hm.") for i in range(6)]
    clips = system.start()([Request(r, seed) for seed, r in enumerate(rows)])
    assert [round(float(clip.wav[0]) * 1000) for clip in clips] == list(range(6))
    sent = sorted(SpeechServer.asked, key=lambda body: body["seed"])
    assert [body["input"] for body in sent] == [f"Text {i}." for i in range(6)]
    assert all(body["ref_text"] == "Hm." and body["ref_audio"] for body in sent)
    assert sent[0]["extra_params"] == {"temperature": 0.5}
    assert system.details["concurrency"] == 3 and system.details["dialect"] == "vllm"


def test_a_server_is_known_by_what_it_serves_not_by_its_address(server, monkeypatch):
    before = open_system(server).details
    assert before["serves"] == ["base"] and open_system(server).details == before
    monkeypatch.setattr(SpeechServer, "serves", "exports/x")
    assert open_system(server).details != before
    assert open_system("http://127.0.0.1:9").details["serves"] is None  # nobody to ask


def test_server_refusing_one_text_is_that_clips_failure(server):
    speak = open_system(server).start()
    texts = ("Fine.", "Please refuse.", "Give silence.")
    good, refused, empty = speak([Request(row(t, t), 1) for t in texts])
    assert good.error == "" and "not this text" in refused.error
    assert empty.wav is None and empty.error


def test_a_server_that_is_gone_stops_the_run_instead_of_failing_every_clip(server):
    with pytest.raises(ConnectionError, match="no server answers"):
        open_system("http://127.0.0.1:9").start()


def test_a_text_that_breaks_a_server_is_that_clips_failure_where_it_speaks_others(
    server, monkeypatch
):
    """Else no resume would ever get past it."""
    monkeypatch.setattr("serve.client.time.sleep", lambda seconds: None)
    from serve.client import ServerError

    speak = open_system(server, batch=2).start()
    fine, broken = (Request(row(t, t), 1) for t in ("Fine.", "Break down."))
    good, bad = speak([fine, broken])
    assert good.error == "" and bad.wav is None and "500" in bad.error
    assert "500" in speak([broken])[0].error  # it has just spoken
    with pytest.raises(ServerError, match="500"):
        speak([broken])  # and now it has not: it is the server


def test_a_server_that_breaks_down_stops_the_run_so_that_it_can_be_resumed(server, monkeypatch):
    from serve.client import ServerError

    monkeypatch.setattr("serve.client.time.sleep", lambda seconds: None)
    speak = open_system(server).start()
    with pytest.raises(ServerError, match="500"):
        speak([Request(row("a", "Break down."), 1)])


def test_espeak_speaks_where_it_has_a_voice():
    pytest.importorskip("espeakng_loader")
    speak = open_system("espeak").start()
    english, zulu = speak([Request(row("a", "Hello <|prosody:pause|>there."), 0),
                           Request(row("b", "Sawubona.", language="zu"), 0)])  # fmt: skip
    assert 0.4 < len(english.wav) / english.sample_rate_hz < 3 and np.abs(english.wav).max() > 0.1
    assert "no voice for zu" in zulu.error and zulu.unsupported


def test_espeak_says_a_row_the_same_whatever_the_batch_holds():
    pytest.importorskip("espeakng_loader")
    speak = open_system("espeak").start()
    requests = [Request(row("a", "Hello there."), 0), Request(row("b", "Good bye."), 0)]
    a, b = speak(requests)
    other_b, other_a = speak(requests[::-1])
    assert np.array_equal(a.wav, other_a.wav) and np.array_equal(b.wav, other_b.wav)


def test_codec_gives_the_recordings_back_as_it_hears_them(nano, tmp_path):
    from higgs_lab.codec import Codec

    audio, bad = tone(tmp_path, "a.wav", 1.2), tmp_path / "bad.wav"
    bad.write_text("no sound")
    system = open_system("codec:nano", device="cpu")
    rows = [row("a", audio=audio), row("b"), row("c", audio=bad)]
    spoken, missing, unreadable = system.start()([Request(r, 0) for r in rows])
    codec, wav = Codec.from_pretrained(nano), read_audio(audio, 24000)
    assert np.allclose(spoken.wav, codec.decode(codec.encode(wav))[: len(wav)], atol=1e-5)
    assert len(spoken.wav) == len(wav) and spoken.took_sec is None
    assert missing.error == "the row has no audio" and "cannot be read as audio" in unreadable.error
    assert not system.random and system.details["weights"] == fingerprint(nano)
    with pytest.raises(ValueError, match="write codec:CHECKPOINT"):
        open_system("codec:")


def test_espeak_speaks_every_language_that_the_table_gives_it():
    """One real sentence of each: 76 of the model's 102 languages and five stretch rows."""
    pytest.importorskip("espeakng_loader")
    from eval.languages import LANGUAGES
    from eval.sets import load_set

    system, first = open_system("espeak"), {}
    for one in load_set("smoke", langs=["all", "stretch"]).rows:
        first.setdefault(one.language, Request(one, 0))
    first["my"] = Request(row("my", "မင်္ဂလာပါ", language="my"), 0)  # on others it crashes
    clips = dict(zip(first, system.start()(list(first.values())), strict=True))
    spoken = {code for code, clip in clips.items() if not clip.error}
    assert spoken == {code for code in LANGUAGES if system.speaks(code)}
    assert sum(LANGUAGES[code].tier > 0 for code in spoken) == 76 and len(spoken) == 81
    assert all(np.abs(clips[code].wav).max() > 0.05 for code in spoken)
    assert all(clips[code].unsupported for code in set(clips) - spoken)


def test_a_text_that_crashes_espeak_fails_alone():
    """espeak-ng overflows a buffer on some Burmese and takes its process down."""
    pytest.importorskip("espeakng_loader")
    from eval.sets import load_set

    burmese = [Request(r, 0) for r in load_set("smoke", langs=["my"]).rows]
    english = [Request(row(str(n), f"Text {n}."), 0) for n in range(2)]
    clips = open_system("espeak").start()([english[0], *burmese, english[1]])
    assert clips[0].error == clips[-1].error == "" and len(clips[-1].wav) > 10000
    crashed = [clip for clip in clips if clip.error]
    assert len(crashed) < len(burmese) and all("crashed" in clip.error for clip in crashed)


def test_real_recordings_go_through(speech_dir):
    from eval.sets import load_set

    test_set = load_set(str(speech_dir / "manifest.jsonl"))
    clips = open_system("human").start()([Request(r, 0) for r in test_set.rows])
    assert all(len(read_audio(clip.audio, 16000)) > 16000 for clip in clips)
