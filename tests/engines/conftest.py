"""Tests against the engines' own code, read from .engines; see load.py.

Where the engines are missing these tests are skipped, which fails in CI (tests/conftest.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest
from load import engine, installed

from higgs_lab.nano import nano_checkpoint
from higgs_lab.vocab import Vocab

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.engine)


def _open(name: str):
    if not installed(name):
        pytest.skip(f"{name} is not in .engines: run `make engines`")
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
