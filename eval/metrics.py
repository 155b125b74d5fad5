"""One clip's score, and the summary of many. Nothing here loads a model.

A clip that failed (missing, empty, silent, runaway, loop, wrong language) has all its words wrong
in the headline, whatever the recogniser made of it: leaving such clips out would reward silence.
The rate over the clips that did speak stands beside it as `error_valid`.
"""

from __future__ import annotations

import copy
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from eval import stats
from eval.acoustics import AudioFacts
from eval.languages import language
from eval.normalize import error_unit, has_digits, normalize
from eval.protocols import PROTOCOLS, published_rate
from higgs_lab.tags import strip_tags
from higgs_lab.text import speech_units

METRICS_VERSION = "3"

FAILURES = ("missing", "empty", "silent", "runaway", "loop", "wrong_language")
EMPTY_SEC = 0.2  # shorter clips hold no word
ACTIVE_SEC = 0.2  # less than this above the level, and the clip is silent
RUNAWAY_FACTOR = 3.0  # times the expected duration
LOOP_REPEATS = 4  # of the same words in a row, beyond those of the reference
LOOP_MAX_UNITS = 20  # longest block looked at
# The recogniser takes the sound for another language, is sure of it, and could not make out half of
# the words. Each alone is not enough: sister languages (id and ms, hr and bs) are guessed as one
# another where every word was understood.
GUESS_SURE, GUESS_UNLIKELY, WRONG_LANGUAGE_ERROR = 0.8, 0.05, 0.5
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


def expected_sec(text: str) -> float:
    """Rough duration of a text in plain reading, with a second for pauses."""
    return 1.0 + SEC_PER_UNIT * speech_units(text)


