"""The wheel works where there is no clone: built, installed into an empty folder, run elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow


def run(command: list[str], **kwargs) -> subprocess.CompletedProcess:
    done = subprocess.run(command, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("hatchling", reason="pip install -e .[dev] brings it")
    out = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT])
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def target(wheel, tmp_path_factory) -> Path:
    """What `pip install` puts into an empty folder."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    run([*pip, "--target", folder, wheel])
    return folder


def outside(target: Path, cwd: Path, *arguments: str) -> str:
    """Output of `python -m higgs_lab ...` with the clone out of reach.

    -S skips the .pth files of site-packages, through one of which an editable install would put
    the clone on sys.path; the dependencies are named as a plain folder instead.
    """
    path = os.pathsep.join([str(target), sysconfig.get_paths()["purelib"]])
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    env |= {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    return run([sys.executable, "-S", *arguments], cwd=cwd, env=env).stdout


def test_nothing_collides_with_other_packages(target):
    """A top-level `eval` or `serve` would shadow other people's."""
    names = {p.name for p in target.iterdir()}
    assert not names & {"eval", "serve", "recipes", "tests", "notebooks"}
    assert {n for n in names if not n.endswith(".dist-info")} <= {"higgs_lab", "bin"}


def test_data_files_travel_along(wheel):
    """Every file of the rooms that git tracks, and nothing that it ignores."""

    def listed(*options: str) -> set[str]:
        git = ["git", "ls-files", *options, "--", "higgs_lab", "eval", "serve", "recipes"]
        names = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.split()
        kept = {n for n in names if (ROOT / n).is_file()}
        return {n if n.startswith("higgs_lab/") else f"higgs_lab/_tools/{n}" for n in kept}

    tracked, ignored = listed(), listed("--others", "--ignored", "--exclude-standard")
    if not tracked:
        pytest.skip("not a git clone")
    packed = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert sorted(tracked - packed) == []
    assert sorted(ignored & packed) == []
    assert not [n for n in packed if "__pycache__" in n or "/." in n]
    assert "higgs_lab/codec_v2.json" in packed
    for folder in ("serve/profiles/", "recipes/configs/"):
        found = [n for n in packed if n.startswith(f"higgs_lab/_tools/{folder}")]
        assert [n for n in found if n.endswith(".yaml")], folder


def test_the_wheel_is_small(wheel):
    """Weights of the nano family may ride along, caches and outputs must not."""
    assert wheel.stat().st_size < 60e6


def test_licence_and_command_are_declared(wheel):
    with zipfile.ZipFile(wheel) as file:
        info = next(n for n in file.namelist() if n.endswith(".dist-info/METADATA"))
        folder = info.rsplit("/", 1)[0]
        metadata = file.read(info).decode()
        assert "License-Expression: Apache-2.0" in metadata
        assert f"{folder}/licenses/LICENSE" in file.namelist()
        entry = file.read(f"{folder}/entry_points.txt").decode()
        assert "higgs-lab = higgs_lab.__main__:main" in entry


COMMANDS = [
    "eval.run",
    "eval.compare",
    "serve.export",
    "serve.check",
    "serve.launch",
    "serve.client",
    "recipes.prepare",
    "recipes.finetune",
    "recipes.synthesize",
    "recipes.demo",
]


def test_help_lists_every_command(target, tmp_path):
    text = outside(target, tmp_path, "-m", "higgs_lab", "--help")
    for command in COMMANDS:
        assert f"  {command}\n" in text


# Each as its own main program, but in one process: they share the seconds of importing torch.
RUN_ALL = """
import sys, higgs_lab.__main__ as m
path = list(sys.path)
for command in sys.argv[1:]:
    for name in [n for n in sys.modules if n.split(".")[0] in m.ROOTS]:
        del sys.modules[name]
    sys.path[:], sys.argv = path, ["higgs_lab", command, "--help"]
    print("RUN", command)
    try:
        m.main()
    except SystemExit as ended:
        assert not ended.code, (command, ended.code)
"""


def test_commands_run_without_the_clone(target, tmp_path):
    text = outside(target, tmp_path, "-c", RUN_ALL, *COMMANDS)
    parts = text.split("RUN ")[1:]
    assert [part.split()[0] for part in parts] == COMMANDS
    assert all("usage" in part for part in parts)


def test_a_text_is_spoken_without_the_clone(target, tmp_path):
    """Not only --help: codec configuration, nano checkpoint and recipes are all found."""
    options = ["model=nano", "text=Hello.", "max_frames=10", "out=hello"]
    outside(target, tmp_path, "-m", "higgs_lab", "recipes.synthesize", *options)
    assert (tmp_path / "hello" / "wavs" / "text.wav").stat().st_size > 1000


def test_modules_come_from_the_installed_folder(target, tmp_path):
    """The proof that none of the above found its files in the clone."""
    code = (
        "import sys, higgs_lab, higgs_lab.__main__ as m; folder = m.tools_folder(); "
        "sys.path.insert(0, str(folder)); import eval, serve.client; "
        "print(higgs_lab.__file__, eval.__file__, serve.client.__file__, sep='\\n')"
    )
    found = outside(target, tmp_path, "-c", code).split()
    assert len(found) == 3
    assert all(Path(f).is_relative_to(target) for f in found), found


def test_a_typo_is_answered_with_the_nearest_command(target, tmp_path):
    path = os.pathsep.join([str(target), sysconfig.get_paths()["purelib"]])
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-S", "-m", "higgs_lab", "eval.rum"],
        cwd=tmp_path,
        env=env | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "Did you mean eval.run" in done.stderr
