"""Served codes and sound are ours, number by number."""

from __future__ import annotations

import io
import wave
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from higgs_lab.delay import delay
from higgs_lab.generate import Sampling, codes_from_rows, generate
from higgs_lab.prompt import render_prompt
from higgs_lab.text import split_text
from serve.client import (
    ServerError,
    _open,
    _request,
    add_voice,
    delete_voice,
    list_voices,
    pcm_to_wav,
    speak,
)

LONG = "There are seventy seven windows over the mountain."  # more than ROWS
TEXTS = ["Hello there.", LONG, "<|emotion:elation|>Great, 你好."]
ROWS = 60


def samples(data: bytes) -> np.ndarray:
    with wave.open(io.BytesIO(data)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (24000, 1, 2)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2")


def greedy(talker, prompt, rows: int = ROWS):
    """Our greedy generation, cut after the same number of rows as the server's."""
    return generate(talker, [prompt], Sampling(temperature=0, mode="vllm", max_frames=rows - 8))[0]


def heard(rows: torch.Tensor, stop_reason: str) -> torch.Tensor:
    """Codes that reach the served codec: a request cut by its length loses its last row."""
    return codes_from_rows(rows if stop_reason == "eoc" else rows[:-1], "vllm")


@pytest.fixture(scope="module")
def reference() -> bytes:
    """1.5 s of a voice-like sound."""
    t = np.arange(36000) / 24000
    tone = sum(np.sin(2 * np.pi * 140 * k * t) / k for k in range(1, 9))
    wav = 0.2 * tone * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * t))
    return pcm_to_wav((wav * 16384).astype("<i2").tobytes())


def as_float(data: bytes) -> np.ndarray:
    return samples(data).astype(np.float32) / 32768


@pytest.mark.parametrize("text", TEXTS)
def test_greedy_codes_and_sound_are_ours(exact, talker, codec, vocab, text):
    data = speak(exact.url, text, temperature=0.0, max_new_tokens=ROWS)
    header, rows = exact.dumps.last()
    prompt = render_prompt(vocab, text)
    assert header["prompt_token_ids"] == prompt.ids.tolist()
    ours = greedy(talker, prompt)
    assert torch.equal(ours.rows, rows)
    want = codec.decode(heard(ours.rows, ours.stop_reason))
    got = samples(data)
    assert len(got) == len(want)
    assert np.abs(got - np.clip(want, -1, 1) * 32767).max() <= 2  # int16 rounding


def test_trap19_a_request_that_ends_by_itself_has_our_frames(exact, talker, codec, vocab):
    """Not one frame more or less: row T ends codebook 0, T frames are heard."""
    text = "The cat is happy."
    data = speak(exact.url, text, temperature=0.0, max_new_tokens=100)
    _, rows = exact.dumps.last()
    ours = greedy(talker, render_prompt(vocab, text), 100)
    assert ours.stop_reason == "eoc" and torch.equal(ours.rows, rows)
    frames = len(rows) - 8
    assert len(ours.codes) == frames
    want = codec.decode(ours.codes)
    got = samples(data)
    assert len(got) == frames * 960
    assert np.abs(got - np.clip(want, -1, 1) * 32767).max() <= 2


@pytest.mark.parametrize("ref_text", [None, "What it says."])
def test_clone_uses_our_codec_and_gives_our_codes(exact, talker, codec, vocab, reference, ref_text):
    """trap 16: the clone encoder is the bundled codec, through HIGGS_AUDIO_TOKENIZER_PATH."""
    ref_codes = codec.encode(as_float(reference))
    text = "Cloned."
    data = speak(
        exact.url,
        text,
        ref_audio=reference,
        ref_text=ref_text,
        temperature=0.0,
        max_new_tokens=ROWS,
    )
    header, rows = exact.dumps.last()
    prompt = render_prompt(vocab, text, ref_codes, ref_text)
    assert header["audio_input_ids"] == delay(ref_codes).tolist()
    assert header["audio_placeholder_positions"] == prompt.is_audio.nonzero()[:, 0].tolist()
    assert header["prompt_token_ids"] == prompt.ids.tolist()
    ours = greedy(talker, prompt)
    assert torch.equal(ours.rows, rows)
    want = codec.decode(heard(ours.rows, ours.stop_reason))
    assert np.abs(samples(data) - np.clip(want, -1, 1) * 32767).max() <= 2


def test_trap39_a_clone_differs_from_plain_speech(exact, reference):
    """vLLM-Omni drops a reference that does not fit with a debug line, and speaks in any voice."""
    speak(exact.url, LONG, temperature=0.0, max_new_tokens=ROWS)
    _, plain = exact.dumps.last()
    speak(exact.url, LONG, ref_audio=reference, temperature=0.0, max_new_tokens=ROWS)
    _, cloned = exact.dumps.last()
    assert not torch.equal(plain, cloned)


def test_trap35_a_hundred_requests_at_once_are_neither_lost_nor_mixed_up(
    exact, talker, codec, vocab
):
    """Codes by request, and each caller gets the sound of its own codes."""
    texts = [f"Request number {i}." for i in range(100)]
    exact.dumps.new()

    def ask(text: str) -> bytes:
        return speak(exact.url, text, temperature=0.0, max_new_tokens=24, retries=0)

    with ThreadPoolExecutor(len(texts)) as pool:
        sounds = list(pool.map(ask, texts))
    rows_of = {tuple(h["prompt_token_ids"]): rows for h, rows in exact.dumps.new()}
    assert len(rows_of) == len(texts)
    prompts = [render_prompt(vocab, text) for text in texts]
    ours = generate(talker, prompts, Sampling(temperature=0, mode="vllm", max_frames=24 - 8))
    for prompt, generation, sound in zip(prompts, ours, sounds, strict=True):
        assert torch.equal(rows_of[tuple(prompt.ids.tolist())], generation.rows)
        want = codec.decode(heard(generation.rows, generation.stop_reason))
        assert np.abs(samples(sound) - np.clip(want, -1, 1) * 32767).max() <= 2


