"""A client of /v1/audio/speech for vLLM-Omni and SGLang-Omni: plain HTTP, no torch.

    from serve.client import speak
    wav = speak("http://127.0.0.1:8000", "Hello there.", ref_audio="voice.wav", ref_text="...")

    python -m serve.client "Hello there." --out hello.wav --ref-audio voice.wav
    python -m serve.client --manifest texts.jsonl --out wavs/ --concurrency 8

The two servers take the same request in two dialects. vLLM-Omni reads temperature, top_p and top_k
only inside `extra_params` and ignores them at top level without a word; SGLang-Omni has them at
top level. vLLM-Omni streams server-sent events unless `stream_format` says "audio".
"""

from __future__ import annotations

import base64
import io
import json
import mimetypes
import secrets
import time
import urllib.error
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


# A path, the bytes of an audio file, a URL, or anything that opens like a Path.
Reference = str | bytes | AudioSource


class ServerError(RuntimeError):
    """The server refused or failed; `status` is the HTTP status, None when none came."""

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


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
    dialect: str = "vllm",
    api_key: str | None = None,
    timeout_sec: float = 600.0,
    **options,
) -> Iterator[bytes]:
    """Raw PCM (16 bit, mono, 24 kHz) of one request, in pieces as the server makes them.

    Not retried: what was heard cannot be taken back. Raises as `speak` does.
    """
    reference = load_reference(ref_audio, dialect) if ref_audio is not None else None
    body = request_body(
        text, reference, ref_text, response_format="pcm", dialect=dialect, stream=True, **options
    )
    request = _request(url, "/v1/audio/speech", api_key, json_body=body)
    odd = b""  # a sample may be cut in two between pieces
    with _open(request, timeout_sec) as response:
        while chunk := response.read1(65536):
            # vLLM-Omni can fail after it has answered 200; the body then holds JSON.
            if chunk.startswith((b'{"error"', b"data: {")):
                raise ServerError(f"the server failed while streaming: {chunk[:500].decode()}")
            chunk = odd + chunk
            odd = chunk[len(chunk) // 2 * 2 :]
            if usable := chunk[: len(chunk) // 2 * 2]:
                yield usable


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
        body["ref_audio"] = reference
        if ref_text is not None:
            check_text(ref_text, where="ref_text")
            body["ref_text"] = ref_text
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
                data = response.read()
            if data.startswith(b'{"error"'):
                raise ServerError(f"the server answered 200 with an error: {data[:500].decode()}")
            return data
        except ServerError as error:
            again = error.status is None or error.status in RETRIED_STATUS
            if not again or attempt == retries:
                raise
            time.sleep(min(2.0**attempt, 30.0) * (0.5 + secrets.randbelow(1000) / 1000))
    raise AssertionError("unreachable")


def _request(
    url: str, path: str, api_key: str | None, json_body: dict | None = None
) -> urllib.request.Request:
    request = urllib.request.Request(url.rstrip("/") + path)
    if api_key:
        request.add_header("Authorization", f"Bearer {api_key}")
    if json_body is not None:
        request.data = json.dumps(json_body).encode()
        request.add_header("Content-Type", "application/json")
    return request


def _open(request: urllib.request.Request, timeout_sec: float):
    """Open, turning every failure into a ServerError with the server's own words."""
    try:
        return urllib.request.urlopen(request, timeout=timeout_sec)
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        try:
            detail = json.loads(text)
            message = (detail.get("error") or {}).get("message") or detail.get("detail") or text
        except (ValueError, AttributeError):
            message = text
        raise ServerError(f"{error.code}: {message}"[:1000], error.code) from None
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ServerError(f"no answer from {request.full_url}: {reason}") from error


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
    joined = join_waves(waves, rate)
    pcm = np.clip(np.round(joined * 32768), -32768, 32767).astype("<i2").tobytes()
    return pcm if response_format == "pcm" else pcm_to_wav(pcm, rate)


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
