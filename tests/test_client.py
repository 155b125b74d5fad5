"""serve.client against a small HTTP server that answers as the engines do."""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
import time
import wave

import numpy as np
import pytest
import soundfile

from higgs_lab.manifest import Utterance
from serve import client, player
from serve.client import ServerError, load_reference, request_body, speak, stream
from serve.client_cli import speak_manifest
from tests.fake_server import ONE_SECOND, FakeServer


@pytest.fixture
def server():
    fake = FakeServer()
    yield fake
    fake.stop()


@pytest.fixture
def no_wait(monkeypatch):
    monkeypatch.setattr(client.time, "sleep", lambda seconds: None)


def test_trap25_sampling_goes_where_each_engine_reads_it():
    """vLLM-Omni ignores top-level temperature; SGLang-Omni knows no extra_params."""
    knobs = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "seed": 7, "max_new_tokens": 100}
    vllm = request_body("Hi.", **knobs)
    assert vllm["extra_params"] == {"temperature": 0.8, "top_k": 50, "top_p": 0.9}
    assert "temperature" not in vllm and "top_k" not in vllm and "top_p" not in vllm
    sglang = request_body("Hi.", dialect="sglang", **knobs)
    assert "extra_params" not in sglang
    assert (sglang["temperature"], sglang["top_k"], sglang["top_p"]) == (0.8, 50, 0.9)
    for body in (vllm, sglang):
        assert (body["seed"], body["max_new_tokens"]) == (7, 100)


def test_the_voice_to_clone_is_named_as_each_engine_documents_it():
    assert request_body("Hi.", "data:x", "Ref.")["ref_text"] == "Ref."
    sglang = request_body("Hi.", "data:x", "Ref.", dialect="sglang")
    assert sglang["references"] == [{"audio_path": "data:x", "text": "Ref."}]
    assert not {"ref_audio", "ref_text"} & set(sglang)
    bare = request_body("Hi.", "data:x", dialect="sglang")
    assert bare["references"] == [{"audio_path": "data:x"}]


def test_zero_is_a_value_and_none_is_not():
    body = request_body("Hi.", temperature=0.0, seed=0, top_p=None)
    assert body["extra_params"] == {"temperature": 0.0} and body["seed"] == 0


def test_trap24_openai_name_max_tokens_is_refused_because_servers_ignore_it():
    with pytest.raises(ValueError, match="max_new_tokens"):
        request_body("Hi.", max_tokens=50)


def test_trap29_smuggled_control_token_is_refused_before_sending(server):
    with pytest.raises(ValueError, match=r"<\|audio\|>"):
        speak(server.url, "Say <|audio|> now")
    with pytest.raises(ValueError):
        speak(server.url, "Hi.", ref_audio=ONE_SECOND, ref_text="x <|endoftext|>")
    assert server.asked == []


def test_known_tag_passes(server):
    speak(server.url, "<|emotion:elation|>Great!")
    assert server.json()["input"] == "<|emotion:elation|>Great!"


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"ref_text": "hello"}, "without ref_audio"),
        ({"reference": "data:x", "voice": "ann"}, "not both"),
        ({"response_format": "aac"}, "response_format"),
        ({"dialect": "openai"}, "dialect"),
        ({"stream": True, "response_format": "mp3"}, "streaming"),
        ({"stream": True, "speed": 1.5}, "speed"),
    ],
)
def test_what_the_server_would_refuse_or_ignore_is_refused_here(kwargs, words):
    with pytest.raises(ValueError, match=words):
        request_body("Hi.", **kwargs)


@pytest.mark.parametrize("text", ["", "  \n"])
def test_empty_text_is_refused(text):
    with pytest.raises(ValueError, match="empty"):
        request_body(text)


def wav_of(seconds: float, channels: int = 1) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(24000)
        file.writeframes(bytes(int(seconds * 24000) * 2 * channels))
    return buffer.getvalue()


def test_trap21_reference_length_is_checked_before_sending(tmp_path):
    for seconds in (0.5, 31.0):
        path = tmp_path / "ref.wav"
        path.write_bytes(wav_of(seconds))
        with pytest.raises(ValueError, match=r"ref.wav lasts .* 1 to 30 s"):
            load_reference(path)
    assert load_reference(wav_of(31.0), dialect="sglang").startswith("data:audio/wav;base64,")
    assert load_reference(wav_of(2.0)).startswith("data:")
    assert load_reference("https://host/x.wav") == "https://host/x.wav"


def test_reference_that_is_no_audio_is_refused(tmp_path):
    path = tmp_path / "ref.wav"
    path.write_text("this is text")
    with pytest.raises(ValueError, match="no audio"):
        load_reference(path)
    with pytest.raises(FileNotFoundError):
        load_reference(tmp_path / "missing.wav")


def test_reference_reaches_the_server_byte_for_byte(server, tmp_path):
    path = tmp_path / "ref.flac"
    import base64

    soundfile.write(path, np.linspace(-0.5, 0.5, 36000), 24000)
    speak(server.url, "Hi.", ref_audio=path, ref_text="What it says.")
    kind, _, data = server.json()["ref_audio"].partition(",")
    assert kind == "data:audio/flac;base64" and base64.b64decode(data) == path.read_bytes()
    assert server.json()["ref_text"] == "What it says."