def runaway_sec(text: str, human: AudioFacts | None) -> float:
    """Duration above which a clip of this text is a runaway."""
    return RUNAWAY_FACTOR * max(expected_sec(text), human.seconds if human else 0)


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
    no_baseline: bool = False,
) -> dict:
    """Everything about one clip that needs no model, with the evidence kept.

    text: what was to be spoken, control tags included (they are stripped here).
    hypothesis: what the recogniser wrote, "" if there was nothing to hear; None if there is no
        recogniser for the language.
    audio: facts of the clip, None if there is no clip; human: facts of the human recording.
    hit_cap: generation stopped at its length cap instead of at an end token.
    transcript: what else the recogniser said: guessed language, no_speech_prob, and so on.
    no_baseline: the system is a baseline that does not claim this language: neither good nor bad.

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
    unit, transcript = error_unit(lang, normalizer), transcript or {}
    failure = None
    if no_baseline:
        audio = hypothesis = None
    elif audio is None:
        failure = "missing"
    elif audio.seconds < EMPTY_SEC:
        failure = "empty"
    elif audio.active_sec < ACTIVE_SEC:
        failure = "silent"
    elif hit_cap or audio.seconds > runaway_sec(text, human):
        failure = "runaway"
    score: dict = {"unit": unit, "reference": reference, "failure": failure}
    score |= {"no_baseline": no_baseline, "guessed": transcript.get("guessed")}
    score |= dict.fromkeys(("hypothesis", "units", "errors", "chars", "char_errors"))
    score |= dict.fromkeys(("substitutions", "deletions", "insertions"))
    if hypothesis is not None:
        heard = normalize(hypothesis, lang, normalizer, heard=True)
        score["hypothesis"] = heard
        compact = reference, heard
        if normalizer not in PROTOCOLS:  # those have dropped the spaces that they do not count
            compact = without_spaces(reference, lang), without_spaces(heard, lang)
        by_char = char_errors(*compact)
        by_unit = word_errors(reference, heard) if unit == "word" else by_char
        # By words wherever there are any, whatever a protocol counts: blocks of letters are short.
        split = str.split if language(lang).unit == "word" else _not_digits
        if failure is None and loops(split(compact[1]), split(compact[0])):
            failure = "loop"
        elif failure is None and _other_language(transcript, lang):
            if by_unit.errors >= WRONG_LANGUAGE_ERROR * by_unit.units:
                failure = "wrong_language"
        score["failure"] = failure
        score |= {
            "units": by_unit.units,
            "errors": by_unit.units if failure else by_unit.errors,
            "chars": by_char.units,
            "char_errors": by_char.units if failure else by_char.errors,
            "substitutions": by_unit.substitutions,
            "deletions": by_unit.deletions,
            "insertions": by_unit.insertions,
        }
    score["failed"] = None if no_baseline else int(failure is not None)
    score["flags"] = _flags(reference, score["hypothesis"], transcript, lang, audio)
    return score | _sound(reference, audio, human)


def summarise(scores: Sequence[dict], seed: int = 0, normalizer: str = "fair") -> dict:
    """Summary of scored clips: one block per language and one over all.

    Each score is `score_clip`'s dict plus `language`, and optionally `sim_ref`, `sim_target`
    (cosines) and `rtf`. Over several languages error rates and similarities are the means of the
    languages' (macro); counts and medians are of all clips. `error_by_take` of `overall` is the
    error of each take (seed) by itself, None if there is one.
    Where `normalizer` is a protocol, `published` is the rate as its own script would average it.

    Raises ValueError for an empty set.
    """
    if not scores:
        raise ValueError("no clips to summarise: the set is empty")
    by_language: dict[str, list[dict]] = {}
    for score in scores:
        by_language.setdefault(score["language"], []).append(score)
    blocks = {code: _block(rows, code, seed) for code, rows in sorted(by_language.items())}
    if len(blocks) == 1:  # the same figures, to the last digit of an interval
        overall = copy.deepcopy(*blocks.values())
    else:
        overall = _block(list(scores), "all", seed, estimates=False) | {"unit": "mixed"}
        for name, *columns in _RATES:
            groups = {
                code: _columns(rows, *columns)
                for code, rows in sorted(by_language.items())
                if _columns(rows, *columns)[0]
            }
            overall[name] = stats.macro(groups, seed).as_dict() if groups else None
        for name in _SIMILARITIES:
            groups = {code: _values(rows, name) for code, rows in sorted(by_language.items())}
            if groups := {code: values for code, values in groups.items() if values[0]}:
                count = sum(len(values[0]) for values in groups.values())
                overall[name] = stats.macro(groups, seed).as_dict() | {"n": count}
    overall["error_by_take"] = _by_take(by_language)
    _add_published(overall, blocks, by_language, normalizer)
    return {"overall": overall, "languages": blocks}


def _by_take(by_language: dict[str, list[dict]]) -> list[float] | None:
    """Mean error over languages of each take alone: how much one seed says."""
    takes = sorted({row.get("take", 0) for rows in by_language.values() for row in rows})
    rates: dict[int, list[float]] = {take: [] for take in takes}
    for rows in by_language.values():
        for take in takes:
            judged = [r for r in rows if r.get("units") and r.get("take", 0) == take]
            if judged:
                units = sum(row["units"] for row in judged)
                rates[take].append(sum(row["errors"] for row in judged) / units)
    found = [statistics.fmean(values) for values in rates.values() if values]
    return found if len(found) > 1 else None


def _values(rows: list[dict], name: str) -> tuple:
    """Numerators, denominators and texts of a mean over clips."""
    having = [row for row in rows if row.get(name) is not None]
    return [row[name] for row in having], [1.0] * len(having), [_cluster(row) for row in having]


def _add_published(overall: dict, blocks: dict, by_language: dict, normalizer: str) -> None:
    """A protocol's own rate of each language, and their mean over languages."""
    for code, rows in by_language.items():
        is_protocol = normalizer in PROTOCOLS
        blocks[code]["published"] = published_rate(rows, normalizer) if is_protocol else None
    rates = [block["published"] for block in blocks.values() if block["published"]]
    overall["published"] = None
    if rates:
        mean = statistics.fmean(rate["value"] for rate in rates)
        counts = {key: sum(rate[key] for rate in rates) for key in ("clips", "left_out")}
        overall["published"] = {"value": mean, "average": rates[0]["average"]} | counts