def test_ten_thousand_characters(exact):
    """One request is refused in the server's words; the client's parts are spoken and joined."""
    text = ("This sentence is one of very many that follow each other. " * 200)[:10_000].strip()
    with pytest.raises(ServerError, match="4096") as caught:
        speak(exact.url, text, split=False, temperature=0.0, max_new_tokens=20, retries=0)
    assert caught.value.status == 500  # though it is the caller's fault
    parts, rows = len(split_text(text)), 20
    whole = samples(speak(exact.url, text, temperature=0.0, max_new_tokens=rows))
    assert parts > 30 and len(whole) == parts * (rows - 9) * 960 - (parts - 1) * 480  # 20 ms fades


def test_trap23_seeds_rule_sampling_and_no_seed_draws_anew(exact):
    def take(**options) -> bytes:
        return speak(exact.url, LONG, max_new_tokens=30, **options)

    assert take(seed=1) == take(seed=1)
    assert take(seed=1) != take(seed=2)
    assert take() != take()  # the engine's own deploy file would give seed 42 to both


def test_trap24_max_new_tokens_limits_the_sound(exact):
    data = speak(exact.url, LONG, seed=3, max_new_tokens=50)
    assert len(samples(data)) <= 50 * 960


def test_trap25_top_level_temperature_is_ignored_over_there(exact):
    """Why the client puts it into extra_params."""
    body = {"input": LONG, "temperature": 0.0, "max_new_tokens": 30}

    def take(extra: dict) -> bytes:
        request = _request(exact.url, "/v1/audio/speech", None, json_body=body | extra)
        with _open(request, 120) as response:
            return response.read()

    assert take({"seed": 1}) != take({"seed": 2})
    greedy_params = {"extra_params": {"temperature": 0.0}}
    assert take({"seed": 1} | greedy_params) == take({"seed": 2} | greedy_params)


@pytest.mark.parametrize(
    "response_format, magic",
    [("wav", b"RIFF"), ("flac", b"fLaC"), ("opus", b"OggS"), ("mp3", None), ("pcm", None)],
)
def test_formats(exact, response_format, magic):
    data = speak(
        exact.url, "Hi.", response_format=response_format, temperature=0.0, max_new_tokens=30
    )
    assert len(data) > 1000
    if magic:
        assert data.startswith(magic)
    if response_format == "mp3":
        assert data[:3] == b"ID3" or data[0] == 0xFF
    if response_format == "pcm":
        wav = speak(exact.url, "Hi.", temperature=0.0, max_new_tokens=30)
        assert data == samples(wav).tobytes()


@pytest.mark.parametrize(
    "body, status, words",
    [
        ({"input": ""}, 400, "empty"),
        ({"input": "Hi.", "voice": "nobody"}, 400, "nobody"),
        ({"input": "Hi.", "model": "another"}, 404, "another"),
        ({"input": "Hi.", "max_new_tokens": 0}, None, "max_new_tokens"),
        ({"input": "Hi.", "ref_audio": "data:audio/wav;base64,bm8gYXVkaW8="}, 400, "audio"),
    ],
)
def test_bad_requests_are_refused_with_the_servers_words(exact, body, status, words):
    with pytest.raises(ServerError, match=words) as caught:
        _open(_request(exact.url, "/v1/audio/speech", None, json_body=body), 60)
    assert caught.value.status == status or (status is None and 400 <= caught.value.status < 500)


@pytest.mark.parametrize("seconds", [0.5, 31.0])
def test_trap21_reference_limits_are_the_ones_the_client_checks(exact, seconds):
    import base64

    wav = pcm_to_wav(bytes(int(seconds * 24000) * 2))
    with pytest.raises(ValueError, match="1 to 30 s"):
        speak(exact.url, "Hi.", ref_audio=wav)
    url = "data:audio/wav;base64," + base64.b64encode(wav).decode()  # a URL is not checked here
    with pytest.raises(ServerError, match="too (short|long)"):
        speak(exact.url, "Hi.", ref_audio=url, retries=0)


def test_uploaded_voice_speaks_as_the_same_reference(exact, reference, tmp_path):
    path = tmp_path / "ann.wav"
    path.write_bytes(reference)
    add_voice(exact.url, "ann", path, consent="signed on paper", ref_text="What it says.")
    try:
        assert [v["name"] for v in list_voices(exact.url)] == ["ann"]
        by_name = speak(exact.url, "Hi.", voice="ann", temperature=0.0, max_new_tokens=30)
    finally:
        delete_voice(exact.url, "ann")
    by_file = speak(
        exact.url, "Hi.", reference, "What it says.", temperature=0.0, max_new_tokens=30
    )
    assert by_name == by_file and list_voices(exact.url) == []


def test_batch_through_the_real_server(exact, tmp_path):
    from higgs_lab.manifest import Utterance, read_manifest
    from serve.client_cli import speak_manifest

    rows = [Utterance(audio=None, text=f"Row {i}.", id=f"r{i}") for i in range(4)]
    assert speak_manifest(exact.url, rows, tmp_path, temperature=0.0, max_new_tokens=30) == 0
    spoken = read_manifest(tmp_path / "manifest.jsonl", need_audio=True)
    assert [row.text for row in spoken] == [row.text for row in rows]
