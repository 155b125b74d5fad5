"""The house: imports point one way, light modules stay light, files stay short."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

ROOMS = ("higgs_lab", "eval", "serve", "recipes")
# room -> prefixes it may import from. recipes has one sideways door, to what judges speech.
JUDGES = ("eval.asr", "eval.speaker", "eval.metrics", "eval.normalize", "eval.stats")
ALLOWED = {
    "higgs_lab": ("higgs_lab",),
    "serve": ("serve", "higgs_lab"),
    "eval": ("eval", "serve.client", "higgs_lab"),
    "recipes": ("recipes", *JUDGES, "higgs_lab"),
}
MAX_LINES = 400
HEAVY = ("torch", "transformers", "numpy", "peft", "datasets")


def modules() -> list[Path]:
    """Python files of the house that git knows or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *ROOMS],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout.split("\n")
    found = [ROOT / name for name in listed if name.endswith(".py") and (ROOT / name).is_file()]
    return found or [p for room in ROOMS for p in (ROOT / room).rglob("*.py")]  # no git here


def imported(file: Path, source: str | None = None) -> set[str]:
    """Dotted names that a file imports anywhere; `from a import b` is a.b, relative is resolved."""
    package = file.relative_to(ROOT).with_suffix("").parts[:-1]
    names: set[str] = set()
    tree = ast.parse(source if source is not None else file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            names |= {".".join([*base, alias.name]) for alias in node.names}
    return names


def trespasses(file: Path, source: str | None = None) -> list[str]:
    room = file.relative_to(ROOT).parts[0]

    def allowed(name: str) -> bool:
        return any(name == p or name.startswith(p + ".") for p in ALLOWED[room])

    wrong = {n for n in imported(file, source) if n.split(".")[0] in ROOMS and not allowed(n)}
    return sorted(wrong)


def test_the_house_has_its_rooms():
    assert {file.relative_to(ROOT).parts[0] for file in modules()} == set(ROOMS)
    assert len(modules()) > 40


@pytest.mark.parametrize("file", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(file):
    """recipes -> higgs_lab, eval -> serve.client -> higgs_lab, serve -> higgs_lab, never back."""
    assert trespasses(file) == []


@pytest.mark.parametrize(
    ("room", "source", "wrong"),
    [
        ("higgs_lab", "from eval.metrics import wer", ["eval.metrics.wer"]),
        ("higgs_lab", "def f():\n    import serve.client", ["serve.client"]),
        ("eval", "from serve.client import speak", []),
        ("eval", "from serve import client", []),
        ("eval", "from serve.export import main", ["serve.export.main"]),
        ("eval", "import recipes.prepare", ["recipes.prepare"]),
        ("serve", "from eval import asr", ["eval.asr"]),
        ("recipes", "from eval.asr import transcribe", []),
        ("recipes", "from eval import run", ["eval.run"]),
        ("recipes", "import serve", ["serve"]),
        ("recipes", "from ..eval import run", ["eval.run"]),
        ("recipes", "import evaluate", []),
    ],
)
def test_the_check_itself_sees_trespasses(room, source, wrong):
    assert trespasses(ROOT / room / "x.py", source) == wrong


@pytest.mark.parametrize("file", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_short(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_recipes_use_no_relative_imports():
    """They also run as plain files under `accelerate launch`, where there is no package."""
    for file in modules():
        if file.relative_to(ROOT).parts[0] != "higgs_lab":
            tree = ast.parse(file.read_text(encoding="utf-8"))
            relative = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]
            assert not relative, file


@pytest.mark.parametrize("module", ["higgs_lab", "serve.client", "higgs_lab.__main__"])
def test_light_modules_load_nothing_heavy(module):
    """In a fresh process: another test may have imported torch already."""
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    if module == "serve.client":  # numpy may hold its wave, torch not
        code = code.replace("'numpy', ", "")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


def test_the_client_names_no_torch():
    """Not even lazily: it is what runs where only a server's address is known."""
    for name in ("client.py", "client_cli.py"):
        file = ROOT / "serve" / name
        if file.is_file():
            assert not {n for n in imported(file) if n.split(".")[0] in ("torch", "transformers")}


def test_importing_scripts_does_no_work():
    """Scripts are imported by tests: arguments are parsed in main(), not on the way."""
    for file in modules():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in tree.body:
            calls = [n for n in ast.walk(node) if isinstance(n, ast.Attribute)]
            guarded = isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.If))
            assert guarded or not any(c.attr == "parse_args" for c in calls), file


def test_nothing_here_names_the_workshop():
    """No path of the machine it was written on, no registry's host."""
    words = ("/work" + "/", "/tmp" + "/w/", "pypi" + ".org", ".." + "/shared")
    for file in [*modules(), ROOT / "pyproject.toml", ROOT / "README.md"]:
        text = file.read_text(encoding="utf-8")
        assert not [w for w in words if w in text], file
