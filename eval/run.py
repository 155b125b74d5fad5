r"""Evaluate a system: speak a set, hear it, measure voices, score, report.

    python -m eval.run --model human --set test.jsonl --out runs/human   # the recogniser's floor
    python -m eval.run --model bosonai/higgs-tts-3-4b --adapter runs/x --set test.jsonl \
        --out runs/x/eval --floor runs/human

Each stage appends to its own JSONL file in the output folder (speech, transcripts, speakers,
scores). Killed and started again with the same command, a run goes on where it stopped and does
nothing twice. Started again with another setting, it refuses and names the setting.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from eval import metrics, report, stages
from eval.anchors import read_anchor
from eval.asr import recognizer_details
from eval.hear import hear
from eval.normalize import NORMALIZERS, normalize, normalizer_version
from eval.pace import Pace
from eval.page import write_report
from eval.plan import plan
from eval.protocols import PROTOCOLS
from eval.public_sets import PUBLIC_SETS
from eval.runs import differences
from eval.sets import REFERENCE_CHOICES, EvalSet, load_set
from eval.speaker import check_independent, encoder_details
from eval.systems import System, open_system
from eval.voices import Voices, calibrated
from eval.work import Locks, rank
from higgs_lab.nano import cache_folder
from higgs_lab.runlog import atomic_path, provenance, remove_leftovers, write_json_atomic
from higgs_lab.tags import strip_tags
from serve.client import ServerError


def evaluate(
    system: System,
    test_set: EvalSet,
    out: str | Path,
    *,
    asr: str = "large-v3",
    speaker: str = "speechbrain/spkrec-ecapa-voxceleb",
    normalizer: str = "fair",
    seed: int = 0,
    takes: int = 1,
    asr_fp16: bool = False,
    device: str | None = None,
    floor: str | Path | None = None,
    ceiling: str | Path | None = None,
    mined_with: str | None = None,
    cache: str | Path | None = None,
) -> dict:
    """Run, resume or join one evaluation in folder `out`; returns the summary.

    asr, speaker: name or path of the judges, or "none" to leave one out.
    takes: clips of each text, spoken with the seeds `seed`, `seed + 1`, ...
    floor, ceiling: folders of finished runs of the same set, measured alike: of the human
        recordings, and of those recordings through the codec.
    mined_with: encoder that chose the references, if one did; it must not be the one that scores.
    device: of the judges, as `chosen_device` has it.
    cache: folder where transcripts and embeddings are kept across runs by the sound's hash and the
        judge's revision and options; None keeps none.

    Raises ValueError when `out` holds a run with other settings, when the system cannot give
    several takes, or when a text has no words left after normalising.
    """
    from higgs_lab.device import chosen_device

    config = settings(
        system,
        test_set,
        asr=asr,
        speaker=speaker,
        normalizer=normalizer,
        seed=seed,
        takes=takes,
        asr_fp16=asr_fp16,
        mined_with=mined_with,
    )
    out, device = Path(out), str(chosen_device(device))
    anchors = [read_anchor(*one, config) for one in (("floor", floor), ("ceiling", ceiling))]
    with _joined(out) as locks:
        with locks.held(1):
            _keep_config(out / "config.yaml", config)
        pace = Pace(cache, "speak", system.name, device)
        speech = stages.speak(system, test_set.rows, out, seed, takes, pace)
        transcripts = hear(speech, test_set.rows, out, asr, asr_fp16, device, cache)
        voices = Voices(out, speaker, device, cache)
        voices.embed(speech, test_set)
        scores = stages.score(speech, transcripts, voices, test_set, out, normalizer)
        summary = metrics.summarise(scores, seed, normalizer)
        scale = voices.calibration(test_set)
        for block in (summary["overall"], *summary["languages"].values()):
            block |= calibrated(block, scale)
        summary |= {
            "config": config,
            "reasons": Counter(
                r["error"] for r in scores if r["failure"] and r["error"]
            ).most_common(3),
            "references": test_set.references,
            "similarity_scale": scale,
            **{a.option: a.beside(scores, config, seed) for a in anchors if a},
            "provenance": provenance(),
        }
        if rank()[0] == 0:
            write_json_atomic(out / "summary.json", summary)
            write_report(out / "report.html", summary, scores, out)
    return summary


def settings(
    system: System,
    test_set: EvalSet,
    *,
    asr: str,
    speaker: str,
    normalizer: str,
    seed: int = 0,
    takes: int = 1,
    asr_fp16: bool = False,
    mined_with: str | None = None,
) -> dict:
    """What decides the result of `evaluate`, found without loading a model. Raises as it does."""
    if takes < 1 or takes > 1 and not system.random:
        raise ValueError(
            f"takes={takes}: {system.name} says a text in one way, so one take is all there is"
        )
    kind = system.details.get("kind")
    if kind in ("human", "codec") and all(row.audio is None for row in test_set.rows):
        raise ValueError(f"{test_set.name} has no recordings, so there is no {kind} row of it")
    for row in test_set.rows:  # what would be refused after hours of speaking is refused here
        if not normalize(strip_tags(row.text), row.language, normalizer, heard=True):
            raise ValueError(f"{row.where}: no words are left of {row.text!r} by {normalizer}")
    encoder = None if speaker == "none" else encoder_details(speaker)
    if encoder and mined_with:
        check_independent(encoder, mined_with)
    languages = {row.language for row in test_set.rows}
    return {
        "system": system.details | {"name": system.name},
        "set": {
            "name": test_set.name,
            "revision": test_set.revision,
            "rows": len(test_set.rows),
            "references": test_set.reference_revision,
            "recordings": test_set.recording_revision,
        },
        "seed": seed,
        "takes": takes,
        "asr": None if asr == "none" else recognizer_details(asr, asr_fp16, languages),
        "encoder": encoder,
        "normalizer": normalizer_version(normalizer),
        "metrics": metrics.METRICS_VERSION,
    }


def _keep_config(path: Path, config: dict) -> None:
    """Write the settings of a new run, or refuse to go on with other ones."""
    import yaml

    _check_config(path, config)
    if not path.exists():
        with atomic_path(path) as temporary:
            temporary.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def _check_config(path: Path, config: dict) -> None:
    import yaml

    if not path.exists():
        return
    before = yaml.safe_load(path.read_text(encoding="utf-8"))
    if config["system"].get("serves", "") is None:  # a server that is down: `start` refuses it
        config["system"]["serves"] = before["system"].get("serves")
    apart = differences(before, yaml.safe_load(yaml.safe_dump(config)))
    if apart:
        listed = "\n".join(f"  {name}: was {old!r}, now {new!r}" for name, old, new in apart)
        raise ValueError(
            f"{path.parent} holds a run with other settings:\n{listed}\n"
            "Mixing them would score two systems as one. Use another --out, or delete this one."
        )


@contextlib.contextmanager
def _joined(out: Path) -> Iterator[Locks]:
    """Take part in the work on a folder; whoever is alone there first clears up after the dead."""
    locks = Locks(out / ".lock")
    with contextlib.closing(locks):
        if locks.take(0):
            remove_leftovers(out)
            remove_leftovers(out / "wavs")
        with locks.held(0, shared=True):
            yield locks


def _judges(asr: str | None, normalizer: str | None, test_set: EvalSet) -> tuple[str, str]:
    """Recogniser and normaliser: as given, else what the set's protocol has; says what it chose."""
    public = test_set.public
    if public is None:
        return asr or "large-v3", normalizer or "fair"
    chosen = asr or public.asr, normalizer or public.protocol or "fair"
    if rank()[0] == 0:
        print(f"{test_set.name}: texts compared by {chosen[1]}, heard by {chosen[0]}")
        if public.protocol and chosen[1] != public.protocol:
            print(f"  published figures on this set follow --normalizer {public.protocol}")
        elif public.protocol:
            print(f"  published figures were heard by {PROTOCOLS[public.protocol].recognizers}")
    return chosen


