"""Who speaks: a checkpoint, a server, a folder of wavs, a command line, espeak-ng; or the set's own
recordings, as they are or through a codec.

A system is a name, the details that decide its sound (recorded, and compared on resume), and a way
to start it. Nothing is loaded before it is needed.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from eval.languages import language
from higgs_lab.manifest import AUDIO_SUFFIXES, Utterance, file_stem
from higgs_lab.runlog import files_hash, fingerprint


@dataclass(frozen=True)
class Request:
    """One clip to be spoken. `seed` is the request's own: the batch must not change the sound."""

    row: Utterance
    seed: int


@dataclass(frozen=True)
class Spoken:
    """A clip, or why there is none. Either `wav` or `audio` is set unless `error` is."""

    wav: np.ndarray | None = None  # mono float32 [n]
    sample_rate_hz: int = 0
    audio: object = None  # Path or EmbeddedAudio: exists already, judged where it lies
    error: str = ""
    unsupported: bool = False  # a baseline that does not claim the row's language
    hit_cap: bool = False  # ran into its length limit instead of ending by itself
    took_sec: float | None = None  # wall time, shared out within a batch


Speak = Callable[[Sequence[Request]], list[Spoken]]


@dataclass(frozen=True)
class System:
    name: str
    details: dict  # what decides the sound
    start: Callable[[], Speak]  # loads what there is to load
    batch: int = 1  # requests handed over at once
    random: bool = True  # several takes of a text differ
    speaks: Callable[[str], bool] = lambda code: True  # a baseline may not claim every language


def open_system(
    model: str,
    adapter: str | None = None,
    *,
    device: str | None = None,
    sampling: dict | None = None,
    batch: int | None = None,
    dialect: str = "vllm",
) -> System:
    """A system by what `model` says.

    - "human": the recordings of the set; what the recogniser makes of them is its floor
    - "codec:CHECKPOINT": those recordings through the checkpoint's codec and back; no talker on top
      of it can do better, so it is the ceiling
    - "wavs:FOLDER": FOLDER/<id>.wav (or .flac, ...); another tool's output
    - "espeak": espeak-ng in the row's language, through the package espeakng-loader
    - "cmd:COMMAND": any command line, see eval.command
    - "http://...": a server that speaks /v1/audio/speech, in the given dialect
    - anything else: a checkpoint for `higgs_lab.load` (folder, hub name[@revision], "nano"), with
      an optional adapter

    sampling: options that replace the defaults; `Sampling`'s for a checkpoint, the request's for a
        server. batch: clips at once (a checkpoint: 64 on a GPU, else 16), requests in flight (a
        server), or commands at once (one that is run for each clip).
    Raises ValueError or FileNotFoundError saying what can be given.
    """
    sampling = dict(sampling or {})
    kind, _, rest = model.partition(":")
    plain = ("human", "codec", "wavs", "cmd", "espeak")
    if kind in (*plain, "http", "https") and adapter:
        raise ValueError(f"--adapter goes with a checkpoint; {model!r} speaks as it is")
    if kind in plain and sampling:
        raise ValueError(f"{model!r} takes no sampling options, but got {', '.join(sampling)}")
    if model == "human":
        return System("human", {"kind": "human"}, lambda: _speak_human, 16, random=False)
    if kind == "wavs":
        return _wavs(Path(rest))
    if kind == "codec":
        return _codec(rest, device, batch or 16)
    if kind == "cmd":
        from eval import command

        seeded = not command.is_per_clip(rest) or "{seed}" in rest
        details = {"kind": "cmd", "command": rest}
        start = functools.partial(command.start, rest, batch or 1)
        return System(model, details, start, max(command.AT_ONCE, batch or 1), random=seeded)
    if model == "espeak":
        from eval.espeak import speak, version

        details = {"kind": "espeak", "version": version()}
        return System(
            "espeak-ng",
            details,
            lambda: speak,
            batch=32,
            random=False,
            speaks=lambda code: language(code).espeak is not None,
        )
    if kind in ("http", "https"):
        return _server(model, sampling, batch or 4, dialect)
    path = Path(model)
    if path.is_dir() and not (path / "config.json").is_file():
        if any(f.suffix.lower() in AUDIO_SUFFIXES for f in path.iterdir()):
            raise ValueError(f"{model} is a folder of audio: write --model wavs:{model}")
    return _checkpoint(model, adapter, device, sampling, batch)


