"""Generation speed: the plain way beside ours, alone and to wav files.

    python -m recipes.bench_generate                       # 4B shape on a GPU, nano on a CPU
    python -m recipes.bench_generate --batches 16,64,256 --texts 1000 --out bench.json

The plain way is Hugging Face's Qwen3Model with its growing cache, one request. Prompts and lengths
are ragged: texts have 4 to 29 words, half of them a reference of 3 to 10 s, takes last 2 to 10 s at
most (random weights end where their cap says, nano where it has said its text). The 4B shape is
given nano's tokens, a byte each, where the released tokenizer has one for each of these words: its
texts are as many bytes as they would be words, so that prompts are as long as they would be.
"of one voice" is what a cloned voice says: all texts have the same reference of 10 s, which is
computed once; "of a voice each": as long ones that are each text's own.
"to wav" has the codec decode and write files meanwhile. "first s" is, with all compiling, the wait
for the first frame of one request, for the first take of many, and for as many files as two batches
give.
"""

from __future__ import annotations

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from higgs_lab.audio import write_wav
from higgs_lab.codec import Codec, codec_hash
from higgs_lab.generate import Sampling, _generate_modules, generate, generate_each
from higgs_lab.nano import nano_checkpoint
from higgs_lab.pipeline import speak_each
from higgs_lab.prompt import Prompt, render_prompt
from recipes.bench import Bench, arguments, synchronize

COLUMNS = ["ms/frame", "RTF", "audio-s/s", "first s", "peak GiB", "CPU ms/frame"]
WORDS = "the quick brown fox jumps over a lazy dog while the river runs on and nobody looks".split()


def main(argv: list[str] | None = None) -> Bench:
    parser = arguments(__doc__)
    parser.add_argument("--batches", help="rows at a time; 16,64,256, on a CPU 4")
    parser.add_argument("--texts", type=int, help="texts to wav files; 1000, on a CPU 8")
    parser.add_argument("--frames", type=int, default=200, help="of the single requests, at most")
    parser.add_argument(
        "--precision", default="fp16", help="of the codec on a GPU: fp32, tf32, fp16, bf16"
    )
    parser.add_argument("--compile", action="store_true", help="compile on a CPU too")
    args = parser.parse_args(argv)
    bench = Bench(args, COLUMNS)
    gpu = bench.device.type == "cuda"
    batches = [int(n) for n in (args.batches or ("16,64,256" if gpu else "4")).split(",")]
    texts = args.texts or (1000 if gpu else 8)
    compiled = args.compile or gpu
    talker = bench.talker()
    bench.row("plain, batch 1", partial(plain, bench, talker))
    bench.row("ours, batch 1, not compiled", partial(single, bench, talker, compile=False))
    if compiled:
        bench.row("ours, batch 1", partial(single, bench, talker, compile=True))
    for n in batches:
        for option in [False, True] if compiled else [False]:
            name = f"ours, {n} rows" + ("" if option or not compiled else ", not compiled")
            bench.row(name, partial(many, bench, talker, n, option))
        for voices, name in [(2 * n, "a voice each"), (1, "one voice")]:
            row = partial(many, bench, talker, n, compiled, voices)
            bench.row(f"ours, {n} rows of {name}", row)
    codec = cache(partial(make_codec, bench))
    for n in batches:
        name = f"ours, {n} rows to wav"
        bench.row(name, partial(to_wav, bench, talker, codec, n, texts, compiled))
    pairs = [(row["method"], "plain, batch 1") for row in bench.rows if "ours" in row["method"]]
    bench.multiples("audio-s/s", pairs)
    lengths = [len(prompt) for prompt in prompts(bench, 256)[0]]
    print(f"prompts of {np.mean(lengths):.0f} positions on average")
    return bench


def prompts(
    bench: Bench, count: int, seed: int = 0, voices: int = 0
) -> tuple[list[Prompt], list[Sampling]]:
    """voices: each prompt has one of so many references of 10 s; 0: half have one of their own."""
    rng = np.random.default_rng(seed)
    found, settings = [], []
    known = [torch.from_numpy(rng.integers(0, 1024, (250, 8))) for _ in range(voices)]
    for i in range(count):
        words = rng.choice(WORDS, int(rng.integers(4, 30)))
        text = " ".join(words).capitalize() + "."
        if bench.size != "nano":
            text = "x" * (len(words) + 1)
        ref = None
        if voices:
            ref = known[i % voices]
        elif i % 2:
            ref = torch.from_numpy(rng.integers(0, 1024, (int(rng.integers(75, 250)), 8)))
        found.append(render_prompt(bench.vocab, text, ref))
        settings.append(Sampling(seed=i, max_frames=int(rng.integers(50, 250))))
    return found, settings


