"""Codec speed by precision, with what each changes in codes and sound.

    python -m recipes.bench_codec                          # released size on a GPU, nano on a CPU

The reference is fp32 with TF32 off. Agreement is the share of codes that equal the reference's,
over all codebooks and in the first; deviation is that of the decoded wave, relative to it. Clips
are buzzes of moving pitch with noise, in batches: of one length, or ragged, each 7 frames shorter.
The random codec of the released size has codebooks that follow no sound: its agreement says how
often a precision moves a vector to another cell, not what that does to speech; nano's is trained.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from higgs_lab.codec import MIN_SAMPLES_SEC, Codec
from higgs_lab.precision import PRECISIONS, exact_float32
from recipes.bench import Bench, arguments, timed
from recipes.bench_generate import make_codec

ENOUGH = 0.99  # share of codes that a precision for training data should keep
COLUMNS = ["audio-s/s", "agreement", "in codebook 0", "deviation", "peak GiB"]


def main(argv: list[str] | None = None) -> Bench:
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, help="clips at a time; 16, on a CPU 2")
    parser.add_argument("--clip-sec", type=float, default=10.0)
    args = parser.parse_args(argv)
    bench = Bench(args, COLUMNS)
    gpu = bench.device.type == "cuda"
    args.batch = args.batch or (16 if gpu else 2)
    codec = make_codec(bench)
    wavs = [buzz(args.clip_sec, seed, codec.sample_rate_hz) for seed in range(args.batch)]
    codes = [own_codes(codec, wav) for wav in wavs]
    waves = [own_wave(codec, clip) for clip in codes]
    cut = [slice(len(c) - 7 * i) for i, c in enumerate(codes)]  # of different lengths
    short = [w[: end.stop * codec.samples_per_frame] for w, end in zip(wavs, cut, strict=True)]
    bench.row("encode fp32, one by one", partial(encode, bench, codec, wavs, codes, "fp32", True))
    known = [p for p in PRECISIONS if gpu or p != "tf32"]  # a CPU has none
    for precision in known:
        bench.row(f"encode {precision}", partial(encode, bench, codec, wavs, codes, precision))
    for precision in known:
        name = f"encode {precision}, ragged"
        bench.row(name, partial(encode, bench, codec, short, None, precision))
    fastest(bench)
    if not gpu:
        known.remove("fp16")  # whose convolutions take PyTorch minutes there
    bench.row("decode fp32, one by one", partial(decode, bench, codec, codes, waves, "fp32", True))
    for precision in known:
        bench.row(f"decode {precision}", partial(decode, bench, codec, codes, waves, precision))
    cut = [c[end] for c, end in zip(codes, cut, strict=True)]
    for precision in known:
        name = f"decode {precision}, ragged"
        bench.row(name, partial(decode, bench, codec, cut, None, precision))
    return bench


def fastest(bench: Bench) -> None:
    """The line that a user who prepares data looks for."""
    good = [row for row in bench.rows if row.get("agreement", 0) >= ENOUGH]
    if good:
        row = max(good, key=lambda row: row["audio-s/s"])
        print(
            f"fastest with {ENOUGH:.0%} agreement: {row['method']}, {row['audio-s/s']:,.0f} s of "
            "audio a second",
            flush=True,
        )


def encode(bench: Bench, codec: Codec, wavs, wanted, precision: str, single=False) -> dict:
    ragged = len({len(wav) for wav in wavs}) > 1
    call = partial(codec.encode_batch, precision=precision, max_batch_sec=1e9, ragged=ragged)
    made = call(wavs)
    wanted = wanted or [own_codes(codec, wav) for wav in wavs]
    seconds = sum(map(len, wavs)) / codec.sample_rate_hz
    found = timed(_step(call, wavs, seconds, single), bench.args.row_sec, warm=1, least=2)
    bench.profile(lambda: call(wavs))
    equal = torch.cat(made) == torch.cat(wanted)
    agreement = {"agreement": float(equal.float().mean())}
    agreement["in codebook 0"] = float(equal[:, 0].float().mean())
    return {"audio-s/s": found["per_sec"], "peak GiB": bench.memory_gib()} | agreement


def own_codes(codec: Codec, wav: np.ndarray) -> torch.Tensor:
    """[T, K] by the model's own code, in fp32 and of one clip: what the rest is held to."""
    shortest = int(MIN_SAMPLES_SEC * codec.sample_rate_hz)
    wav = np.pad(wav, (0, max(0, shortest - len(wav))))
    with exact_float32(), torch.inference_mode():
        batch = torch.from_numpy(wav).to(codec.device)[None, None]
        return codec.model.encode(batch).audio_codes[0].T.cpu()


def own_wave(codec: Codec, codes: torch.Tensor) -> np.ndarray:
    """The same of codes [T, K]."""
    with exact_float32(), torch.inference_mode():
        batch = codes.T[None].to(codec.device)
        return codec.model.decode(batch).audio_values[0, 0].cpu().numpy()


def decode(bench: Bench, codec: Codec, codes, wanted, precision: str, single=False) -> dict:
    call = partial(codec.decode_batch, precision=precision, ragged=True, max_batch_frames=1 << 30)
    made = call(codes)
    wanted = wanted or [own_wave(codec, clip) for clip in codes]
    seconds = sum(map(len, made)) / codec.sample_rate_hz
    found = timed(_step(call, codes, seconds, single), bench.args.row_sec, warm=1, least=2)
    bench.profile(lambda: call(codes))
    a, b = np.concatenate(made), np.concatenate(wanted)
    deviation = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    return {
        "audio-s/s": found["per_sec"],
        "deviation": deviation,
        "peak GiB": bench.memory_gib(),
    }


def _step(call, items, seconds: float, single: bool):
    def step(_: int) -> float:
        if single:
            for item in items:
                call([item])
        else:
            call(items)
        return seconds

    return step


def buzz(seconds: float, seed: int, sample_rate_hz: int) -> np.ndarray:
    """Something between voice and noise, so that all codebooks get work."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * sample_rate_hz)) / sample_rate_hz
    phase = 2 * np.pi * np.cumsum(120 + 40 * np.sin(4 * time + seed)) / sample_rate_hz
    sound = sum(np.sin(h * phase) / h for h in range(1, 12))
    loud = 0.2 + 0.8 * np.abs(np.sin(8 * time))
    return (0.1 * loud * sound + 0.01 * rng.standard_normal(len(time))).astype(np.float32)


if __name__ == "__main__":
    main()
