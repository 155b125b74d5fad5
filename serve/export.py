"""`python -m serve.export`: a base and an adapter -> a directory that the servers load.

    python -m serve.export --model bosonai/higgs-tts-3-4b@REV --adapter runs/x --out exports/x
    python -m serve.export --model runs/full/checkpoints/step-900/model --out exports/full
    python -m serve.export --model BASE --adapter runs/a --out exports/a --adapter runs/b --out ...

The result has the base's keys, shapes, dtypes and shards, a complete index, the codec untouched,
`audio_tokenizer/` (vLLM-Omni's clone encoder), `deploy/*.yaml`, a model card, and `export.json`
with every check and its figure. It appears whole or not at all. Tensors pass through one at a time,
so merging the 4B model takes a few GB of memory.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

from higgs_lab.adapter import check_base, read_meta
from higgs_lab.checkpoint import Checkpoint, NativeFiles, resolve_checkpoint, rewrite_native
from higgs_lab.codec import Codec
from higgs_lab.runlog import Progress, atomic_path, provenance, write_json_atomic
from serve.card import model_card
from serve.check import check_export, failures, table
from serve.merge import Adapter, MergeFigures, merged, read_adapter

PROFILES = Path(__file__).parent / "profiles"
# Less of an adapter's change than this surviving the cast to the stored dtype is a failed merge.
MIN_DELTA_KEPT = 0.5
SPARE_BYTES = 256 * 2**20


def export(model: str | Path, out: str | Path, adapter: str | Path | None = None) -> dict:
    """Write the export directory `out`; returns what stands in its export.json.

    Raises ValueError when the adapter has no effect, belongs to another base, or does not survive
    the merge; OSError when the disk is too small; FileNotFoundError for what is not there. Nothing
    is left behind then.
    """
    base, out = resolve_checkpoint(model), Path(out)
    if out.exists() and not (out / "export.json").is_file() and any(out.iterdir()):
        raise ValueError(f"{out} exists and is no export: name another folder")
    files = NativeFiles(base.path)
    loaded = None if adapter is None else _checked(read_adapter(adapter), base, files)
    _check_disk(base.path, files, out)
    codec = Codec.from_pretrained(base.path)
    with atomic_path(out) as temporary:
        figures = _write_weights(base, temporary, loaded, files)
        codec.save_tokenizer_folder(temporary / "audio_tokenizer")
        shutil.copytree(PROFILES, temporary / "deploy")
        record = {
            "base": base.name,
            "revision": base.revision,
            "adapter": None if loaded is None else str(loaded.path),
            "adapter_meta": {} if loaded is None else read_meta(loaded.path),
            "merge": None if loaded is None else figures.as_dict(),
            "codec_hash": codec.hash,
            "checks": {},
        }
        findings = check_export(temporary)
        if bad := failures(findings, "vllm"):
            raise ValueError(f"the export would not be served:\n{table(bad)}")
        kept = Codec.from_pretrained(temporary).hash == codec.hash
        if not kept or _layout(temporary) != _layout(base.path):
            raise ValueError("the codec or the key layout changed on the way: please report this")
        record["checks"] = {f.rule: {"vllm": f.vllm, "sglang": f.sglang} for f in findings}
        record["provenance"] = provenance()
        write_json_atomic(temporary / "export.json", record)
        (temporary / "README.md").write_text(model_card(out.name, record), encoding="utf-8")
    return record


def _checked(adapter: Adapter, base: Checkpoint, files: NativeFiles) -> Adapter:
    check_base(adapter.path, base.path)
    strangers = sorted(adapter.keys - set(files.keys()))
    if strangers:
        raise ValueError(f"adapter {adapter.path} trains {strangers[0]!r}, which {base.path} lacks")
    return adapter


def _write_weights(
    base: Checkpoint, out: Path, adapter: Adapter | None, files: NativeFiles
) -> MergeFigures:
    """Copy the weights, merging on the way; refuses a merge that lost the adapter."""
    figures = MergeFigures()
    with Progress(len(files.shard), "tensors", "export") as progress:

        def edit(key: str, tensor: Tensor) -> Tensor:
            progress.update()
            return tensor if adapter is None else merged(adapter, key, tensor, figures)

        rewrite_native(base.path, out, edit)
    if adapter is None:
        return figures
    if figures.delta_norm2 == 0:
        raise ValueError(
            f"adapter {adapter.path} has no effect: its change is zero. Was it trained?"
        )
    if figures.kept < MIN_DELTA_KEPT:
        raise ValueError(
            f"merge parity failed: only {figures.kept:.0%} of the adapter's change survives in the "
            "stored dtype, it is too small for it: train longer or with a higher learning rate"
        )
    return figures


def _layout(path: Path) -> dict[str, tuple]:
    """key -> dtype, shape, shard of a directory."""
    files = NativeFiles(path)
    return {k: (file, *spec) for file in files.files for k, spec in _flat(files.specs(file))}


def _flat(specs: dict[str, tuple[str, list[int]]]):
    return ((key, (dtype, tuple(shape))) for key, (dtype, shape) in specs.items())


def _check_disk(base: Path, files: NativeFiles, out: Path) -> None:
    """The weights once more, the codec in fp32, and some to spare."""
    need = 2 * SPARE_BYTES + sum((base / file).stat().st_size for file in files.files)
    for key, spec in ((k, s) for f in files.files for k, s in files.specs(f).items()):
        if ".modality_embeddings.0.model." in key:
            need += 4 * torch.Size(spec[1]).numel()
    folder = next(p for p in [out, *out.resolve().parents] if p.is_dir())
    free = shutil.disk_usage(folder).free
    if free < need:
        raise OSError(
            f"{folder} has {free / 1e9:.1f} GB free, the export takes {need / 1e9:.1f} GB: free "
            "some space or choose another --out"
        )


def push(out: str | Path, repo: str) -> str:
    """Upload an export as a private hub model; returns its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    url = api.create_repo(repo, private=True, exist_ok=True)
    api.upload_folder(folder_path=out, repo_id=repo, commit_message="Export of higgs_lab")
    return str(url)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m serve.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="base: nano, a folder or org/name@revision")
    parser.add_argument("--adapter", action="append", help="run or PEFT folder; once per --out")
    parser.add_argument("--out", action="append", required=True, help="export directory")
    parser.add_argument("--push-to-hub", metavar="ORG/NAME", help="upload it, privately")
    args = parser.parse_args()
    adapters = args.adapter or [None]
    if len(adapters) != len(args.out):
        parser.error(f"{len(adapters)} adapters but {len(args.out)} output folders: one each")
    if args.push_to_hub and len(args.out) > 1:
        parser.error("--push-to-hub takes one export at a time")
    for adapter, out in zip(adapters, args.out, strict=True):
        try:
            record = export(args.model, out, adapter)
        except (ValueError, OSError) as error:
            sys.exit(f"serve.export: {error}")
        if (merge := record["merge"]) is not None:
            print(
                f"merged {merge['changed']} of {merge['tensors']} tensors; output error "
                f"{merge['output_error']:.2g}, {merge['delta_kept']:.1%} of the change kept"
            )
        print(f"{out} is ready: python -m serve.launch {out}")
        if args.push_to_hub:
            print(push(out, args.push_to_hub))


if __name__ == "__main__":
    main()
