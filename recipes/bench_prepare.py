"""Preparing mixed recordings: is the codec the bottleneck, or the reading?

    python -m recipes.bench_prepare             # 10 h on a GPU, released size; else 1 min, nano

Makes recordings of 2 to 15 s (wav, flac and ogg; 16 to 48 kHz; mono and stereo), reads them as
`prepare` does, encodes what was read, then does both at once by the recipe's own code. Waited: the
codec, for recordings. Reading takes every core, so its share falls with their number; the codec's
falls with the card. Needs soundfile and soxr, the last row also `datasets`; without them the codec
alone is measured. --folder keeps the recordings for the next run.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from higgs_lab.audio import audio_info, read_audio
from higgs_lab.codec import Codec
from higgs_lab.manifest import read_manifest
from higgs_lab.nano import nano_checkpoint
from recipes.bench import Bench, arguments, synchronize
from recipes.bench_codec import buzz
from recipes.bench_generate import make_codec
from recipes.prepare import PrepareConfig, screen
from recipes.prepare import main as prepare
from recipes.prepare_parts import encode_parts, plan_parts, read_recording

COLUMNS = ["audio-s/s", "hours/min", "seconds", "CPU s", "codec s", "waited s"]
FORMATS = ("wav", "flac", "ogg")
RATES_HZ = (16000, 22050, 24000, 44100, 48000)
ALONE_SEC = 1200.0  # of audio, at most, through the codec alone
THREADS = min(32, max(2, os.cpu_count() or 2))  # as encode_parts has


@dataclass
class Work:
    """What the rows share."""

    folder: Path
    hours: float
    codec: Codec
    seconds: dict[str, float] = field(default_factory=dict)  # of each recording, by its path


def main(argv: list[str] | None = None) -> Bench:
    parser = arguments(__doc__)
    parser.add_argument("--hours", type=float, help="of audio; 10, on a CPU a minute")
    parser.add_argument("--folder", type=Path, help="for the recordings; else a temporary one")
    args = parser.parse_args(argv)
    bench = Bench(args, COLUMNS)
    hours = args.hours or (10.0 if bench.device.type == "cuda" else 1 / 60)
    folder = args.folder or Path(tempfile.mkdtemp(prefix="bench_prepare_"))
    try:
        rows(bench, Work(folder, hours, make_codec(bench)))
    finally:
        if args.folder is None:
            shutil.rmtree(folder)
    return bench


def rows(bench: Bench, work: Work) -> None:
    bench.row("codec alone, clip by clip", partial(codec_alone, work))
    if bench.row("make the recordings", partial(make, work)) is None or not work.seconds:
        return
    for kind in FORMATS:
        files = [Path(name) for name in work.seconds if name.endswith(kind)]
        bench.row(f"decode {kind}", partial(read, work, files, decode))
    files = [Path(name) for name in work.seconds]
    whole = partial(read_recording, sample_rate_hz=work.codec.sample_rate_hz)
    bench.row("look at headers", partial(headers, work))
    bench.row("decode all", partial(read, work, files, decode))
    bench.row("decode, resample, measure all", partial(read, work, files, whole))
    row = bench.row("read and encode at once", partial(both, work))
    if row and "note" not in row:
        share = row["waited s"] / row["seconds"]
        slower = "codec" if row["codec s"] > row["waited s"] else "reading"
        print(
            f"the {slower} is the bottleneck: of {row['seconds']:.1f} s {row['codec s']:.1f} were "
            f"spent in the codec and {row['waited s']:.1f} ({share:.1%}) waiting for {THREADS} "
            f"threads that read",
            flush=True,
        )
    if bench.device.type == "cuda":  # a faster codec waits sooner
        for precision in ("tf32", "fp16", "bf16"):
            name = f"read and encode at once, {precision}"
            bench.row(name, partial(both, work, precision=precision))
    bench.row("prepare, the whole command", partial(command, work))


def made_of(work: Work, audio_sec: float, began: float, cpu_began: float) -> dict:
    seconds = time.monotonic() - began
    rate = audio_sec / seconds
    figures = {"audio-s/s": rate, "hours/min": rate / 60, "seconds": seconds}
    return figures | {"CPU s": time.process_time() - cpu_began}


def make(work: Work) -> dict:
    """Clips of one long buzz a rate, each cut elsewhere, so that no two are the same recording."""
    import soundfile

    began, cpu = time.monotonic(), time.process_time()
    work.folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    sources = {rate: buzz(60.0, seed, rate) for seed, rate in enumerate(RATES_HZ)}
    clips, total = [], 0.0
    while total < work.hours * 3600:
        i, sec = len(clips), float(rng.uniform(2, 15))
        rate = RATES_HZ[i // len(FORMATS) % len(RATES_HZ)]
        channels = 1 + i // (len(FORMATS) * len(RATES_HZ)) % 2
        start = int(rng.integers(0, int((60 - 15.1) * rate)))
        path = work.folder / f"{i:06d}.{FORMATS[i % len(FORMATS)]}"
        clips.append((path, rate, channels, start, round(sec * rate), float(rng.uniform(0.3, 1))))
        total += sec

    def write(clip) -> None:
        path, rate, channels, start, samples, gain = clip
        if path.is_file() and audio_info(path).samples == samples:
            return
        cuts = [sources[rate][start + 99 * c :][:samples] for c in range(channels)]
        soundfile.write(path, gain * np.stack(cuts, axis=1), rate)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(write, clips))
    with (work.folder / "manifest.jsonl").open("w") as file:
        for i, (path, rate, _, _, samples, _) in enumerate(clips):
            text = (f"{i} says what is said here, word by word. " * 6)[: round(14 * samples / rate)]
            row = {"audio": path.name, "text": text, "speaker": "buzz"}
            file.write(json.dumps(row) + "\n")
    work.seconds = {str(path): samples / rate for path, rate, _, _, samples, _ in clips}
    return made_of(work, total, began, cpu)


def decode(path: Path) -> None:
    """As it is stored: reading without resampling."""
    read_audio(path, audio_info(path).sample_rate_hz)


def read(work: Work, files: Iterable[Path], call: Callable[[Path], object]) -> dict:
    began, cpu = time.monotonic(), time.process_time()
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(call, files):
            pass
    return made_of(work, sum(work.seconds[str(f)] for f in files), began, cpu)


def headers(work: Work) -> dict:
    began, cpu = time.monotonic(), time.process_time()
    utterances = read_manifest(work.folder / "manifest.jsonl", check_files=False)
    config = PrepareConfig(source="", model="nano", out="")
    rejects, _ = screen(utterances, config, frozenset(), show=False)
    if rejects:
        raise ValueError(f"{len(rejects)} recordings refused: {next(iter(rejects.values()))}")
    return made_of(work, sum(work.seconds.values()), began, cpu)


def codec_alone(work: Work) -> dict:
    """Clips in memory of the same spread of lengths, of which only equal ones share a pass."""
    codec, rng = work.codec, np.random.default_rng(1)
    sound, wavs, total = buzz(60.0, 0, codec.sample_rate_hz), [], 0.0
    while total < min(work.hours * 3600, ALONE_SEC):
        sec = float(rng.uniform(2, 15))
        start = int(rng.integers(0, 44 * codec.sample_rate_hz))
        wavs.append(sound[start:][: round(sec * codec.sample_rate_hz)])
        total += sec
    codec.encode_batch(wavs[:2])  # what is set up once
    synchronize()
    began, cpu = time.monotonic(), time.process_time()
    codec.encode_batch(wavs)
    found = made_of(work, total, began, cpu)
    return found | {"codec s": found["seconds"]}


def both(work: Work, precision: str = "fp32") -> dict:
    """The recipe's own loop."""
    utterances = read_manifest(work.folder / "manifest.jsonl", check_files=False)
    parts = plan_parts(utterances, work.seconds, 300.0, work.codec.hash)
    out = work.folder / "parts"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    began, cpu = time.monotonic(), time.process_time()
    times = encode_parts(work.codec, parts, out, show=False, precision=precision)
    found = made_of(work, sum(work.seconds.values()), began, cpu)
    shutil.rmtree(out)
    return found | {"codec s": times.codec_sec, "waited s": times.waiting_sec}


def command(work: Work) -> dict:
    """Headers, reading, codec, checks and saving."""
    import datasets  # noqa: F401  (before an hour of audio is read for nothing)

    out = work.folder / "prepared"
    shutil.rmtree(out, ignore_errors=True)
    config = PrepareConfig(str(work.folder / "manifest.jsonl"), str(nano_checkpoint()), str(out))
    began, cpu = time.monotonic(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):  # its report would tear the table
        prepare(config, work.codec)
    found = made_of(work, sum(work.seconds.values()), began, cpu)
    shutil.rmtree(out)
    return found


if __name__ == "__main__":
    main()
