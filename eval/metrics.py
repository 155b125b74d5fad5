"""One clip's score, and the summary of many. Nothing here loads a model.

A clip that failed to speak (missing, empty, silent, runaway, loop) has all its words wrong in the
headline, whatever the recogniser made of it: leaving such clips out would reward silence. The rate
over the clips that did speak stands beside it as `error_valid`.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval import stats
from eval.languages import language
from eval.normalize import has_digits, normalize
from higgs_lab.tags import strip_tags
from higgs_lab.text import speech_units

METRICS_VERSION = "1"

FAILURES = ("missing", "empty", "silent", "runaway", "loop")
EMPTY_SEC = 0.2  # shorter clips hold no word
SILENCE_DBFS = -50.0  # a 20 ms frame below this level is silence
ACTIVE_SEC = 0.2  # less than this above the level, and the clip is silent
RUNAWAY_FACTOR = 3.0  # times the expected duration
LOOP_REPEATS = 4  # of the same words in a row, beyond those of the reference
LOOP_MAX_UNITS = 20  # longest block looked at
NO_SPEECH = 0.6  # Whisper's own thresholds, used to flag, never to drop
REPETITIVE = 2.4  # text length over its zlib-compressed length

SEC_PER_UNIT = 1 / 15  # plain reading of one of higgs_lab.text's units, a Latin letter


@dataclass(frozen=True)
class Errors:
    """An alignment's counts. units = hits + substitutions + deletions."""

    hits: int
    substitutions: int
    deletions: int
    insertions: int

    @property
    def units(self) -> int:
        return self.hits + self.substitutions + self.deletions

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions


@dataclass(frozen=True)
class AudioFacts:
    """What a waveform says about itself."""

    seconds: float
    active_sec: float  # time in frames above SILENCE_DBFS
    leading_sec: float  # silence before the first such frame; all of it in a silent clip
    trailing_sec: float
    loudness_dbfs: float | None  # RMS of the active frames; None in a silent clip
    clipped_share: float  # samples at full scale

    @property
    def spoken_sec(self) -> float:
        """From the first sound to the last."""
        return max(0.0, self.seconds - self.leading_sec - self.trailing_sec)


def word_errors(reference: str, hypothesis: str) -> Errors:
    """Word alignment by jiwer, of strings that are already normalised. Raises on no reference."""
    import jiwer

    _check_reference(reference)
    out = jiwer.process_words(reference, hypothesis)
    return Errors(out.hits, out.substitutions, out.deletions, out.insertions)


def char_errors(reference: str, hypothesis: str) -> Errors:
    """Character alignment by jiwer (spaces are characters), of strings already normalised."""
    import jiwer

    _check_reference(reference)
    out = jiwer.process_characters(reference, hypothesis)
    return Errors(out.hits, out.substitutions, out.deletions, out.insertions)


def without_spaces(text: str, lang: str) -> str:
    """Drop spaces where they do not separate words, so that they are not scored."""
    return text.replace(" ", "") if language(lang).unit == "char" else text


def audio_facts(wav: np.ndarray, sample_rate_hz: int) -> AudioFacts:
    """Durations, level and clipping of a mono waveform [n] in [-1, 1]."""
    wav = np.asarray(wav, dtype=np.float32)
    seconds = len(wav) / sample_rate_hz
    frame = max(1, round(0.02 * sample_rate_hz))
    padded = np.pad(wav, (0, -len(wav) % frame)).reshape(-1, frame).astype(np.float64)
    power = (padded**2).mean(axis=1)
    active = np.flatnonzero(power > 10 ** (SILENCE_DBFS / 10))
    if len(active) == 0:
        return AudioFacts(seconds, 0.0, seconds, 0.0, None, 0.0)
    first, last = active[0] * frame, min(len(wav), (active[-1] + 1) * frame)
    return AudioFacts(
        seconds=seconds,
        active_sec=len(active) * frame / sample_rate_hz,
        leading_sec=first / sample_rate_hz,
        trailing_sec=(len(wav) - last) / sample_rate_hz,
        loudness_dbfs=float(10 * np.log10(power[active].mean())),
        clipped_share=float((np.abs(wav) >= 0.999).mean()),
    )


