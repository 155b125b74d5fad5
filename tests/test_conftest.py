"""The suite's own promise: in CI no engine, server or browser test is skipped."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

BY_MARK = """
import pytest

@pytest.mark.skip(reason="no engine here")
@pytest.mark.{marker}
def test_something():
    pass
"""
WHOLE_FILE = "import pytest\npytest.importorskip('an_engine_that_is_not_there')\n"


def suite(
    tmp_path, folder: str, source: str, ci: bool, workers: int = 0
) -> subprocess.CompletedProcess:
    (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "conftest.py")
    (tmp_path / folder / "test_it.py").write_text(source)
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nmarkers =\n engine: x\n serve: x\n browser: x\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "CI"} | ({"CI": "true"} if ci else {})
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-n",
        str(workers),
        ".",
    ]
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("marker", "workers"), [("engine", 0), ("engine", 1), ("serve", 0), ("browser", 0)]
)
def test_a_skipped_engine_server_or_browser_test_fails_in_ci(tmp_path, marker, workers):
    run = suite(tmp_path, "any", BY_MARK.format(marker=marker), ci=True, workers=workers)
    assert run.returncode == 1 and "in CI it must run" in run.stdout, run.stdout
    if marker != "browser":
        assert f"{marker} tests against vllm" in run.stdout and "1 failed" in run.stdout


@pytest.mark.parametrize("folder", ["engines", "serve"])
def test_a_file_that_skips_itself_fails_in_ci(tmp_path, folder):
    run = suite(tmp_path, folder, WHOLE_FILE, ci=True)
    assert run.returncode != 0 and "in CI it must run" in run.stdout, run.stdout


def test_elsewhere_a_skip_is_a_skip(tmp_path):
    run = suite(tmp_path, "engines", BY_MARK.format(marker="engine"), ci=False)
    assert run.returncode == 0 and "1 skipped" in run.stdout, run.stdout