def _options(pairs: Sequence[str]) -> dict:
    """key=value pairs as a dict, values read as YAML."""
    import yaml

    result = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--sampling {pair!r}: write key=value, such as temperature=0.7")
        result[key] = yaml.safe_load(value)
    return result


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="checkpoint, http://server, cmd:COMMAND, wavs:FOLDER, "
        "espeak, human, codec:CHECKPOINT: see eval.systems")  # fmt: skip
    add("--adapter", help="LoRA adapter folder, with a checkpoint")
    add(
        "--set",
        required=True,
        help="manifest (.jsonl), data folder, CSV, hub name, or one of "
        f"{', '.join(PUBLIC_SETS)}: see eval.public_sets",
    )
    add("--set-path", help="folder of a public set that is not to be fetched")
    add("--split", help="split of the set")
    add("--language", help="language of rows that name none")
    add("--langs", default="", help="languages to keep, such as tier1,de,zh")
    add("--limit", type=int, help="rows per language, drawn by --seed")
    add("--refs", default="auto", choices=REFERENCE_CHOICES, help="where references come from")
    add("--seed", type=int, default=0, help="of sampling, of --limit, of references")
    add("--takes", type=int, default=1, help="clips of each text, with seeds from --seed on")
    add(
        "--asr",
        help="Whisper, mms, auto, nano, none, ...: see eval.asr (default: the set's, or large-v3)",
    )
    add("--asr-fp16", action="store_true", help="recognise in half precision (GPU)")
    add("--speaker", default="speechbrain/spkrec-ecapa-voxceleb",
        help="ECAPA or WavLM x-vector encoder: hub name, folder, nano, none")  # fmt: skip
    add("--mined-with", help="encoder that chose the references; refused if it is --speaker")
    add("--normalizer", choices=NORMALIZERS, help="default: the public set's protocol, or fair")
    add("--sampling", nargs="*", default=[], metavar="KEY=VALUE", help="such as temperature=0.7")
    add("--batch", type=int,
        help="clips spoken at once (64 on a GPU, else 16); requests to a server (4)")  # fmt: skip
    add("--dialect", default="vllm", choices=("vllm", "sglang"), help="of a server")
    add("--device", help="cuda, cuda:1, cpu, auto (default: cuda if there is one)")
    add("--floor", help="output folder of a --model human run of the same set")
    add("--ceiling", help="output folder of a --model codec:CHECKPOINT run of the set")
    add("--cache", help="folder for transcripts and voices of all runs, or none")
    add("--dry-run", action="store_true", help="say what would be done and how long it would take")
    add("--out", required=True, help="output folder; an existing run is resumed")
    return parser


