"""`python -m serve.export`: a base and an adapter -> a directory that the servers load.

    python -m serve.export --model bosonai/higgs-tts-3-4b@REV --adapter runs/x --out exports/x
    python -m serve.export --model runs/full/model --out exports/full
    python -m serve.export --model BASE --adapter runs/a --out exports/a --adapter runs/b --out ...
    python -m serve.export --model BASE --from org/their-finetune --out exports/theirs

The result has the base's keys, shapes, dtypes and shards, a complete index, the codec untouched,
`audio_tokenizer/` (vLLM-Omni's clone encoder), `deploy/*.yaml`, a model card, and `export.json`
with every check and its figure. It appears whole or not at all; of several exports, all or none.
Tensors pass through one at a time and each is read once, however many exports are made of it, so
the 4B model takes a few GB of memory.

`--from` takes what other trainers made: a checkpoint under the names of the Hugging Face port
(`model.*`, `audio_embedding.*`), whole or sharded, or a PEFT adapter trained on that port or on its
bare backbone. Codec, tokenizer and configuration are the base's.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from higgs_lab.adapter import check_base, read_meta
from higgs_lab.checkpoint import (
    CODEC_PREFIX,
    TIED_COPIES,
    Checkpoint,
    NativeFiles,
    resolve_checkpoint,
    rewrite_many,
)
from higgs_lab.codec import Codec
from higgs_lab.runlog import (
    Progress,
    atomic_path,
    duration,
    peak_memory_gb,
    provenance,
    write_json_atomic,
)
from serve.card import evaluation_table, model_card
from serve.check import check_export, failures, table
from serve.merge import MergeFigures, merged
from serve.sources import Source, Weights, open_source

PROFILES = Path(__file__).parent / "profiles"
# Less of an adapter's change than this surviving the cast to the stored dtype is a failed merge.
MIN_DELTA_KEPT = 0.5
SPARE_BYTES = 256 * 2**20


@dataclass
class Job:
    """One export of several: `source` is an adapter, a checkpoint or None for the base as it is.

    evaluation: folder of an eval.run, whose table goes into the model card. data, consent: what the
    card says about the recordings and whose consent there is.
    """

    out: str | Path
    source: str | Path | None = None
    evaluation: str | Path | None = None
    data: str | None = None
    consent: str | None = None
    figures: MergeFigures = field(default_factory=MergeFigures)


def export(model: str | Path, out: str | Path, adapter: str | Path | None = None, **said) -> dict:
    """Write the export directory `out`; returns what stands in its export.json. `said`: see Job.

    Raises ValueError when the adapter has no effect, belongs to another base, or does not survive
    the merge; OSError when the disk is too small; FileNotFoundError for what is not there. Nothing
    is left behind then.
    """
    return export_many(model, [Job(out, adapter, **said)])[0]


def export_many(
    model: str | Path, jobs: Sequence[Job], table_from: str | None = None
) -> list[dict]:
    """Several exports of one base in one pass over it; all of them, or none and an exception.

    table_from: see sources.open_source.
    """
    base = resolve_checkpoint(model)
    outs = [Path(job.out) for job in jobs]
    if twice := [str(out) for out, n in Counter(o.resolve() for o in outs).items() if n > 1]:
        raise ValueError(f"{twice[0]} is named for two exports: give each its own folder")
    for out in outs:
        if out.exists() and not (out / "export.json").is_file() and any(out.iterdir()):
            raise ValueError(f"{out} exists and is no export: name another folder")
    files = NativeFiles(base.path)
    tables = [None if job.evaluation is None else evaluation_table(job.evaluation) for job in jobs]
    sources = [
        None if job.source is None else _checked(open_source(job.source, table_from), base, files)
        for job in jobs
    ]
    _check_disk(base.path, files, outs)
    codec = Codec.from_pretrained(base.path)
    with ExitStack() as stack:
        temporaries = [stack.enter_context(atomic_path(out)) for out in outs]
        _write_weights(base, temporaries, sources, [job.figures for job in jobs], files)
        records = []
        for job, out, temporary, source, lines in zip(
            jobs, outs, temporaries, sources, tables, strict=True
        ):
            records.append(_complete(base, job, out, temporary, source, codec, lines))
    return records


def _complete(
    base: Checkpoint,
    job: Job,
    out: Path,
    temporary: Path,
    source: Source | None,
    codec: Codec,
    evaluation: str | None,
) -> dict:
    """Everything beside the weights, and the checks; returns the record."""
    codec.save_tokenizer_folder(temporary / "audio_tokenizer")
    shutil.copytree(PROFILES, temporary / "deploy")
    is_adapter = source is not None and source.kind == "adapter"
    record = {
        "base": base.name,
        "revision": base.revision,
        "adapter": str(source.path) if is_adapter else None,
        "from": None if source is None or is_adapter else str(source.path),
        "adapter_meta": read_meta(source.path) if is_adapter else {},
        "merge": None if source is None else job.figures.as_dict(),
        "data": job.data,
        "consent": job.consent,
        "codec_hash": codec.hash,
        "checks": {},
    }
    findings = check_export(temporary)
    if bad := failures(findings, "vllm"):
        raise ValueError(f"the export would not be served:\n{table(bad)}")
    # (The check has compared the bundled codec with audio_tokenizer/, which is the base's.)
    if _layout(temporary) != _layout(base.path):
        raise ValueError("the key layout changed on the way: please report this")
    record["checks"] = {f.rule: {"vllm": f.vllm, "sglang": f.sglang} for f in findings}
    record["peak_memory_gb"] = peak_memory_gb()
    record["provenance"] = provenance()
    write_json_atomic(temporary / "export.json", record)
    card = model_card(out.name, record, evaluation)
    (temporary / "README.md").write_text(card, encoding="utf-8")
    return record


def _checked(source: Source, base: Checkpoint, files: NativeFiles) -> Source:
    """Refuse what was made for another base, or lacks something of this one."""
    named = f"{source.kind} {source.path}"
    strangers = sorted(source.keys - set(files.keys()))
    if strangers:
        name = source.names.get(strangers[0], strangers[0])
        raise ValueError(
            f"{named} has {name!r}, that is {strangers[0]!r}, which {base.path} lacks: another base"
        )
    if not isinstance(source, Weights):
        check_base(source.path, base.path)
        return source
    talker = {k for k in files.keys() if not k.startswith(CODEC_PREFIX) and k not in TIED_COPIES}
    if missing := sorted(talker - source.keys):
        raise ValueError(f"{named} has no weight for {missing[0]!r} ({len(missing)} missing)")
    for key, tensor in files.items(list(source.codec)):
        if not torch.equal(tensor.float(), source.tensor(source.codec[key]).float()):
            raise ValueError(
                f"{named} bundles another codec than {base.path}: {key!r} differs. Give it as "
                "--model if it is a whole native checkpoint"
            )
    return source


def _write_weights(
    base: Checkpoint,
    outs: list[Path],
    sources: list[Source | None],
    figures: list[MergeFigures],
    files: NativeFiles,
) -> None:
    """Copy the weights, merging on the way; refuses a merge that lost the adapter."""
    total = sum((base.path / file).stat().st_size for file in files.files) / 1e9
    with Progress(round(total, 2), "GB", "export") as progress:

        def edit_of(number: int):
            def edit(key: str, tensor: Tensor) -> Tensor:
                if number == 0:  # one pass, however many exports
                    progress.update(tensor.nbytes / 1e9)
                source = sources[number]
                return tensor if source is None else merged(source, key, tensor, figures[number])

            return edit

        rewrite_many(base.path, [(out, edit_of(i)) for i, out in enumerate(outs)])
    for source, figure in zip(sources, figures, strict=True):
        if source is None or (figure.delta_norm2 == 0 and source.kind == "checkpoint"):
            continue  # a checkpoint may be the base under other names
        if figure.delta_norm2 == 0:
            raise ValueError(
                f"adapter {source.path} has no effect: its change is zero. Was it trained?"
            )
        if figure.kept < MIN_DELTA_KEPT:
            raise ValueError(
                f"merge parity failed: only {figure.kept:.0%} of the change that {source.kind} "
                f"{source.path} makes survives in the stored dtype, it is too small for it: train "
                "longer or with a higher learning rate"
            )


def _layout(path: Path) -> dict[str, tuple]:
    """key -> dtype, shape, shard of a directory."""
    files = NativeFiles(path)
    return {k: (file, *spec) for file in files.files for k, spec in _flat(files.specs(file))}


def _flat(specs: dict[str, tuple[str, list[int]]]):
    return ((key, (dtype, tuple(shape))) for key, (dtype, shape) in specs.items())


def _check_disk(base: Path, files: NativeFiles, outs: Sequence[Path]) -> None:
    """Per export: the weights once more, the codec in fp32, and some to spare."""
    need = 2 * SPARE_BYTES + sum((base / file).stat().st_size for file in files.files)
    for key, spec in ((k, s) for f in files.files for k, s in files.specs(f).items()):
        if key.startswith(CODEC_PREFIX):
            need += 4 * torch.Size(spec[1]).numel()
    folders = [next(p for p in [out, *out.resolve().parents] if p.is_dir()) for out in outs]
    for disk, count in Counter(os.stat(folder).st_dev for folder in folders).items():
        folder = next(f for f in folders if os.stat(f).st_dev == disk)
        free = shutil.disk_usage(folder).free
        if free < need * count:
            raise OSError(
                f"{folder} has {free / 1e9:.1f} GB free, {count} x {need / 1e9:.1f} GB are needed: "
                "free some space or choose another --out"
            )


def hub_ready(repos: Sequence[str]) -> None:
    """Raise ValueError before hours of work when nobody is logged in, or a name is no hub name."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        for repo in repos:
            validate_repo_id(repo)
        HfApi().whoami()
    except HFValidationError as error:
        raise ValueError(f"--push-to-hub: {error}") from error
    except Exception as error:  # no token, a wrong one, no network: the hub raises many kinds
        raise ValueError(
            f"--push-to-hub: the hub does not know you ({error}). Run `hf auth login`, or set "
            "HF_TOKEN"
        ) from error