def test_retries_overload_and_server_errors_but_not_bad_requests(server, no_wait):
    server.answers = [(503, b"busy"), (500, b"oops"), (200, ONE_SECOND)]
    assert speak(server.url, "Hi.") == ONE_SECOND
    assert len(server.asked) == 3
    server.answers = [(400, b'{"error":{"message":"Unknown voice"}}')]
    with pytest.raises(ServerError, match="400: Unknown voice") as caught:
        speak(server.url, "Hi.")
    assert caught.value.status == 400 and len(server.asked) == 4


def test_gives_up_after_the_retries_and_says_what_the_server_said(server, no_wait):
    server.answers = [(500, b'{"error":{"message":"EngineCore died"}}')]
    with pytest.raises(ServerError, match="EngineCore died"):
        speak(server.url, "Hi.", retries=2)
    assert len(server.asked) == 3


def test_waits_as_long_as_the_server_asks(server, monkeypatch):
    waited = []
    monkeypatch.setattr(client.time, "sleep", waited.append)
    server.answers = [
        (429, b"slowly", {"Retry-After": "7"}),
        (503, b"", {"Retry-After": "86400"}),
        (500, b"oops"),
        (200, ONE_SECOND),
    ]
    speak(server.url, "Hi.")
    assert waited[0] == 7.0 and waited[1] == client.MAX_RETRY_AFTER_SEC
    assert 2.0 <= waited[2] <= 6.0  # the third back-off: 4 s, spread


def test_an_answer_that_is_cut_is_asked_for_again(server, no_wait):
    cut = {"Content-Length": str(len(ONE_SECOND) + 9), "Connection": "close"}
    server.answers = [(200, ONE_SECOND, cut), (200, ONE_SECOND)]
    assert speak(server.url, "Hi.") == ONE_SECOND and len(server.asked) == 2
    server.answers = [(200, ONE_SECOND, cut)]
    with pytest.raises(ServerError, match="in the middle"):
        speak(server.url, "Hi.", retries=0)


