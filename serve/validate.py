r"""`python -m serve.validate`: check on the real weights what could only be assumed without them.

    python -m serve.validate --model bosonai/higgs-tts-3-4b --out validation \
        --recordings my/manifest.jsonl --sglang http://127.0.0.1:8001
    python -m serve.validate --model nano --out /tmp/validation --device cpu

One run through everything that this toolkit takes from a single source or could not try: the key
inventory, tied heads, bundled and other codecs, precisions, the training alignment, how requests
end, prompt and greedy codes of the servers, and word errors of the toolkit and of each server on
fifty sentences. Each step stores its result when it is done; started again with the same command,
the run goes on with what is missing or failed. A step that fails says so and stops no other.
`report.md` and `report.json` are made to be attached to a bug report: no sound, no key is in them.

recordings: a manifest or data folder with transcripts, of one voice whose owner consented; the
first clip of 1 to 30 s is the voice that is cloned. Without any, what needs speech is skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from higgs_lab.runlog import atomic_path, duration, provenance, write_json_atomic
from serve.validation import FAIL, OK, SKIP, WARN, Outcome, Run, Skip

Step = Callable[[Run], Outcome]


def steps() -> dict[str, Step]:
    """Name -> step, cheap ones first."""
    from serve import validate_checkpoint as checkpoint
    from serve import validate_speech as speech

    return {
        "files": checkpoint.files,
        "config": checkpoint.config,
        "tokenizer": checkpoint.tokenizer,
        "keys": checkpoint.keys,
        "tied heads": checkpoint.tied_heads,
        "bundled codec": checkpoint.bundled_codec,
        "codec precision": checkpoint.codec_precision,
        "engine's codec": checkpoint.other_codec,
        "v2 tokenizer": checkpoint.v2_tokenizer,
        "alignment": speech.alignment,
        "talker precision": speech.talker_precision,
        "endings": speech.endings,
        "export": speech.exported,
        "vLLM-Omni server": speech.vllm_server,
        "SGLang-Omni server": speech.sglang_server,
        "words: human": speech.words_of_recordings,
        "words: toolkit": speech.words_of_toolkit,
        "words: vLLM-Omni": speech.words_of_vllm,
        "words: SGLang-Omni": speech.words_of_sglang,
        "words compared": speech.words_compared,
    }


def validate(run: Run, only: list[str] | None = None, again: list[str] | None = None) -> dict:
    """Do or resume the steps; returns the report that report.json holds.

    only: names of the steps to do; again: done ones to repeat. Raises ValueError for an unknown
    step, or when `run.out` holds a validation with other settings.
    """
    known = steps()
    for name in [*(only or []), *(again or [])]:
        if name not in known:
            raise ValueError(f"no step {name!r}; there are {', '.join(known)}")
    folder = run.out / "steps"
    folder.mkdir(parents=True, exist_ok=True)
    _keep_settings(run)
    for name, step in known.items():
        if only and name not in only:
            continue
        file = folder / f"{_slug(name)}.json"
        before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        if before and before["verdict"] in (OK, WARN) and name not in (again or []):
            print(f"{name}: {before['verdict']} (done before)", flush=True)
            continue
        print(f"{name} ...", flush=True)
        result = _do(step, run)
        write_json_atomic(file, {"name": name} | result)
        print(f"{name}: {result['verdict']} in {duration(result['seconds'])}", flush=True)
        for line in result["lines"]:
            print(f"  {line}", flush=True)
        write_report(run)
    return write_report(run)


def _do(step: Step, run: Run) -> dict:
    begun = time.monotonic()
    try:
        outcome = step(run)
    except Skip as reason:
        outcome = Outcome(SKIP, [str(reason)])
    except Exception as error:  # whatever it is, the other steps are worth doing
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        outcome = Outcome(FAIL, [f"{type(error).__name__}: {error} ({where})"])
    return asdict(outcome) | {"seconds": time.monotonic() - begun}


def _keep_settings(run: Run) -> None:
    file, settings = run.out / "settings.json", run.settings()
    if not file.is_file():
        write_json_atomic(file, settings)
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    # A server that is there now, or recordings that are given now, are what a resume is for.
    may_come = ("vllm_url", "sglang_url", "recordings")
    changed = [
        f"{k}: was {before.get(k)!r}, now {v!r}"
        for k, v in settings.items()
        if before.get(k) != v and not (k in may_come and before.get(k) is None)
    ]
    if changed:
        raise ValueError(
            f"{run.out} holds a validation with other settings ({'; '.join(changed)}): use "
            "another --out"
        )
    write_json_atomic(file, settings)


def write_report(run: Run) -> dict:
    """report.json and report.md of the steps done so far."""
    done = {}
    for name in steps():
        file = run.out / "steps" / f"{_slug(name)}.json"
        if file.is_file():
            done[name] = json.loads(file.read_text(encoding="utf-8"))
    settings = json.loads((run.out / "settings.json").read_text(encoding="utf-8"))
    for name in ("model", "recordings", "other_codec"):  # folders of the user's machine
        if settings[name] and Path(settings[name]).exists():
            settings[name] = Path(settings[name]).name
    about = provenance()
    del about["command"]  # it may name folders of the user
    steps_text = json.dumps(done)
    for place, name in ((run.path.resolve(), "MODEL"), (run.out.resolve(), "OUT")):
        steps_text = steps_text.replace(json.dumps(str(place))[1:-1], name)
    report = {"settings": settings, "provenance": about, "steps": json.loads(steps_text)}
    write_json_atomic(run.out / "report.json", report)
    with atomic_path(run.out / "report.md") as temporary:
        temporary.write_text(_markdown(report), encoding="utf-8")
    return report


def _markdown(report: dict) -> str:
    settings, about = report["settings"], report["provenance"]
    rows = [f"# Validation of {settings['model']}", ""]
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    rows += [f"Revision `{settings['revision']}`, {about['time']}, {about.get('device', 'CPU')}."]
    rows += [f"higgs_lab at `{about['git_commit']}`; {versions}; {about['platform']}.", ""]
    rows += ["`warn`: unlike what was assumed, nothing breaks. `FAIL`: something relies on it.", ""]
    rows += ["| step | verdict | seconds | |", "|---|---|---|---|"]
    for name, step in report["steps"].items():
        why = step["lines"][0] if step["lines"] and step["verdict"] != OK else ""
        cells = (name, step["verdict"], f"{step['seconds']:.0f}", why.replace("|", "\\|"))
        rows.append(f"| {' | '.join(cells)} |")
    about = {name: " ".join((step.__doc__ or "").split()) for name, step in steps().items()}
    for name, step in report["steps"].items():
        rows += ["", f"## {name}: {step['verdict']}", "", about.get(name, "")]
        if step["lines"]:
            rows += ["", *(f"- {line}" for line in step["lines"])]
        if step["figures"]:
            figures = json.dumps(step["figures"], indent=1, ensure_ascii=False)
            rows += ["", "```json", figures, "```"]
    return "\n".join(rows) + "\n"


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name.lower())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m serve.validate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="nano, a folder or org/name@revision")
    add("--out", type=Path, required=True, help="folder of the validation; an old one is resumed")
    add("--device", default="auto", choices=["auto", "cuda", "cpu"])
    add("--recordings", help="manifest or data folder of one voice, with transcripts")
    add("--vllm", dest="vllm_url", metavar="URL", help="a running vLLM-Omni; default: start one")
    add("--sglang", dest="sglang_url", metavar="URL", help="a running SGLang-Omni on the export")
    add("--api-key", default=os.environ.get("VLLM_API_KEY"), help="of the servers at those URLs")
    add("--profile", help="deploy profile of the server that is started")
    add("--other-codec", default=Run.other_codec, help="hub name or folder of the engine's codec")
    add("--asr", help="recogniser of eval.run; default large-v3, for nano its own")
    add("--speaker", help="speaker encoder of eval.run; default ECAPA, for nano its own")
    add("--texts", type=int, default=50, help="sentences of the word error panel")
    add("--only", nargs="+", metavar="STEP", help="do these steps only")
    add("--again", nargs="+", metavar="STEP", help="repeat these steps")
    args = vars(parser.parse_args(argv))
    only, again = args.pop("only"), args.pop("again")
    for judge in ("asr", "speaker"):
        args[judge] = args[judge] or ("nano" if args["model"] == "nano" else getattr(Run, judge))
    run = Run(**args)
    try:
        report = validate(run, only, again)
    except (ValueError, OSError) as error:
        sys.exit(f"serve.validate: {error}")
    counts = [step["verdict"] for step in report["steps"].values()]
    said = ", ".join(f"{counts.count(v)} {v}" for v in (OK, WARN, FAIL, SKIP) if v in counts)
    print(f"{said}; the report to attach: {run.out / 'report.md'}")
    sys.exit(FAIL in counts)


if __name__ == "__main__":
    main()
