"""Scores, summaries and folders of finished runs, without a model."""

from __future__ import annotations

import json
from pathlib import Path

from eval.metrics import AudioFacts, score_clip, summarise

FINE = AudioFacts(2.0, 1.8, 0.1, 0.1, -25.0, 0.0)


def scored(id: str, text: str, heard: str | None, lang: str = "en", audio=FINE, **more) -> dict:
    """One clip's row of scores.jsonl."""
    row = {"id": id, "take": 0, "language": lang, "text": text, "audio": None, "error": ""}
    row |= {"sim_ref": None, "sim_target": None}
    return row | score_clip(text, heard, lang, audio=audio) | more


def finish(scores: list[dict], system: str = "a <b> system", kind: str = "human") -> dict:
    """The summary.json of such clips."""
    config = {
        "system": {"name": system, "kind": kind},
        "set": {"name": "set.jsonl", "revision": "1"},
        "asr": {"name": "large-v3", "revision": "2"},
        "encoder": {"name": "org/ecapa", "revision": "0123456789"},
        "seed": 0,
        "takes": 1,
        "normalizer": "fair-1",
        "metrics": "1",
    }
    reasons = [["no voice for it", 1]] if any(s["audio"] is None for s in scores) else []
    rest = {
        "reasons": reasons,
        "references": {"none": len(scores)},
    }
    return summarise(scores) | rest | {"config": config, "provenance": {"time": "now"}}


def write_run(folder: Path, scores: list[dict], system: str) -> Path:
    """What eval.compare reads of a finished run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(finish(scores, system)))
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scores))
    return folder
