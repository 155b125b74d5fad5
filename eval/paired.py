"""Scores of two runs on the same texts, clip beside clip, and what differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

import numpy as np

from eval import stats


@dataclass(frozen=True)
class Measure:
    """A sum over a sum of two fields of scores.jsonl; without a denominator a mean over clips."""

    title: str
    numerator: str
    denominator: str | None = None
    better: int = 0  # sign of an improvement; 0: neither more nor less is better in itself
    counts: bool = False  # of errors, shown in per cent (see stats.ratio)
    form: str = "{:.3f}"


# "mean" in a title: eval.run's table shows the same of each clip as a median over clips.
METRICS: dict[str, Measure] = {
    "error": Measure("error %", "errors", "units", -1, True, "{:.2f}"),
    "cer": Measure("CER %", "char_errors", "chars", -1, True, "{:.2f}"),
    "failed": Measure("failed %", "failed", None, -1, True, "{:.2f}"),
    "sim_target": Measure("SIM to speaker", "sim_target", better=1),
    "sim_ref": Measure("SIM to reference", "sim_ref", better=1),
    "duration_ratio": Measure("mean duration ratio", "duration_ratio"),
    "letters_per_sec": Measure("mean letters/s", "letters_per_sec", form="{:.2f}"),
    "f0_hz": Measure("mean F0 Hz", "f0_hz", form="{:.1f}"),
    "f0_spread_st": Measure("mean F0 spread st", "f0_spread_st", form="{:.2f}"),
    "loudness_lufs": Measure("mean loudness LUFS", "loudness_lufs", form="{:.1f}"),
    "leading_sec": Measure("mean silence before s", "leading_sec"),
    "trailing_sec": Measure("mean silence after s", "trailing_sec"),
}
Pair = tuple[dict, dict]


def pairs_of(a: Sequence[dict], b: Sequence[dict]) -> list[Pair]:
    """Clips of B beside A's of the same row and take; a run's only take stands beside them all."""
    one_of_a, one_of_b = (len({row["take"] for row in rows}) == 1 for rows in (a, b))
    if one_of_a:  # the human row has one take, whatever the system gave
        by_id = {row["id"]: row for row in a}
        return [(by_id[row["id"]], row) for row in b if row["id"] in by_id]
    if one_of_b:
        return [(one, two) for two, one in pairs_of(b, a)]
    of_a = {(row["id"], row["take"]): row for row in a}
    return [(of_a[key], row) for row in b if (key := (row["id"], row["take"])) in of_a]


def paired_differences(pairs: Sequence[Pair], metric: str, seed: int = 0) -> dict | None:
    """B - A of a metric: {"languages": {code: entry}, "overall": entry of the mean over languages}.

    An entry holds a and b (each run's figure on these clips), value, low, high, p, texts, and
    texts_apart, on which the runs differ at all. Clips for which one of the runs has no value are
    left out; None if all are.
    """
    sums, by_language = {}, {}
    for pair in pairs:
        by_language.setdefault(pair[1]["language"], []).append(pair)
    for code in sorted(by_language):
        both = _sums(by_language[code], metric)
        if both is not None:
            sums[code] = both
    if not sums:
        return None
    counts = METRICS[metric].counts
    languages = {}
    for code, both in sums.items():
        a, b = (float(side[:, 0].sum() / side[:, 1].sum()) for side in both)
        found = stats.paired_difference(*both, code, seed, counts=counts)
        apart = int(np.any(both[0] != both[1], axis=1).sum())
        languages[code] = {"a": a, "b": b} | asdict(found) | {"texts_apart": apart}
    means = {side: fmean(entry[side] for entry in languages.values()) for side in "ab"}
    means["texts_apart"] = sum(entry["texts_apart"] for entry in languages.values())
    return {
        "languages": languages,
        "overall": means | asdict(stats.paired_macro(sums, seed, counts=counts)),
    }


def _sums(pairs: Sequence[Pair], metric: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Sums [C, 2] of both runs over the same texts."""
    numerator, denominator = METRICS[metric].numerator, METRICS[metric].denominator
    pairs = [pair for pair in pairs if all(row.get(numerator) is not None for row in pair)]
    if not pairs:
        return None
    texts = [two["reference"] for _, two in pairs]
    a, b = (
        stats.cluster_sums(
            [[row[numerator], row[denominator] if denominator else 1.0] for row in side], texts
        )[0]
        for side in zip(*pairs, strict=True)
    )
    return a, b