# Of each the median over the clips that have one.
SOUND_MEASURES = (
    "duration_ratio",
    "letters_per_sec",
    "f0_hz",
    "f0_spread_st",
    "loudness_lufs",
    "leading_sec",
    "trailing_sec",
    "rtf",
)
_SIMILARITIES = ("sim_ref", "sim_target")
# name, numerator, denominator, whether only clips without failure count
_RATES = (
    ("error", "errors", "units", False),
    ("error_valid", "errors", "units", True),
    ("cer", "char_errors", "chars", False),
    ("cer_valid", "char_errors", "chars", True),
)


def _block(rows: list[dict], label: str, seed: int, estimates: bool = True) -> dict:
    """Counts, medians and, if asked for, rates and similarities with intervals of these clips."""
    failures = Counter(row["failure"] for row in rows if row["failure"])
    judged = [row for row in rows if row.get("units")]
    valid = [row for row in judged if not row["failure"]]
    block: dict = {
        "clips": len(rows),
        "texts": len({_cluster(row) for row in rows}),
        "judged": len(judged),
        "language_guessed": sum(row.get("guessed") is not None for row in judged),
        "no_baseline": sum(row.get("no_baseline", False) for row in rows),
        "unit": rows[0]["unit"],
        "failed": sum(failures.values()),
        "failures": {name: failures.get(name, 0) for name in FAILURES},
        "flags": dict(Counter(flag for row in rows for flag in row["flags"])),
    }
    for name, *columns in _RATES:
        numerators, denominators, clusters = _columns(rows, *columns)
        block[name] = (
            stats.ratio(numerators, denominators, clusters, label, seed).as_dict()
            if numerators and estimates
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
    for name in _SIMILARITIES:
        values = _values(rows, name)
        block[name] = None
        if values[0] and estimates:
            cosines, _, clusters = values
            block[name] = stats.mean(cosines, clusters, label, seed).as_dict() | {"n": len(cosines)}
    for name in SOUND_MEASURES:
        values = [row[name] for row in rows if row.get(name) is not None]
        block[f"{name}_median"] = statistics.median(values) if values else None
    return block


def _columns(rows: list[dict], numerator: str, denominator: str, valid_only: bool) -> tuple:
    kept = [r for r in rows if r.get("units") and not (valid_only and r["failure"])]
    clusters = [_cluster(row) for row in kept]
    return [row[numerator] for row in kept], [row[denominator] for row in kept], clusters


def _cluster(row: dict) -> tuple[str, str]:
    return row["language"], row["reference"]


def _sound(reference: str, audio: AudioFacts | None, human: AudioFacts | None) -> dict:
    """Measures of the waveform; those of a clip without speech are left out."""
    if audio is None:
        return {}
    sound: dict = {"seconds": audio.seconds, "spoken_sec": audio.spoken_sec}
    for name in ("leading_sec", "trailing_sec", "loudness_lufs", "clipped_share", "f0_hz",
                 "f0_spread_st"):  # fmt: skip
        sound[name] = getattr(audio, name)
    if audio.active_sec >= ACTIVE_SEC:  # a click has no speaking rate
        sound["letters_per_sec"] = len(reference.replace(" ", "")) / audio.spoken_sec
        if human and human.spoken_sec > 0:
            sound["duration_ratio"] = audio.spoken_sec / human.spoken_sec
    return sound


def _not_digits(text: str) -> list[str]:
    """Characters that a loop is made of: the zeros of "1000000" are none."""
    return [char for char in text if not char.isdigit()]


def _other_language(transcript: dict, lang: str) -> bool:
    """Whether the recogniser is sure to hear a language that it was not asked for."""
    guessed = transcript.get("guessed")
    return (
        guessed is not None
        and guessed not in (lang, language(lang).code)
        and (transcript.get("guessed_prob") or 0) >= GUESS_SURE
        and (transcript.get("expected_prob") or 0) <= GUESS_UNLIKELY
    )


def _flags(
    reference: str, heard: str | None, transcript: dict, lang: str, audio: AudioFacts | None
) -> list[str]:
    flags = []
    if transcript.get("error"):
        flags.append("recogniser_error")
    if _other_language(transcript, lang):
        flags.append("other_language")
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
