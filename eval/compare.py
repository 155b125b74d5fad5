"""Is run B better than run A? Paired by text, with intervals, corrected for many languages.

    python -m eval.compare runs/a/eval runs/b/eval --out compare.html
    python -m eval.compare runs/base/eval runs/*/eval     # several, each against the first

Differences are B minus A: below zero is fewer errors. Runs whose set, recogniser, normaliser or
metrics differ are refused, since the difference would be theirs.
"""

from __future__ import annotations

import argparse
import json
import string
import sys
from pathlib import Path

from eval import stats
from eval.paired import METRICS, paired_differences, pairs_of
from eval.runs import differences, read_scores, read_summary
from eval.table import bounds, signed
from higgs_lab.runlog import write_json_atomic

ALPHA = 0.05
FEW = 6  # languages that get a line each
# What must be equal, or the difference would be that of the measuring.
_SAME = ("set.revision", "asr.revision", "asr.precision", "asr.options", "normalizer", "metrics",
         "encoder.revision")  # fmt: skip


def compare(*runs: str | Path, seed: int = 0) -> dict:
    """Paired differences of finished runs to the first of them, per language and over all.

    Returns {"runs": [...], "notes": [...], "comparisons": [{"name": "B", "metrics": {metric:
    {"languages": {code: entry}, "overall": entry}}}]}, entries as `paired_differences` gives them
    with p_holm, the p-value adjusted over the languages and runs compared, and the verdict.

    Raises ValueError, naming the field, for runs that cannot be compared.
    """
    if not 2 <= len(runs) <= len(string.ascii_uppercase):
        raise ValueError(f"{len(runs)} runs given: two are needed, at least")
    names = string.ascii_uppercase[: len(runs)]
    summaries = [read_summary(run) for run in runs]
    configs = [summary["config"] for summary in summaries]
    metrics, notes = list(METRICS), []
    if not configs[0]["encoder"]:
        metrics = [name for name in metrics if not name.startswith("sim_")]
    for name, run, config in zip(names[1:], runs[1:], configs[1:], strict=True):
        _check_comparable(configs[0], config, runs[0], run)
        if _value(configs[0], "set.references") != _value(config, "set.references"):
            notes.append(f"{name} had other references than A: similarity to them is left out")
            metrics = [metric for metric in metrics if metric != "sim_ref"]
        if _value(configs[0], "set.recordings") != _value(config, "set.recordings"):
            notes.append(
                f"{name} had other recordings of the speakers than A: what is measured against "
                "them (similarity to speaker, duration ratio) is left out"
            )
            metrics = [m for m in metrics if m not in ("sim_target", "duration_ratio")]
        for key in ("seed", "takes"):
            if configs[0][key] != config[key]:
                notes.append(f"{key}: {configs[0][key]} in A, {config[key]} in {name}")
    scores = [read_scores(run) for run in runs]
    comparisons = []
    for name, theirs in zip(names[1:], scores[1:], strict=True):
        pairs = pairs_of(scores[0], theirs)
        found = {metric: paired_differences(pairs, metric, seed) for metric in metrics}
        comparisons.append({"name": name, "metrics": {m: f for m, f in found.items() if f}})
    _adjust(comparisons)
    described = [
        {"name": name, "path": str(run), "system": summary["config"]["system"]["name"]}
        for name, run, summary in zip(names, runs, summaries, strict=True)
    ]
    return {"runs": described, "notes": notes, "comparisons": comparisons}


def _adjust(comparisons: list[dict]) -> None:
    """Holm's correction over all languages and runs of a metric, over the runs for the means; and
    what is to be said then."""
    for metric in METRICS:
        found = {c["name"]: c["metrics"][metric] for c in comparisons if metric in c["metrics"]}
        entries = {(n, code): e for n, f in found.items() for code, e in f["languages"].items()}
        means = {name: entry["overall"] for name, entry in found.items()}
        for family in (entries, means):
            adjusted = stats.holm({key: entry["p"] for key, entry in family.items()})
            for key, entry in family.items():
                entry["p_holm"] = adjusted[key]
                # However far apart the runs are, swapping k texts gives no smaller p than this.
                entry["p_least"] = min(1.0, len(family) * 2.0 ** (1 - entry["texts_apart"]))
                name = key if isinstance(key, str) else key[0]
                entry["verdict"] = verdict(metric, entry, name)


def _check_comparable(one: dict, two: dict, run_one: str | Path, run_two: str | Path) -> None:
    """Raise where the measuring differs."""
    for name in _SAME:
        if _value(one, name) != _value(two, name):
            raise ValueError(
                f"{run_one} and {run_two} cannot be compared: {name} is {_value(one, name)!r} in "
                f"the first and {_value(two, name)!r} in the second; run one of them again with "
                "the other's"
            )


def _value(config: dict, name: str):
    for part in name.split("."):
        config = (config or {}).get(part)
    return config


def settings_apart(one: dict, two: dict) -> list[tuple[str, object, object]]:
    """What the two systems were run with, where it differs, names included."""
    systems = [(config["system"].get("name"), config) for config in (one, two)]
    names = (
        [("system.name", *(name for name, _ in systems))] if systems[0][0] != systems[1][0] else []
    )
    return names + differences(one, two)


def verdict(metric: str, entry: dict, name: str = "B") -> str:
    """In words, at 5 % for all languages and runs together."""
    if entry["low"] is None:
        return "one text"
    if entry["low"] <= 0 <= entry["high"]:
        return "no difference shown"
    if entry["p_holm"] >= ALPHA:
        return "too few texts" if entry["p_least"] >= ALPHA else "no difference shown"
    change = entry["value"] * METRICS[metric].better
    if change == 0:
        return f"{name} is {'higher' if entry['value'] > 0 else 'lower'}"
    return f"{name} is {'better' if change > 0 else 'worse'}"


