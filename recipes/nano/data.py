"""Training speech for the nano family: seeded shards of espeak-ng utterances, many processes.

    python -m recipes.nano.data --out /dev/shm/nano --hours 43 --workers 16
    python -m recipes.nano.data --wav my_voice --voice made9000 --minutes 2   # a voice to fine-tune

A shard is `shard-00017.npy` (int16 samples at 24 kHz, utterances end to end) beside
`shard-00017.json` (one row per utterance). Shard n is a function of (seed, split, n) alone, to the
last sample where numpy and scipy are the same, so any part of the data can be made again, and
trainers may start while later shards are still being made.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np

from recipes.nano.espeak import SAMPLE_RATE_HZ, data_folder, speak
from recipes.nano.texts import NUMBER_LANGUAGES, draw_text
from recipes.nano.voices import DEMO_VOICE, HOME_VOICES, all_voices

UTTERANCES_PER_VOICE = 8
VOICES_PER_SHARD = 24
UTTERANCE_SEC = 1.64  # the mean of 7,680 utterances of the training split, tags among them
MAX_SEC = 7.0
# Words per minute and espeak's pitch for each prosody tag; pitch 50 is the voice's own, 36 and 63
# are about -4 and +4 semitones.
TAG_RATE = {"<|prosody:speed_slow|>": 0.72, "<|prosody:speed_fast|>": 1.4}
TAG_PITCH = {"<|prosody:pitch_low|>": 32, "<|prosody:pitch_high|>": 68}
TAGS = (*TAG_RATE, *TAG_PITCH)
NOISE_FLOOR = 5e-4  # RMS, -66 dBFS: espeak's pauses are digital zeros, which no microphone gives


def speak_tagged(text: str, language: str, voice: str, rng: random.Random) -> np.ndarray:
    """`text`, which may begin with one prosody tag, at a natural 160 to 180 words a minute."""
    tag = next((tag for tag in TAGS if text.startswith(tag)), "")
    rate = round(rng.uniform(160, 180) * TAG_RATE.get(tag, 1.0))
    return speak(text.removeprefix(tag), language, voice, rate, TAG_PITCH.get(tag, 50))


def draw_utterance(language: str, rng: random.Random, split: str, tags: float = 0.2) -> str:
    """A text of the split; an English one carries a prosody tag with probability `tags`."""
    text = draw_text(language, rng, split)
    return rng.choice(TAGS) + text if language == "en" and rng.random() < tags else text


def make_shard(job: tuple[Path, int, int, str]) -> float:
    """Write shard `number`; returns its seconds of audio."""
    out, seed, number, split = job
    name = out / f"shard-{number:05d}"
    if name.with_suffix(".json").exists():
        return 0.0
    rng = random.Random(f"{seed}-{split}-{number}")
    voices = [i for i, voice in enumerate(all_voices()) if voice.split == split]
    home = [i for i in voices if all_voices()[i].name in HOME_VOICES]
    rows, pieces, position = [], [], 0
    for _ in range(VOICES_PER_SHARD):
        index = rng.choice(home if home and rng.random() < 0.2 else voices)
        voice = all_voices()[index].name
        visit = [rng.choices(("en", rng.choice(NUMBER_LANGUAGES)), (0.45, 0.55))[0] for _ in "ab"]
        for language in visit:
            for _ in range(UTTERANCES_PER_VOICE // 2):
                text = draw_utterance(language, rng, split)
                wav = speak_tagged(text, language, voice, rng)
                if len(wav) > MAX_SEC * SAMPLE_RATE_HZ:
                    continue
                rows.append([position, len(wav), text, language, index])
                pieces.append((wav * 32767).astype(np.int16))
                position += len(wav)
    temporary = name.with_suffix(".tmp.npy")
    np.save(temporary, np.concatenate(pieces))
    os.replace(temporary, name.with_suffix(".npy"))
    temporary = name.with_suffix(".tmp")
    temporary.write_text(
        json.dumps(
            {"columns": ["start", "samples", "text", "language", "voice"], "rows": rows},
            ensure_ascii=False,
        ),
        encoding="utf-8",
    )
    os.replace(temporary, name.with_suffix(".json"))
    return position / SAMPLE_RATE_HZ


def make_shards(out: Path, hours: float, workers: int, seed: int, split: str) -> None:
    """Make `hours` of audio of `split` in `out`: whole shards of about 5 minutes, at least one."""
    out.mkdir(parents=True, exist_ok=True)
    mean_sec = UTTERANCE_SEC * UTTERANCES_PER_VOICE * VOICES_PER_SHARD
    jobs = [(out, seed, n, split) for n in range(max(1, round(hours * 3600 / mean_sec)))]
    data_folder()  # shared by the workers and removed when this process ends
    begin, seconds = time.time(), 0.0
    # the pool ends its workers by SIGTERM, for which they may have inherited a handler
    default = signal.signal, (signal.SIGTERM, signal.SIG_DFL)
    with multiprocessing.get_context("fork").Pool(workers, *default) as pool:
        for done, length in enumerate(pool.imap_unordered(make_shard, jobs), 1):
            seconds += length
            if done % max(1, len(jobs) // 10) == 0:
                rate = seconds / (time.time() - begin)
                print(
                    f"data {split}: {done}/{len(jobs)} shards, {seconds / 3600:.2f} h, "
                    f"{rate:.0f} x real time",
                    flush=True,
                )
    (out / "complete").touch()


def make_voice_folder(out: Path, voice: str, minutes: float, seed: int, split: str) -> None:
    """A folder of wav + txt pairs of one voice speaking English sentences, with the noise floor."""
    from higgs_lab.audio import write_wav

    out.mkdir(parents=True, exist_ok=True)
    rng, noise = random.Random(f"{seed}-{voice}-{split}"), np.random.default_rng(seed)
    seconds, seen = 0.0, set()
    while seconds < minutes * 60:
        text = draw_text("en", rng, split)
        if text in seen:
            continue
        seen.add(text)
        wav = speak_tagged(text, "en", voice, rng)
        wav = wav + noise.normal(0, NOISE_FLOOR, len(wav)).astype(np.float32)
        stem = out / f"{voice}-{len(seen):03d}"
        write_wav(stem.with_suffix(".wav"), wav, SAMPLE_RATE_HZ)
        stem.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
        seconds += len(wav) / SAMPLE_RATE_HZ


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for shards")
    parser.add_argument("--hours", type=float, default=43.0, help="of speech")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("train", "test"), default="train")
    parser.add_argument("--wav", type=Path, help="write one voice as wav + txt pairs instead")
    parser.add_argument("--voice", default=DEMO_VOICE)
    parser.add_argument("--minutes", type=float, default=2.0)
    args = parser.parse_args(argv)
    if args.wav:
        make_voice_folder(args.wav, args.voice, args.minutes, args.seed, args.split)
    elif args.out:
        make_shards(args.out, args.hours, args.workers, args.seed, args.split)
    else:
        parser.error("say --out FOLDER for shards or --wav FOLDER for one voice")


if __name__ == "__main__":
    sys.exit(main())
