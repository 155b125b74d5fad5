"""A client of /v1/audio/speech for vLLM-Omni and SGLang-Omni: plain HTTP, no torch.

    from serve.client import speak
    wav = speak("http://127.0.0.1:8000", "Hello there.", ref_audio="voice.wav", ref_text="...")

    python -m serve.client "Hello there." --out hello.wav --ref-audio voice.wav
    python -m serve.client --manifest texts.jsonl --out wavs/ --concurrency 8

The two servers take the same request in two dialects. vLLM-Omni reads temperature, top_p and top_k
only inside `extra_params` and ignores them at top level without a word, and takes the voice to
clone as `ref_audio`; SGLang-Omni has the former at top level and documents `references`. vLLM-Omni
streams server-sent events unless `stream_format` says "audio".
"""

from __future__ import annotations

import base64
import io
import json
import mimetypes
import secrets
import time
import urllib.parse
import urllib.request
import wave
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path

import numpy as np

from higgs_lab.audio import AudioSource
from higgs_lab.tags import check_text
from higgs_lab.text import join_waves, split_text
from serve.transport import ServerError, read_all, read_some
from serve.transport import build_request as _request
from serve.transport import open_request as _open

DIALECTS = ("vllm", "sglang")
# vLLM-Omni's serving_speech.py and SGLang-Omni's higgs_tts/stages.py.
REFERENCE_SEC = {"vllm": (1.0, 30.0), "sglang": (1.0, 100.0)}
FORMATS = {
    "vllm": ("wav", "pcm", "flac", "mp3", "opus"),
    "sglang": ("wav", "pcm", "flac", "mp3", "opus", "aac"),
}
SAMPLING = ("temperature", "top_p", "top_k")
PASSED_ON = ("seed", "max_new_tokens", "speed", "initial_codec_chunk_frames")
URL_SCHEMES = ("http", "https", "data", "file")
RETRIED_STATUS = (408, 429, 500, 502, 503, 504)
MAX_RETRY_AFTER_SEC = 120.0
FADE_BYTES = 2 * round(0.02 * 24000)  # of PCM: join_waves' 20 ms


# A path, the bytes of an audio file, a URL, or anything that opens like a Path.
Reference = str | bytes | AudioSource


def speak(
    url: str,
    text: str,
    ref_audio: Reference | None = None,
    ref_text: str | None = None,
    *,
    split: bool = True,
    response_format: str = "wav",
    dialect: str = "vllm",
    api_key: str | None = None,
    timeout_sec: float = 600.0,
    retries: int = 3,
    **options,
) -> bytes:
    """Speech for a text as the bytes of a wav (or other) file.

    url: server root, such as "http://127.0.0.1:8000".
    ref_audio: voice to clone: a file, its bytes, or a URL that the server fetches.
    ref_text: what the reference says, verbatim; needs ref_audio.
    split: long texts are split at sentence bounds, spoken one by one and joined with a cross-fade
        of 20 ms, since one request ends after 81 s whatever the text. Only for wav and pcm, other
        containers cannot be joined. Without a reference every piece draws its own voice, so give
        one (or a `voice`) for long texts.
    timeout_sec: longest silence of the server, which sends nothing before a piece is whole.
    retries: further tries after overload, a server error or a lost connection, waiting 1, 2, 4 ...
        30 s (times 0.5 to 1.5), or as long as a Retry-After says.
    options: temperature, top_p, top_k, seed, max_new_tokens (rows, 25 a second), voice (an uploaded
        one), model, speed, initial_codec_chunk_frames.

    Raises ValueError for what the server would refuse or ignore, ServerError when it fails.
    """
    joinable = response_format in ("wav", "pcm")
    pieces = (split_text(text) or [text]) if split and joinable else [text]
    reference = load_reference(ref_audio, dialect) if ref_audio is not None else None
    sounds = []
    for piece in pieces:
        body = request_body(
            piece, reference, ref_text, response_format=response_format, dialect=dialect, **options
        )
        sounds.append(_post(url, body, api_key, timeout_sec, retries))
    return sounds[0] if len(sounds) == 1 else _join(sounds, response_format)


def stream(
    url: str,
    text: str,
    ref_audio: Reference | None = None,
    ref_text: str | None = None,
    *,
    split: bool = True,
    dialect: str = "vllm",
    api_key: str | None = None,
    timeout_sec: float = 600.0,
    **options,
) -> Iterator[bytes]:
    """Raw PCM (16 bit, mono, 24 kHz), in pieces as the server makes them.

    Long texts are split and joined as in `speak`: the last 20 ms of each part wait for the next.
    Not retried: what was heard cannot be taken back. Raises as `speak` does.
    """
    reference = load_reference(ref_audio, dialect) if ref_audio is not None else None
    bodies = [
        request_body(
            part,
            reference,
            ref_text,
            response_format="pcm",
            dialect=dialect,
            stream=True,
            **options,
        )
        for part in ((split_text(text) or [text]) if split else [text])
    ]
    held = b""  # the end of the part before, to be faded into the next
    for number, body in enumerate(bodies):
        fade_in, held = held, b""
        keep = FADE_BYTES if number + 1 < len(bodies) else 0
        for chunk in _stream_pcm(url, body, api_key, timeout_sec):
            held += chunk
            if fade_in:
                if len(held) < len(fade_in):
                    continue
                size = len(fade_in)
                held, fade_in = _fade(fade_in, held[:size]) + held[size:], b""
            if len(held) > keep:
                yield held[: len(held) - keep]
                held = held[len(held) - keep :]
        held = fade_in + held if fade_in else held  # a part shorter than the fade: one after other
    if held:
        yield held