def advice(found: dict, wanted: float = 0.01) -> dict[str, int]:
    """Texts needed to show a difference of `wanted`, by language, where these are too few.

    found: the error's {"languages": ...} of one comparison.
    """
    needed = {}
    for code, entry in found["languages"].items():
        if entry["low"] is None or not entry["low"] <= 0 <= entry["high"]:
            continue
        half_width = (entry["high"] - entry["low"]) / 2
        if half_width > wanted:
            needed[code] = stats.texts_needed(half_width, entry["texts"], wanted)
    return needed


def advice_lines(comparison: dict, wanted: float = 0.01) -> list[str]:
    """`advice` in words: a line per language, or one for many."""
    found = comparison["metrics"].get("error")
    needed = advice(found, wanted) if found else {}
    if len(needed) > FEW:
        most = sorted(needed, key=needed.__getitem__, reverse=True)
        listed = ", ".join(f"{code} {needed[code]}" for code in most[:FEW])
        return [
            f"{comparison['name']}: too few texts to show {100 * wanted:g} points of difference "
            f"in {len(needed)} languages; needed are {listed}, fewer in the others"
        ]
    lines = []
    for code, texts in needed.items():
        entry = found["languages"][code]
        half_width = 100 * (entry["high"] - entry["low"]) / 2
        lines.append(
            f"{comparison['name']}, {code}: {entry['texts']} texts tell differences of about "
            f"{half_width:.1f} points apart; for {100 * wanted:g} about {texts} are needed"
        )
    return lines


def cells(metric: str, entry: dict) -> dict[str, str]:
    """An entry as text: a, b, value, interval, p."""
    scale, form = 100 if METRICS[metric].counts else 1, METRICS[metric].form
    signs = form.replace(":", ":+")
    interval = "–" if entry["low"] is None else bounds(entry, signs, scale)
    return {
        "a": signed(scale * entry["a"], form),
        "b": signed(scale * entry["b"], form),
        "value": signed(scale * entry["value"], signs),
        "interval": interval,
        "p": f"{p:.4f}" if (p := entry["p_holm"]) >= 1e-4 else "<0.0001",
    }


def print_comparison(result: dict, wanted: float = 0.01) -> None:
    """A table for each run compared with A: every language's error, and what else differs."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    for run in result["runs"]:
        console.print(f"{run['name']}  {run['system']}  ({run['path']})", highlight=False)
    for comparison in result["comparisons"]:
        name, metrics = comparison["name"], comparison["metrics"]
        heads = ["language", "measure", "texts", "A", name, f"{name} − A", "interval", "p (Holm)",
                 "verdict"]  # fmt: skip
        # What a narrow terminal does without; the page and --json have it.
        left_out = {3, 4} if console.width < 105 else set()
        left_out |= {2, 7} if console.width < 80 else set()
        table = Table(title=f"{name} − A, 95 % intervals", title_justify="left")
        for number, head in enumerate(heads):
            if number not in left_out:
                table.add_column(head, justify="left" if number < 2 else "right")

        def add(code: str, metric: str, entry: dict, said: str) -> None:
            row = (code, *_row(metric, entry, said))  # noqa: B023
            table.add_row(*(c for n, c in enumerate(row) if n not in left_out))  # noqa: B023

        codes = sorted({code for found in metrics.values() for code in found["languages"]})
        for code in codes:
            for metric, found in metrics.items():
                entry = found["languages"].get(code)
                if entry is None:
                    continue
                said = verdict(metric, entry, name)
                shown = METRICS[metric].better and said.startswith(name)
                if len(codes) == 1 or metric == "error" or shown:
                    add(code, metric, entry, said)
        if len(codes) > 1:
            table.add_section()
            for metric, found in metrics.items():
                entry = found["overall"]
                said = verdict(metric, entry, name)
                add("mean", metric, entry, said)
        console.print(table)
    for note in result["notes"]:
        console.print(f"note: {note}", highlight=False)
    for comparison in result["comparisons"]:
        for line in advice_lines(comparison, wanted):
            console.print(line, highlight=False)


def _row(metric: str, entry: dict, said: str) -> tuple[str, ...]:
    text = cells(metric, entry)
    return (METRICS[metric].title, str(entry["texts"]), text["a"], text["b"], text["value"],
            text["interval"], text["p"], said)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m eval.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="FOLDER", help="output folders of eval.run; the first is A")
    add("--seed", type=int, default=0, help="of the bootstrap")
    add("--difference", type=float, default=1.0, metavar="POINTS",
        help="of error that should be seen: says how many texts that takes")  # fmt: skip
    add("--out", help="write a page with players to this file, such as compare.html")
    add("--json", help="write the differences to this file, too")
    args = parser.parse_args(argv)
    wanted = args.difference / 100
    try:
        if wanted <= 0:
            raise ValueError(f"--difference {args.difference:g}: must be above 0 points")
        result = compare(*args.runs, seed=args.seed)
        if args.json:
            write_json_atomic(args.json, result)
        if args.out:
            from eval.compare_page import write_comparison

            write_comparison(args.out, result, wanted)
    except (ValueError, OSError, json.JSONDecodeError) as error:
        sys.exit(f"eval.compare: {error}")
    print_comparison(result, wanted)
    if args.out:
        print(f"page: {args.out}")


if __name__ == "__main__":
    main()
