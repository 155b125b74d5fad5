"""What the nano family reaches on held-out voices and sentences: every figure of its model card.

    python -m recipes.nano.evaluate                        # judges, codec and talker
    python -m recipes.nano.evaluate --parts whisper ecapa  # a part alone

All speech is made here by espeak-ng from voices and texts that no part was trained on.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from eval.asr import load_recognizer
from eval.metrics import char_errors, word_errors
from eval.normalize import normalize
from eval.speaker import cosine, load_encoder
from higgs_lab.runlog import Progress
from recipes.nano.data import NOISE_FLOOR, speak_tagged
from recipes.nano.espeak import SAMPLE_RATE_HZ, is_female
from recipes.nano.texts import LANGUAGES, NUMBER_LANGUAGES, draw_text
from recipes.nano.voices import all_voices

JUDGE_HZ = 16_000
MAX_F0_SEMITONES = 2.0  # between a voice and the distractors it is confused with


@dataclass(frozen=True)
class Figure:
    """One line of the table. value and target are shares or rates; at_least: which side is good."""

    part: str
    measure: str
    value: float
    target: float | None = None
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target


@dataclass(frozen=True)
class Clip:
    wav: np.ndarray  # float32 [n] at 24 kHz, with the family's noise floor
    text: str
    language: str
    voice: str


def held_out(language: str, count: int, seed: int, voices: list[str] | None = None) -> list[Clip]:
    """Clips of test texts in test voices, each voice in turn."""
    names = voices or [voice.name for voice in all_voices() if voice.split == "test"]
    rng, noise = random.Random(f"{seed}-{language}"), np.random.default_rng(seed)
    clips = []
    for i in range(count):
        text, voice = draw_text(language, rng, "test"), names[i % len(names)]
        wav = speak_tagged(text, language, voice, rng)
        wav = wav + noise.normal(0, NOISE_FLOOR, len(wav)).astype(np.float32)
        clips.append(Clip(wav, text, language, voice))
    return clips


def for_judges(wav: np.ndarray) -> np.ndarray:
    import soxr

    return soxr.resample(wav, SAMPLE_RATE_HZ, JUDGE_HZ).astype(np.float32)


def error_rate(recognizer, wavs: list[np.ndarray], clips: list[Clip], unit: str) -> float:
    """Corpus error of what is heard in `wavs` against the texts of `clips`; unit "word", "char"."""
    heard = recognizer.transcribe_all(
        [for_judges(wav) for wav in wavs], [clip.language for clip in clips]
    )
    errors = words = 0
    for transcript, clip in zip(heard, clips, strict=True):
        pair = (
            normalize(clip.text, clip.language),
            normalize(transcript.text, clip.language),
        )
        if unit == "char":
            pair = tuple(text.replace(" ", "") for text in pair)
        found = (word_errors if unit == "word" else char_errors)(*pair)
        errors, words = errors + found.errors, words + found.units
    return errors / words


# --- the judges ------------------------------------------------------------------------------
def whisper_figures(args: argparse.Namespace) -> Iterator[Figure]:
    recognizer = load_recognizer("nano", "cpu")
    rates = {}
    with Progress(len(LANGUAGES), "languages", "whisper") as progress:
        for language in LANGUAGES:
            clips = held_out(language, args.clips if language == "en" else args.clips // 4, 1)
            unit = "word" if language == "en" else "char"
            rates[language] = error_rate(recognizer, [c.wav for c in clips], clips, unit)
            progress.update()
    yield Figure("whisper", "WER, English", rates["en"], 0.03)
    numbers = [rates[language] for language in NUMBER_LANGUAGES]
    yield Figure("whisper", f"macro CER, {len(numbers)} languages", float(np.mean(numbers)), 0.05)
    worst = max(NUMBER_LANGUAGES, key=rates.get)
    yield Figure("whisper", f"CER, worst language ({worst})", rates[worst])


def ecapa_figures(args: argparse.Namespace) -> Iterator[Figure]:
    """EER of trials whose impostors share language, sex and pitch with the voice."""
    encoder = load_encoder("nano", "cpu")
    names = [voice.name for voice in all_voices() if voice.split == "test"]
    clips = held_out("en", 4 * len(names), 2)
    vectors = [encoder.embed(for_judges(clip.wav)) for clip in clips]
    f0 = {name: median_f0([c.wav for c in clips if c.voice == name]) for name in names}
    same, other = [], []
    for i, a in enumerate(clips):
        for j in range(i):
            b = clips[j]
            if a.voice == b.voice:
                same.append(cosine(vectors[i], vectors[j]))
            elif confusable(a.voice, b.voice, f0):
                other.append(cosine(vectors[i], vectors[j]))
    rate = equal_error_rate(np.array(same), np.array(other))
    yield Figure("ecapa", f"EER, {len(same)} + {len(other)} trials", rate, 0.05)
    yield Figure("ecapa", "mean similarity, same voice", float(np.mean(same)))
    yield Figure("ecapa", "mean similarity, confusable voices", float(np.mean(other)))


def confusable(a: str, b: str, f0: dict[str, float]) -> bool:
    """Of the same sex and within two semitones."""
    apart = abs(12 * np.log2(f0[a] / f0[b]))
    return a != b and is_female(a) == is_female(b) and apart <= MAX_F0_SEMITONES


def median_f0(wavs: list[np.ndarray], low_hz: float = 60, high_hz: float = 400) -> float:
    """Median pitch over frames whose autocorrelation has a clear peak."""
    found = []
    size, hop = 1200, 600
    low, high = int(SAMPLE_RATE_HZ / high_hz), int(SAMPLE_RATE_HZ / low_hz)
    for wav in wavs:
        for start in range(0, len(wav) - size, hop):
            frame = wav[start : start + size] - wav[start : start + size].mean()
            power = float(frame @ frame)
            if power < size * 1e-4:
                continue
            corr = np.correlate(frame, frame, "full")[size - 1 :]
            corr = corr / (power * np.linspace(1, 1 / size, size))  # shorter overlaps, less sum
            lag = low + int(corr[low : min(high, size // 2)].argmax())
            if corr[lag] > 0.7:
                found.append(SAMPLE_RATE_HZ / lag)
    return float(np.median(found)) if found else float("nan")


def equal_error_rate(same: np.ndarray, other: np.ndarray) -> float:
    """Where false accepts equal false rejects."""
    thresholds = np.sort(np.concatenate([same, other]))
    accept = np.array([(other >= t).mean() for t in thresholds])
    reject = np.array([(same < t).mean() for t in thresholds])
    at = np.abs(accept - reject).argmin()
    return float((accept[at] + reject[at]) / 2)


# --- codec and talker ------------------------------------------------------------------------
def codec_figures(args: argparse.Namespace) -> Iterator[Figure]:
    import torch

    from higgs_lab.checkpoint import resolve_checkpoint
    from higgs_lab.codec import Codec

    codec = Codec.from_pretrained(resolve_checkpoint(args.model).path)
    recognizer, encoder = load_recognizer("nano", "cpu"), load_encoder("nano", "cpu")
    clips = held_out("en", args.clips, 3)
    codes = [codec.encode(clip.wav) for clip in clips]
    again = codec.decode_batch(codes)
    before = error_rate(recognizer, [clip.wav for clip in clips], clips, "word")
    after = error_rate(recognizer, again, clips, "word")
    yield Figure("codec", "WER added by a round trip", after - before, 0.02)
    used = [
        len(torch.cat(codes)[:, k].unique()) / codec.model.config.codebook_size for k in range(8)
    ]
    yield Figure("codec", "codes in use, least used codebook", min(used), 0.5, at_least=True)
    first = [encoder.embed(for_judges(clip.wav)) for clip in clips]
    second = [encoder.embed(for_judges(wav)) for wav in again]
    own = [cosine(a, b) for a, b in zip(first, second, strict=True)]
    voices = sorted({clip.voice for clip in clips})
    f0 = {name: median_f0([c.wav for c in clips if c.voice == name]) for name in voices}
    others = [
        cosine(second[i], first[j])
        for i, a in enumerate(clips)
        for j, b in enumerate(clips)
        if confusable(a.voice, b.voice, f0)
    ]
    yield Figure("codec", "similarity to the original", float(np.mean(own)))
    yield Figure("codec", "similarity to confusable voices", float(np.mean(others)))
    clearly = float(np.mean(np.array(own) > np.quantile(others, 0.95)))
    yield Figure("codec", "original above 95 % of those", clearly, 0.9, at_least=True)


def talker_figures(args: argparse.Namespace) -> Iterator[Figure]:
    import higgs_lab

    m = higgs_lab.load(args.model, adapter=args.adapter, device="cpu")
    recognizer, encoder = load_recognizer("nano", "cpu"), load_encoder("nano", "cpu")
    clips = held_out("en", args.clips // 2, 4)
    spoken = m.speak([clip.text for clip in clips], seed=list(range(len(clips))))
    rate = error_rate(recognizer, [wav for wav, _ in spoken], clips, "word")
    failed = [info.stop_reason != "eoc" or info.seconds < 0.3 for _, info in spoken]
    yield Figure("talker", "WER, no reference", rate, 0.08)
    yield Figure("talker", "runaway or empty", float(np.mean(failed)), 0.01)
    for said, name in ((True, "with transcript"), (False, "without")):
        references = held_out("en", len(clips), 5)
        cloned = m.speak(
            [clip.text for clip in clips],
            ref_audio=[ref.wav for ref in references],
            ref_text=[ref.text if said else None for ref in references],
            seed=list(range(len(clips))),
        )
        f0 = {ref.voice: median_f0([ref.wav]) for ref in references}
        vectors = {ref.voice: encoder.embed(for_judges(ref.wav)) for ref in references}
        nearer = []
        for (wav, _), ref in zip(cloned, references, strict=True):
            if len(wav) < JUDGE_HZ // 5:
                nearer.append(0.0)
                continue
            own = encoder.embed(for_judges(wav))
            rivals = [v for v in vectors if confusable(ref.voice, v, f0)]
            right = cosine(own, vectors[ref.voice])
            nearer += [float(right > cosine(own, vectors[v])) for v in rivals]
        rate = error_rate(recognizer, [wav for wav, _ in cloned], clips, "word")
        yield Figure("talker", f"WER of clones, {name}", rate)
        yield Figure(
            "talker", f"right voice nearer, {name}", float(np.mean(nearer)), 0.8, at_least=True
        )


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Figure]]] = {
    "whisper": whisper_figures,
    "ecapa": ecapa_figures,
    "codec": codec_figures,
    "talker": talker_figures,
}


def main(argv: list[str] | None = None) -> list[Figure]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--model", default="nano", help="checkpoint of the codec and the talker")
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--clips", type=int, default=200, help="English clips of each measure")
    args = parser.parse_args(argv)
    figures = [figure for part in args.parts for figure in PARTS[part](args)]
    table = Table("part", "measure", "value", "target", "")
    for figure in figures:
        sign = "≥" if figure.at_least else "≤"
        target = "" if figure.target is None else f"{sign} {figure.target:.2f}"
        verdict = {True: "met", False: "missed", None: ""}[figure.met]
        table.add_row(figure.part, figure.measure, f"{figure.value:.4f}", target, verdict)
    Console().print(table)
    return figures


if __name__ == "__main__":
    main()
