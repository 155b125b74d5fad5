"""The server as shipped: streaming, API key, and what a user meets when it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from served import API_KEY, START_SEC, launch

from higgs_lab.checkpoint import NativeFiles
from serve.client import ServerError, is_healthy, speak, stream

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


def test_zz_killed_server_is_noticed_and_leaves_nobody_behind(chunked):
    """Last on purpose: it ends the shared server."""
    chunked.process.send_signal(signal.SIGTERM)
    assert chunked.process.wait(90) is not None
    assert not is_healthy(chunked.url)
    with pytest.raises(ServerError) as caught:
        speak(chunked.url, "Hi.", api_key=API_KEY, retries=0)
    assert caught.value.status is None


def test_zz_an_export_that_the_server_refuses_is_explained(serve_env, exported, tmp_path):
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
