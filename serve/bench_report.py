"""Figures of a load, their intervals, two servers side by side, table and plot: serve.bench's other
half.

Percentiles are nearest-rank over the requests that were answered; the failed ones are counted
beside them. Intervals are 95 %: of percentiles by bootstrap over requests, of throughput by batch
means over ten slices of time (requests of one load wait for each other, slices much less so).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import t as student

from higgs_lab.runlog import atomic_path
from serve.load import Load, play

DRAWS, SLICES = 2000, 10
PERCENTILES = (50, 95, 99)


def percentile(values: np.ndarray, percent: float) -> np.ndarray:
    """The smallest value that at least `percent` of them do not exceed, along the last axis."""
    return np.percentile(values, percent, axis=-1, method="inverted_cdf")


def interval(draws: np.ndarray) -> list[float | None]:
    low, high = np.percentile(draws, (2.5, 97.5))
    return [float(low), float(high)]


def resampled(count: int, seed: int = 0) -> np.ndarray:
    """Indices [DRAWS, count] of bootstrap samples."""
    return np.random.default_rng(seed).integers(0, count, (DRAWS, count))


def delivered(load: Load) -> np.ndarray:
    """Seconds of sound that arrived per second, in each of SLICES equal parts of the load."""
    pieces = [piece for take in load.takes for piece in take.arrivals]
    end = load.end_sec or max((at for at, _ in pieces), default=0.0)
    if not end:
        return np.zeros(SLICES)
    times, seconds = np.array(pieces or [(0.0, 0.0)]).T
    sums, _ = np.histogram(times, bins=SLICES, range=(0.0, end), weights=seconds)
    return sums * SLICES / end


def values_of(load: Load, delay_sec: float = 0.0) -> dict[str, dict[int, float]]:
    """figure -> {request number: value} of the requests that were answered."""
    answered = [take for take in load.takes if not take.error]
    found = {
        name: {take.number: getattr(take, name) for take in answered}
        for name in ("first_audio_sec", "total_sec", "real_time_factor")
    }
    heard = {take.number: play(take.arrivals, delay_sec) for take in answered}
    found["needed_delay_sec"] = {n: one.needed_sec for n, one in heard.items()}
    found["underruns"] = {n: float(one.underruns) for n, one in heard.items()}
    return found


def summarise(load: Load, delay_sec: float) -> dict:
    """All figures of a load; `delay_sec` is how long the player waits after the first piece."""
    failed = Counter(take.error for take in load.takes if take.error)
    rates = delivered(load)
    half = float(student.ppf(0.975, SLICES - 1) * rates.std(ddof=1) / math.sqrt(SLICES))
    mean = float(rates.mean())
    found: dict = {
        "requests": len(load.takes),
        "failed": sum(failed.values()),
        "failures": dict(failed.most_common(10)),
        "audio_sec": sum(take.audio_sec for take in load.takes),
        "audio_sec_per_sec": {"value": mean, "low": max(0.0, mean - half), "high": mean + half},
        # the client behind its own schedule: near zero, or the client is the limit
        "client_lag_sec": max((take.sent - take.due for take in load.takes), default=0.0),
    }
    values = values_of(load, delay_sec)
    underruns = np.array(list(values.pop("underruns").values()))
    found["underrun_share"] = float((underruns > 0).mean()) if len(underruns) else None
    found["underruns"] = int(underruns.sum())
    for name, by_number in values.items():
        one = np.array(list(by_number.values()))
        if len(one):
            draws = one[resampled(len(one))]
            found[name] = {
                f"p{p}": {"value": float(percentile(one, p))}
                | dict(zip(("low", "high"), interval(percentile(draws, p)), strict=True))
                for p in PERCENTILES
            }
    return found


def compare(first: Load, second: Load) -> dict[str, dict]:
    """Second over first as ratios with intervals; requests are paired by number (same text, same
    seed), so that what differs is the server."""
    found = {}
    one, two = values_of(first), values_of(second)
    for name in ("first_audio_sec", "real_time_factor"):
        both = sorted(one[name].keys() & two[name].keys())
        if not both:
            continue
        pair = np.array([[values[name][n] for n in both] for values in (one, two)])
        drawn = pair[:, resampled(len(both))]
        for p in (50, 95):
            a, b = percentile(pair, p)
            draws = percentile(drawn[1], p) / percentile(drawn[0], p)
            found[f"{name} p{p}"] = _ratio(float(b / a), draws)
    a, b = delivered(first), delivered(second)
    with np.errstate(divide="ignore", invalid="ignore"):
        draws = b[resampled(SLICES, 1)].mean(axis=1) / a[resampled(SLICES, 2)].mean(axis=1)
    if a.mean() > 0 and np.isfinite(draws).all():
        found["audio_sec_per_sec"] = _ratio(float(b.mean() / a.mean()), draws)
    return found


def _ratio(value: float, draws: np.ndarray) -> dict:
    low, high = interval(draws)
    return {"ratio": value, "low": low, "high": high, "differs": not low <= 1 <= high}


def table(levels: Sequence[dict]) -> str:
    """One line a server and load; levels are {"server", "load", "summary", ...}."""
    head = ["server", "load", "requests", "failed", "audio s/s"]
    head += ["first audio p50/p95/p99, s", "RTF p50/p95/p99", "underruns", "delay needed p95, s"]
    rows = [head]
    for level in levels:
        s = level["summary"]
        rate = s["audio_sec_per_sec"]
        share = s["underrun_share"]
        rows.append([
            level["server"], level["load"], str(s["requests"]), str(s["failed"]),
            f"{rate['value']:.2f} ({rate['low']:.2f}-{rate['high']:.2f})",
            _percentiles(s, "first_audio_sec"), _percentiles(s, "real_time_factor"),
            "-" if share is None else f"{share:.0%}",
            f"{s['needed_delay_sec']['p95']['value']:.2f}" if "needed_delay_sec" in s else "-",
        ])  # fmt: skip
    return aligned(rows)


def comparison_table(comparisons: Sequence[dict]) -> str:
    rows = [["load", "figure", "ratio", "95 % interval", ""]]
    for one in comparisons:
        for figure, r in one["figures"].items():
            verdict = f"{one['second']} differs" if r["differs"] else "no difference seen"
            span = f"{r['low']:.2f}-{r['high']:.2f}"
            rows.append([one["load"], figure, f"{r['ratio']:.2f}", span, verdict])
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _percentiles(summary: dict, name: str) -> str:
    if name not in summary:
        return "-"
    return " / ".join(f"{summary[name][f'p{p}']['value']:.2f}" for p in PERCENTILES)


def plot(levels: Sequence[dict], path: Path) -> None:
    """Four figures against load, a row for closed loops and one for open loops."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = [k for k in ("closed", "open") if any(level["kind"] == k for level in levels)]
    figure, axes = plt.subplots(
        len(kinds), 4, figsize=(18, 4 * len(kinds)), squeeze=False, layout="constrained"
    )
    for row, kind in zip(axes, kinds, strict=True):
        names = list(dict.fromkeys(level["server"] for level in levels))
        for color, name in zip(plt.rcParams["axes.prop_cycle"].by_key()["color"] * 9, names):  # noqa: B905
            own = [level for level in levels if (level["server"], level["kind"]) == (name, kind)]
            _lines(row, sorted(own, key=lambda level: level["value"]), name, color)
        label = {"closed": "requests at a time", "open": "requests a second"}[kind]
        for axis, title in zip(row, ("first audio, s", "RTF", "audio s/s", "with underruns"),
                               strict=True):  # fmt: skip
            axis.set(xlabel=label, title=title, ylim=(0, None))
            axis.grid(alpha=0.3)
            axis.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100)
    plt.close(figure)