def main(argv: list[str] | None = None) -> dict:
    args = parser().parse_args(argv)
    from higgs_lab.device import chosen_device

    try:
        device = str(chosen_device(args.device))
        system = open_system(
            args.model,
            args.adapter,
            device=device,
            sampling=_options(args.sampling),
            batch=args.batch,
            dialect=args.dialect,
        )
        test_set = load_set(
            args.set,
            default_language=args.language,
            langs=[name for name in args.langs.split(",") if name],
            split=args.split,
            limit=args.limit,
            refs=args.refs,
            seed=args.seed,
            folder=args.set_path,
        )
        asr, normalizer = _judges(args.asr, args.normalizer, test_set)
        cache = None if args.cache == "none" else args.cache or cache_folder() / "eval"
        judged = dict(
            asr=asr,
            speaker=args.speaker,
            normalizer=normalizer,
            seed=args.seed,
            takes=args.takes,
            asr_fp16=args.asr_fp16,
            mined_with=args.mined_with,
        )
        if args.dry_run:
            config = settings(system, test_set, **judged)
            _check_config(Path(args.out) / "config.yaml", config)
            lines = plan(system, test_set, config, args.out, asr=asr, device=device, cache=cache)
            if rank()[0] == 0:
                print("\n".join(lines))
            return {"config": config}
        anchors = {"floor": args.floor, "ceiling": args.ceiling}
        summary = evaluate(
            system, test_set, args.out, device=device, cache=cache, **anchors, **judged
        )
    except ServerError as error:
        sys.exit(
            f"eval.run: {error}\nThe clips so far are kept: when the server is back, the same "
            "command goes on where it stopped"
        )
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"eval.run: {error}")
    if rank()[0] == 0:
        report.print_table(summary)
        print(f"report: {Path(args.out) / 'report.html'}")
    return summary


if __name__ == "__main__":
    main()
