r"""How fast clips are heard: openai-whisper one by one against our batches, same words, same run.

    python -m eval.bench_hear                              # Whisper-large-v3's size on a GPU
    python -m eval.bench_hear --precisions fp32 fp16 --json hear.json
    python -m eval.bench_hear --reference-clips 300        # one by one takes most of the time

Random weights of the true size, and clips of five seconds as 16 kHz arrays in memory. Both sides
write exactly 40 tokens a clip (no row of the table lets them end early), in the settings that
eval.asr uses; log-mels and the text are made within the time. "same" counts clips whose 40 tokens
are identical to those of openai-whisper in the same precision. Without a GPU a tiny size shows that
it runs. Needs torch, numpy and openai-whisper's source; what that imports and this does not use may
be missing (numba, tiktoken).
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
import types
from collections.abc import Sequence

import numpy as np
import torch

from higgs_lab.runlog import Progress, write_json_atomic

TINY = {"n_mels": 80, "n_vocab": 51865, "state": 64, "head": 4, "layer": 2}
LARGE_V3 = {"n_mels": 128, "n_vocab": 51866, "state": 1280, "head": 20, "layer": 32}
SIZES = {"tiny": TINY, "large-v3": LARGE_V3}


def stand_in_for_missing() -> list[str]:
    """Let openai-whisper import where numba or tiktoken are not installed; names what stands in.

    numba speeds up word timestamps, which nobody asks for here. The tokenizer is tiktoken's, by
    the same merge ranks.
    """
    missing = [name for name in ("numba", "tiktoken") if importlib.util.find_spec(name) is None]
    if "numba" in missing:
        numba = sys.modules["numba"] = types.ModuleType("numba")
        numba.jit = lambda *args, **kwargs: lambda function: function
    if "tiktoken" in missing:
        tiktoken = sys.modules["tiktoken"] = types.ModuleType("tiktoken")
        tiktoken.Encoding = Encoding
    return missing


class Encoding:
    """tiktoken.Encoding as far as openai-whisper uses it: byte pairs merged by rank."""

    def __init__(self, name, *, explicit_n_vocab, pat_str, mergeable_ranks, special_tokens):
        import regex  # transformers brings it

        self.name, self.n_vocab = name, explicit_n_vocab
        self._split, self._ranks, self._special = (
            regex.compile(pat_str),
            mergeable_ranks,
            special_tokens,
        )
        self._bytes = {token: data for data, token in mergeable_ranks.items()}
        self._bytes |= {token: text.encode() for text, token in special_tokens.items()}

    @property
    def special_tokens_set(self) -> set[str]:
        return set(self._special)

    @property
    def eot_token(self) -> int:
        return self._special["<|endoftext|>"]

    def encode_single_token(self, text: str) -> int:
        return self._special[text] if text in self._special else self._ranks[text.encode()]

    def encode(self, text: str) -> list[int]:
        tokens = []
        for piece in self._split.findall(text):
            parts = [bytes([byte]) for byte in piece.encode()]
            while len(parts) > 1:
                pairs = [a + b for a, b in zip(parts, parts[1:], strict=False)]
                known = [(self._ranks[p], i) for i, p in enumerate(pairs) if p in self._ranks]
                if not known:
                    break
                _, best = min(known)
                parts[best : best + 2] = [pairs[best]]
            tokens += [self._ranks[part] for part in parts]
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(self._bytes[token] for token in tokens).decode(errors="replace")


def random_model(size: str, device: str, seed: int = 0):
    """openai-whisper's model class at a true size, with random weights that listen.

    Scaled so that each clip is given words of its own, as deep random nets do not: what is
    heard counts (loud convolutions, sharp far attention) and is not averaged away by 32 layers.
    Rows of the token table differ in length, as trained ones do: among 51,866 alike the best would
    be a toss-up that rounding decides. The end token and timestamps have rows of zeros, so that
    nothing ends early.
    """
    from whisper.model import ModelDimensions, Whisper
    from whisper.tokenizer import get_tokenizer

    shape = SIZES[size]
    dims = {"n_mels": shape["n_mels"], "n_vocab": shape["n_vocab"]}
    dims |= {"n_audio_ctx": 1500, "n_text_ctx": 448}
    for side in ("audio", "text"):
        dims |= {f"n_{side}_{part}": shape[part] for part in ("state", "head", "layer")}
    with torch.device(device):
        model = Whisper(ModelDimensions(**dims))
    random = torch.Generator(device).manual_seed(seed)
    gains = {"conv": 4.0, "cross_attn.value": 1.0, "cross_attn": 2.0}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "decoder.positional_embedding":
                parameter.normal_(std=1.0, generator=random)
            elif "embedding" in name:
                parameter.normal_(std=0.1, generator=random)
            elif parameter.ndim > 1:
                gain = next((gain for part, gain in gains.items() if part in name), 1.0)
                if name.startswith("encoder.blocks") and "attn.out" in name:
                    gain = 0.3
                parameter.normal_(std=gain / parameter[0].numel() ** 0.5, generator=random)
            else:
                parameter.fill_(float("ln" in name and "weight" in name))
        table = model.decoder.token_embedding.weight
        lengths = torch.empty(len(table), 1, device=table.device).normal_(std=0.3, generator=random)
        table *= lengths.exp()
        tokenizer = get_tokenizer(True, num_languages=model.num_languages)
        table[tokenizer.eot] = table[tokenizer.timestamp_begin :] = 0
    return model.eval()


def random_clips(count: int, seconds: float, seed: int = 0) -> list[np.ndarray]:
    """Tenths of a second of one pitch and loudness each, with noise; no two clips alike."""
    rng = np.random.default_rng(seed)
    samples, step = round(seconds * 16000), 1600
    time_sec = np.arange(samples) / 16000
    clips = []
    for _ in range(count):
        pieces = samples // step + 1
        hz = np.repeat(rng.uniform(80, 4000, pieces), step)[:samples]
        loud = np.repeat(rng.uniform(0, 0.4, pieces), step)[:samples]
        wav = loud * np.sin(2 * np.pi * hz * time_sec) + 0.01 * rng.standard_normal(samples)
        clips.append(wav.astype(np.float32))
    return clips


def one_by_one(
    model, clips: Sequence[np.ndarray], fp16: bool, tokens: int
) -> tuple[list[list[int]], float]:
    """openai-whisper's `transcribe` on each clip -> (tokens of each, seconds)."""
    from eval.asr_whisper import exact_fp32

    options = dict(language="en", task="transcribe", temperature=0.0, verbose=None, fp16=fp16)
    options |= dict(condition_on_previous_text=False, without_timestamps=True, sample_len=tokens)
    options |= dict(compression_ratio_threshold=None, logprob_threshold=None)
    options |= dict(no_speech_threshold=None)
    written = []
    with exact_fp32():
        model.transcribe(clips[0], **options)  # warm
        begin = _now(model)
        with Progress(len(clips), "clips", "one by one") as progress:
            for clip in clips:
                segments = model.transcribe(clip, **options)["segments"]
                written.append([token for segment in segments for token in segment["tokens"]])
                progress.update()
        return written, _now(model) - begin


