"""The server as shipped: streaming, API key, other clients, and what a user meets when it dies."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import wave

import numpy as np
import pytest
from served import API_KEY, ROOT, START_SEC, launch

from higgs_lab.checkpoint import NativeFiles
from serve.client import ServerError, pcm_to_wav, speak, stream

TEXT = "This is spoken while it is made."


def test_api_key_is_asked_for(chunked):
    for key in (None, "wrong"):
        with pytest.raises(ServerError) as caught:
            speak(chunked.url, "Hi.", api_key=key, max_new_tokens=20)
        assert caught.value.status == 401
    assert speak(chunked.url, "Hi.", api_key=API_KEY, max_new_tokens=20)


def test_stream_equals_whole_and_comes_in_pieces(chunked):
    options = {"api_key": API_KEY, "temperature": 0.0, "max_new_tokens": 150}
    whole = speak(chunked.url, TEXT, response_format="pcm", **options)
    begin, pieces, first = time.monotonic(), [], None
    for piece in stream(chunked.url, TEXT, **options):
        first = first or time.monotonic() - begin
        pieces.append(piece)
    total = time.monotonic() - begin
    assert b"".join(pieces) == whole
    assert len(pieces) > 1 and first < 0.9 * total


def test_chunked_sound_is_nearly_that_of_the_whole_decode(chunked, codec):
    """Same codes, same length; only samples near the chunk bounds may differ."""
    from higgs_lab.generate import codes_from_rows

    chunked.dumps.new()
    pcm = speak(
        chunked.url,
        TEXT,
        api_key=API_KEY,
        response_format="pcm",
        temperature=0.0,
        max_new_tokens=100,
    )
    _, rows = chunked.dumps.last()
    want = codec.decode(codes_from_rows(rows[:-1], "vllm"))
    got = np.frombuffer(pcm, "<i2") / 32768
    assert len(got) == len(want)
    frames = np.abs(got - want).reshape(-1, 960).max(axis=1)
    assert np.median(frames) < 1e-3


def test_command_line_client(chunked, tmp_path):
    out = tmp_path / "hello.wav"
    command = [sys.executable, "-m", "serve.client", "Hello.", "--out", str(out)]
    command += ["--url", chunked.url, "--api-key", API_KEY, "--max-new-tokens", "30"]
    subprocess.run(command, check=True, timeout=120)
    assert out.read_bytes().startswith(b"RIFF")
    refused = subprocess.run(
        [*command[:3], "Say <|audio|>.", *command[4:]], capture_output=True, text=True, timeout=120
    )
    assert refused.returncode != 0 and "<|audio|>" in refused.stderr


def test_the_docs_example_of_the_official_openai_client_runs(chunked, serve_env, tmp_path):
    """openai comes with vllm, so its own environment runs it."""
    (code,) = re.findall(
        r"```python\n(.*?from openai import.*?)```",
        (ROOT / "docs" / "serving.md").read_text(),
        re.S,
    )
    assert "http://127.0.0.1:8000" in code and 'api_key="none"' in code
    code = code.replace("http://127.0.0.1:8000", chunked.url).replace('"none"', repr(API_KEY))
    t = np.arange(36000) / 24000
    tone = (3000 * sum(np.sin(2 * np.pi * 140 * k * t) / k for k in range(1, 9))).astype("<i2")
    (tmp_path / "voice.wav").write_bytes(pcm_to_wav(tone.tobytes()))
    command = [serve_env / "python", "-c", code]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=200)
    with wave.open(str(tmp_path / "hello.wav")) as file:
        whole = file.readframes(file.getnframes())
    streamed = (tmp_path / "hello.pcm").read_bytes()
    assert len(whole) >= 960 * 2 and len(whole) % 1920 == 0  # whole frames of 40 ms
    assert streamed == whole  # one seed, one take


def test_an_export_that_the_server_refuses_is_explained(serve_env, exported, tmp_path):
    """What serve.check finds beforehand kills the server, and the launcher says why."""
    import shutil

    from safetensors.torch import save_file

    from serve.check import check_export, failures

    bad = tmp_path / "bad"
    shutil.copytree(exported, bad)
    tensors = dict(NativeFiles(exported).items())
    del tensors["body.norm.weight"]
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    index = (bad / "model.safetensors.index.json").read_text()
    index = index.replace('"body.norm.weight": "model.safetensors",', "")
    (bad / "model.safetensors.index.json").write_text(index)
    assert [f.rule for f in failures(check_export(bad), "vllm")] == ["talker keys complete"]
    with launch(bad, tmp_path, "bad", "cpu_smoke") as server:
        with pytest.raises(RuntimeError, match=r"required checkpoint keys missing.*body\.norm"):
            server.wait_ready(START_SEC, progress=False)
