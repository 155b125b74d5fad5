"""Helpers of the server tests: starting one."""

from __future__ import annotations

from pathlib import Path

from serve.launch import Server, free_port, make_plan, start

ROOT = Path(__file__).parents[2]
START_SEC = 300
API_KEY = "key-of-the-tests"


def launch(export_dir: Path, folder: Path, name: str, profile: str, **options) -> Server:
    log = folder / f"{name}.log"
    plan = make_plan(export_dir, profile, "cpu", port=free_port(), log=log, state=folder, **options)
    # Compiled bytecode and kernels may be shared between runs; voices and dumps may not.
    return start(plan, {"HIGGS_LAB_DUMP_DIR": str(folder / name / "dumps")})