def in_batches(
    recognizer, clips: Sequence[np.ndarray], tokens: int
) -> tuple[list[list[int]], float]:
    """Our batches -> (tokens of each clip, seconds)."""
    recognizer.decode_all(clips[: recognizer.batch], ["en"] * len(clips[: recognizer.batch]), 2)
    begin = _now(recognizer.model)
    decoded = recognizer.decode_all(clips, ["en"] * len(clips), tokens)
    texts = [recognizer._decoder.text(one.tokens) for one in decoded]
    elapsed = _now(recognizer.model) - begin
    assert len(texts) == len(clips)
    return [one.tokens for one in decoded], elapsed


def bench(
    size: str,
    device: str,
    clips: int,
    reference_clips: int,
    precisions: Sequence[str],
    seconds: float = 5.0,
    tokens: int = 40,
    batch: int | None = None,
) -> list[dict]:
    """A row per path and precision; openai-whisper has no bf16, its fp32 stands beside that."""
    from eval.asr_whisper import WhisperRecognizer

    wavs = random_clips(clips, seconds)
    rows: list[dict] = []
    references: dict[str, list[list[int]]] = {}
    for precision in precisions:
        model = random_model(size, device)
        if precision != "bf16" and reference_clips:
            some = wavs[:reference_clips]
            fp16 = precision == "fp16"
            references[precision], elapsed = one_by_one(model, some, fp16, tokens)
            rows.append(_row("openai-whisper, one by one", precision, len(some), elapsed, seconds))
        recognizer = WhisperRecognizer(model, size, precision, batch)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        written, elapsed = in_batches(recognizer, wavs, tokens)
        row = _row(f"batches of {recognizer.batch}", precision, clips, elapsed, seconds)
        expected = references.get(precision, references.get("fp32", []))
        pairs = list(zip(expected, written, strict=False))
        row["same"] = [sum(one == other for one, other in pairs), len(pairs)]
        row["distinct"] = len({tuple(one) for one in written})
        if rows and pairs:
            base = next(r for r in reversed(rows) if r["path"].startswith("openai"))
            row["speedup"] = row["clips_per_sec"] / base["clips_per_sec"]
        if device == "cuda":
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        lengths = {len(one) for one in written + expected}
        if lengths != {tokens}:
            raise RuntimeError(f"clips of {sorted(lengths)} tokens, {tokens} were asked for")
        rows.append(row)
        del model, recognizer
        print(table(rows), file=sys.stderr, flush=True)  # if the machine is taken away before all
    return rows


