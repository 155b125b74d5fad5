"""Intervals and tests. The unit that is drawn is the *text*, not the clip.

Clips of one text (several seeds, voices) fail together, so drawing clips one by one would make
intervals too narrow. All rates here are ratios of sums (errors over words), re-computed in each
draw; a mean is the same thing with a count of one per clip. Intervals are BCa bootstrap intervals
(Efron 1987): with few errors the plain percentiles end too low and miss the truth too often.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.special import ndtr, ndtri

DRAWS = 2000
SWAPS = 20_000  # of a permutation test, at most: p can become 0.05 after Holm over 400 languages
FAR_ENOUGH = 20  # swaps as extreme as the data, and p is known well enough
LEVEL = 0.95
_CHUNK = 1_000_000  # rows drawn at once; bounds memory at about 40 MB


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
    numerator, denominator = _redrawn(sums, label, seed, draws).T
    return numerator / np.where(denominator == 0, np.nan, denominator)


def _redrawn(sums: np.ndarray, label: str, seed: int, draws: int) -> np.ndarray:
    """Column sums of as many rows as there are, drawn with replacement: [C, n] -> [draws, n]."""
    rng = np.random.default_rng([seed, zlib.crc32(label.encode())])
    count = len(sums)
    parts = []
    for size in _chunks(draws, count):
        rows = rng.integers(0, count, size=(size, count)) + count * np.arange(size)[:, None]
        times = np.bincount(rows.ravel(), minlength=size * count).reshape(size, count)
        parts.append(times.astype(np.float64) @ sums)
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
    value = float(_ratio(sums.sum(0)))
    if len(names) > 1 and not sums[:, 0].any():
        return Estimate(value, 0.0, _none_seen([sums]), len(names))
    return _estimate(value, ratio_draws(sums, label, seed, draws), _influence(sums), len(names))


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
    sums = {
        name: cluster_sums(list(zip(numerators, denominators, strict=True)), clusters)[0]
        for name, (numerators, denominators, clusters) in groups.items()
    }
    value = float(np.mean([_ratio(one.sum(0)) for one in sums.values()]))
    texts = sum(map(len, sums.values()))
    if texts <= len(groups):  # one text a language says nothing about spread
        return Estimate(value, None, None, texts)
    if not any(one[:, 0].any() for one in sums.values()):
        return Estimate(value, 0.0, _none_seen(list(sums.values())), texts)
    drawn = np.mean([ratio_draws(one, name, seed, draws) for name, one in sums.items()], axis=0)
    influence = np.concatenate([_influence(one) for one in sums.values()]) / len(sums)
    return _estimate(value, drawn, influence, texts)


def paired_difference(
    a: np.ndarray,
    b: np.ndarray,
    label: str = "",
    seed: int = 0,
    draws: int = DRAWS,
    counts: bool = False,
) -> Difference:
    """Difference B - A of two ratios over the same clusters.

    a, b: [C, 2] sums (numerator, denominator); row i of both is the same text. The interval is a
    bootstrap that draws each text for both runs at once; p is a permutation test that swaps the
    two runs text by text (with the +1 of Phipson and Smyth 2010, so it is never 0).
    counts: the numerators are counts of errors, so that no text with a difference is no proof of
        none (see `ratio`).
    """
    return paired_macro({label: (a, b)}, seed, draws, counts)


def paired_macro(
    groups: dict[str, tuple[np.ndarray, np.ndarray]],
    seed: int = 0,
    draws: int = DRAWS,
    counts: bool = False,
) -> Difference:
    """Mean over groups (languages) of each group's paired difference B - A.

    groups: name -> (a, b) as `paired_difference` takes them; each is drawn and swapped by itself.
    """
    if not groups:
        raise ValueError("no languages to compare: the runs have no clip in common")
    values, drawn, influence, texts = [], [], [], 0
    for name, (a, b) in groups.items():
        if a.shape != b.shape:
            raise ValueError(f"the two runs have different texts: shapes {a.shape} and {b.shape}")
        values.append(_ratio(b.sum(0)) - _ratio(a.sum(0)))
        drawn.append(_paired_draws(a, b, name, seed, draws))
        influence.append((_influence(b) - _influence(a)) / len(groups))
        texts += len(a)
    value = float(np.mean(values))
    if texts <= len(groups):  # one text a language says nothing about spread
        return Difference(value, None, None, 1.0, texts)
    if counts and all(np.array_equal(a, b) for a, b in groups.values()):
        edge = _none_seen([b for _, b in groups.values()])
        return Difference(0.0, -edge, edge, 1.0, texts)
    estimate = _estimate(value, np.mean(drawn, axis=0), np.concatenate(influence), texts)
    return Difference(value, estimate.low, estimate.high, _p_value(groups, value, seed), texts)


def _paired_draws(a: np.ndarray, b: np.ndarray, label: str, seed: int, draws: int) -> np.ndarray:
    """B - A of texts drawn anew, each for both runs: [draws]."""
    drawn = _redrawn(np.concatenate([a, b], axis=1), label, seed, draws)
    return _ratio(drawn[:, 2:].T) - _ratio(drawn[:, :2].T)


def _p_value(groups: dict[str, tuple[np.ndarray, np.ndarray]], value: float, seed: int) -> float:
    """Share of random swaps of the two runs, text by text, that part them as far as `value`.

    In rounds, until it is clear that p is not small: a p-value that is to survive a correction for
    a hundred languages needs many swaps, one of 0.5 does not.
    """
    rngs = {n: np.random.default_rng([seed, zlib.crc32(n.encode()), 1]) for n in groups}
    as_far = done = 0
    while done < SWAPS and as_far < FAR_ENOUGH:
        parted = []
        for name, (a, b) in groups.items():
            means = []
            for size in _chunks(SWAPS // 10, len(a)):
                bits = np.frombuffer(rngs[name].bytes(-(-size * len(a) // 8)), dtype=np.uint8)
                swap = np.unpackbits(bits, count=size * len(a)).reshape(size, len(a))
                moved = swap.astype(np.float64) @ (b - a)
                means.append(_ratio((b.sum(0) - moved).T) - _ratio((a.sum(0) + moved).T))
            parted.append(np.concatenate(means))
        as_far += int(np.sum(np.abs(np.mean(parted, axis=0)) >= abs(value) - 1e-12))
        done += SWAPS // 10
    return (as_far + 1) / (done + 1)


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


def _estimate(value: float, draws: np.ndarray, influence: np.ndarray, texts: int) -> Estimate:
    """BCa interval: percentiles moved by the draws' bias and by the skewness of the texts' weight.

    draws: [draws]; influence: [C], what each text adds to the value.
    """
    if texts < 2:
        return Estimate(value, None, None, texts)
    draws = draws[~np.isnan(draws)]
    slack = 1e-12 * max(1.0, abs(value))
    below = (np.mean(draws < value - slack) + np.mean(draws <= value + slack)) / 2
    edge = 1 / (len(draws) + 1)
    bias = ndtri(np.clip(below, edge, 1 - edge))
    spread = np.sum(influence**2)
    skew = np.sum(influence**3) / (6 * spread**1.5) if spread > slack**2 else 0.0
    normal = bias + ndtri(np.array([1 - LEVEL, 1 + LEVEL]) / 2)
    low, high = np.quantile(draws, ndtr(bias + normal / (1 - skew * normal)))
    return Estimate(value, float(min(low, value)), float(max(high, value)), texts)


def _influence(sums: np.ndarray) -> np.ndarray:
    """What leaving out each cluster takes from the ratio of sums: [C, 2] -> [C], mean zero."""
    if len(sums) < 2:
        return np.zeros(len(sums))
    without = _ratio((sums.sum(0) - sums).T)
    without = np.where(np.isnan(without), _ratio(sums.sum(0)), without)
    return without.mean() - without


def _none_seen(groups: list[np.ndarray]) -> float:
    """Upper end of the interval where no error was seen at all: drawing zeros again proves nothing.

    The rule of three, exact and over texts: so many of them could have had one error and, in one
    case of forty, all of ours still none.
    """
    texts = sum(len(sums) for sums in groups)
    faulty = 1 - ((1 - LEVEL) / 2) ** (1 / texts)
    return float(faulty * np.mean([len(sums) / sums[:, 1].sum() for sums in groups]))


def _ratio(sums: np.ndarray) -> np.ndarray:
    """numerator / denominator of sums [2] or [2, draws]; NaN where nothing was drawn."""
    numerator, denominator = sums
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.divide(numerator, denominator)


def _chunks(draws: int, count: int) -> list[int]:
    size = max(1, min(draws, _CHUNK // count))
    return [size] * (draws // size) + ([draws % size] if draws % size else [])
