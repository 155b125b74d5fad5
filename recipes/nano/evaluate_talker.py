"""Figures of the nano talker: what it says, in whose voice, how, and what fine-tuning adds."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import higgs_lab
from eval.asr import load_recognizer
from eval.speaker import cosine, load_encoder
from recipes.nano.data import TAG_PITCH, TAG_RATE
from recipes.nano.measure import (
    JUDGE_HZ,
    Clip,
    Figure,
    confusable,
    error_rate,
    for_judges,
    held_out,
    median_f0,
)
from recipes.nano.texts import NUMBER_LANGUAGES

LORA_TEXTS = 40


def talker_figures(args: argparse.Namespace) -> Iterator[Figure]:
    m = higgs_lab.load(args.model, adapter=args.adapter, device="cpu")
    recognizer = load_recognizer("nano", "cpu")
    clips = held_out("en", args.clips // 2, 4)
    spoken = m.speak([clip.text for clip in clips], seed=list(range(len(clips))))
    waves = [wav for wav, _ in spoken]
    yield Figure("talker", "WER, no reference", error_rate(recognizer, waves, clips, "word"), 0.08)
    failed = [info.stop_reason != "eoc" or info.seconds < 0.3 for _, info in spoken]
    yield Figure("talker", "runaway or empty", float(np.mean(failed)), 0.01)
    rates = []
    for language in NUMBER_LANGUAGES:
        numbers = held_out(language, args.clips // 10, 4)
        waves = [
            wav for wav, _ in m.speak([c.text for c in numbers], seed=list(range(len(numbers))))
        ]
        rates.append(error_rate(recognizer, waves, numbers, "char"))
    yield Figure("talker", f"macro CER of numbers, {len(rates)} languages", float(np.mean(rates)))
    yield from clone_figures(m, recognizer, clips)
    yield from tag_figures(m, clips)


def clone_figures(m, recognizer, clips: list[Clip]) -> Iterator[Figure]:
    """Clones of voices never trained on; rivals are voices of the same sex and near in pitch."""
    encoder = load_encoder("nano", "cpu")
    references = held_out("en", len(clips), 5)
    f0 = {ref.voice: median_f0([ref.wav]) for ref in references}
    vectors = {ref.voice: encoder.embed(for_judges(ref.wav)) for ref in references}
    for said, name in ((True, "with transcript"), (False, "without")):
        cloned = m.speak(
            [clip.text for clip in clips],
            ref_audio=[ref.wav for ref in references],
            ref_text=[ref.text if said else None for ref in references],
            seed=list(range(len(clips))),
        )
        nearer = []
        for (wav, _), ref in zip(cloned, references, strict=True):
            if len(wav) < JUDGE_HZ // 5:
                nearer.append(0.0)
                continue
            own = encoder.embed(for_judges(wav))
            right = cosine(own, encoder.embed(for_judges(ref.wav)))
            rivals = [v for v in vectors if confusable(ref.voice, v, f0)]
            nearer += [float(right > cosine(own, vectors[v])) for v in rivals]
        rate = error_rate(recognizer, [wav for wav, _ in cloned], clips, "word")
        yield Figure("talker", f"WER of clones, {name}", rate)
        share = float(np.mean(nearer))
        yield Figure("talker", f"right voice nearer, {name}", share, 0.8, at_least=True)


def tag_figures(m, clips: list[Clip]) -> Iterator[Figure]:
    """The same texts and seeds under opposite tags."""

    def said(tag: str) -> list[np.ndarray]:
        texts = [tag + clip.text for clip in clips]
        return [wav for wav, _ in m.speak(texts, seed=list(range(len(texts))))]

    slow, fast = (said(tag) for tag in TAG_RATE)
    ratio = [len(a) / max(1, len(b)) for a, b in zip(slow, fast, strict=True)]
    yield Figure("talker", "duration, slow / fast", float(np.median(ratio)), 1.3, at_least=True)
    low, high = (said(tag) for tag in TAG_PITCH)
    apart = [12 * np.log2(median_f0([b]) / median_f0([a])) for a, b in zip(low, high, strict=True)]
    semitones = float(np.nanmedian(apart))
    yield Figure("talker", "semitones, high - low", semitones, 2.0, at_least=True)


def lora_figures(args: argparse.Namespace) -> Iterator[Figure]:
    """`make demo` on the voice held out from all parts, and what it found."""
    from recipes.demo import main as demo

    with tempfile.TemporaryDirectory() as folder:
        out = Path(args.demo or folder)
        demo(["--out", str(out), "--model", args.model, "--tests", str(LORA_TEXTS)])
        comparisons = json.loads((out / "eval" / "before_after.json").read_text())["comparisons"]
        for label, found in zip(("with reference", "without"), comparisons, strict=False):
            sim, error = (found["metrics"][name]["overall"] for name in ("sim_target", "error"))
            low = sim["low"]
            yield Figure("lora", f"similarity gained, {label}", sim["value"])
            yield Figure("lora", f"the interval's lower end, {label}", low, 0.0, at_least=True)
            yield Figure("lora", f"WER added, {label}", error["value"], 0.03)
        for name in ("before", "after", "alone"):
            summary = json.loads((out / "eval" / name / "summary.json").read_text())
            for metric, measure in (("sim_target", "similarity"), ("error", "WER")):
                yield Figure("lora", f"{measure}, {name}", summary["overall"][metric]["value"])
