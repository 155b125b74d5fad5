"""`--dry-run`: what a run would do, with whom, and about how long it would take. Loads no model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from eval.asr import judge_of, parse_spec, recognizer_title
from eval.languages import language
from eval.metrics import expected_sec
from eval.pace import device_name, known_pace
from eval.sets import EvalSet
from eval.speaker import encoder_title
from eval.stats import texts_needed
from eval.systems import System
from eval.work import Ledger
from higgs_lab import nano
from higgs_lab.runlog import duration

# Seconds of sound per second of work where nothing was measured yet: (GPU, CPU). Orders of
# magnitude; a run on the machine replaces them.
ASSUMED = {
    "speak checkpoint": (30, 0.3),
    "speak server": (15, 15),
    "speak cmd": (1, 1),
    "speak codec": (100, 3),
    "speak espeak": (100, 100),
    "speak": (500, 500),
    "hear nano": (300, 20),
    "hear": (100, 0.5),
    "voices nano": (500, 50),
    "voices": (500, 15),
}
# A typical error and clustering of texts, for the interval to expect before anything is known:
# ten words a text at 5 % and a design effect of 2 (half-width of a 95 % interval, 100 texts).
HALF_WIDTH_100 = 0.02
DEAF = "no recogniser"


def plan(
    system: System,
    test_set: EvalSet,
    config: Mapping,
    out: str | Path,
    *,
    asr: str,
    device: str | None,
    cache: str | Path | None,
) -> list[str]:
    """Lines that say what a run with these settings would do, and what of it is done already."""
    rows, takes = test_set.rows, config["takes"]
    languages = sorted({row.language for row in rows})
    silent = [code for code in languages if not system.speaks(code)]
    rows = [row for row in rows if row.language not in silent]
    clips, sound_sec = len(rows) * takes, takes * sum(expected_sec(row.text) for row in rows)
    lines = [
        f"system      {config['system']['name']}",
        f"set         {test_set.name}: {len(test_set.rows)} texts in {len(languages)} languages",
        f"clips       {clips} ({takes} a text), about {duration(sound_sec)} of speech",
        "references  " + ", ".join(f"{n} from {name}" for name, n in test_set.references.items()),
    ]
    if silent:
        lines.append(f"no baseline {len(silent)} languages: {' '.join(silent)}")
    judges = _judges(asr, config["asr"], languages)
    for title, codes in judges.items():
        listed = " ".join(codes) if len(codes) <= 12 else f"{' '.join(codes[:12])} ..."
        lines.append(f"heard by    {title}: {len(codes)} languages: {listed}")
    if config["encoder"]:
        lines.append(f"voices by   {encoder_title(config['encoder'])}")
    lines.append(f"normaliser  {config['normalizer']}")
    lines += _interval(len({(row.language, row.text) for row in rows}), len(languages))
    stages = [("speak", "speech", system.name, config["system"].get("kind", ""))]
    if config["asr"]:
        stages.append(("hear", "transcripts", asr, asr))
    if config["encoder"]:
        name = config["encoder"]["name"]
        stages.append(("voices", "", name, name))
    deaf = set(judges.get(DEAF, ()))
    heard_sec = takes * sum(expected_sec(row.text) for row in rows if row.language not in deaf)
    ids, total_sec = {row.id for row in rows}, 0.0
    for stage, file, who, kind in stages:
        done = _done(Path(out) / f"{file}.jsonl", ids) if file else 0
        left_sec = heard_sec if stage == "hear" else sound_sec
        left_sec *= max(0, clips - done) / clips if clips else 0.0
        pace = known_pace(cache, stage, who, device)
        how = "measured here" if pace else "assumed"
        pace = pace or _assumed(stage, kind, device)
        total_sec += left_sec / pace
        resumed = f"{done} of {clips} done, " if done else ""
        lines.append(
            f"{stage:<11} {resumed}{duration(left_sec / pace)} at {pace:.3g} x real time ({how})"
        )
    lines.append(
        f"about {duration(total_sec)} on one {device_name(device)}, without loading the models; "
        f"--out {out}, nothing was run or written"
    )
    return lines


def _judges(asr: str, details: Mapping | None, languages: list[str]) -> dict[str, list[str]]:
    """Recogniser's title -> languages that it hears, as far as can be told without loading it."""
    judges: dict[str, list[str]] = {}
    routes = parse_spec(asr) if details else {"": "none"}
    for code in languages:
        title = DEAF
        if _hears(judge_of(routes, code), code):
            title = details["routes"][code] if "routes" in details else recognizer_title(details)
        judges.setdefault(title, []).append(code)
    return judges


def _hears(judge: str, code: str) -> bool:
    """By the table of languages; a worker says for itself."""
    row, family = language(code), judge.partition(":")[0]
    if family in ("none", "worker"):
        return family == "worker"
    if family == "nano":
        return row.code in nano.LANGUAGES
    return (row.mms if family == "mms" else row.whisper) is not None


def _interval(texts: int, languages: int) -> list[str]:
    """The interval to expect of one language, and how many texts a point's difference needs."""
    each = texts / languages
    half_width = HALF_WIDTH_100 * (100 / each) ** 0.5 if each else float("inf")
    needed = texts_needed(HALF_WIDTH_100, 100, 0.01)
    return [
        f"precision   about {each:.0f} texts a language: the error of one will be known to about "
        f"±{100 * half_width:.1f} points; ±1 takes about {needed} texts (at 5 % and ten words each)"
    ]


def _assumed(stage: str, kind: str, device: str | None) -> float:
    pair = ASSUMED.get(f"{stage} {kind}") or ASSUMED[stage]
    return pair[device_name(device) == "CPU"]


def _done(path: Path, ids: set[str]) -> int:
    """Rows of a stage's file that are of these texts."""
    if not path.is_file():
        return 0
    with Ledger(path) as ledger:
        return sum(id in ids for id, _ in ledger.rows)
