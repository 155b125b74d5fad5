"""Rebuild parts of the nano family: make speech, then train several parts at once.

    python -m recipes.nano.build --parts codec whisper ecapa --out runs/nano --seconds 420
    python -m recipes.nano.build --parts talker --out runs/nano --seconds 500

With two GPUs the codec has one to itself. Each part's log is `PART.log` in `--out`.
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
SHARE = {"codec": 0.8, "whisper": 1.0, "ecapa": 0.95, "talker": 1.0}
HOURS = {"codec": 15, "whisper": 60, "ecapa": 60, "talker": 120}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=tuple(SHARE), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("/dev/shm/nano"))
    parser.add_argument("--hours", type=float, default=60)
    parser.add_argument("--seconds", type=float, default=420)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 4))
    parser.add_argument(
        "--extra", nargs=argparse.REMAINDER, default=[], help="more arguments for every part"
    )
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    module = [sys.executable, "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONUNBUFFERED": "1"}
    maker = [*module, "recipes.nano.data", "--workers", str(args.workers)]
    test = [*maker, "--out", f"{args.data}-test", "--hours", "0.4", "--split", "test"]
    data = [*maker, "--out", str(args.data), "--hours", str(args.hours)]
    single = environment | {"OMP_NUM_THREADS": "1"}
    jobs = {"data": subprocess.Popen(data, env=single)}
    jobs["test"] = subprocess.Popen(test, env=single)
    gpus = os.environ.get("NANO_GPUS", "0").split(",")
    begin = time.time()
    for part in args.parts:
        gpu = gpus[0] if part in ("codec", "talker") else gpus[-1]
        command = [
            *module, f"recipes.nano.train_{part}", "--data", str(args.data),
            "--test", f"{args.data}-test", "--out", str(args.out),
            "--seconds", str(args.seconds * SHARE[part]),
            "--hours", str(min(HOURS[part], 2 * args.hours)), *args.extra,
        ]  # fmt: skip
        if part in ("whisper", "ecapa") and "codec" in args.parts:
            command += ["--codec", str(args.out / "codec.safetensors")]
        log = (args.out / f"{part}.log").open("w")
        jobs[part] = subprocess.Popen(
            command, env=environment | {"CUDA_VISIBLE_DEVICES": gpu}, stdout=log, stderr=log
        )
    while any(job.poll() is None for job in jobs.values()):
        time.sleep(15)
        lines = [f"[{time.time() - begin:.0f}s]"]
        for part in args.parts:
            text = (args.out / f"{part}.log").read_text().strip().splitlines()
            lines.append(text[-1][:200] if text else f"{part}: no line yet")
        print("\n  ".join(lines), flush=True)
    if "NANO_SHIP" in os.environ:
        for part in args.parts:
            shutil.copy(args.out / f"{part}.log", os.environ["NANO_SHIP"])
    failed = [part for part, job in jobs.items() if job.returncode]
    for part in args.parts:
        text = (args.out / f"{part}.log").read_text().strip().splitlines()
        print(f"--- {part}", *text[-25 if part in failed else -4 :], sep="\n", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
