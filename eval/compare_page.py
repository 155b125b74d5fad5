"""compare.html: two or more runs side by side, and the clips on which they differ most."""

from __future__ import annotations

from pathlib import Path

from eval import compare, report, table
from eval.clips import Sounds, diff, rate, similarity
from eval.page import facts, write_page
from eval.paired import METRICS, pairs_of
from eval.runs import read_scores, read_summary

DIFFERENT_CLIPS = 30
DIFFERENT_VOICES = 8


def write_comparison(path: str | Path, result: dict, wanted: float = 0.01) -> None:
    """The page of `compare.compare`'s result. wanted: the difference in error to be shown."""
    path = Path(path)
    runs = [read_summary(run["path"]) for run in result["runs"]]
    names = [run["name"] for run in result["runs"]]
    sets = [sides(read_scores(result["runs"][0]["path"]), read_scores(run["path"]))
            for run in result["runs"]]  # fmt: skip
    shared = [key for key in sets[0] if all(key in one for one in sets)]
    clips = [[one[key] for one in sets] for key in shared]
    sounds = Sounds(path)
    folders = [Path(run["path"]) for run in result["runs"]]

    def card(clip: list[dict]) -> dict:
        return _card(clip, names, folders, sounds)

    apart = most_different(clips, rate, DIFFERENT_CLIPS)
    voices = [c for c in most_different(clips, similarity, DIFFERENT_VOICES) if c not in apart]
    write_page(
        path,
        "compare.html.j2",
        title=" and ".join(run["system"] for run in result["runs"]),
        result=result,
        runs=[_run(one, summary) for one, summary in zip(result["runs"], runs, strict=True)],
        setting=report.setting(runs[0]),
        comparisons=[_comparison(c, wanted) for c in result["comparisons"]],
        settings={
            name: compare.settings_apart(runs[0]["config"], summary["config"])
            for name, summary in zip(names[1:], runs[1:], strict=True)
        },
        wanted=wanted,
        total=len(clips),
        clips=[card(clip) for clip in apart],
        voices=[card(clip) for clip in voices],
        facts=[(name, facts(summary)) for name, summary in zip(names, runs, strict=True)],
    )


def sides(a: list[dict], b: list[dict]) -> dict[tuple, dict]:
    """B's clips by row and take, of the run that has several."""
    return {(one["id"], max(one["take"], two["take"])): two for one, two in pairs_of(a, b)}


def most_different(clips: list[list[dict]], measure, count: int) -> list[list[dict]]:
    """Clips whose measure differs most between runs; those that do not differ are left out."""

    def spread(clip: list[dict]) -> float:
        values = [value for score in clip if (value := measure(score)) is not None]
        return max(values) - min(values) if len(values) > 1 else 0.0

    found = sorted((clip for clip in clips if spread(clip) > 0), key=spread, reverse=True)
    return found[:count]


def _card(clip: list[dict], names: list[str], folders: list[Path], sounds: Sounds) -> dict:
    shown = [
        {
            "name": name,
            "rate": rate(score),
            "similarity": similarity(score),
            "failure": score["failure"],
            "error": score["error"],
            "diff": diff(score["reference"], score["hypothesis"], score["unit"]),
            "sound": sounds.clip(folder, score["audio"]),
        }
        for name, score, folder in zip(names, clip, folders, strict=True)
    ]
    rates = [side["rate"] for side in shown]
    best = [n for n, r in zip(names, rates, strict=True) if r is not None and r == min(
        x for x in rates if x is not None)]  # fmt: skip
    first = clip[0]
    return {
        "id": first["id"], "take": clip[-1]["take"], "language": first["language"],
        "unit": first["unit"], "text": first["text"], "kind": f"{' and '.join(best)} better",
        "sides": shown,
    }  # fmt: skip


def _run(run: dict, summary: dict) -> dict:
    """A row of the table of runs."""
    overall = summary["overall"]
    cells = [
        table.percent(overall["error"]),
        table.interval(overall["error"]),
        table.Cell(str(overall["failed"]), overall["failed"]),
        table.percent(overall["error_valid"]),
        *(table.number(overall[key] and overall[key]["value"], "{:.3f}")
          for key in ("sim_target", "sim_ref")),
        table.number(overall.get("rtf_median"), "{:.2f}"),
        table.Cell(str(overall["clips"]), overall["clips"]),
    ]  # fmt: skip
    return run | {"cells": [cell.text for cell in cells], "date": summary["provenance"].get("time")}


def _comparison(comparison: dict, wanted: float) -> dict:
    """Tables by metric: rows by language with the text and the bar of each difference."""
    name, tables = comparison["name"], []
    for metric, found in comparison["metrics"].items():
        entries = dict(found["languages"])
        if len(entries) > 1:
            entries = {"overall": found["overall"]} | entries
        end = _axis(entries.values())
        needed = compare.advice(found, wanted) if metric == "error" else {}
        rows = {
            code: compare.cells(metric, entry)
            | {
                "entry": entry,
                "verdict": compare.verdict(metric, entry, name),
                "bar": _bar(entry, end, metric),
                "needed": needed.get(code),
            }
            for code, entry in entries.items()
        }
        scale = 100 if METRICS[metric].counts else 1
        tables.append({"metric": metric, "title": METRICS[metric].title, "rows": rows,
                       "end": f"{scale * end:g}", "advice": bool(needed)})  # fmt: skip
    return {"name": name, "tables": tables}


def _axis(entries) -> float:
    ends = [abs(e[key]) for e in entries for key in ("low", "high", "value") if e[key] is not None]
    largest = max(ends, default=1.0)
    steps = (step * 10.0**power for power in range(-2, 4) for step in (1, 2, 5))
    return next((end for end in steps if largest <= end), largest)


def _bar(entry: dict, end: float, metric: str) -> dict:
    """Positions on an axis from -end to end, in per cent, and which way it points."""

    def at(value: float) -> float:
        return round(50 + 50 * max(-1.0, min(1.0, value / end)), 2)

    ends = (entry["value"],) * 2 if entry["low"] is None else (entry["low"], entry["high"])
    said = compare.verdict(metric, entry).rpartition(" ")[2]
    return {
        "low": at(ends[0]),
        "width": round(at(ends[1]) - at(ends[0]), 2),
        "at": at(entry["value"]),
        "kind": said if said in ("better", "worse") else "same",
    }
