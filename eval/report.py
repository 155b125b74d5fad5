"""What a run found, in words: its title, what a reader must know, a table on the terminal."""

from __future__ import annotations

from pathlib import Path

from eval.anchors import FLOOR_LIMIT
from eval.asr import recognizer_title
from eval.stats import texts_needed
from eval.table import Cell, Column, blocks, error_columns, language_name, sound_columns


def title(summary: dict) -> str:
    return f"{summary['config']['system']['name']} {setting(summary)}"


def setting(summary: dict) -> str:
    """On what a system was tested, and heard by whom."""
    config, clips = summary["config"], summary["overall"]["clips"]
    return (
        f"on {config['set']['name']} ({clips} clip{'s' * (clips != 1)}), "
        f"heard by {judge(config)}, normaliser {config['normalizer']}"
    )


def judge(config: dict) -> str:
    asr = config["asr"]
    if not asr:
        return "no recogniser"
    if "routes" in asr or asr["name"].startswith("worker:"):  # a command is no name
        return recognizer_title(asr)
    return Path(asr["name"]).name


def print_table(summary: dict) -> None:
    """The headline and a row per language on the terminal, as many columns as fit."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a log file scrolls sideways
    found = blocks(summary)
    columns = [c for c in error_columns(summary) + sound_columns(summary) if c.short]
    console.print(_few(summary, columns) if len(found) == 1 else _many(summary, columns, console))
    for note in notes(summary):
        console.print(f"note: {note}", highlight=False)


def _few(summary: dict, columns: list[Column]):
    """One language: its figures below each other."""
    from rich.table import Table

    [(code, block)] = blocks(summary).items()
    view = Table(title=title(summary), title_justify="left")
    view.add_column("language")
    view.add_column(f"{language_name(code)} ({code})", justify="right")
    for column in columns:
        view.add_row(column.short.replace("\n", " "), _printed(column.cell(code, block)))
    return view


def _many(summary: dict, columns: list[Column], console):
    """A row per language, the mean at the end, where the eye is when the command returns."""
    from rich.table import Table

    rows = list(blocks(summary).items())
    rows = rows[1:] + rows[:1]
    labels = [
        language_name(code) if code == "overall" else f"{code} {language_name(code)}"
        for code, _ in rows
    ]
    texts = {c: [_printed(c.cell(code, block)) for code, block in rows] for c in columns}

    def width(column: Column) -> int:
        return 3 + max(map(len, [*column.short.split("\n"), *texts[column]]))

    room = console.width - 4 - min(24, max(map(len, labels)))
    shown = set()
    for column in sorted(columns, key=lambda column: column.rank):
        if width(column) <= room:
            shown.add(column)
            room -= width(column)
    columns = [column for column in columns if column in shown]
    view = Table(title=title(summary), title_justify="left")
    view.add_column("language", max_width=24, no_wrap=True, overflow="ellipsis")
    for column in columns:
        view.add_column(column.short, justify="right", no_wrap=True)
    for number, label in enumerate(labels):
        if number == len(labels) - 1:
            view.add_section()
        view.add_row(label, *(texts[column][number] for column in columns))
    return view


def _printed(cell: Cell) -> str:
    return f"{cell.text} {cell.mark}".strip()


def notes(summary: dict) -> list[str]:
    """What a reader must know to read the numbers rightly."""
    overall, config = summary["overall"], summary["config"]
    lines = []
    if overall["failed"]:
        kinds = ", ".join(
            f"{n} {name.replace('_', ' ')}" for name, n in overall["failures"].items() if n
        )
        lines.append(f"failed clips have all words wrong in 'error': {kinds}")
    for reason, count in summary["reasons"]:
        lines.append(f"{count} not spoken: {reason}")
    languages = summary["languages"]
    if silent := [code for code, block in languages.items() if block.get("no_baseline")]:
        lines.append(f"no baseline in {len(silent)} languages: {', '.join(silent)}")
    deaf = [c for c, b in languages.items() if not b["judged"] and not b.get("no_baseline")]
    if config["asr"] and deaf:
        lines.append(
            f"no recogniser for {len(deaf)} languages, so no error rates there: {', '.join(deaf)}"
        )
    if published := overall.get("published"):
        lines.append(
            f"as the protocol averages ({published['average']}): {100 * published['value']:.3f} % "
            f"over {published['clips']} clips, {published['left_out']} left out as its script does"
        )
    blind = [c for c, b in languages.items() if b["judged"] and not b.get("language_guessed", 1)]
    if blind:
        lines.append(
            f"wrong language not looked for in {', '.join(blind)}: the recogniser there does not "
            "guess languages"
        )
    floor = summary.get("floor") or {}
    limited = [
        c for c in languages if (floor.get(c, {}).get("error") or _NONE)["value"] > FLOOR_LIMIT
    ]
    if limited:
        lines.append(
            f"recogniser-limited: {', '.join(limited)}; it errs above {100 * FLOOR_LIMIT:.0f} % on "
            "the human recordings there, so read the excess, not the error"
        )
    if config["system"].get("kind") == "human":
        limited = [
            c for c, b in languages.items() if (b["error_valid"] or _NONE)["value"] > FLOOR_LIMIT
        ]
        if limited:
            lines.append(
                f"the recogniser errs above {100 * FLOOR_LIMIT:.0f} % on these recordings in "
                f"{', '.join(limited)}: look at the worst clips (are the texts theirs?), and at "
                "another --asr"
            )
    elif not floor and overall["error_valid"] and overall["error_valid"]["value"] > 0.5:
        lines.append(
            "more than half the words are wrong: is it the voice or the recogniser? Run --model "
            "human on this set and give that run as --floor"
        )
    if digits := overall["flags"].get("digits"):
        lines.append(f"{digits} clips have digits, which are compared as written, not as spoken")
    if flags := {k: v for k, v in overall["flags"].items() if k != "digits"}:
        counted = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in sorted(flags.items()))
        lines.append(f"flagged, not failed: {counted}")
    lines += _similarity_scale(summary.get("similarity_scale") or {}, overall)
    lines += sample_size(languages)
    if rates := overall.get("error_by_take"):
        listed = ", ".join(f"{100 * rate:.2f}" for rate in rates)
        lines.append(f"error % of each take alone: {listed}; one seed says no more than that")
    origin = ", ".join(f"{n} from {name}" for name, n in summary["references"].items())
    lines.append(f"references: {origin}")
    return lines


def _similarity_scale(scales: dict, overall: dict) -> list[str]:
    """What the cosines mean: those of the set's own recordings, and where the system lies."""
    lines = []
    for key, whom in (("sim_ref", "clip to clip"), ("sim_target", "clip to speaker")):
        scale = scales.get(key) or {}
        if scale.get("same") is None or scale.get("different") is None:
            continue
        line = (
            f"SIM {whom} of the set's recordings: same speaker {scale['same']:.3f}, others "
            f"{scale['different']:.3f} ({scale['pairs'][0]} and {scale['pairs'][1]} pairs), equal "
            f"error {100 * scale['eer']:.1f} %"
        )
        reached = overall.get(f"{key}_calibrated")
        if reached is not None:
            line += f"; this system reaches {100 * reached:.0f} % of the way"
        lines.append(line)
    return lines


def sample_size(languages: dict[str, dict], wanted: float = 0.01) -> list[str]:
    """Which languages have too few texts for an error known to `wanted`, and how many would do."""
    wide = {}
    for code, block in languages.items():
        error = block["error"]
        if error and error["low"] is None:
            wide[code] = None
        elif error and (half_width := (error["high"] - error["low"]) / 2) > wanted:
            wide[code] = texts_needed(half_width, error["texts"], wanted)
    lines = []
    if single := [code for code, needed in wide.items() if needed is None]:
        lines.append(f"one text, so no interval: {', '.join(single)}")
    if counts := {code: needed for code, needed in wide.items() if needed is not None}:
        worst = sorted(counts, key=counts.__getitem__, reverse=True)
        listed = ", ".join(f"{code} {counts[code]}" for code in worst[:8])
        more = f" and {len(worst) - 8} more languages" if len(worst) > 8 else ""
        lines.append(
            f"texts needed to know the error to ±{100 * wanted:.0f} point (95 %): {listed}{more}; "
            "to tell two systems apart fewer do, paired by text (eval.compare)"
        )
    return lines


_NONE = {"value": 0.0}
