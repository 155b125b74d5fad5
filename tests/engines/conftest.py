"""Tests against the engines' own code, read from .engines; see load.py.

Where the engines are missing these tests are skipped on a developer's machine and fail in CI.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from load import engine, installed, version

from higgs_lab.nano import nano_checkpoint
from higgs_lab.vocab import Vocab

HERE = Path(__file__).parent
_outcomes: dict[str, int] = {}


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.engine)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if HERE in item.path.parents and (report.when == "call" or report.outcome != "passed"):
        _outcomes[report.outcome] = _outcomes.get(report.outcome, 0) + 1
    return report


def pytest_terminal_summary(terminalreporter):
    if _outcomes:
        counts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(_outcomes.items()))
        versions = ", ".join(f"{n} {version(n)}" for n in ("vllm_omni", "sglang_omni"))
        terminalreporter.write_line(f"engine tests against {versions}: {counts}")


def _open(name: str):
    if not installed(name):
        message = f"{name} is not in .engines: run `make engines`"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    with engine(name) as modules:
        yield modules


@pytest.fixture(scope="module")
def vllm():
    yield from _open("vllm_omni")


@pytest.fixture(scope="module")
def sglang():
    yield from _open("sglang_omni")


@pytest.fixture(scope="session")
def nano_path() -> Path:
    return nano_checkpoint()


@pytest.fixture(scope="session")
def vocab(nano_path) -> Vocab:
    return Vocab.from_pretrained(nano_path)
