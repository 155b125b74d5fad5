"""What the nano family reaches on held-out voices and sentences: every figure of its model card.

    python -m recipes.nano.evaluate                        # judges, codec, talker, a fine-tune
    python -m recipes.nano.evaluate --parts whisper ecapa  # a part alone

All speech is made here by espeak-ng from voices and texts that no part was trained on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from eval.asr import load_recognizer
from eval.speaker import cosine, load_encoder
from higgs_lab.audio import read_audio
from higgs_lab.manifest import read_manifest
from higgs_lab.runlog import Progress
from recipes.nano.evaluate_talker import lora_figures, talker_figures
from recipes.nano.measure import (
    JUDGE_HZ,
    Figure,
    confusable,
    equal_error_rate,
    error_rate,
    errors,
    for_judges,
    held_out,
    median_f0,
)
from recipes.nano.texts import LANGUAGES, NUMBER_LANGUAGES
from recipes.nano.voices import all_voices


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
    if args.recordings:
        yield from recordings_figures(args.recordings, encoder)


def recordings_figures(manifest: Path, encoder) -> Iterator[Figure]:
    """People's voices, which the encoder has never met: reported, not promised."""
    rows = read_manifest(manifest)
    vectors = [encoder.embed(read_audio(row.audio, JUDGE_HZ)) for row in rows]
    pairs = [(i, j) for i in range(len(rows)) for j in range(i)]
    for same, name in ((True, "within"), (False, "between")):
        found = [
            cosine(vectors[i], vectors[j])
            for i, j in pairs
            if (rows[i].speaker == rows[j].speaker) == same
        ]
        if found:
            measure = f"similarity {name} real speakers, {len(found)} pairs"
            yield Figure("ecapa", measure, float(np.mean(found)))


def codec_figures(args: argparse.Namespace) -> Iterator[Figure]:
    import torch

    from higgs_lab.checkpoint import resolve_checkpoint
    from higgs_lab.codec import Codec

    codec = Codec.from_pretrained(resolve_checkpoint(args.model).path)
    recognizer, encoder = load_recognizer("nano", "cpu"), load_encoder("nano", "cpu")
    clips = held_out("en", args.clips, 3)
    codes = [codec.encode(clip.wav) for clip in clips]
    again = codec.decode_batch(codes)
    before, words = errors(recognizer, [clip.wav for clip in clips], clips, "word")
    after, _ = errors(recognizer, again, clips, "word")
    added, voice = after - before, np.array([clip.voice for clip in clips])
    yield Figure("codec", "WER added by a round trip", added.sum() / words.sum(), 0.02)
    worst = max(sorted(set(voice)), key=lambda name: added[voice == name].sum())
    rest = voice != worst
    measure = f"the same without the voice that loses most ({worst})"
    yield Figure("codec", measure, added[rest].sum() / words[rest].sum())
    used = [
        len(torch.cat(codes)[:, k].unique()) / codec.model.config.codebook_size for k in range(8)
    ]
    # a few clips cannot use them all
    enough = sum(map(len, codes)) >= 4 * codec.model.config.codebook_size
    aim = 0.5 if enough else None
    yield Figure("codec", "codes in use, least used codebook", min(used), aim, at_least=True)
    first = [encoder.embed(for_judges(clip.wav)) for clip in clips]
    second = [encoder.embed(for_judges(wav)) for wav in again]
    own = [cosine(a, b) for a, b in zip(first, second, strict=True)]
    voices = sorted({clip.voice for clip in clips})
    f0 = {name: median_f0([c.wav for c in clips if c.voice == name]) for name in voices}
    rivals = [
        (i, cosine(second[i], first[j]))
        for i, a in enumerate(clips)
        for j, b in enumerate(clips)
        if confusable(a.voice, b.voice, f0)
    ]
    others = [similarity for _, similarity in rivals]
    yield Figure("codec", "similarity to the original", float(np.mean(own)))
    yield Figure("codec", "similarity to confusable voices", float(np.mean(others)))
    clearly = float(np.mean(np.array(own) > np.quantile(others, 0.95)))
    yield Figure("codec", "original above 95 % of those", clearly)
    nearer = float(np.mean([own[i] > similarity for i, similarity in rivals]))
    yield Figure("codec", "right voice nearer: what a clone can reach", nearer)


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Figure]]] = {
    "whisper": whisper_figures,
    "ecapa": ecapa_figures,
    "codec": codec_figures,
    "talker": talker_figures,
    "lora": lora_figures,
}


def main(argv: list[str] | None = None) -> list[Figure]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--model", default="nano", help="checkpoint of the codec and the talker")
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--recordings", type=Path, help="a manifest of people's voices, for ecapa")
    parser.add_argument("--demo", type=Path, help="folder of a demo, for lora; kept and resumed")
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
