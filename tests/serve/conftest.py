"""A real vLLM-Omni server on the nano checkpoint, one start per configuration.

A configuration has one file of tests, and its server lives no longer than the file: so no file can
end another's server, and no more than one stands in memory.

Needs the serving environment in .venv-serve (make serve-env). Without it these tests are skipped on
a developer's machine and fail in CI.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from served import API_KEY, START_SEC, launch

from higgs_lab.checkpoint import load_talker
from higgs_lab.codec import Codec
from higgs_lab.vocab import Vocab
from serve.client import is_healthy
from serve.compare import Dumps
from serve.export import export

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.serve)
            item.add_marker(pytest.mark.timeout(START_SEC + 300))


@pytest.fixture(scope="session")
def serve_env() -> Path:
    """The serving environment's bin folder."""
    folder = ROOT / ".venv-serve" / "bin"
    if not (folder / "vllm").is_file():
        message = ".venv-serve is missing: run `make serve-env`"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def exported(nano, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "nano"
    export(nano, folder)
    return folder


@pytest.fixture(scope="session")
def talker(exported):
    return load_talker(exported, dtype=torch.float32)


@pytest.fixture(scope="session")
def codec(exported) -> Codec:
    return Codec.from_pretrained(exported)


@pytest.fixture(scope="session")
def vocab(exported) -> Vocab:
    return Vocab.from_pretrained(exported)


def _serve(exported: Path, tmp_path_factory, name: str, profile: str, **options):
    """A server for the tests of one file; that it ends well is the last of them."""
    folder = tmp_path_factory.mktemp(name)
    with launch(exported, folder, name, profile, **options) as server:
        seconds = server.wait_ready(START_SEC, progress=False)
        print(f"\nserver {name!r} was up after {seconds:.0f} s")
        server.dumps = Dumps(folder / name / "dumps")
        yield server
        assert server.process.poll() is None, "the server ended before its tests did"
        assert server.stop() == 0, f"SIGTERM did not end it well: see {server.plan.log}"
        assert not is_healthy(server.url)


@pytest.fixture(scope="module")
def exact(serve_env, exported, tmp_path_factory):
    """float32, the codec decoding each clip whole: comparable with our own numbers."""
    overlay = exported / "deploy" / "exact.yaml"
    overlay.write_text("base_config: cpu_smoke.yaml\nasync_chunk: false\n")
    yield from _serve(exported, tmp_path_factory, "exact", str(overlay))


@pytest.fixture(scope="module")
def chunked(serve_env, exported, tmp_path_factory):
    """As shipped: the codec streams in chunks; an API key is set."""
    yield from _serve(exported, tmp_path_factory, "chunked", "cpu_smoke", api_key=API_KEY)
