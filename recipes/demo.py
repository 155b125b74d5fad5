"""The whole path on a laptop: recordings -> prepared data -> LoRA -> speech -> scores -> export.

    python -m recipes.demo --out demo                  # a new espeak-ng voice, as `make demo`
    python -m recipes.demo --out demo --data my/clips  # manifest, LJSpeech, wav+txt or CSV

Every step is a command of the toolkit, printed as it is run, so that it can be copied. Run again,
it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from higgs_lab.audio import audio_info, write_wav
from higgs_lab.config import one_line_errors
from higgs_lab.corpora import open_data
from higgs_lab.manifest import Utterance, file_stem, write_manifest
from higgs_lab.prepared import text_key
from higgs_lab.runlog import duration

TOOLS = Path(__file__).resolve().parent.parent  # holds recipes/, eval/ and serve/
NUM_TRAIN, NUM_TEST, MOST_TRAIN = 60, 40, 200


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("demo"), help="folder for everything made")
    add("--data", help="your recordings: manifest, LJSpeech folder, wav+txt folder or CSV")
    add("--language", help="of recordings that name none, such as en")
    add("--clips", type=int, default=MOST_TRAIN, help="at most so many of them to learn from")
    add("--model", default="nano", help="base: nano, a folder or org/name@revision")
    add("--asr", default="nano", help="Whisper name or checkpoint")
    add("--speaker", default="nano", help="ECAPA name or folder")
    add("--steps", type=int, default=90, help="optimiser steps")
    add("--tests", type=int, default=NUM_TEST, help="texts of the evaluation")
    add("--temperature", type=float, default=0.5, help="of all speech that is compared")
    args = parser.parse_args(argv)
    out, began = args.out, time.monotonic()
    train, test = out / "train.jsonl", out / "test.jsonl"
    made_of, note = args.data or "a new espeak-ng voice", out / "source.txt"
    if train.is_file() and test.is_file():
        if note.is_file() and (before := note.read_text(encoding="utf-8")) != made_of:
            sys.exit(
                f"demo: {out} is a demo of {before}, not of {made_of}: name another folder "
                "(make demo OUT=..., or --out)"
            )
    else:
        if args.data:
            with one_line_errors("demo"):
                take_recordings(args.data, train, test, args.tests, args.clips, args.language)
        else:
            make_recordings(out / "recordings", train, test, args.tests)
        note.write_text(made_of, encoding="utf-8")

    deaf = bool(args.data) and args.asr == "nano"
    if deaf:
        print(
            "note: the nano recogniser knows the sentences it was made for and little else, so on "
            "your recordings its word errors say next to nothing, a human's included; a Whisper, "
            "which is downloaded, hears them: --asr base (make demo DATA=... OPTIONS='--asr base')"
        )

    def tool(name: str, *options: str) -> None:
        run(["python", "-m", name, *options])

    model = f"model={args.model}"
    tool("recipes.prepare", f"source={train}", f"out={out / 'prepared'}", model)
    launch = ["accelerate", "launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    script = str(TOOLS / "recipes" / "finetune.py")
    options = ["--config", str(TOOLS / "recipes" / "configs" / "nano_lora.yaml"), model]
    options += [f"data={out / 'prepared'}", f"out={out / 'run'}", f"steps={args.steps}"]
    run([*launch, script, *options])
    adapter = out / "run" / "adapter"
    hello = "text=Hello from my new voice."
    tool("recipes.synthesize", model, f"adapter={adapter}", hello, f"out={out / 'hello'}")
    judges = ["--asr", args.asr, "--speaker", args.speaker, "--set", str(test)]
    # a folder for each choice of judges, so that data and adapter serve the next one, too
    evals = out / "-".join(
        ["eval", *(file_stem(j) for j in (args.asr, args.speaker) if j != "nano")]
    )
    folders = {name: str(evals / name) for name in ("human", "before", "after", "alone")}
    tool("eval.run", "--model", "human", *judges, "--out", folders["human"])
    floor = [*judges, "--floor", folders["human"], "--sampling", f"temperature={args.temperature}"]
    tool("eval.run", "--model", args.model, *floor, "--out", folders["before"])
    after = ["--model", args.model, "--adapter", str(adapter), *floor, "--out", folders["after"]]
    tool("eval.run", *after)
    tool("eval.run", *after[:-1], folders["alone"], "--refs", "none")
    compared = [folders[name] for name in ("before", "after", "alone", "human")]
    page, differences = evals / "before_after.html", evals / "before_after.json"
    tool("eval.compare", *compared, "--out", str(page), "--json", str(differences))
    export = str(out / "export")
    tool("serve.export", "--model", args.model, "--adapter", str(adapter), "--out", export)
    tool("serve.check", export)
    print(
        f"\nDone in {duration(time.monotonic() - began)}.\n"
        f"  recordings      {train} and {test}\n"
        f"  adapter         {adapter} (PEFT), its curve in {out / 'run' / 'metrics.jsonl'}\n"
        f"  a wav to hear   {out / 'hello' / 'wavs'}\n"
        f"  evaluation      {folders['before']}/report.html and {folders['after']}/report.html\n"
        f"  side by side    {page}, all spoken at temperature {args.temperature}\n"
        f"  for the server  {export}: python -m serve.launch {export} --device cpu\n\n"
        f"{achieved(differences, Path(folders['after'], 'summary.json'), deaf)}; "
        f"hear both in {page}"
    )


def achieved(differences: Path, summary: Path, deaf: bool = False) -> str:
    """In one line: is the fine-tuned voice nearer to the speaker, and what did it cost in words?

    differences: the JSON of eval.compare, in which A is the base, B the fine-tuned voice and D the
    recordings; summary: B's, which says what its errors are counted in. deaf: the recogniser does
    not understand the recordings, so its errors are left out.
    """
    compared = json.loads(differences.read_text(encoding="utf-8"))["comparisons"]
    metrics = {one["name"]: one["metrics"] for one in compared}
    nearer, error = (metrics["B"].get(name) for name in ("sim_target", "error"))
    if nearer is None:
        line = "How near the fine-tuned voice is to the speaker could not be measured"
    else:
        verdict = nearer["overall"]["verdict"]
        line = {
            "B is better": "The fine-tuned voice is nearer to the speaker than the base",
            "B is worse": "The fine-tuned voice is farther from the speaker than the base",
        }.get(verdict, f"It is not shown that fine-tuning made the voice nearer ({verdict})")
        line += f": similarity {_change(metrics, 'sim_target', '{:.2f}')}"
    if deaf:
        line += ", words not judged (the same command with --asr base judges them)"
    elif error is not None:
        unit = json.loads(summary.read_text(encoding="utf-8"))["overall"]["unit"]
        name = {"word": "WER", "char": "CER"}.get(unit, "errors")
        verdict = error["overall"]["verdict"]
        verdict = {
            "B is better": "better",
            "B is worse": "worse",
            "too few texts": "too few texts to tell",
        }.get(verdict, verdict)
        line += f", {name} {_change(metrics, 'error', '{:.1f} %', 100)}: {verdict}"
    return line


def _change(metrics: dict[str, dict], name: str, form: str, scale: float = 1) -> str:
    """Such as "0.59 -> 0.67 (recordings 0.95)"."""
    both, human = metrics["B"][name]["overall"], metrics["D"].get(name)
    text = f"{form.format(scale * both['a'])} -> {form.format(scale * both['b'])}"
    return text + (f" (recordings {form.format(scale * human['overall']['b'])})" if human else "")


def run(command: list[str]) -> None:
    """Show and run one command; stop the demo when it fails."""
    print("\n$ " + shlex.join(command), flush=True)
    environment = dict(os.environ)
    # The tools' folder on the path: a clone is not the working directory of every user.
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(TOOLS), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    start = time.monotonic()
    real = [sys.executable, *command[1:]]
    if command[0] == "accelerate":
        real = [sys.executable, "-m", "accelerate.commands.launch", *command[2:]]
    code = subprocess.run(real, env=environment).returncode
    if code:
        sys.exit(f"demo: the command above failed with exit code {code}")
    print(f"({duration(time.monotonic() - start)})", flush=True)


def make_recordings(folder: Path, train: Path, test: Path, num_test: int) -> None:
    """Two minutes of a voice that no part of the nano family was trained on, and test texts.

    The same recordings every time.
    """
    from recipes.nano.espeak import speak
    from recipes.nano.texts import draw_text
    from recipes.nano.voices import DEMO_VOICE

    rng = random.Random(0)
    rows: dict[str, list[Utterance]] = {"train": [], "test": []}
    for split, count in (("train", NUM_TRAIN), ("test", num_test)):
        seen = set()
        while len(rows[split]) < count:
            text = draw_text("en", rng, split)
            if text_key(text) in seen:
                continue
            seen.add(text_key(text))
            wav = speak(text, "en", DEMO_VOICE, rate=rng.randint(150, 180))
            path = folder / f"{split}{len(rows[split]):03d}.wav"
            write_wav(path, wav, 24000)
            rows[split].append(
                Utterance(audio=path, text=text, id=path.stem, speaker=DEMO_VOICE, language="en")
            )
    voice = next(r for r in rows["train"] if audio_info(r.audio).seconds >= 1.5)
    write_manifest(train, rows["train"])
    write_manifest(
        test, [replace(r, ref_audio=voice.audio, ref_text=voice.text) for r in rows["test"]]
    )
    print(f"{NUM_TRAIN} clips to learn from and {num_test} to test on in {folder}")


def take_recordings(
    source: str, train: Path, test: Path, num_test: int, clips: int, language: str | None = None
) -> None:
    """Split the user's recordings: some last texts of each speaker are the test, and another clip
    of the speaker is the reference.

    language: of those that name none. Those that name no speaker are taken for one voice.
    """
    rows = open_data(source)
    if unknown := sum(not (row.language or language) for row in rows):
        raise ValueError(
            f"{unknown} of {len(rows)} clips of {source} name no language: write it into the data, "
            "or give --language (make demo DATA=... OPTIONS='--language en')"
        )
    if alone := sum(row.speaker is None for row in rows):
        print(f"{alone} of {len(rows)} clips name no speaker: they are taken for one voice")
    rows = [
        replace(row, language=row.language or language, speaker=row.speaker or "voice")
        for row in rows
    ]
    texts = {text_key(row.text) for row in rows}
    if len(texts) < 4:
        raise ValueError(f"{source} has {len(texts)} different texts; at least 4 are needed")
    held_out = last_texts(rows, min(num_test, len(texts) // 3))
    learn = [row for row in rows if text_key(row.text) not in held_out]
    if len(learn) > clips:
        print(f"{len(learn)} clips, of which the demo takes {clips} (--clips)")
        learn = random.Random(0).sample(learn, clips)
    voices: dict[str | None, Utterance] = {}  # a clip of each speaker that can serve as reference
    for row in learn:
        if row.speaker not in voices and 1 <= seconds_of(row) <= 15:
            voices[row.speaker] = row
    tests = []
    for row in rows:
        if text_key(row.text) in held_out and len(tests) < 2 * num_test:
            if row.ref_audio is None and (voice := voices.get(row.speaker)) is not None:
                row = replace(row, ref_audio=voice.audio, ref_text=voice.text)
            tests.append(row)
    write_manifest(train, learn)
    write_manifest(test, tests)
    print(f"{len(learn)} clips to learn from and {len(tests)} to test on")


def last_texts(rows: list[Utterance], count: int) -> set[str]:
    """Texts to test on, one speaker after the other, leaving each at least two to learn from."""
    left: dict[str | None, list[str]] = {}
    for row in rows:
        of_speaker = left.setdefault(row.speaker, [])
        if text_key(row.text) not in of_speaker:
            of_speaker.append(text_key(row.text))
    found: set[str] = set()
    while len(found) < count and any(len(texts) > 2 for texts in left.values()):
        for texts in left.values():
            if len(found) < count and len(texts) > 2:
                found.add(texts.pop())
    return found or {text_key(row.text) for row in rows[-count:]}


def seconds_of(row: Utterance) -> float:
    """0 when the recording cannot be read; `prepare` says why."""
    try:
        return audio_info(row.audio).seconds
    except (ValueError, OSError):
        return 0.0


if __name__ == "__main__":
    main()
