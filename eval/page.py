"""report.html: one self-contained page per run, to read and to listen to."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

from eval import report, table
from eval.anchors import FLOOR_LIMIT, KINDS
from eval.clips import Sounds, diff, least_similar, rate, worst
from eval.languages import LANGUAGES
from higgs_lab.runlog import atomic_path

WORST_CLIPS = 40
LEAST_SIMILAR_CLIPS = 8
FULL_COLOUR = 0.25  # of error or excess
BINS = ((0.0, "none"), (0.1, "up to 10 %"), (0.25, "10–25 %"), (0.5, "25–50 %"),
        (1.0, "50–100 %"), (math.inf, "above 100 %"))  # fmt: skip
SCRIPTS = {
    "Latn": "Latin", "Cyrl": "Cyrillic", "Arab": "Arabic", "Deva": "Devanagari", "Beng": "Bengali",
    "Grek": "Greek", "Gujr": "Gujarati", "Hebr": "Hebrew", "Armn": "Armenian", "Jpan": "Japanese",
    "Geor": "Georgian", "Knda": "Kannada", "Kore": "Korean", "Mlym": "Malayalam", "Taml": "Tamil",
    "Telu": "Telugu", "Thai": "Thai", "Hans": "Chinese", "Hant": "Chinese", "Guru": "Gurmukhi",
    "Ethi": "Ethiopic", "Tibt": "Tibetan", "Khmr": "Khmer", "Laoo": "Lao", "Mymr": "Myanmar",
    "Orya": "Odia", "Sinh": "Sinhala",
}  # fmt: skip


def write_report(path: str | Path, summary: dict, scores: list[dict], run: str | Path) -> None:
    """The page of one run. Clips lie in `run`; the worst are embedded, the rest linked."""
    path, run = Path(path), Path(run)
    sounds = Sounds(path)
    by_language: dict[str, list[dict]] = {}
    for score in scores:
        by_language.setdefault(score["language"], []).append(score)
    blocks = table.blocks(summary)
    end = _round_above(
        (b["error"]["high"] or b["error"]["value"]) for b in blocks.values() if b["error"]
    )
    kinds = {code: error_kinds(by_language.get(code, scores)) for code in blocks}
    kinds = {code: found for code, found in kinds.items() if found["known"]}
    clips = worst(scores, WORST_CLIPS)
    strangers = [s for s in least_similar(scores, LEAST_SIMILAR_CLIPS) if s not in clips]
    write_page(
        path,
        "report.html.j2",
        title=report.title(summary),
        summary=summary,
        setting=report.setting(summary),
        headline=headline(summary),
        notes=report.notes(summary),
        errors=sortable(table.error_columns(summary), blocks),
        ranges={code: span(code, block, summary, end) for code, block in blocks.items()},
        axis_end=end,
        sound=sortable(table.sound_columns(summary), blocks),
        tiles=tiles(summary),
        kinds=kinds,
        kinds_end=_round_above(sum(v or 0 for v in k["shares"].values()) for k in kinds.values()),
        bins=histogram(scores),
        voices=voice_scale(summary),
        clips=[shown(score, run, sounds) for score in clips],
        strangers=[shown(score, run, sounds) for score in strangers],
        total=len(scores),
        facts=facts(summary),
    )


def write_page(path: Path, template: str, **context) -> None:
    """Render a template of eval/pages to a file, atomically."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "pages"), autoescape=True,
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["name"] = table.language_name
    environment.filters["cosine"] = lambda value: table.signed(value, "{:.3f}")
    page = environment.get_template(template).render(**context)
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def headline(summary: dict) -> list[dict]:
    """The few figures that a reader takes away: {"name", "value", "range", "detail"}."""
    overall, cards = summary["overall"], []
    judged = sum(block["error"] is not None for block in summary["languages"].values())
    whose = f"mean of {judged} languages" if len(summary["languages"]) > 1 else ""
    unit = {"word": "word error", "char": "character error"}.get(overall["unit"], "error")
    if overall["error"]:
        cards.append(_card(unit, table.percent(overall["error"]).text + " %",
                           table.interval(overall["error"]).text, whose))  # fmt: skip
    for option, name in (("floor", "excess over human"), ("ceiling", "excess over codec")):
        block = (summary.get(option) or {}).get("overall")
        if block and block["excess"] and block["error"]:
            detail = f"points; {KINDS[option]}: {table.percent(block['error']).text} %"
            excess = block["excess"]
            cards.append(_card(name, table.points(excess["value"]).text,
                               table.interval(excess, sign=True).text, detail))  # fmt: skip
    failed = overall["failed"]
    kinds = ", ".join(
        f"{n} {name.replace('_', ' ')}" for name, n in overall["failures"].items() if n
    )
    spoken = overall["error_valid"]
    detail = kinds or (f"of {overall['clips']} clips")
    if failed and spoken:
        detail += f"; without them {table.percent(spoken).text} %"
    cards.append(_card("failed clips", str(failed), "", detail))
    for key, name in (
        ("sim_target", "similarity to speaker"),
        ("sim_ref", "similarity to reference"),
    ):
        if estimate := overall.get(key):
            human = (summary.get("floor") or {}).get("overall", {}).get(key)
            range = "" if estimate["low"] is None else table.bounds(estimate, "{:.3f}")
            detail = f"human: {human['value']:.3f}" if human else f"{estimate['n']} clips"
            cards.append(_card(name, table.signed(estimate["value"], "{:.3f}"), range, detail))
    if (rtf := overall.get("rtf_median")) is not None:
        cards.append(_card("real-time factor", f"{rtf:.2f}", "", "median, as run here"))
    return cards


