"""The server as shipped: streaming, API key, other clients, and what a user meets when it dies."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import wave
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file
from served import API_KEY, ROOT, START_SEC, launch

from higgs_lab.checkpoint import NativeFiles
from higgs_lab.manifest import read_manifest
from serve.check import OK, check_export, failures, table
from serve.client import ServerError, pcm_to_wav, speak, stream
from serve.launch import free_port
from serve.live import run_panel

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
    assert len(rows) < 100  # it ended by itself: one that is cut loses its last row
    want = codec.decode(codes_from_rows(rows, "vllm"))
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


def test_the_whole_panel_of_check_holds(chunked, exported):
    """`serve.check EXPORT --live`: codes and sound as ours, limits, formats, seeds, key."""
    dumps = chunked.dumps.folder
    findings = run_panel(exported, chunked.url, "cpu", api_key=API_KEY, dumps=dumps, rows=60)
    assert not failures(findings, "vllm"), table(findings)
    held = {f.rule for f in findings if f.vllm == OK}
    lines = ("short", "plain", "tag and scripts", "clone", "clone with transcript")
    wanted = {f"{what}: {line}" for what in ("prompt", "codes", "sound") for line in lines}
    wanted |= {"reference codes: clone", "stop reasons", "clone differs from plain", "formats"}
    wanted |= {"stream equals whole", "a seed repeats", "seeds differ", "no seed draws anew"}
    wanted |= {"refuses: text beyond the context", "refuses: reference of 0.5 s", "api key"}
    assert wanted <= held, table(findings)


def test_bench_measures_it(chunked, tmp_path):
    words = [sys.executable, "-m", "serve.bench", "--out", str(tmp_path), "--url", chunked.url]
    words += ["--concurrency", "2", "--rate", "1", "--requests", "4", "--max-new-tokens", "40"]
    words += ["--consistency", "3", "--float32", "--dumps", str(chunked.dumps.folder)]
    env = os.environ | {"VLLM_API_KEY": API_KEY}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr + done.stdout
    result = json.loads((tmp_path / "bench.json").read_text())
    assert [level["load"] for level in result["levels"]] == ["2 at a time", "1 a second"]
    for level in result["levels"]:
        assert level["summary"]["failed"] == 0, level["summary"]["failures"]
        first, whole = (
            level["summary"][name]["p50"]["value"] for name in ("first_audio_sec", "total_sec")
        )
        assert 0 < first < whole
        assert max(len(take["arrivals"]) for take in level["takes"]) > 1  # it streams
    greedy = result["consistency"][0]["greedy"]
    assert greedy["same_codes"] == greedy["same_sound"] == greedy["requests"] == 6


def test_killed_in_the_middle_of_a_batch(chunked, exported, tmp_path):
    """kill -9 of a server that serve.launch started: launcher and client say so and end, and the
    batch goes on with another server."""
    url, out, log = f"http://127.0.0.1:{free_port()}", tmp_path / "wavs", tmp_path / "launch.log"
    env = os.environ | {"VLLM_API_KEY": API_KEY}
    rows = [{"id": f"r{i}", "text": f"Row {i}."} for i in range(24)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def batch(url: str, *more: str) -> list[str]:
        words = [sys.executable, "-m", "serve.client", "--manifest", str(tmp_path / "texts.jsonl")]
        words += ["--out", str(out), "--url", url, "--temperature", "0", "--max-new-tokens", "30"]
        return [*words, *more]

    launch_words = [sys.executable, "-m", "serve.launch", str(exported), "--device", "cpu"]
    launch_words += ["--port", url.rpartition(":")[2], "--state", str(tmp_path / "state")]
    with log.open("w") as said:
        launcher = subprocess.Popen(launch_words, env=env, stdout=said, stderr=said)
    try:
        while "ready after" not in log.read_text():
            assert launcher.poll() is None, log.read_text()
            time.sleep(0.5)
        client = subprocess.Popen(
            batch(url, "--retries", "1"), env=env, stderr=subprocess.PIPE, text=True
        )
        while len(list(out.glob("*.wav"))) < 4:
            assert client.poll() is None
            time.sleep(0.05)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text()
        os.kill(int(children.split()[0]), signal.SIGKILL)
        assert launcher.wait(60) == 128 + signal.SIGKILL
        assert "killed by SIGKILL" in log.read_text()
        reported = client.communicate(timeout=120)[1]
    finally:
        launcher.terminate()
    assert client.returncode not in (0, None) and "Traceback" not in reported
    assert f"Nobody answers {url} any more" in reported and "it goes on with" in reported
    done = {file: file.stat().st_mtime_ns for file in out.glob("*.wav")}
    assert 4 <= len(done) < len(rows)
    failed = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert {row["id"] for row in failed}.isdisjoint(file.stem for file in done) and failed
    assert not list(out.glob("*.tmp*"))  # nothing half-written

    subprocess.run(batch(chunked.url), env=env, check=True, timeout=280)
    assert {file: file.stat().st_mtime_ns for file in done} == done  # not asked for again
    spoken = read_manifest(out / "manifest.jsonl", need_audio=True)
    assert [row.text for row in spoken] == [row["text"] for row in rows]
    assert not (out / "failures.jsonl").exists()


def test_an_export_that_the_server_refuses_is_explained(serve_env, exported, tmp_path):
    """What serve.check finds beforehand kills the server, and the launcher says why."""
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