def table(rows: Sequence[dict]) -> str:
    lines = [
        "| path | precision | clips | seconds | clips/s | x real time | speed-up | same | memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        same = "{} of {}".format(*row["same"]) if row.get("same") else "-"
        faster = f"{row['speedup']:.1f}x" if row.get("speedup") else "-"
        memory = f"{row['peak_gib']:.1f} GiB" if row.get("peak_gib") else "-"
        lines.append(
            f"| {row['path']} | {row['precision']} | {row['clips']} | {row['seconds']:.1f} | "
            f"{row['clips_per_sec']:.2f} | {row['real_time']:.0f} | {faster} | {same} | {memory} |"
        )
    return "\n".join(lines)


def _row(path: str, precision: str, clips: int, elapsed: float, seconds: float) -> dict:
    rate = clips / elapsed
    row = {"path": path, "precision": precision, "clips": clips, "seconds": elapsed}
    return row | {"clips_per_sec": rate, "real_time": rate * seconds}


def _now(model) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(
        prog="python -m eval.bench_hear",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--size", default="large-v3" if gpu else "tiny", choices=SIZES)
    add("--device", default="cuda" if gpu else "cpu")
    add("--clips", type=int, default=1000 if gpu else 16)
    add("--reference-clips", type=int, help="heard one by one; all by default, 0 for none")
    add("--seconds", type=float, default=5.0, help="of each clip")
    add("--tokens", type=int, default=40, help="written for each clip")
    add("--precisions", nargs="+", default=["fp32"], choices=("fp32", "fp16", "bf16"))
    add("--batch", type=int, help="clips at once (default: by memory)")
    add("--json", help="write the rows here, too")
    args = parser.parse_args(argv)
    missing = stand_in_for_missing()
    reference = args.clips if args.reference_clips is None else args.reference_clips
    rows = bench(
        args.size, args.device, args.clips, min(reference, args.clips), args.precisions,
        args.seconds, args.tokens, args.batch,
    )  # fmt: skip
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"\nWhisper {args.size}, random weights, {args.seconds:g} s clips, {args.tokens} tokens "
          f"each, on {name}, torch {torch.__version__}")  # fmt: skip
    print(table(rows))
    print(f"distinct token sequences: {rows[-1]['distinct']} of {args.clips}")
    if missing:
        print(f"stand-ins for packages not installed: {', '.join(missing)}")
    if args.json:
        write_json_atomic(args.json, {"device": name, "arguments": vars(args), "rows": rows})
    return rows


if __name__ == "__main__":
    main()