def push(out: str | Path, repo: str) -> str:
    """Upload an export as a private hub model; returns its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    url = api.create_repo(repo, private=True, exist_ok=True)
    api.upload_folder(folder_path=out, repo_id=repo, commit_message="Export of higgs_lab")
    return str(url)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serve.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="base: nano, a folder or org/name@revision")
    sources = {"dest": "sources", "action": "append", "metavar": "SOURCE"}
    add("--adapter", **sources, help="run or PEFT folder; once per --out")
    add("--from", **sources, help="checkpoint or adapter of another trainer; once per --out")
    add("--out", action="append", required=True, help="export directory")
    add("--eval", action="append", metavar="DIR", help="eval.run folder for the card; per --out")
    add("--data", help="for the card: what it was trained on")
    add("--consent", help="for the card: who consented to the use of the voice, and how")
    add("--table", choices=["embedding", "head"], help="which to keep if a trainer untied them")
    add("--push-to-hub", action="append", metavar="ORG/NAME", help="upload, privately; per --out")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    per_out = {"--adapter/--from": args.sources, "--eval": args.eval}
    per_out["--push-to-hub"] = args.push_to_hub
    for option, values in per_out.items():
        if values and len(values) != len(args.out):
            parser.error(f"{len(values)} {option} but {len(args.out)} --out: one each, in order")
    nothing = [None] * len(args.out)
    jobs = [
        Job(out, source, evaluation, args.data, args.consent)
        for out, source, evaluation in zip(
            args.out, args.sources or nothing, args.eval or nothing, strict=True
        )
    ]
    begun = time.monotonic()
    try:
        if args.push_to_hub:
            hub_ready(args.push_to_hub)
        records = export_many(args.model, jobs, args.table)
    except (ValueError, OSError) as error:
        sys.exit(f"serve.export: {error}")
    for out, record, repo in zip(args.out, records, args.push_to_hub or nothing, strict=True):
        if (merge := record["merge"]) is not None:
            print(
                f"{out}: changed {merge['changed']} of {merge['tensors']} tensors; output error "
                f"{merge['output_error']:.2g}, {merge['delta_kept']:.1%} of the change kept"
            )
        print(f"{out} is ready: python -m serve.launch {out}")
        if repo:
            print(push(out, repo))
    took = duration(time.monotonic() - begun)
    print(f"{took}, peak memory {records[-1]['peak_memory_gb']:.2f} GB")


if __name__ == "__main__":
    main()