def _card(name: str, value: str, range: str, detail: str) -> dict:
    return {"name": name, "value": value, "range": "" if range == table.MISSING else range,
            "detail": detail}  # fmt: skip


def sortable(columns: list[table.Column], blocks: dict[str, dict]) -> dict:
    """A table of the page: columns, and cells by language code."""
    rows = {code: [c.cell(code, block) for c in columns] for code, block in blocks.items()}
    empty = {code for code, cells in rows.items() if all(c.text == table.MISSING for c in cells)}
    return {"columns": columns, "rows": {c: cells for c, cells in rows.items() if c not in empty}}


def _round_above(values: Iterable[float]) -> float:
    """Where an axis of rates ends: a round figure above them all, at most 100 %."""
    largest = max(values, default=1.0)
    return next((end for end in (0.02, 0.05, 0.1, 0.2, 0.5) if largest <= end), 1.0)


def span(code: str, block: dict, summary: dict, end: float) -> dict | None:
    """Positions in per cent of the axis: interval, value, human."""
    error = block["error"]
    if error is None:
        return None
    human = (summary.get("floor") or {}).get(code, {}).get("error")

    def at(value: float | None) -> float | None:
        return None if value is None else round(100 * min(value / end, 1.0), 2)

    return {"low": at(error["low"]), "high": at(error["high"]), "at": at(error["value"]),
            "human": at(human and human["value"])}  # fmt: skip


def tiles(summary: dict) -> dict:
    """Languages by script, each with its excess over human, or its error where nobody knows that.

    Scripts and not a map of the world: what goes wrong together (normaliser, recogniser, text front
    end) shares a script, and half of the languages would be dots on a map.
    """
    floor, groups = summary.get("floor") or {}, {}
    for code, block in summary["languages"].items():
        human = floor.get(code, {})
        excess, error = human.get("excess"), block["error"]
        value = excess["value"] if excess else error["value"] if error and not floor else None
        limited = (human.get("error") or {"value": 0})["value"] > FLOOR_LIMIT
        script = SCRIPTS.get(LANGUAGES[code].script, LANGUAGES[code].script)
        form = "{:+.1f}" if floor else "{:.1f}"
        text = table.MISSING if value is None else table.signed(100 * value, form)
        tile = {"code": code, "value": value, "text": text}
        groups.setdefault(script, []).append(tile | {"limited": limited, "shade": shade(value)})
    ordered = sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))
    return {"scripts": ordered, "excess": bool(floor)}


