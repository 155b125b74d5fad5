"""Recordings -> codes in parts, each a file that is whole or absent: what makes prepare resumable.

A part holds a few minutes of recordings of similar length. Several processes share the parts, and
one that was killed goes on with those that are not on disk.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from higgs_lab.audio import AudioSource, measure_levels, read_audio
from higgs_lab.manifest import EmbeddedAudio, Utterance
from higgs_lab.runlog import Progress, atomic_path, duration

if TYPE_CHECKING:
    from higgs_lab.codec import Codec


@dataclass(frozen=True)
class Clip:
    """An encoded recording, or why there is none."""

    codes: np.ndarray | None  # uint16 [T, K]
    facts: dict  # seconds, hash of the samples, levels; or error


@dataclass
class EncodeTimes:
    """Where `encode_parts` spent its time."""

    seconds: float = 0.0
    codec_sec: float = 0.0
    waiting_sec: float = 0.0  # the codec, for recordings to be read


def plan_parts(
    rows: Iterable[Utterance], seconds: dict[str, float], part_sec: float, made_by: str
) -> dict[str, list[AudioSource]]:
    """Every recording once, by length, in parts of about `part_sec`; name -> recordings.

    made_by: codec, precision, version of the encoder. A part is named by it and by what is in it,
    so a changed file is a new part, and the plan is the same in every process and after a restart.
    """
    sources = {str(s): s for row in rows for s in (row.audio, row.ref_audio) if s is not None}
    groups: list[list[AudioSource]] = []
    room = 0.0
    for name in sorted(sources, key=lambda name: (seconds[name], name)):
        if not groups or seconds[name] > room or len(groups[-1]) >= 512:
            groups.append([])
            room = part_sec
        groups[-1].append(sources[name])
        room -= seconds[name]
    parts = {}
    for group in groups:
        key = json.dumps([made_by, [identity(source) for source in group]])
        parts[hashlib.sha256(key.encode()).hexdigest()[:24]] = group
    return parts


def encode_parts(
    codec: "Codec",
    parts: dict[str, list[AudioSource]],
    work: Path,
    rank: int = 0,
    world: int = 1,
    finished=lambda: False,
    show: bool = True,
    precision: str = "fp32",
) -> EncodeTimes:
    """Encode this process's parts that are not on disk yet, one atomic .npz file each.

    Decoding and resampling let go of the interpreter, so the next part is read, on all cores, while
    the codec encodes this one; the last line says how long the codec had to wait all the same.

    Returns where the time went.
    """
    # on a CPU a batch gains nothing, and the reference is the model's own code
    ragged = codec.device.type == "cuda" and (precision != "fp32" or codec.takes_lengths)
    mine = list(parts)[rank::world]
    todo = [name for name in mine if not (work / f"{name}.npz").is_file()]
    total, left = (sum(len(parts[name]) for name in names) for names in (mine, todo))
    label = "encode" if world == 1 else f"encode (process 1 of {world})"
    began, times = time.monotonic(), EncodeTimes()
    with (
        ThreadPoolExecutor(min(32, max(2, (os.cpu_count() or 2) // world))) as pool,
        Progress(total, "clips", label, start=total - left, enabled=show) as bar,
    ):

        def start(name: str) -> list[Future]:
            return [pool.submit(read_recording, s, codec.sample_rate_hz) for s in parts[name]]

        ahead = start(todo[0]) if todo else []
        for name, following in zip(todo, [*todo[1:], None], strict=False):
            if finished():
                pool.shutdown(cancel_futures=True)
                return times
            reading, ahead = ahead, start(following) if following else []
            asked = time.monotonic()
            read = [one.result() for one in reading]
            got = time.monotonic()
            whole = [index for index, (wav, _) in enumerate(read) if wav is not None]
            codes = codec.encode_batch(
                [read[index][0] for index in whole], precision=precision, ragged=ragged
            )
            times.waiting_sec += got - asked
            times.codec_sec += time.monotonic() - got
            by_index = dict(zip(whole, codes, strict=True))
            clips = []
            for index, (wav, facts) in enumerate(read):
                encoded = None
                if wav is not None:
                    # A clip below 1 s was padded with silence, which must not be learnt.
                    frames = -(-len(wav) // codec.samples_per_frame)
                    encoded = by_index[index][:frames].numpy().astype(np.uint16)
                clips.append(Clip(encoded, facts))
            _save_part(work / f"{name}.npz", clips, codec.num_codebooks)
            bar.update(len(read))
    times.seconds = time.monotonic() - began
    if show and todo:
        print(f"encoded in {duration(times.seconds)}: {times.codec_sec:.1f} s in the codec, "
              f"{times.waiting_sec:.1f} s waiting for the reading")  # fmt: skip
    return times


def identity(source: AudioSource) -> list:
    if isinstance(source, EmbeddedAudio):
        return [source.name, getattr(source.dataset, "_fingerprint", "")]
    if not source.is_file():
        return [str(source)]
    stat = source.stat()
    return [str(source), stat.st_size, stat.st_mtime_ns]


def read_recording(source: AudioSource, sample_rate_hz: int) -> tuple[np.ndarray | None, dict]:
    """(mono samples or None, what `Clip.facts` says of them)."""
    try:
        wav = read_audio(source, sample_rate_hz)
    except (ValueError, OSError) as error:
        return None, {"error": str(error)}
    rounded = np.round(np.clip(wav, -1, 1) * 32767).astype(np.int16)
    facts = asdict(measure_levels(wav, sample_rate_hz))
    if not np.isfinite(facts["level_dbfs"]):
        facts["level_dbfs"] = None
    digest = hashlib.sha256(rounded.tobytes()).hexdigest()
    return wav, facts | {"seconds": len(wav) / sample_rate_hz, "hash": digest}


def _save_part(path: Path, clips: list[Clip], num_codebooks: int) -> None:
    none = np.zeros((0, num_codebooks), dtype=np.uint16)
    arrays = [none if clip.codes is None else clip.codes for clip in clips]
    facts = [clip.facts | {"frames": len(codes)} for clip, codes in zip(clips, arrays, strict=True)]
    with atomic_path(path) as temporary:
        np.savez(temporary, codes=np.concatenate([none, *arrays]), facts=json.dumps(facts))


def load_part(path: Path) -> list[Clip]:
    with np.load(path) as file:
        facts, codes = json.loads(str(file["facts"])), file["codes"]
    ends = np.cumsum([fact["frames"] for fact in facts])
    return [
        Clip(None if "error" in fact else codes[end - fact["frames"] : end], fact)
        for fact, end in zip(facts, ends, strict=True)
    ]


def wait_for(files: list[Path], stalled_sec: float = 3600) -> None:
    """Until the other processes have written their parts."""
    missing, since = len(files) + 1, time.monotonic()
    while gone := [file for file in files if not file.is_file()]:
        if len(gone) < missing:
            missing, since = len(gone), time.monotonic()
            print(f"waiting for {missing} parts of other processes", flush=True)
        if time.monotonic() - since > stalled_sec:
            raise TimeoutError(
                f"no process has written a part for {stalled_sec:.0f} s: run the command again"
            )
        time.sleep(0.5)
