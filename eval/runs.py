"""Finished runs on disk, and in which settings two of them differ."""

from __future__ import annotations

import json
from pathlib import Path

from higgs_lab.runlog import read_jsonl

# What may change between a run and its resumption, or between two compared runs: where the same
# weights (`revision`) lie on this machine.
_NAMES = ("system.name", "set.name", "asr.name", "encoder.name", "system.adapter.name")


def read_summary(run: str | Path) -> dict:
    """summary.json of a finished run. Raises FileNotFoundError saying what to run."""
    path = Path(run) / "summary.json"
    if not path.is_file():
        raise FileNotFoundError(f"{run} has no summary.json: finish that run with eval.run first")
    return json.loads(path.read_text(encoding="utf-8"))


def read_scores(run: str | Path) -> list[dict]:
    """scores.jsonl of a finished run, in one order whoever wrote which part of it."""
    rows = read_jsonl(Path(run) / "scores.jsonl")
    return sorted(rows, key=lambda row: (row["take"], row["id"]))


def differences(before: dict, now: dict, prefix: str = "") -> list[tuple[str, object, object]]:
    """(dotted name, old, new) of all settings that differ, names of files and folders aside."""
    found = []
    for key in dict.fromkeys([*before, *now]):
        name, old, new = prefix + key, before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, name + ".")
        elif old != new and name not in _NAMES:
            found.append((name, old, new))
    return found