def test_a_silent_server_is_given_up_after_the_timeout(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        begin = time.monotonic()
        with pytest.raises(ServerError, match="timed out"):
            speak(url, "Hi.", timeout_sec=0.3, retries=0)
        assert time.monotonic() - begin < 5


def test_no_server_is_a_server_error_without_status(no_wait):
    with pytest.raises(ServerError, match="no answer") as caught:
        speak("http://127.0.0.1:9", "Hi.", retries=1)
    assert caught.value.status is None


def test_an_error_inside_a_200_is_an_error(server, no_wait):
    """vLLM-Omni answers 200 and puts the error in the body when the engine refuses late."""
    server.answers = [(200, b'{"error":{"message":"stop ids out of vocabulary"}}')]
    with pytest.raises(ServerError, match="stop ids"):
        speak(server.url, "Hi.", retries=0)
    with pytest.raises(ServerError, match="stop ids"):
        list(stream(server.url, "Hi."))


def test_api_key_travels_as_bearer(server):
    speak(server.url, "Hi.", api_key="s3cret")
    assert server.asked[-1][1]["Authorization"] == "Bearer s3cret"


def test_long_text_is_split_and_joined_into_one_wav(server):
    text = " ".join(f"This is the sentence with the number {i} in it." for i in range(20))
    data = speak(server.url, text)
    assert len(server.asked) > 1
    assert " ".join(server.json(i)["input"] for i in range(len(server.asked))) == text
    with wave.open(io.BytesIO(data)) as file:
        fade = round(0.02 * 24000)
        assert file.getframerate() == 24000
        assert file.getnframes() == 24000 * len(server.asked) - fade * (len(server.asked) - 1)


def test_formats_that_cannot_be_joined_are_not_split(server):
    speak(server.url, "One sentence here. " * 60, response_format="mp3")
    assert len(server.asked) == 1


def test_stream_asks_for_raw_pcm_and_never_cuts_a_sample(server):
    server.answers = [(200, bytes(range(256)) * 1001)]
    pieces = list(stream(server.url, "Hi.", temperature=0.5))
    assert all(len(piece) % 2 == 0 for piece in pieces)
    assert b"".join(pieces) == bytes(range(256)) * 1001
    body = server.json()
    assert (body["stream"], body["stream_format"], body["response_format"]) == (
        True,
        "audio",
        "pcm",
    )


LONG = " ".join(f"This is the sentence with the number {i} in it." for i in range(20))


def noise(number: int, samples: int = 5000) -> bytes:
    rng = np.random.default_rng(number)
    return rng.integers(-20000, 20000, samples).astype("<i2").tobytes()


@pytest.mark.parametrize("samples", [5000, 961, 960])
def test_long_text_streams_as_it_is_spoken_whole(server, samples):
    answers = [(200, noise(i, samples)) for i in range(8)]
    server.answers = list(answers)
    whole = speak(server.url, LONG, response_format="pcm")
    parts = len(server.asked)
    assert 1 < parts < 8
    server.answers = list(answers)
    assert b"".join(stream(server.url, LONG)) == whole
    server.answers = list(answers)
    assert b"".join(stream(server.url, LONG, split=False)) == answers[0][1]
    assert server.json()["input"] == LONG


def test_streams_are_saved_and_played_as_they_come(server, tmp_path):
    server.answers = [(200, noise(1))]
    player.save(stream(server.url, "Hi."), tmp_path / "a.wav")
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert (file.getframerate(), file.getnframes()) == (24000, 5000)
        assert file.readframes(5000) == noise(1)
    player.save(stream(server.url, "Hi."), tmp_path / "a.pcm")
    assert (tmp_path / "a.pcm").read_bytes() == noise(1)
    heard = tmp_path / "heard"
    player.play(stream(server.url, "Hi."), f"dd status=none of={heard}")
    assert heard.read_bytes() == player.wav_header() + noise(1)
    assert soundfile.info(heard).samplerate == 24000  # the header of a stream is understood
    with pytest.raises(OSError, match="exit code 3"):
        player.play(stream(server.url, "Hi."), "sh -c 'exit 3'")


def test_a_stream_that_breaks_leaves_no_file(server, tmp_path):
    server.answers = [(200, b'{"error":{"message":"late"}}')]
    with pytest.raises(ServerError, match="late"):
        player.save(stream(server.url, "Hi."), tmp_path / "a.wav")
    assert list(tmp_path.iterdir()) == []


def test_player_is_found_or_named(monkeypatch):
    monkeypatch.setattr(player.shutil, "which", lambda name: "/x" if name == "aplay" else None)
    assert player.find_player() == "aplay -q"
    monkeypatch.setattr(player.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="--player"):
        player.find_player()


def run_client(server, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "serve.client", *words, "--url", server.url]
    return subprocess.run(command, capture_output=True, timeout=120)


def test_command_line_takes_the_format_from_the_name_and_plays(server, tmp_path):
    assert run_client(server, "Hi.", "--out", str(tmp_path / "a.flac")).returncode == 0
    assert server.json()["response_format"] == "flac"
    heard = tmp_path / "heard"
    out = tmp_path / "a.wav"
    server.answers = [(200, noise(1))]
    words = ["Hi.", "--play", "--player", f"dd status=none of={heard}", "--out", str(out)]
    assert run_client(server, *words).returncode == 0
    assert heard.read_bytes().endswith(noise(1)) and out.stat().st_size == 44 + len(noise(1))
    assert run_client(server, "Hi.", "--stream", "--out", "-").stdout == noise(1)
    refused = run_client(server, "Hi.", "--stream", "--out", "-", "--format", "mp3")
    assert refused.returncode != 0 and b"pcm and wav only" in refused.stderr


def rows_of(number: int) -> list[Utterance]:
    return [Utterance(audio=None, text=f"Text {i}.", id=f"row{i}") for i in range(number)]


def test_batch_writes_all_and_resumes_without_asking_again(server, tmp_path):
    assert speak_manifest(server.url, rows_of(5), tmp_path, concurrency=2) == 0
    assert sorted(p.name for p in tmp_path.glob("*.wav")) == [f"row{i}.wav" for i in range(5)]
    (tmp_path / "row3.wav").unlink()
    asked = len(server.asked)
    assert speak_manifest(server.url, rows_of(5), tmp_path, concurrency=2) == 0
    assert len(server.asked) == asked + 1 and server.json()["input"] == "Text 3."
    lines = (tmp_path / "manifest.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [f"row{i}" for i in range(5)]


def test_batch_records_failures_and_goes_on(server, tmp_path, no_wait):
    server.answers = [(200, ONE_SECOND), (400, b'{"error":{"message":"bad"}}'), (200, ONE_SECOND)]
    assert speak_manifest(server.url, rows_of(4), tmp_path, concurrency=1) == 1
    failure = json.loads((tmp_path / "failures.jsonl").read_text())
    assert failure["id"] == "row1" and "bad" in failure["error"]
    assert len(list(tmp_path.glob("*.wav"))) == 3


def test_batch_stops_when_the_server_is_gone(server, tmp_path, no_wait):
    server.stop()
    with pytest.raises(ServerError):
        speak_manifest(server.url, rows_of(50), tmp_path, concurrency=2, retries=0)
    assert (tmp_path / "manifest.jsonl").read_text() == ""


def test_voice_upload_needs_consent_and_sends_a_form(server, tmp_path):
    path = tmp_path / "ann.wav"
    path.write_bytes(wav_of(2.0))
    with pytest.raises(ValueError, match="consent"):
        client.add_voice(server.url, "ann", path, consent=" ")
    server.answers = [(200, b'{"voice": {"name": "ann"}}')]
    assert client.add_voice(server.url, "ann", path, "signed", ref_text="Hi.")["name"] == "ann"
    sent, headers, body = server.asked[-1]
    assert sent == "/v1/audio/voices" and headers["Content-Type"].startswith("multipart/form-data")
    assert path.read_bytes() in body and b'name="consent"\r\n\r\nsigned' in body


def test_no_torch_is_imported():
    code = "import sys, serve.client, serve.client_cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
