"""Pack trained parts into the files that the project ships.

    python -m recipes.nano.pack --trained runs/nano/ship --out higgs_lab/nano/assets

`--trained` holds what the training scripts leave in --ship: `codec.safetensors` (packed already),
`whisper.safetensors`, `ecapa.safetensors`, `talker-mlp.safetensors` and `talker-rest.safetensors`.
Parts that are missing are left as they are.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from safetensors.torch import load_file

from higgs_lab.nano.packing import pack

LIMIT, TOTAL_LIMIT = 16 * 2**20, 24 * 2**20  # bytes, of a file and of all


def pack_whisper(sources: list[Path], target: Path) -> None:
    from recipes.nano.train_whisper import DIMS

    tensors = load_file(sources[0])
    del tensors["encoder.positional_embedding"]  # sinusoids
    name = "decoder.positional_embedding"
    tensors[name] = tensors[name][:128]  # no text of the domain is longer
    pack(tensors, target, {"dims": json.dumps(DIMS)})


def pack_ecapa(sources: list[Path], target: Path) -> None:
    from recipes.nano.train_ecapa import SIZES

    tensors = {
        k: v for k, v in load_file(sources[0]).items() if not k.endswith("num_batches_tracked")
    }
    pack(tensors, target, {"sizes": json.dumps(SIZES)})


def pack_talker(sources: list[Path], target: Path) -> None:
    from recipes.nano.train_talker import TEXT_CONFIG

    tensors = {name: value for source in sources for name, value in load_file(source).items()}
    pack(tensors, target, {"text_config": json.dumps(TEXT_CONFIG)})


def pack_codec(sources: list[Path], target: Path) -> None:
    shutil.copyfile(sources[0], target)


PARTS = {
    "codec": (["codec"], pack_codec),
    "whisper": (["whisper"], pack_whisper),
    "ecapa": (["ecapa"], pack_ecapa),
    "talker": (["talker-mlp", "talker-rest"], pack_talker),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trained", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for part, (names, write) in PARTS.items():
        sources = [args.trained / f"{name}.safetensors" for name in names]
        target = args.out / f"{part}.safetensors"
        if all(source.exists() for source in sources):
            write(sources, target)
    files = sorted(args.out.glob("*.safetensors"))
    for file in files:
        size = file.stat().st_size
        print(f"{file} {size / 2**20:.2f} MiB")
        if size > LIMIT:
            raise SystemExit(f"{file} is larger than {LIMIT / 2**20:.0f} MiB")
    total = sum(file.stat().st_size for file in files)
    print(f"together {total / 2**20:.2f} MiB")
    if total > TOTAL_LIMIT:
        raise SystemExit(f"that is more than {TOTAL_LIMIT / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
