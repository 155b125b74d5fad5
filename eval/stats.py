"""Intervals and tests. The unit that is drawn is the *text*, not the clip.

Clips of one text (several seeds, voices) fail together, so drawing clips one by one would make
intervals too narrow. All rates here are ratios of sums (errors over words), re-computed in each
draw; a mean is the same thing with a count of one per clip.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

DRAWS = 2000
LEVEL = 0.95
_CHUNK = 4_000_000  # weights drawn at once; bounds memory at about 32 MB


@dataclass(frozen=True)
class Estimate:
    """A rate or mean with its 95 % interval; low and high are None below two texts."""

    value: float
    low: float | None
    high: float | None
    texts: int  # clusters drawn from

    def as_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Difference:
    """B minus A on the same texts, with its 95 % interval and a two-sided p-value."""

    value: float
    low: float | None
    high: float | None
    p: float
    texts: int


def cluster_sums(
    values: Sequence[Sequence[float]], clusters: Sequence[Hashable]
) -> tuple[np.ndarray, list[Hashable]]:
    """Sum columns of `values` [n, columns] within each cluster -> ([C, columns], cluster names).

    Clusters are in order of first appearance, so the same data give the same draws.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0:
        raise ValueError("no clips to summarise: the set is empty")
    if len(values) != len(clusters):
        raise ValueError(f"{len(values)} rows of values but {len(clusters)} cluster names")
    names = list(dict.fromkeys(clusters))
    index = {name: i for i, name in enumerate(names)}
    sums = np.zeros((len(names), values.shape[1]))
    np.add.at(sums, [index[cluster] for cluster in clusters], values)
    return sums, names


def ratio_draws(sums: np.ndarray, label: str = "", seed: int = 0, draws: int = DRAWS) -> np.ndarray:
    """Bootstrap of sum(numerator) / sum(denominator) over clusters: sums [C, 2] -> [draws].

    label: separates the random streams of, say, two languages, so that a macro mean over
    languages draws them independently.
    """
    rng = np.random.default_rng([seed, zlib.crc32(label.encode())])
    count = len(sums)
    share = np.full(count, 1 / count)
    parts = []
    for size in _chunks(draws, count):
        weights = rng.multinomial(count, share, size=size)  # [size, C] times each text is drawn
        numerator, denominator = (weights @ sums).T
        parts.append(numerator / np.where(denominator == 0, np.nan, denominator))
    return np.concatenate(parts)


def ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    clusters: Sequence[Hashable],
    label: str = "",
    seed: int = 0,
    draws: int = DRAWS,
) -> Estimate:
    """sum(numerators) / sum(denominators) with an interval clustered by text.

    Raises ValueError for an empty set or denominators that add up to zero.
    """
    sums, names = cluster_sums(list(zip(numerators, denominators, strict=True)), clusters)
    if sums[:, 1].sum() <= 0:
        raise ValueError("the denominators add up to zero: no words to be wrong about")
    value = float(sums[:, 0].sum() / sums[:, 1].sum())
    return _estimate(value, ratio_draws(sums, label, seed, draws), len(names))


def mean(
    values: Sequence[float], clusters: Sequence[Hashable], label: str = "", seed: int = 0
) -> Estimate:
    """Mean over clips with an interval clustered by text."""
    return ratio(values, [1.0] * len(values), clusters, label, seed)


def macro(
    groups: dict[str, tuple[Sequence[float], Sequence[float], Sequence[Hashable]]],
    seed: int = 0,
    draws: int = DRAWS,
) -> Estimate:
    """Mean over groups (languages) of each group's ratio; every group is drawn by itself.

    groups: name -> (numerators, denominators, clusters).
    """
    if not groups:
        raise ValueError("no languages to average over: the set is empty")
    values, drawn, texts = [], [], 0
    for name, (numerators, denominators, clusters) in groups.items():
        sums, names = cluster_sums(list(zip(numerators, denominators, strict=True)), clusters)
        values.append(sums[:, 0].sum() / sums[:, 1].sum())
        drawn.append(ratio_draws(sums, name, seed, draws))
        texts += len(names)
    enough = texts > len(groups)  # one text a language says nothing about spread
    return _estimate(float(np.mean(values)), np.mean(drawn, axis=0), texts if enough else 1)


def paired_difference(
    a: np.ndarray, b: np.ndarray, label: str = "", seed: int = 0, draws: int = DRAWS
) -> Difference:
    """Difference B - A of two ratios over the same clusters.

    a, b: [C, 2] sums (numerator, denominator); row i of both is the same text. The interval is a
    bootstrap that draws each text for both runs at once; p is a permutation test that swaps the
    two runs text by text (with the +1 of Phipson and Smyth 2010, so it is never 0).
    """
    if a.shape != b.shape:
        raise ValueError(f"the two runs have different texts: shapes {a.shape} and {b.shape}")
    count = len(a)
    value = _ratio(b.sum(0)) - _ratio(a.sum(0))
    rng = np.random.default_rng([seed, zlib.crc32(label.encode())])
    share = np.full(count, 1 / count)
    drawn, swapped = [], []
    for size in _chunks(draws, count):
        weights = rng.multinomial(count, share, size=size)
        drawn.append(_ratio((weights @ b).T) - _ratio((weights @ a).T))
        swap = rng.integers(0, 2, size=(size, count))
        moved = swap @ (b - a)
        swapped.append(_ratio((b.sum(0) - moved).T) - _ratio((a.sum(0) + moved).T))
    as_far = np.sum(np.abs(np.concatenate(swapped)) >= abs(value) - 1e-12)
    estimate = _estimate(value, np.concatenate(drawn), count)
    p = float((as_far + 1) / (draws + 1)) if count > 1 else 1.0
    return Difference(value, estimate.low, estimate.high, p, count)


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment: p-values that hold for the whole family (Holm 1979)."""
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def texts_needed(half_width: float, texts: int, wanted: float) -> int:
    """Texts for an interval of half-width `wanted`, given the half-width that `texts` gave."""
    if wanted <= 0:
        raise ValueError(f"the wanted half-width must be positive, not {wanted}")
    return max(2, math.ceil(texts * (half_width / wanted) ** 2))


def _estimate(value: float, draws: np.ndarray, texts: int) -> Estimate:
    if texts < 2:
        return Estimate(value, None, None, texts)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.nanpercentile(draws, [tail, 100 - tail])
    return Estimate(value, float(low), float(high), texts)


def _ratio(sums: np.ndarray) -> np.ndarray:
    """numerator / denominator of sums [2] or [2, draws]; NaN where nothing was drawn."""
    numerator, denominator = sums
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.divide(numerator, denominator)


def _chunks(draws: int, count: int) -> list[int]:
    size = max(1, min(draws, _CHUNK // count))
    return [size] * (draws // size) + ([draws % size] if draws % size else [])