def _lines(row, levels: Sequence[dict], name: str, color: str) -> None:
    for axis, figure in zip(row[:2], ("first_audio_sec", "real_time_factor"), strict=True):
        for p, style in ((50, "-"), (95, "--")):
            found = [
                (level["value"], level["summary"][figure][f"p{p}"])
                for level in levels
                if figure in level["summary"]
            ]
            _bars(axis, found, f"{name} p{p}", color, style)
    rates = [(level["value"], level["summary"]["audio_sec_per_sec"]) for level in levels]
    _bars(row[2], rates, name, color, "-")
    shares = [(level["value"], level["summary"]["underrun_share"]) for level in levels]
    known = [(x, y) for x, y in shares if y is not None]
    row[3].plot(*zip(*known, strict=True), color=color, marker="o", label=name) if known else None


def _bars(axis, points: Sequence[tuple[float, dict]], label: str, color: str, style: str) -> None:
    """A line with its intervals."""
    if points:
        x, y, low, high = zip(*[(x, e["value"], e["low"], e["high"]) for x, e in points],
                              strict=True)  # fmt: skip
        down, up = np.maximum(np.subtract(y, low), 0), np.maximum(np.subtract(high, y), 0)
        axis.errorbar(
            x, y, yerr=[down, up], color=color, ls=style, marker="o", capsize=3, label=label
        )