def _stream_pcm(url: str, body: dict, api_key: str | None, timeout_sec: float) -> Iterator[bytes]:
    """PCM of one request, whole samples only."""
    odd = b""  # a sample may be cut in two between pieces
    with _open(_request(url, "/v1/audio/speech", api_key, json_body=body), timeout_sec) as response:
        while chunk := read_some(response):
            # vLLM-Omni can fail after it has answered 200; the body then holds JSON.
            if chunk.startswith((b'{"error"', b"data: {")):
                raise ServerError(f"the server failed while streaming: {chunk[:500].decode()}")
            chunk = odd + chunk
            odd = chunk[len(chunk) // 2 * 2 :]
            if usable := chunk[: len(chunk) // 2 * 2]:
                yield usable


def _fade(tail: bytes, head: bytes) -> bytes:
    """Equal lengths of PCM, the first going down while the second comes up; as `join_waves`."""
    rise = (np.arange(len(tail) // 2, dtype=np.float32) + 0.5) / (len(tail) // 2)
    down, up = (np.frombuffer(x, "<i2").astype(np.float32) / 32768 for x in (tail, head))
    return _to_pcm(down * rise[::-1] + up * rise)


def request_body(
    text: str,
    reference: str | None = None,
    ref_text: str | None = None,
    *,
    response_format: str = "wav",
    dialect: str = "vllm",
    stream: bool = False,
    voice: str | None = None,
    model: str | None = None,
    **options,
) -> dict:
    """JSON body of one request in the server's dialect; `reference` is a URL or data URL."""
    if dialect not in DIALECTS:
        raise ValueError(f"dialect must be one of {DIALECTS}, got {dialect!r}")
    if response_format not in FORMATS[dialect]:
        raise ValueError(
            f"response_format for {dialect} must be one of {FORMATS[dialect]}, "
            f"got {response_format!r}"
        )
    unknown = sorted(set(options) - {*SAMPLING, *PASSED_ON})
    if unknown:
        hint = ": the name is max_new_tokens" if "max_tokens" in unknown else ""
        raise ValueError(f"unknown option {unknown[0]!r}{hint}; known: {[*SAMPLING, *PASSED_ON]}")
    if ref_text is not None and reference is None:
        raise ValueError("ref_text is given without ref_audio: the servers would ignore it")
    if reference is not None and voice is not None:
        raise ValueError("give either ref_audio or an uploaded voice, not both")
    check_text(text, where="text")
    body: dict = {"input": text, "response_format": response_format}
    body |= {k: v for k in PASSED_ON if (v := options.get(k)) is not None}
    sampling = {k: v for k in SAMPLING if (v := options.get(k)) is not None}
    if dialect == "vllm" and sampling:
        body["extra_params"] = sampling
    else:
        body |= sampling
    if model is not None:
        body["model"] = model
    if voice is not None:
        body["voice"] = voice
    if reference is not None:
        if ref_text is not None:
            check_text(ref_text, where="ref_text")
        if dialect == "sglang":
            spoken = {} if ref_text is None else {"text": ref_text}
            body["references"] = [{"audio_path": reference} | spoken]
        else:
            spoken = {} if ref_text is None else {"ref_text": ref_text}
            body |= {"ref_audio": reference} | spoken
    if stream:
        if response_format not in ("pcm", "wav"):
            raise ValueError("streaming knows pcm and wav only")
        if body.get("speed") not in (None, 1, 1.0):
            raise ValueError("speed cannot be changed while streaming: the server would refuse it")
        body["stream"] = True
        body["stream_format"] = "audio"  # vLLM-Omni's default is server-sent events
    return body


def load_reference(ref_audio: Reference, dialect: str = "vllm") -> str:
    """A reference for the request: a URL as it is, a file or its bytes as a data URL.

    Raises ValueError when the clip is no audio or its length is one that the server refuses.
    """
    if isinstance(ref_audio, str) and ref_audio.partition(":")[0] in URL_SCHEMES:
        return ref_audio
    if isinstance(ref_audio, bytes):
        name, data = "reference audio", ref_audio
    else:
        source = Path(ref_audio) if isinstance(ref_audio, str) else ref_audio
        name = str(source)
        with source.open("rb") as file:
            data = file.read()
    seconds = _seconds(data)
    low, high = REFERENCE_SEC[dialect]
    if seconds is None:
        raise ValueError(f"{name} is no audio file that can be read; use wav or flac")
    if not low <= seconds <= high:
        raise ValueError(
            f"{name} lasts {seconds:.1f} s, the server takes {low:.0f} to {high:.0f} s: "
            f"{'use a longer clip' if seconds < low else 'cut it'}"
        )
    kind = mimetypes.guess_type(name)[0] or "audio/wav"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def list_voices(url: str, api_key: str | None = None) -> list[dict]:
    """Uploaded voices: name, consent, ref_text and more."""
    with _open(_request(url, "/v1/audio/voices", api_key), 60) as response:
        return json.load(response)["uploaded_voices"]


def add_voice(
    url: str,
    name: str,
    ref_audio: str | Path,
    consent: str,
    ref_text: str | None = None,
    api_key: str | None = None,
) -> dict:
    """Store a voice on the server under a name, for `voice=name`.

    consent: id or description of the speaker's recorded consent; the server keeps it.
    """
    if not consent.strip():
        raise ValueError("say how the speaker consented: a voice is not cloned without consent")
    load_reference(ref_audio)  # the same limits
    path = Path(ref_audio)
    fields = {"name": name, "consent": consent} | ({"ref_text": ref_text} if ref_text else {})
    bound = f"----{secrets.token_hex(16)}"
    parts = [
        f'--{bound}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'.encode()
        for k, v in fields.items()
    ]
    kind = mimetypes.guess_type(path.name)[0] or "audio/wav"
    parts.append(
        f'--{bound}\r\nContent-Disposition: form-data; name="audio_sample"; '
        f'filename="{path.name}"\r\nContent-Type: {kind}\r\n\r\n'.encode()
        + path.read_bytes()
        + f"\r\n--{bound}--\r\n".encode()
    )
    request = _request(url, "/v1/audio/voices", api_key)
    request.data = b"".join(parts)
    request.add_header("Content-Type", f"multipart/form-data; boundary={bound}")
    with _open(request, 60) as response:
        return json.load(response)["voice"]


def delete_voice(url: str, name: str, api_key: str | None = None) -> None:
    request = _request(url, f"/v1/audio/voices/{urllib.parse.quote(name)}", api_key)
    request.method = "DELETE"
    with _open(request, 60) as response:
        response.read()


def list_models(url: str, api_key: str | None = None) -> list[str] | None:
    """Names of the models that the server serves; None if it does not say, or does not answer."""
    try:
        with _open(_request(url, "/v1/models", api_key), 5) as response:
            return sorted(str(model["id"]) for model in json.load(response)["data"])
    except (ServerError, OSError, HTTPException, ValueError, KeyError, TypeError):
        return None


def is_healthy(url: str, timeout_sec: float = 5.0) -> bool:
    """Whether the server answers /health with 200."""
    try:
        with urllib.request.urlopen(url.rstrip("/") + "/health", timeout=timeout_sec) as response:
            return response.status == 200
    except (OSError, HTTPException):
        return False


def _post(url: str, body: dict, api_key: str | None, timeout_sec: float, retries: int) -> bytes:
    """POST a speech request; overload, server errors and lost connections are tried again."""
    for attempt in range(retries + 1):
        try:
            request = _request(url, "/v1/audio/speech", api_key, json_body=body)
            with _open(request, timeout_sec) as response:
                data = read_all(response)
            if data.startswith(b'{"error"'):
                raise ServerError(f"the server answered 200 with an error: {data[:500].decode()}")
            return data
        except ServerError as error:
            again = error.status is None or error.status in RETRIED_STATUS
            if not again or attempt == retries:
                raise
            wait = min(2.0**attempt, 30.0) * (0.5 + secrets.randbelow(1000) / 1000)
            time.sleep(max(wait, min(error.retry_after_sec or 0.0, MAX_RETRY_AFTER_SEC)))
    raise AssertionError("unreachable")


def _seconds(data: bytes) -> float | None:
    """Length of an audio file, or None when it is none."""
    try:
        with wave.open(io.BytesIO(data)) as file:
            return file.getnframes() / file.getframerate()
    except (wave.Error, EOFError):
        pass  # no PCM wav: let libsndfile try
    import soundfile

    try:
        return soundfile.info(io.BytesIO(data)).duration
    except (soundfile.LibsndfileError, RuntimeError):
        return None


def _join(sounds: list[bytes], response_format: str) -> bytes:
    """Join wav files (or raw PCM) with the toolkit's cross-fade; 16 bit mono in and out."""
    rate, waves = 24000, []
    for sound in sounds:
        if response_format == "wav":
            with wave.open(io.BytesIO(sound)) as file:
                rate, sound = file.getframerate(), file.readframes(file.getnframes())
        waves.append(np.frombuffer(sound, dtype="<i2").astype(np.float32) / 32768)
    pcm = _to_pcm(join_waves(waves, rate))
    return pcm if response_format == "pcm" else pcm_to_wav(pcm, rate)


def _to_pcm(wave: np.ndarray) -> bytes:
    return np.clip(np.round(wave * 32768), -32768, 32767).astype("<i2").tobytes()


def pcm_to_wav(pcm: bytes, sample_rate_hz: int = 24000) -> bytes:
    """Raw 16-bit mono PCM as the bytes of a wav file."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate_hz)
        file.writeframes(pcm)
    return buffer.getvalue()


if __name__ == "__main__":
    from serve.client_cli import main

    main()
