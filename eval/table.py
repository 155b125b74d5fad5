"""The figures of a summary as columns and cells, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from eval.anchors import FLOOR_LIMIT
from eval.languages import LANGUAGES
from eval.speaker import encoder_title

MISSING = "–"
UNITS = {"word": "WER", "char": "CER"}


@dataclass(frozen=True)
class Cell:
    text: str
    sort: float | str | None = None  # None sorts last, whichever way
    mark: str = ""  # a word of warning beside the figure


@dataclass(frozen=True)
class Column:
    """`short` heads the terminal's column, where `rank` says which go first if there is no room."""

    title: str
    help: str
    cell: Callable[[str, dict], Cell]
    short: str = ""
    rank: int = 9


def language_name(code: str) -> str:
    return LANGUAGES[code].name if code in LANGUAGES else "mean of languages"


def blocks(summary: dict) -> dict[str, dict]:
    """Blocks by language, the judged ones first; over several the mean leads, as "overall"."""
    languages = summary["languages"].items()
    found = dict(sorted(languages, key=lambda item: (item[1]["error"] is None, item[0])))
    return {"overall": summary["overall"]} | found if len(found) > 1 else found


def error_columns(summary: dict) -> list[Column]:
    """What the recogniser heard."""
    floor, ceiling = summary.get("floor") or {}, summary.get("ceiling") or {}
    columns = [
        Column("error %", "errors per unit of all texts; a failed clip has all its units wrong",
               _headline, "error %", 0),
        Column("95 %", "interval, drawn by text", lambda code, b: interval(b["error"]), "95 %", 1),
        Column("unit", "what is counted: words (WER) or characters (CER), by language",
               lambda code, block: _text(UNITS.get(block["unit"], "mixed"))),
    ]  # fmt: skip
    if floor:
        columns += [
            Column("human %", "the same texts in the set's own recordings: the recogniser's floor",
                   lambda code, b: percent(floor.get(code, {}).get("error")), "human %", 3),
            Column("excess", "points above human on the same texts",
                   partial(_excess, floor), "excess", 1),
            Column("excess 95 %", "paired interval, drawn by text",
                   lambda code, b: interval(floor.get(code, {}).get("excess"), sign=True)),
        ]  # fmt: skip
    if ceiling:
        columns += [
            Column("codec %", "the recordings through the codec: the best a talker on it can do",
                   lambda code, b: percent(ceiling.get(code, {}).get("error")), "codec %", 4),
        ]  # fmt: skip
    if summary["overall"].get("published"):
        columns += [
            Column("as published %", "averaged as the protocol's own script does, which leaves out "
                   "clips without sound and counts failures as they were heard",
                   lambda code, b: percent(b["published"]), "published %", 2),
        ]  # fmt: skip
    columns += [
        Column("failed", "missing, empty, silent, runaway, loop, other language",
               _count("failed"), "failed", 2),
        Column("spoken only %", "errors per unit without the failed clips",
               lambda code, b: percent(b["error_valid"]), "valid %", 4),
        Column("CER %", "errors per character, failed clips all wrong",
               lambda code, b: percent(b["cer"]), "CER %", 5),
        Column("clip mean %", "mean over clips of each clip's rate, at most 100",
               lambda code, b: share(b["utterance_mean_capped"], 2)),
        Column("clip median %", "median over clips of each clip's rate",
               lambda code, b: share(b["utterance_median"], 2)),
        Column("over half %", "clips with more than half wrong",
               lambda code, b: share(b["utterances_over_half"], 1)),
        Column("clips", "clips spoken or tried", _count("clips"), "clips", 5),
    ]  # fmt: skip
    return columns