def request_seed(seed: int, id: str) -> int:
    """The seed of one request: fixed by run seed and row, so that no order or batch matters."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{id}".encode()).digest()[:4], "big") >> 1


def _speak_human(requests: Sequence[Request]) -> list[Spoken]:
    missing = Spoken(error="the row has no audio")
    return [missing if r.row.audio is None else Spoken(audio=r.row.audio) for r in requests]


def _wavs(folder: Path) -> System:
    if not folder.is_dir():
        raise FileNotFoundError(f"wavs:{folder}: no such folder")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES)
    if not found:
        raise ValueError(f"wavs:{folder}: no audio files ({', '.join(AUDIO_SUFFIXES)})")
    files = {p.relative_to(folder).with_suffix("").as_posix(): p.absolute() for p in found}

    def one(id: str) -> Spoken:
        path = files.get(id) or files.get(file_stem(id))
        return Spoken(audio=path) if path else Spoken(error=f"no file {id}.wav in {folder}")

    def speak(requests: Sequence[Request]) -> list[Spoken]:
        return [one(request.row.id) for request in requests]

    # Folders of many runs are called "wavs", and one may be filled anew: what is in them counts.
    details = {"kind": "wavs", "content": files_hash(found, folder)}
    return System(f"wavs:{folder.name}", details, lambda: speak, 16, random=False)


def _codec(model: str, device: str | None, batch: int) -> System:
    from higgs_lab.checkpoint import resolve_checkpoint

    if not model:
        raise ValueError("write codec:CHECKPOINT, such as codec:bosonai/higgs-tts-3-4b")
    checkpoint = resolve_checkpoint(model)

    def start() -> Speak:
        from higgs_lab.codec import Codec
        from higgs_lab.device import chosen_device

        codec = Codec.from_pretrained(checkpoint.path, chosen_device(device))
        return functools.partial(_speak_through, codec)

    details = {"kind": "codec", "name": checkpoint.name, "revision": checkpoint.revision}
    details["weights"] = fingerprint(checkpoint.path)
    return System(f"codec:{model}", details, start, batch, random=False)


def _speak_through(codec, requests: Sequence[Request]) -> list[Spoken]:
    """The human recordings as the codec gives them back."""
    from higgs_lab.audio import read_audio

    clips: dict[int, Spoken] = {}
    wavs: dict[int, np.ndarray] = {}
    for number, spoken in enumerate(_speak_human(requests)):
        try:
            if spoken.error:
                raise ValueError(spoken.error)
            wavs[number] = read_audio(spoken.audio, codec.sample_rate_hz)
        except (ValueError, FileNotFoundError) as error:
            clips[number] = Spoken(error=str(error))
    decoded = codec.decode_batch(codec.encode_batch(list(wavs.values())))
    for (number, wav), back in zip(wavs.items(), decoded, strict=True):
        clips[number] = Spoken(back[: len(wav)], codec.sample_rate_hz)  # whole frames are longer
    return [clips[number] for number in range(len(requests))]


# Statuses that mean "this request is wrong"; anything else means that the server is, except an
# internal error of one that is healthy and speaks other texts: this text breaks it, and would break
# it again after every resume.
_REFUSED = (400, 413, 422)
_BROKE = 500


def _server(url: str, sampling: dict, concurrency: int, dialect: str) -> System:
    from serve import client

    client.request_body("options are checked once", dialect=dialect, **sampling)
    key = os.environ.get(
        "VLLM_API_KEY"
    )  # as for serve.client; never in a file or on a command line

    def one(request: Request) -> Spoken | client.ServerError:
        from higgs_lab.audio import read_audio

        row, begin = request.row, time.monotonic()
        reference = row.ref_audio
        if reference is not None and not isinstance(reference, Path):
            reference = reference.open().read()
        options = {"seed": request.seed, "dialect": dialect, "api_key": key} | sampling
        try:
            data = client.speak(url, row.text, reference, row.ref_text, **options)
            took_sec = time.monotonic() - begin
            wav = read_audio(_InMemory(data, f"answer for {row.id}"), 24000, max_sec=None)
        except client.ServerError as error:
            if error.status == _BROKE and client.is_healthy(url):
                return error
            if error.status not in _REFUSED:
                raise
            return Spoken(error=str(error))
        except ValueError as error:  # a reference or an answer that nobody can use
            return Spoken(error=str(error))
        return Spoken(wav, 24000, took_sec=took_sec)

    def start() -> Speak:
        if not client.is_healthy(url):
            raise ConnectionError(f"no server answers {url}/health: start it, or check the address")
        pool, speaks = ThreadPoolExecutor(concurrency), False

        def say(requests: Sequence[Request]) -> list[Spoken]:
            nonlocal speaks
            answers = list(pool.map(one, requests))
            spoken = [answer for answer in answers if isinstance(answer, Spoken)]
            spoke_before, speaks = speaks, any(clip.wav is not None for clip in spoken)
            for answer in answers:
                if isinstance(answer, client.ServerError) and not (speaks or spoke_before):
                    raise answer
            return [a if isinstance(a, Spoken) else Spoken(error=str(a)) for a in answers]

        return say

    details = {"kind": "server", "dialect": dialect, "sampling": sampling}
    details["concurrency"] = concurrency  # servers have sounded different under load
    details["serves"] = client.list_models(url, key)  # an address alone does not say who speaks
    return System(url, details, start, concurrency)


def _checkpoint(
    model: str, adapter: str | None, device: str | None, sampling: dict, batch: int | None
) -> System:
    from higgs_lab.adapter import find_adapter
    from higgs_lab.checkpoint import resolve_checkpoint
    from higgs_lab.device import chosen_device
    from higgs_lab.generate import Sampling
    from higgs_lab.speech import default_batch_size, default_precision

    known = [f.name for f in fields(Sampling) if f.name != "seed"]
    for name in sampling:
        if name not in known:
            raise ValueError(f"unknown sampling option {name!r}; known: {', '.join(known)}")
    options = Sampling(**sampling)
    checkpoint = resolve_checkpoint(model)

    def start() -> Speak:
        import higgs_lab

        higgs = higgs_lab.load(model, adapter=adapter, device=device)
        return functools.partial(_speak_checkpoint, higgs, options, batch)

    runs_on, tuned = chosen_device(device), None
    batch = batch or default_batch_size(runs_on)
    stored = f"as stored, codec {default_precision(runs_on)}"
    if adapter is not None:
        tuned = {"name": adapter, "weights": fingerprint(find_adapter(adapter))}
    details = {
        "kind": "checkpoint",
        "name": checkpoint.name,
        "revision": checkpoint.revision,
        "weights": fingerprint(checkpoint.path),
        "adapter": tuned,
        "precision": "fp32" if runs_on.type == "cpu" else stored,  # higgs_lab.load's choice
        "sampling": {k: v for k, v in asdict(options).items() if k != "seed"},
    }
    name = model if adapter is None else f"{model} + {adapter}"
    # on a GPU more than are spoken at once, so that whoever ends makes room for the next
    return System(name, details, start, batch * (2 if runs_on.type == "cuda" else 1))


def _speak_checkpoint(higgs, options, batch: int, requests: Sequence[Request]) -> list[Spoken]:
    rows, begin = [request.row for request in requests], time.monotonic()
    try:
        pairs = higgs.speak(
            [row.text for row in rows],
            ref_audio=[_wave_or_path(row.ref_audio, higgs.sample_rate_hz) for row in rows],
            ref_text=[row.ref_text for row in rows],
            sampling=options,
            seed=[request.seed for request in requests],
            batch_size=batch,
        )
    except ValueError as error:  # one text or reference is wrong; other errors stop the run
        if len(requests) == 1:
            return [Spoken(error=str(error))]
        half = len(requests) // 2  # it is refused before any is spoken: by halves it is soon found
        parts = requests[:half], requests[half:]
        return [one for part in parts for one in _speak_checkpoint(higgs, options, batch, part)]
    took_sec = (time.monotonic() - begin) / len(requests)
    return [
        Spoken(wav, higgs.sample_rate_hz, hit_cap=info.stop_reason != "eoc", took_sec=took_sec)
        for wav, info in pairs
    ]


def _wave_or_path(audio, sample_rate_hz: int):
    """A reference as `Higgs.speak` takes it: clips inside a data set have no path."""
    from higgs_lab.audio import read_audio

    return audio if audio is None or isinstance(audio, Path) else read_audio(audio, sample_rate_hz)


@dataclass(frozen=True)
class _InMemory:
    """Audio in memory, to be read like a file."""

    data: bytes
    name: str

    def open(self, mode: str = "rb") -> io.BytesIO:
        return io.BytesIO(self.data)

    def __str__(self) -> str:
        return self.name
