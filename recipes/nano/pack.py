"""Pack trained parts into the files that the project ships.

    python -m recipes.nano.pack --trained runs/nano/home --out higgs_lab/nano/assets

`--trained` holds what the training scripts leave in NANO_SHIP: `codec.safetensors` (packed
already), `whisper.fp16.safetensors`, `ecapa.fp16.safetensors`, `talker-mlp.fp16.safetensors` and
`talker-rest.fp16.safetensors`. Parts that are missing are left out.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from safetensors.torch import load_file

from higgs_lab.nano.packing import pack

LIMIT = 16 * 2**20


def pack_whisper(source: Path, target: Path) -> int:
    from recipes.nano.train_whisper import DIMS

    tensors = load_file(source)
    del tensors["encoder.positional_embedding"]  # sinusoids
    name = "decoder.positional_embedding"
    tensors[name] = tensors[name][
        :128
    ]  # no text of the domain is longer; the rest was never trained
    return pack(tensors, target, {"dims": json.dumps(DIMS)})


def pack_ecapa(source: Path, target: Path) -> int:
    from recipes.nano.train_ecapa import SIZES

    tensors = {k: v for k, v in load_file(source).items() if not k.endswith("num_batches_tracked")}
    return pack(tensors, target, {"sizes": json.dumps(SIZES)})


def pack_talker(sources: list[Path], target: Path) -> int:
    from recipes.nano.train_talker import TEXT_CONFIG

    tensors = {name: value for source in sources for name, value in load_file(source).items()}
    return pack(tensors, target, {"text_config": json.dumps(TEXT_CONFIG)})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trained", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    total = 0
    for part in ("codec", "whisper", "ecapa", "talker"):
        target = args.out / f"{part}.safetensors"
        if part == "codec" and (args.trained / "codec.safetensors").exists():
            shutil.copyfile(args.trained / "codec.safetensors", target)
        elif part == "talker" and (args.trained / "talker-rest.fp16.safetensors").exists():
            pack_talker(sorted(args.trained.glob("talker-*.fp16.safetensors")), target)
        elif (source := args.trained / f"{part}.fp16.safetensors").exists():
            {"whisper": pack_whisper, "ecapa": pack_ecapa}[part](source, target)
        else:
            continue
        size = target.stat().st_size
        total += size
        if size > LIMIT:
            raise SystemExit(f"{target} has {size / 2**20:.1f} MiB, more than 16")
        print(f"{target} {size / 2**20:.2f} MiB")
    print(f"together {total / 2**20:.2f} MiB of 24")


if __name__ == "__main__":
    main()