def sound_columns(summary: dict) -> list[Column]:
    """Whose voice it was, and what the waveform says. Measures that no clip has are left out."""
    encoder, floor = summary["config"]["encoder"], summary.get("floor") or {}
    columns = []
    if encoder:
        name = encoder_title(encoder)
        for key, whom, help in (
            ("sim_ref", "reference", "cosine to the reference clip that was given"),
            ("sim_target", "speaker", "cosine to the centroid of the speaker's other recordings"),
        ):
            columns.append(
                Column(f"SIM to {whom} ({name})", help, partial(_similarity, key),
                       f"SIM to {whom}\n{name}", 3)
            )  # fmt: skip
            if any(b.get(f"{key}_calibrated") is not None for b in blocks(summary).values()):
                columns.append(
                    Column(f"{whom}, calibrated", "0: as different speakers of this set, 1: as two "
                           "recordings of one",
                           lambda code, b, name=f"{key}_calibrated": number(b[name], "{:.2f}"))
                )  # fmt: skip
            if any(block.get(key) for block in floor.values()):
                columns.append(
                    Column(f"human to {whom}", "the same of the set's own recordings",
                           partial(_anchor_similarity, floor, key))
                )  # fmt: skip
    for key, title, help, digits in _SOUND:
        name = f"{key}_median"
        if any(block.get(name) is not None for block in blocks(summary).values()):
            form = f"{{:.{digits}f}}"
            columns.append(
                Column(f"median {title}", f"{help}; median over clips",
                       lambda code, b, name=name, form=form: number(b.get(name), form),
                       f"median\n{title}", 8 if key != "rtf" else 6)
            )  # fmt: skip
    return columns


_SOUND = (
    ("duration_ratio", "duration ratio", "speech time over that of the recording", 2),
    ("letters_per_sec", "letters/s", "letters of the text per second of speech", 1),
    ("f0_hz", "F0 Hz", "pitch", 0),
    ("f0_spread_st", "F0 spread st", "spread of the pitch in semitones", 1),
    ("loudness_lufs", "loudness LUFS", "loudness", 1),
    ("leading_sec", "silence before s", "silence before the first sound", 2),
    ("trailing_sec", "silence after s", "silence after the last sound", 2),
    ("rtf", "RTF", "time to speak over duration of the speech, as run here", 2),
)


def percent(estimate: dict | None) -> Cell:
    value = None if estimate is None else estimate["value"]
    return share(value, 2)


def share(value: float | None, digits: int) -> Cell:
    return Cell(MISSING) if value is None else Cell(f"{100 * value:.{digits}f}", value)


def interval(estimate: dict | None, sign: bool = False) -> Cell:
    if estimate is None or estimate["low"] is None:
        return Cell(MISSING)
    form = "{:+.2f}" if sign else "{:.2f}"
    return Cell(bounds(estimate, form, 100), estimate["high"])


def bounds(estimate: dict, form: str, scale: float = 1) -> str:
    """The interval's ends; "to" between them where a dash would look like a minus."""
    low, high = (signed(scale * estimate[end], form) for end in ("low", "high"))
    return f"{low} to {high}" if "+" in form or estimate["low"] < 0 else f"{low}–{high}"


def signed(value: float, form: str) -> str:
    """A figure with a real minus sign, and none at all before a zero."""
    text = form.format(value)
    return text.replace("-", "−") if float(text) else text.lstrip("+-")


def points(value: float | None) -> Cell:
    """A difference of two rates in percentage points, with its sign."""
    return Cell(MISSING) if value is None else Cell(signed(100 * value, "{:+.2f}"), value)


def _headline(code: str, block: dict) -> Cell:
    """The error rate, or why there is none."""
    if block["error"] is not None:
        return percent(block["error"])
    return Cell("no baseline" if block.get("no_baseline") == block["clips"] else "no recogniser")


def _excess(floor: dict, code: str, block: dict) -> Cell:
    found = floor.get(code, {})
    human, excess = found.get("error"), found.get("excess")
    limited = human is not None and human["value"] > FLOOR_LIMIT
    cell = points(excess and excess["value"])
    return Cell(cell.text, cell.sort, "recogniser-limited" if limited else "")


def _similarity(key: str, code: str, block: dict) -> Cell:
    estimate = block.get(key)
    if estimate is None:
        return Cell(MISSING)
    text = signed(estimate["value"], "{:.3f}")
    if estimate["low"] is not None:
        text += f" ({bounds(estimate, '{:.3f}')})"
    return Cell(text, estimate["value"])


def _anchor_similarity(floor: dict, key: str, code: str, block: dict) -> Cell:
    estimate = floor.get(code, {}).get(key)
    return number(estimate and estimate["value"], "{:.3f}")


def _count(key: str) -> Callable[[str, dict], Cell]:
    return lambda code, block: Cell(str(block[key]), block[key])


def number(value: float | None, form: str) -> Cell:
    return Cell(MISSING) if value is None else Cell(signed(value, form), value)


def _text(text: str) -> Cell:
    return Cell(text, text)
