"""Word errors of a system, by `eval.run` as a command of its own: serve knows eval by its command
line only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TOOLS = Path(__file__).resolve().parent.parent  # holds eval/ and serve/


def evaluate(
    model: str, set: str | Path, out: Path, more: Sequence[str] = (), env: dict | None = None
) -> dict:
    """The overall figures of `eval.run --model model --set set --out out`; a killed run goes on.

    Raises RuntimeError with the last line that it said when it fails.
    """
    command = [sys.executable, "-m", "eval.run", "--model", model, "--set", str(set)]
    env = dict(env or os.environ)
    env["PYTHONPATH"] = f"{TOOLS}{os.pathsep}{env.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [*command, "--out", str(out), *more], env=env, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"eval.run: {' '.join(done.stderr.strip().splitlines()[-1:])}")
    return json.loads((out / "summary.json").read_text(encoding="utf-8"))["overall"]


def estimate(value: dict | None, scale: float) -> str:
    """An estimate with its interval, as text."""
    if value is None:
        return "-"
    known = value["low"] is not None
    span = f" ({scale * value['low']:.2f}-{scale * value['high']:.2f})" if known else ""
    return f"{scale * value['value']:.2f}{span}"
