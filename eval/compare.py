"""Is run B better than run A? Paired by text, with intervals, corrected for many languages.

    python -m eval.compare runs/a/eval runs/b/eval

Differences are B minus A: below zero is fewer errors. Runs whose set, recogniser, normaliser or
metrics differ are refused, since the difference would be theirs.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from eval import report, stats
from higgs_lab.runlog import read_jsonl, write_json_atomic

ALPHA = 0.05


def compare(a: str | Path, b: str | Path, seed: int = 0) -> dict:
    """Paired differences of two finished runs, per language and over all.

    Returns {"a", "b", "languages": {code: {metric: {...}}}, "overall": {...}, "notes": [...]}.
    Raises ValueError, naming the field, for runs that cannot be compared.
    """
    configs = [report.read_summary(run)["config"] for run in (a, b)]
    notes = _check_comparable(configs, (a, b))
    scores = [
        {(row["id"], row["take"]): row for row in read_jsonl(Path(run) / "scores.jsonl")}
        for run in (a, b)
    ]
    metrics = [("error", "errors", "units"), ("cer", "char_errors", "chars")]
    same_encoder = _value(configs[0], "encoder.revision") == _value(configs[1], "encoder.revision")
    if same_encoder and configs[0]["encoder"]:
        metrics.append(("sim_target", "sim_target", None))
        if not any("references" in note for note in notes):
            metrics.append(("sim_ref", "sim_ref", None))
    languages = sorted({row["language"] for row in scores[0].values()})
    result = {"a": str(a), "b": str(b), "notes": notes, "languages": {}, "overall": {}}
    for name, numerator, denominator in metrics:
        differences = {}
        for code in languages:
            sums = _paired_sums(scores, code, numerator, denominator)
            if sums is not None:
                differences[code] = stats.paired_difference(*sums, label=code, seed=seed)
        adjusted = stats.holm({code: d.p for code, d in differences.items()})
        for code, difference in differences.items():
            entry = asdict(difference) | {"p_holm": adjusted[code]}
            result["languages"].setdefault(code, {})[name] = entry
        sums = _paired_sums(scores, None, numerator, denominator)
        if sums is not None:
            result["overall"][name] = asdict(stats.paired_difference(*sums, seed=seed))
    return result


def _paired_sums(scores: list[dict], code: str | None, numerator: str, denominator: str | None):
    """Sums [C, 2] of both runs over the same texts, of clips that both runs have a value for."""
    pairs = [
        (scores[0][key], scores[1][key])
        for key in scores[0]
        if key in scores[1] and (code is None or scores[0][key]["language"] == code)
    ]
    pairs = [p for p in pairs if all(row.get(numerator) is not None for row in p)]
    if not pairs:
        return None
    clusters = [(one["language"], one["reference"]) for one, _ in pairs]
    return [
        stats.cluster_sums(
            [[row[numerator], row[denominator] if denominator else 1.0] for row in side], clusters
        )[0]
        for side in zip(*pairs, strict=True)
    ]


def _check_comparable(configs: list[dict], runs: tuple) -> list[str]:
    """Raise where the measuring differs; notes where only the system's conditions do."""
    for name in ("set.revision", "asr.revision", "asr.precision", "asr.options", "normalizer",
                 "metrics", "encoder.revision"):  # fmt: skip
        one, two = (_value(config, name) for config in configs)
        if one != two:
            raise ValueError(
                f"{runs[0]} and {runs[1]} cannot be compared: {name} is {one!r} in the first and "
                f"{two!r} in the second; run one of them again with the other's"
            )
    notes = []
    if _value(configs[0], "set.references") != _value(configs[1], "set.references"):
        notes.append("the references given differ: similarity to them is left out")
    for name in ("seed", "takes"):
        if configs[0][name] != configs[1][name]:
            notes.append(f"{name}: {configs[0][name]} in A, {configs[1][name]} in B")
    return notes


def _value(config: dict, name: str):
    for part in name.split("."):
        config = (config or {}).get(part)
    return config


def print_comparison(result: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    table = Table(title=f"B - A, 95 % intervals\nA {result['a']}\nB {result['b']}")
    for column in ("language", "metric", "texts", "difference", "interval", "p (Holm)", "verdict"):
        table.add_column(column, justify="left" if column in ("language", "metric") else "right")
    for code, entries in result["languages"].items():
        for name, entry in entries.items():
            table.add_row(code, *_cells(name, entry, entry["p_holm"]))
    if len(result["languages"]) > 1:
        table.add_section()
        for name, entry in result["overall"].items():
            table.add_row("all, pooled", *_cells(name, entry, entry["p"]))
    console.print(table)
    for note in result["notes"]:
        console.print(f"note: {note}")
    for line in advice(result):
        console.print(line)


def advice(result: dict, wanted: float = 0.01) -> list[str]:
    """How many texts would show a difference of `wanted`, where these are too few."""
    lines = []
    for code, entries in result["languages"].items():
        entry = entries.get("error")
        if not entry or entry["low"] is None:
            continue
        half_width = (entry["high"] - entry["low"]) / 2
        if entry["low"] < 0 < entry["high"] and half_width > wanted:
            needed = stats.texts_needed(half_width, entry["texts"], wanted)
            lines.append(
                f"{code}: {entry['texts']} texts tell differences of about {100 * half_width:.1f} "
                f"points apart; for {100 * wanted:.0f} point about {needed} texts are needed"
            )
    return lines


def _cells(name: str, entry: dict, p: float) -> tuple[str, ...]:
    scale, form = (100, "{:+.2f}") if name in ("error", "cer") else (1, "{:+.3f}")
    if entry["low"] is None:
        return name, str(entry["texts"]), form.format(scale * entry["value"]), "-", "-", "one text"
    interval = " to ".join(form.format(scale * entry[end]) for end in ("low", "high"))
    verdict = "no difference shown"
    if p < ALPHA and not entry["low"] <= 0 <= entry["high"]:
        better = (entry["value"] < 0) == (name in ("error", "cer"))
        verdict = "B is better" if better else "B is worse"
    value = form.format(scale * entry["value"])
    return name, str(entry["texts"]), value, interval, f"{p:.4f}", verdict


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m eval.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", help="output folder of a run of eval.run")
    parser.add_argument("b", help="another one, on the same set with the same judges")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write the differences to this file, too")
    args = parser.parse_args(argv)
    try:
        result = compare(args.a, args.b, args.seed)
    except (ValueError, OSError, json.JSONDecodeError) as error:
        sys.exit(f"eval.compare: {error}")
    if args.json:
        write_json_atomic(args.json, result)
    print_comparison(result)


if __name__ == "__main__":
    main()