def shade(value: float | None) -> int:
    """Strength of a colour, 0 to 100 (negative: better than human), by the root: 1 point shows."""
    if value is None:
        return 0
    return round(math.copysign(100 * math.sqrt(min(1.0, abs(value) / FULL_COLOUR)), value))


def error_kinds(scores: list[dict]) -> dict:
    """What the error is made of, as shares of all units: they add up to the rate over all clips."""
    judged = [score for score in scores if score.get("units")]
    units = sum(score["units"] for score in judged)
    spoken = [score for score in judged if not score["failure"]]
    found = {
        kind: sum(score[kind] for score in spoken) / units if units else None
        for kind in ("substitutions", "deletions", "insertions")
    }
    lost = sum(score["errors"] for score in judged if score["failure"])
    found["failed"] = lost / units if units else None
    names = [score["failure"] for score in scores if score["failure"]]
    flags = [flag for score in scores for flag in score["flags"]]
    known = bool(judged or names or flags)
    return {"shares": found, "failures": _counts(names), "flags": _counts(flags), "known": known}


def _counts(names: list[str]) -> str:
    return ", ".join(f"{names.count(name)} {name.replace('_', ' ')}" for name in sorted(set(names)))


def histogram(scores: list[dict]) -> list[dict]:
    """How many clips have how large an error: few broken ones or many slightly wrong ones?"""
    rates = [r for score in scores if (r := rate(score)) is not None]
    found, below = [], -1.0
    for end, name in BINS:
        count = sum(below < r <= end for r in rates)
        found.append({"name": name, "count": count, "share": count / len(rates) if rates else 0})
        below = end
    return found if rates else []


def voice_scale(summary: dict) -> list[dict]:
    """Where this run lies between two speakers of the set and two recordings of one."""
    scales, overall = summary.get("similarity_scale") or {}, summary["overall"]
    human = (summary.get("floor") or {}).get("overall", {})
    found = []
    for key, whom in (("sim_ref", "reference"), ("sim_target", "speaker")):
        scale, value = scales.get(key) or {}, (overall[key] or {}).get("value")
        marks = [("different speakers", scale.get("different"), "pair"),
                 ("one speaker", scale.get("same"), "pair"),
                 ("human row", (human.get(key) or {}).get("value"), "human"),
                 ("this run", value, "run")]  # fmt: skip
        if value is not None:
            marks = [{"name": n, "value": v, "kind": k} for n, v, k in marks if v is not None]
            found.append({"title": f"to {whom}", "marks": marks, "eer": scale.get("eer")})
    return found


def shown(score: dict, run: Path, sounds: Sounds) -> dict:
    """One clip for the page."""
    pieces = diff(score["reference"], score["hypothesis"], score["unit"])
    return score | {"rate": rate(score), "diff": pieces, "sound": sounds.clip(run, score["audio"])}


def facts(summary: dict) -> list[tuple[str, str]]:
    """Provenance in rows: who spoke, who judged, what ran where."""
    config, origin = summary["config"], summary["provenance"]
    asr, encoder = config["asr"], config["encoder"]
    code = origin.get("git_commit") or "installed as a wheel"
    rows = [
        ("system", _facts_line(config["system"])),
        ("set", _facts_line(config["set"])),
        ("recogniser", _facts_line(asr) if asr else "none"),
        ("speaker encoder", _facts_line(encoder) if encoder else "none"),
        ("normaliser", config["normalizer"]),
        ("seed, takes", f"{config.get('seed', 0)}, {config.get('takes', 1)}"),
        ("command", " ".join(map(str, origin.get("command", [])))),
        ("date", origin.get("time", "")),
        ("machine", ", ".join(filter(None, (origin.get("device"), origin.get("platform"))))),
        ("code", code + " with changes" * bool(origin.get("git_dirty"))),
        ("versions", ", ".join(f"{k} {v}" for k, v in origin.get("versions", {}).items())),
    ]  # fmt: skip
    return [(name, text) for name, text in rows if text]


def _facts_line(details: dict) -> str:
    """name value, name value; nested settings as JSON."""
    return ", ".join(
        f"{key} {json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value}"
        for key, value in details.items()
        if value is not None
    )