def expected_sec(text: str) -> float:
    """Rough duration of a text in plain reading, with a second for pauses."""
    return 1.0 + SEC_PER_UNIT * speech_units(text)


def loops(hypothesis: Sequence[str], reference: Sequence[str]) -> bool:
    """Whether some block of units repeats over and over where the reference's does not."""
    for size in range(1, min(LOOP_MAX_UNITS, len(hypothesis) // LOOP_REPEATS) + 1):
        repeats = _most_repeats(hypothesis, size)
        if repeats >= LOOP_REPEATS and repeats - _most_repeats(reference, size) >= LOOP_REPEATS - 1:
            return True
    return False


def score_clip(
    text: str,
    hypothesis: str | None,
    lang: str,
    *,
    normalizer: str = "fair",
    audio: AudioFacts | None,
    human: AudioFacts | None = None,
    hit_cap: bool = False,
    transcript: dict | None = None,
) -> dict:
    """Everything about one clip that needs no model, with the evidence kept.

    text: what was to be spoken, control tags included (they are stripped here).
    hypothesis: what the recogniser wrote, "" if there was nothing to hear; None if there is no
        recogniser for the language.
    audio: facts of the clip, None if there is no clip; human: facts of the human recording.
    hit_cap: generation stopped at its length cap instead of at an end token.
    transcript: the recogniser's no_speech_prob and compression_ratio, for flags.

    The keys `units`, `errors`, `chars`, `char_errors` are the headline (failures count as all
    wrong); substitutions, deletions and insertions are as heard. Without a recogniser these are
    None. Raises ValueError if the text has no words left after normalising.
    """
    reference = normalize(strip_tags(text), lang, normalizer)
    if not reference:
        raise ValueError(
            f"no words are left of {text!r} after normalising by {normalizer}: take the row out "
            "of the set"
        )
    unit = language(lang).unit
    limit_sec = RUNAWAY_FACTOR * max(expected_sec(text), human.seconds if human else 0)
    failure = None
    if audio is None:
        failure = "missing"
    elif audio.seconds < EMPTY_SEC:
        failure = "empty"
    elif audio.active_sec < ACTIVE_SEC:
        failure = "silent"
    elif hit_cap or audio.seconds > limit_sec:
        failure = "runaway"
    score: dict = {"unit": unit, "reference": reference, "failure": failure}
    score |= dict.fromkeys(("hypothesis", "units", "errors", "chars", "char_errors"))
    score |= dict.fromkeys(("substitutions", "deletions", "insertions"))
    if hypothesis is not None:
        heard = normalize(hypothesis, lang, normalizer)
        score["hypothesis"] = heard
        compact = without_spaces(reference, lang), without_spaces(heard, lang)
        by_char = char_errors(*compact)
        by_unit = word_errors(reference, heard) if unit == "word" else by_char
        split = str.split if unit == "word" else list
        if failure is None and loops(split(compact[1]), split(compact[0])):
            failure = score["failure"] = "loop"
        score |= {
            "units": by_unit.units,
            "errors": by_unit.units if failure else by_unit.errors,
            "chars": by_char.units,
            "char_errors": by_char.units if failure else by_char.errors,
            "substitutions": by_unit.substitutions,
            "deletions": by_unit.deletions,
            "insertions": by_unit.insertions,
        }
    score["flags"] = _flags(reference, score["hypothesis"], transcript or {}, audio)
    if audio is not None:
        score |= {"seconds": audio.seconds, "spoken_sec": audio.spoken_sec}
        score["leading_sec"], score["trailing_sec"] = audio.leading_sec, audio.trailing_sec
        score["loudness_dbfs"] = audio.loudness_dbfs
        if audio.spoken_sec > 0:
            score["letters_per_sec"] = len(reference.replace(" ", "")) / audio.spoken_sec
            if human and human.spoken_sec > 0:
                score["duration_ratio"] = audio.spoken_sec / human.spoken_sec
    return score


def summarise(scores: Sequence[dict], seed: int = 0) -> dict:
    """Summary of scored clips: one block per language and one over all.

    Each score is `score_clip`'s dict plus `language`, and optionally `sim_ref`, `sim_target`
    (cosines) and `rtf`. Over several languages the headline is the mean of their rates (macro).

    Raises ValueError for an empty set.
    """
    if not scores:
        raise ValueError("no clips to summarise: the set is empty")
    by_language: dict[str, list[dict]] = {}
    for score in scores:
        by_language.setdefault(score["language"], []).append(score)
    blocks = {code: _block(rows, code, seed) for code, rows in sorted(by_language.items())}
    overall = _block(list(scores), "all", seed)
    if len(blocks) > 1:
        overall["unit"] = "mixed"
        for name, *columns in _RATES:
            groups = {
                code: _columns(rows, *columns)
                for code, rows in sorted(by_language.items())
                if _columns(rows, *columns)[0]
            }
            overall[name] = stats.macro(groups, seed).as_dict() if groups else None
    return {"overall": overall, "languages": blocks}


# name, numerator, denominator, whether only clips without failure count
_RATES = (
    ("error", "errors", "units", False),
    ("error_valid", "errors", "units", True),
    ("cer", "char_errors", "chars", False),
    ("cer_valid", "char_errors", "chars", True),
)


def _block(rows: list[dict], label: str, seed: int) -> dict:
    failures = Counter(row["failure"] for row in rows if row["failure"])
    judged = [row for row in rows if row.get("units")]
    valid = [row for row in judged if not row["failure"]]
    block: dict = {
        "clips": len(rows),
        "texts": len({_cluster(row) for row in rows}),
        "judged": len(judged),
        "unit": rows[0]["unit"],
        "failed": sum(failures.values()),
        "failures": {name: failures.get(name, 0) for name in FAILURES},
        "flags": dict(Counter(flag for row in rows for flag in row["flags"])),
    }
    for name, *columns in _RATES:
        numerators, denominators, clusters = _columns(rows, *columns)
        block[name] = (
            stats.ratio(numerators, denominators, clusters, label, seed).as_dict()
            if numerators
            else None
        )
    units = sum(row["units"] for row in valid)
    for kind in ("substitutions", "deletions", "insertions"):
        block[kind] = sum(row[kind] for row in valid) / units if units else None
    rates = [row["errors"] / row["units"] for row in judged]
    capped = [min(1.0, rate) for rate in rates]
    block["utterance_mean_capped"] = statistics.fmean(capped) if capped else None
    block["utterance_median"] = statistics.median(rates) if rates else None
    block["utterances_over_half"] = sum(r > 0.5 for r in rates) / len(rates) if rates else None
    for name in ("sim_ref", "sim_target"):
        having = [row for row in rows if row.get(name) is not None]
        block[name] = None
        if having:
            values, clusters = [row[name] for row in having], [_cluster(row) for row in having]
            block[name] = stats.mean(values, clusters, label, seed).as_dict() | {"n": len(having)}
    for name in ("duration_ratio", "letters_per_sec", "rtf"):
        values = [row[name] for row in rows if row.get(name) is not None]
        block[f"{name}_median"] = statistics.median(values) if values else None
    return block


def _columns(rows: list[dict], numerator: str, denominator: str, valid_only: bool) -> tuple:
    kept = [r for r in rows if r.get("units") and not (valid_only and r["failure"])]
    clusters = [_cluster(row) for row in kept]
    return [row[numerator] for row in kept], [row[denominator] for row in kept], clusters


def _cluster(row: dict) -> tuple[str, str]:
    return row["language"], row["reference"]


def _flags(reference: str, heard: str | None, transcript: dict, audio: AudioFacts | None) -> list:
    flags = []
    if has_digits(reference) or has_digits(heard or ""):
        flags.append("digits")
    if (transcript.get("no_speech_prob") or 0) > NO_SPEECH:
        flags.append("no_speech")
    if (transcript.get("compression_ratio") or 0) > REPETITIVE:
        flags.append("repetitive")
    if transcript.get("cut"):
        flags.append("transcript_cut")
    if audio is not None and audio.clipped_share > 0.001:
        flags.append("clipped")
    return flags


def _most_repeats(units: Sequence[str], size: int) -> int:
    """Most repeats in a row of any block of `size` units."""
    most = 1 if len(units) >= size else 0
    run = 0
    for i in range(size, len(units)):
        run = run + 1 if units[i] == units[i - size] else 0
        most = max(most, run // size + 1)
    return most


def _check_reference(reference: str) -> None:
    if not reference.strip():
        raise ValueError("the reference is empty: an error rate needs words to be wrong about")
