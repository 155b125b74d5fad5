"""Codec speed by precision, with what each changes in codes and sound.

    python -m recipes.bench_codec                          # released size on a GPU, nano on a CPU

The reference is fp32 with TF32 off. Agreement is the share of codes that equal the reference's,
over all codebooks and in the first; deviation is that of the decoded wave, relative to it. Clips
are buzzes of moving pitch with noise, in batches: of one length, or ragged, each 7 frames shorter.
The random codec of the released size has codebooks that follow no sound: its agreement says how
often a precision moves a vector to another cell, not what that does to speech; nano's is trained.
Encoding and decoding take turns, so that both are measured where --seconds are few: then a row is
measured for less than --row-sec, at least one pass after a first one, on a GPU two, and rows left
out are named.
"""

from __future__ import annotations

from functools import cache, partial

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
    cut = [slice(len(c) - 7 * i) for i, c in enumerate(codes)]  # of different lengths
    short = [w[: end.stop * codec.samples_per_frame] for w, end in zip(wavs, cut, strict=True)]
    sounds = {"": wavs, ", ragged": short}
    tokens = {"": codes, ", ragged": [c[end] for c, end in zip(codes, cut, strict=True)]}

    @cache
    def right_codes() -> dict[str, list[torch.Tensor]]:
        return {"": codes, ", ragged": [own_codes(codec, wav) for wav in short]}

    @cache
    def right_waves() -> dict[str, list[np.ndarray]]:
        return {kind: [own_wave(codec, c) for c in clips] for kind, clips in tokens.items()}

    def both(precision: str, kind: str = "", single: bool = False) -> list[tuple]:
        name = precision + (", one by one" if single else kind)
        how = precision, single
        there = partial(encode, bench, codec, sounds[kind], lambda: right_codes()[kind], *how)
        back = partial(decode, bench, codec, tokens[kind], lambda: right_waves()[kind], *how)
        return [(f"encode {name}", there), (f"decode {name}", back)]

    rows = both("fp32", single=True)
    known = [p for p in PRECISIONS if gpu or p not in ("tf32", "fp16")]
    for kind in sounds:
        for precision in known:
            rows += both(precision, kind)
    # before rows share what is left: the first of them would seem to need all this at least
    for kind, references in (("encode", right_codes), ("decode", right_waves)):
        if any(bench.wanted(name) for name, _ in rows if name.startswith(kind)):
            references()
    bench.share(rows)
    if not gpu:
        print("tf32 and fp16 are for a GPU: a CPU has no TF32, and takes minutes in fp16")
    fastest(bench)
    return bench


def fastest(bench: Bench) -> None:
    """The line that a user who prepares data looks for."""
    measured = [row for row in bench.rows if "agreement" in row]
    good = [row for row in measured if row["agreement"] >= ENOUGH]
    if good and len(measured) > 1:
        row = max(good, key=lambda row: row["audio-s/s"])
        print(
            f"fastest with {ENOUGH:.0%} agreement: {row['method']}, {row['audio-s/s']:,.0f} s of "
            "audio a second",
            flush=True,
        )


def encode(bench: Bench, codec: Codec, wavs, wanted, precision: str, single: bool) -> dict:
    ragged = len({len(wav) for wav in wavs}) > 1
    call = partial(codec.encode_batch, precision=precision, max_batch_sec=1e9, ragged=ragged)
    made, cells = measured(bench, call, wavs, sum(map(len, wavs)) / codec.sample_rate_hz, single)
    equal = torch.cat(made) == torch.cat(wanted())
    agreement = {"agreement": float(equal.float().mean())}
    agreement["in codebook 0"] = float(equal[:, 0].float().mean())
    return cells | agreement


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


def decode(bench: Bench, codec: Codec, codes, wanted, precision: str, single: bool) -> dict:
    call = partial(codec.decode_batch, precision=precision, ragged=True, max_batch_frames=1 << 30)
    seconds = sum(map(len, codes)) * codec.samples_per_frame / codec.sample_rate_hz
    made, cells = measured(bench, call, codes, seconds, single)
    a, b = np.concatenate(made), np.concatenate(wanted())
    return cells | {"deviation": float(np.linalg.norm(a - b) / np.linalg.norm(b))}


def measured(bench: Bench, call, items: list, seconds: float, single: bool) -> tuple[list, dict]:
    """What call makes of items, together or one by one, and how fast and in what memory it does."""
    made = []

    def step(_: int = 0) -> float:
        found = [call([item])[0] for item in items] if single else call(items)
        if not made:  # waves of each pass, kept until the next, would be new pages for the system
            made.extend(found)
        return seconds

    warm = 2 if bench.device.type == "cuda" else 1  # a pass may take a CPU many seconds
    found = timed(step, bench.row_sec, warm, least=1)
    cells = {"audio-s/s": found["per_sec"], "peak GiB": bench.memory_gib()}
    cells["spare_sec"] = found["spare_sec"]
    bench.profile(step)
    return made, cells


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