def plain(bench: Bench, talker) -> dict:
    made, settings = prompts(bench, 2)
    frames = min(bench.args.frames, 60)
    settings = [Sampling(seed=s.seed, max_frames=frames) for s in settings]
    begun = time.monotonic()
    _generate_modules(talker, made[:1], [Sampling(max_frames=1)], False)
    first = time.monotonic() - begun
    return _timed(bench, first, lambda: _generate_modules(talker, made[:1], settings[:1], False))


def single(bench: Bench, talker, compile: bool) -> dict:
    made, _ = prompts(bench, 1)
    setting = Sampling(seed=1, max_frames=bench.args.frames)
    begun = time.monotonic()
    generate(talker, made, Sampling(max_frames=1), compile=compile)
    synchronize()
    first = time.monotonic() - begun
    generate(talker, made, setting, compile=compile)  # records what it needs
    return _timed(bench, first, lambda: generate(talker, made, setting, compile=compile))


def many(bench: Bench, talker, rows: int, compile: bool, voices: int = 0) -> dict:
    made, settings = prompts(bench, 2 * rows, voices=voices)
    options = dict(max_batch=rows, compile=compile)
    begun = time.monotonic()
    next(iter(generate_each(talker, made, settings, **options)))
    first = time.monotonic() - begun
    generate(talker, made, settings, **options)
    found = _timed(bench, first, lambda: generate(talker, made, settings, **options))
    return found | {"ms/frame": None, "RTF": None}


def to_wav(bench: Bench, talker, codec, rows: int, texts: int, compile: bool) -> dict:
    codec = codec()
    made, settings = prompts(bench, texts, seed=1)
    precision = bench.args.precision if bench.device.type == "cuda" else "fp32"

    def run(count: int, folder: Path) -> list:
        options = dict(max_batch=rows, compile=compile, precision=precision)
        spoken = speak_each(talker, codec, made[:count], settings[:count], **options)
        results, files = [], []
        with ThreadPoolExecutor(4) as pool:
            for index, one, wav in spoken:
                path = folder / f"{index}.wav"
                if len(wav):
                    files.append(pool.submit(write_wav, path, wav, codec.sample_rate_hz))
                results.append(one)
        for file in files:
            file.result()  # raises what went wrong
        return results

    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        run(min(texts, 2 * rows), Path(folder))
        first = time.monotonic() - begun
        found = _timed(bench, first, lambda: run(texts, Path(folder)), least=0)
        files = len(list(Path(folder).glob("*.wav")))
    return found | {"ms/frame": None, "RTF": None, "files": files, "precision": precision}


def _timed(bench: Bench, first: float, run, least: float = 3) -> dict:
    """Runs for `least` seconds, at least once."""
    synchronize()
    begun, worked, frames, times = time.monotonic(), time.process_time(), 0, 0
    while not times or time.monotonic() - begun < min(least, bench.args.row_sec):
        frames += sum(len(one.codes) for one in run())
        times += 1
    synchronize()
    seconds, worked = time.monotonic() - begun, time.process_time() - worked
    bench.profile(run)
    audio = frames / bench.vocab.frame_rate_hz
    return {
        "ms/frame": 1000 * seconds / frames,
        "RTF": seconds / audio,
        "audio-s/s": audio / seconds,
        "first s": first,
        "peak GiB": bench.memory_gib(),
        "CPU ms/frame": 1000 * worked / frames,  # of all threads; tells more on a busy machine
        "frames": frames,
    }


def make_codec(bench: Bench) -> Codec:
    """nano's, or a codec of random weights in the released size."""
    if bench.size == "nano":
        return Codec.from_pretrained(nano_checkpoint(), bench.device)
    from higgs_lab.nano.random_4b import _codec
    from higgs_lab.vocab import CODEC_CONFIG

    model = _codec(CODEC_CONFIG, seed=0).to(bench.device)
    return Codec(model, codec_hash(CODEC_CONFIG, {}))


if __name__ == "__main__":
    main()
