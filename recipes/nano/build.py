"""Rebuild parts of the nano family: make speech, then train several parts at once on one GPU.

    python -m recipes.nano.build --parts codec --out runs/nano --seconds 540
    python -m recipes.nano.build --parts decoder --out runs/nano --seconds 540
    python -m recipes.nano.build --parts talker whisper ecapa --out runs/nano --seconds 540
    python -m recipes.nano.pack --trained runs/nano/ship --out higgs_lab/nano/assets

"decoder" trains what decodes on, with the codes as they are, so that the talker may learn them
beside it on another GPU. Each part's log is `PART.log` in `--out`, its packaged weights are in
`--out`/ship. The others need a codec that is finished: its codes are what the talker learns, and
the judges hear a quarter of their speech through it, as a judge of real speech has heard codecs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

# seconds of a part as a share of the whole, hours of speech it holds on the device
SHARE = {"codec": 1.0, "decoder": 1.0, "whisper": 0.35, "ecapa": 0.3, "talker": 1.0}
HOURS = {"codec": 20, "decoder": 20, "whisper": 60, "ecapa": 60, "talker": 0}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=tuple(SHARE), required=True)
    add("--out", type=Path, required=True)
    add("--ship", type=Path, help="where packaged weights go (default: ship in --out)")
    add("--data", type=Path, default=Path("/dev/shm/nano"), help="where the speech is made")
    add("--hours", type=float, default=43, help="of speech")
    add("--seconds", type=float, default=540, help="of training")
    add("--codec", type=Path, help="a trained or packaged codec (default: the one in --out)")
    add("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 4), help="that speak")
    add("--extra", nargs=argparse.REMAINDER, default=[], help="more options for every part")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if {"codec", "decoder"} <= set(args.parts):
        parser.error("the decoder is trained on when the codec is finished: in another call")
    codec = args.codec or args.out / "codec.safetensors"
    jobs = start(args, codec)
    begin = time.time()
    while any(job.poll() is None for job in jobs.values()):
        time.sleep(10)
        lines = [f"[{time.time() - begin:.0f} s]"]
        for part in args.parts:
            log = last_lines(args.out / f"{part}.log", 1)
            lines.append(log[0][:200] if log else f"{part}: no line yet")
        print("\n  ".join(lines), flush=True)
    failed = [name for name, job in jobs.items() if job.returncode]
    for part in args.parts:
        lines = last_lines(args.out / f"{part}.log", 25 if part in failed else 3)
        print(f"--- {part}", *lines, sep="\n", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def start(args: argparse.Namespace, codec: Path) -> dict[str, subprocess.Popen]:
    """The speakers of both splits and one process a part, all at once."""
    module = [sys.executable, "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    speakers = [*module, "recipes.nano.data", "--workers", str(args.workers)]
    train = ["--out", str(args.data), "--hours", str(args.hours)]
    test = ["--out", f"{args.data}-test", "--hours", "0.26", "--split", "test"]
    jobs = {
        "train speech": subprocess.Popen([*speakers, *train], env=environment),
        "test speech": subprocess.Popen([*speakers, *test], env=environment),
    }
    for part in args.parts:
        script = "codec" if part == "decoder" else part
        command = [*module, f"recipes.nano.train_{script}", "--out", str(args.out)]
        command += ["--data", str(args.data), "--test", f"{args.data}-test"]
        command += ["--ship", str(args.ship or args.out / "ship")]
        command += ["--seconds", str(args.seconds * SHARE[part])]
        command += ["--hours", str(min(HOURS[part], 2 * args.hours))]
        begin = args.out / "codec-before-decoder.safetensors"
        if part == "codec":
            begin.unlink(missing_ok=True)  # of another codec
        elif part == "decoder":
            if not begin.exists():  # a second start begins anew, not with what the first left
                shutil.copyfile((args.ship or args.out / "ship") / "codec.safetensors", begin)
            command += ["--init", str(begin), "--decoder-only", "--lr", "5e-4"]
            command += ["--adversarial", "0.04"]
        else:
            command += ["--codec", str(codec)]
        with (args.out / f"{part}.log").open("w") as log:
            jobs[part] = subprocess.Popen(
                [*command, *args.extra], env=environment, stdout=log, stderr=log
            )
    return jobs


def last_lines(path: Path, count: int) -> list[str]:
    return path.read_text(errors="replace").strip().splitlines()[-count:]


if __name__ == "__main__":
    main()
