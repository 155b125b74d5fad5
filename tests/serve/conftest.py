"""A real vLLM-Omni server on the nano checkpoint, one start per configuration.

Needs the serving environment in .venv-serve (make serve-env). Without it these tests are skipped on
a developer's machine and fail in CI.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import torch

from higgs_lab.checkpoint import load_talker, rewrite_native, to_native_key
from higgs_lab.codec import Codec
from higgs_lab.generate import Sampling, generate
from higgs_lab.prompt import render_prompt
from higgs_lab.vocab import EOC, Vocab
from serve.export import export
from serve.launch import Server, make_plan, start

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
START_SEC = 300
API_KEY = "key-of-the-tests"


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


ENDING_TEXT, ENDING_ROW = "Hello there.", 25


@pytest.fixture(scope="session")
def exported(nano, tmp_path_factory) -> Path:
    """An export of nano that is sure to stop by itself: greedy speech of ENDING_TEXT ends at
    ENDING_ROW, so that both endings of a request are compared with the server's."""
    folder = tmp_path_factory.mktemp("served")
    row = _end_direction(load_talker(nano, dtype=torch.float32), Vocab.from_pretrained(nano))
    table = to_native_key("codebooks.weight")

    def edit(key: str, tensor: torch.Tensor) -> torch.Tensor:
        if key == table:
            tensor = tensor.clone()
            tensor[EOC] = row.to(tensor.dtype)
        return tensor

    rewrite_native(nano, folder / "base", edit)
    export(folder / "base", folder / "nano")
    return folder / "nano"


@torch.inference_mode()
def _end_direction(talker, vocab: Vocab) -> torch.Tensor:
    """Codebook 0's EOC row that fires at ENDING_ROW: the part of that step's hidden state which no
    earlier one shares, long enough to beat every other entry."""
    prompt = render_prompt(vocab, ENDING_TEXT)
    greedy = Sampling(temperature=0, max_frames=ENDING_ROW + 10)
    rows = generate(talker, [prompt], greedy)[0].rows[:ENDING_ROW]
    ids = torch.cat([prompt.ids, torch.zeros(len(rows), dtype=torch.long)])
    is_audio = torch.cat([prompt.is_audio, torch.ones(len(rows), dtype=torch.bool)])
    out = talker(ids[None], is_audio[None], torch.cat([prompt.rows, rows])[None])
    hidden = out.hidden[0, len(prompt) - 1 :]
    past, now = hidden[:-1].T, hidden[-1]
    fresh = now - past @ torch.linalg.lstsq(past, now[:, None]).solution[:, 0]
    wanted = out.logits[0, -1, 0].max() + 5
    return fresh * (wanted / fresh.square().sum())


@pytest.fixture(scope="session")
def talker(exported):
    return load_talker(exported, dtype=torch.float32)


@pytest.fixture(scope="session")
def codec(exported) -> Codec:
    return Codec.from_pretrained(exported)


@pytest.fixture(scope="session")
def vocab(exported) -> Vocab:
    return Vocab.from_pretrained(exported)


class Dumps:
    """What the talker stage of a server wrote about each request (see serve/cpu)."""

    def __init__(self, folder: Path):
        self.folder, self.seen = folder, set()

    def new(self) -> list[tuple[dict, torch.Tensor]]:
        """(header, rows [S, 8]) of every request since the last call."""
        files = set(self.folder.glob("*.jsonl")) - self.seen
        self.seen |= files
        return [self._read(file) for file in sorted(files, key=lambda f: f.stat().st_mtime)]

    def last(self) -> tuple[dict, torch.Tensor]:
        return self.new()[-1]

    @staticmethod
    def _read(file: Path) -> tuple[dict, torch.Tensor]:
        header, *rows = (json.loads(line) for line in file.read_text().splitlines())
        return header, torch.tensor(rows)


def launch(export_dir: Path, folder: Path, name: str, profile: str, **options) -> Server:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    plan = make_plan(
        export_dir, profile, "cpu", port=port, log=folder / f"{name}.log", state=folder, **options
    )
    # Compiled bytecode and kernels may be shared between runs; voices and dumps may not.
    return start(plan, {"HIGGS_LAB_DUMP_DIR": str(folder / name / "dumps")})


def _serve(exported: Path, tmp_path_factory, name: str, profile: str, **options):
    folder = tmp_path_factory.mktemp(name)
    with launch(exported, folder, name, profile, **options) as server:
        seconds = server.wait_ready(START_SEC, progress=False)
        print(f"\nserver {name!r} was up after {seconds:.0f} s")
        server.dumps = Dumps(folder / name / "dumps")
        yield server


@pytest.fixture(scope="session")
def exact(serve_env, exported, tmp_path_factory):
    """float32, the codec decoding each clip whole: comparable with our own numbers."""
    overlay = exported / "deploy" / "exact.yaml"
    overlay.write_text("base_config: cpu_smoke.yaml\nasync_chunk: false\n")
    yield from _serve(exported, tmp_path_factory, "exact", str(overlay))


@pytest.fixture(scope="session")
def chunked(serve_env, exported, tmp_path_factory):
    """As shipped: the codec streams in chunks; an API key is set."""
    yield from _serve(exported, tmp_path_factory, "chunked", "cpu_smoke", api_key=API_KEY)
