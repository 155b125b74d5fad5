"""What a run found: a table on the terminal, and one self-contained page to read and listen to."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np

from eval.languages import LANGUAGES
from eval.speaker import encoder_title
from higgs_lab.runlog import atomic_path

WORST_CLIPS = 20
PLAYER_SEC = 30.0  # of each clip in the page
FLOOR_LIMIT = 0.15  # a recogniser that errs more on human speech says little about ours
# What may change between a run and its resumption, or between two compared runs: where the same
# weights (`revision`) lie on this machine.
_NAMES = ("system.name", "set.name", "asr.name", "encoder.name", "system.adapter.name")


def read_summary(run: str | Path) -> dict:
    """summary.json of a finished run. Raises FileNotFoundError saying what to run."""
    path = Path(run) / "summary.json"
    if not path.is_file():
        raise FileNotFoundError(f"{run} has no summary.json: finish that run with eval.run first")
    return json.loads(path.read_text(encoding="utf-8"))


def read_floor(run: str | Path, config: dict) -> dict:
    """Error of the human recordings per language, from a run measured in the same way."""
    summary = read_summary(run)
    before = summary["config"]
    if before["system"].get("kind") != "human":
        raise ValueError(f"--floor {run}: that run is of {before['system']['name']}, not of human")
    measured = ("set", "asr", "normalizer", "metrics")
    apart = differences(
        {key: before[key] for key in measured}, {key: config[key] for key in measured}
    )
    apart = [entry for entry in apart if entry[0] != "set.references"]
    if apart:
        name, old, new = apart[0]
        raise ValueError(
            f"--floor {run}: {name} is {old!r} there and {new!r} here; run --model human with the "
            "same set, --limit, --seed, --asr and --normalizer"
        )
    blocks = summary["languages"] | {"overall": summary["overall"]}
    return {code: block["error"] for code, block in blocks.items()}


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


def print_table(summary: dict) -> None:
    """The headline, a row per language, on the terminal."""
    from rich.console import Console
    from rich.table import Table

    columns, rows = table(summary)
    lines = [columns] + [[cell["text"] for cell in row] for row in rows]
    if len(rows) <= 3:  # few languages stand side by side, many below each other
        lines = [list(line) for line in zip(*lines, strict=True)]
    view = Table(title=title(summary))
    for number, column in enumerate(lines[0]):
        view.add_column(column, justify="left" if number == 0 else "right")
    for line in lines[1:]:
        view.add_row(*line)
    console = Console()
    if len(rows) > 3 and not console.is_terminal:
        console = Console(width=200)  # a log file scrolls sideways
    console.print(view)
    for note in notes(summary):
        console.print(f"note: {note}", highlight=False)


def title(summary: dict) -> str:
    config = summary["config"]
    asr = config["asr"] or {"name": "no recogniser"}
    return (
        f"{config['system']['name']} on {config['set']['name']} ({summary['overall']['clips']} "
        f"clips), heard by {Path(asr['name']).name}, normaliser {config['normalizer']}"
    )


def table(summary: dict) -> tuple[list[str], list[list[dict]]]:
    """Column titles and rows of cells {"text", "sort"}; error rates in per cent."""
    encoder, floor = summary["config"]["encoder"], summary["floor"] or {}
    columns = ["language", "clips", "failed", "error %", "95 %", "spoken only %", "CER %"]
    columns += ["sub/del/ins %"]
    if floor:
        columns += ["human %", "excess"]
    if encoder:
        name = encoder_title(encoder)
        columns += [f"SIM to reference ({name})", f"SIM to speaker ({name})"]
    columns += ["duration ratio", "RTF"]
    blocks = dict(summary["languages"])
    if len(blocks) > 1:
        blocks = {"overall": summary["overall"]} | blocks
    rows = []
    for code, block in blocks.items():
        error, human = block["error"], floor.get(code)
        label = f"{LANGUAGES[code].name} ({code})" if code in LANGUAGES else "mean of languages"
        kinds = [block[kind] for kind in ("substitutions", "deletions", "insertions")]
        unit = {"word": "WER", "char": "CER"}.get(block["unit"], "")
        row = [
            _cell(label, label),
            _cell(str(block["clips"]), block["clips"]),
            _cell(str(block["failed"]), block["failed"]),
            _cell(_headline(block, unit), _value(error)),
            _cell(_interval(error)),
            _cell(_percent(block["error_valid"]), _value(block["error_valid"])),
            _cell(_percent(block["cer"]), _value(block["cer"])),
            _cell("/".join("-" if k is None else f"{100 * k:.1f}" for k in kinds)),
        ]
        if floor:
            excess = error["value"] - human["value"] if error and human else None
            limited = human is not None and human["value"] > FLOOR_LIMIT
            row.append(_cell(_percent(human), _value(human)))
            text = "-" if excess is None else f"{100 * excess:+.2f}"
            row.append(_cell(text + " recogniser-limited" * limited, excess))
        if encoder:
            row += [_cell(_similarity(block[n]), _value(block[n])) for n in _SIMILARITIES]
        for name in ("duration_ratio_median", "rtf_median"):
            value = block[name]
            row.append(_cell("-" if value is None else f"{value:.2f}", value))
        rows.append(row)
    return columns, rows


_SIMILARITIES = ("sim_ref", "sim_target")


def notes(summary: dict) -> list[str]:
    """What a reader must know to read the numbers rightly."""
    overall, config = summary["overall"], summary["config"]
    lines = []
    if overall["failed"]:
        kinds = ", ".join(f"{n} {name}" for name, n in overall["failures"].items() if n)
        lines.append(f"failed clips have all words wrong in 'error': {kinds}")
    for reason, count in summary["reasons"]:
        lines.append(f"{count} not spoken: {reason}")
    blocks = summary["languages"]
    if silent := [code for code, block in blocks.items() if block["no_baseline"]]:
        lines.append(f"no baseline in {len(silent)} languages: {', '.join(silent)}")
    deaf = [c for c, b in blocks.items() if not b["judged"] and not b["no_baseline"]]
    if config["asr"] and deaf:
        lines.append(f"no recogniser for {', '.join(deaf)}: no error rates there")
    if published := overall.get("published"):
        lines.append(
            f"as the protocol averages ({published['average']}): {100 * published['value']:.3f} % "
            f"over {published['clips']} clips, {published['left_out']} left out as its script does"
        )
    if not summary["floor"] and overall["error_valid"] and overall["error_valid"]["value"] > 0.5:
        lines.append(
            "more than half the words are wrong: is it the voice or the recogniser? Run --model "
            "human on this set and give that run as --floor"
        )
    if digits := overall["flags"].get("digits"):
        lines.append(f"{digits} clips have digits, which are compared as written, not as spoken")
    if flags := {k: v for k, v in overall["flags"].items() if k != "digits"}:
        counted = ", ".join(f"{name} {n}" for name, n in sorted(flags.items()))
        lines.append(f"flagged, not failed: {counted}")
    if pairs := summary["similarity_pairs"]:
        means = [
            f"{name.replace('_', ' ')} {value['mean']:.3f} ({value['pairs']} pairs)"
            for name, value in pairs.items()
            if value["mean"] is not None
        ]
        lines.append(f"cosines between the set's own recordings: {', '.join(means)}")
    if overall["error"] and overall["error"]["low"] is None:
        lines.append("too few texts for an interval")
    origin = ", ".join(f"{n} from {name}" for name, n in summary["references"].items())
    lines.append(f"references: {origin}")
    return lines


def write_html(path: str | Path, summary: dict, scores: list[dict], out: str | Path) -> None:
    """One page that needs nothing else: table, notes, worst clips with sound and diff, provenance.

    Clips are embedded as FLAC (lossless, half a wav's size), the first 30 s of each.
    """
    import jinja2

    columns, rows = table(summary)
    clips = []
    for score in worst(scores):
        aligned = diff(score["reference"], score["hypothesis"], score["unit"])
        clips.append(score | {"diff": aligned, "sound": _sound(Path(out), score["audio"])})
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    page = environment.get_template("report.html.j2").render(
        title=title(summary),
        columns=columns,
        rows=rows,
        notes=notes(summary),
        overall=summary["overall"],
        clips=clips,
        total=len(scores),
        config=json.dumps(summary["config"], indent=2, ensure_ascii=False),
        provenance=json.dumps(summary["provenance"], indent=2, ensure_ascii=False),
    )
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def worst(scores: list[dict], count: int = WORST_CLIPS) -> list[dict]:
    """Clips that most need a listener: failures first, then by error rate, then by similarity."""

    def badness(score: dict) -> tuple:
        rate = score["errors"] / score["units"] if score.get("units") else -1.0
        similarity = score.get("sim_ref")
        return score["failure"] is not None, rate, -(1.0 if similarity is None else similarity)

    return sorted(scores, key=badness, reverse=True)[:count]


def diff(reference: str, hypothesis: str | None, unit: str) -> list[tuple[str, str]]:
    """Pieces (kind, text), kind in equal, delete, insert: what was to be said and what was heard.

    A substitution is a delete followed by an insert.
    """
    import jiwer

    if hypothesis is None:
        return [("equal", reference)]
    if unit == "word":
        out, joint = jiwer.process_words(reference, hypothesis), " "
    else:
        reference, hypothesis = reference.replace(" ", ""), hypothesis.replace(" ", "")
        out, joint = jiwer.process_characters(reference, hypothesis), ""
    said, heard = out.references[0], out.hypotheses[0]
    pieces = []
    for chunk in out.alignments[0]:
        old = joint.join(said[chunk.ref_start_idx : chunk.ref_end_idx])
        new = joint.join(heard[chunk.hyp_start_idx : chunk.hyp_end_idx])
        if chunk.type == "equal":
            pieces.append(("equal", old))
        else:
            pieces += [(kind, text) for kind, text in (("delete", old), ("insert", new)) if text]
    return pieces


def _sound(out: Path, audio: str | None) -> str | None:
    """A clip as a data address, or None if there is nothing to play."""
    import soundfile

    from higgs_lab.audio import read_audio

    if audio is None or not (out / audio).is_file():
        return None
    try:
        wav = read_audio(out / audio, 24000, max_sec=None)[: int(PLAYER_SEC * 24000)]
    except ValueError:
        return None
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(wav, -1, 1), 24000, format="FLAC", subtype="PCM_16")
    return "data:audio/flac;base64," + base64.b64encode(buffer.getvalue()).decode()


def _headline(block: dict, unit: str) -> str:
    """The error rate, or why there is none."""
    if block["error"] is not None:
        return f"{_percent(block['error'])} {unit}".strip()
    return "no baseline" if block["no_baseline"] == block["clips"] else "no recogniser"


def _cell(text: str, sort: object = "") -> dict:
    return {"text": text, "sort": "" if sort is None else sort}


def _value(estimate: dict | None) -> float | None:
    return None if estimate is None else estimate["value"]


def _percent(estimate: dict | None) -> str:
    return "-" if estimate is None else f"{100 * estimate['value']:.2f}"


def _interval(estimate: dict | None) -> str:
    if estimate is None or estimate["low"] is None:
        return "-"
    return f"{100 * estimate['low']:.2f}-{100 * estimate['high']:.2f}"


def _similarity(estimate: dict | None) -> str:
    if estimate is None:
        return "-"
    if estimate["low"] is None:
        return f"{estimate['value']:.3f}"
    return f"{estimate['value']:.3f} ({estimate['low']:.3f}-{estimate['high']:.3f})"
