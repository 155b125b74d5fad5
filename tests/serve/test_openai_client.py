"""The official openai client against the real server: the example of docs/serving.md as it is."""

from __future__ import annotations

import re
import subprocess
import wave
from pathlib import Path

import numpy as np
from served import API_KEY

from serve.client import pcm_to_wav

DOCS = Path(__file__).parents[2] / "docs" / "serving.md"


def test_the_example_of_the_docs_runs(chunked, serve_env, tmp_path):
    """openai comes with vllm, so its own environment runs it."""
    (code,) = re.findall(r"```python\n(.*?from openai import.*?)```", DOCS.read_text(), re.S)
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
