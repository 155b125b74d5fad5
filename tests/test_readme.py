"""The README says what is there: every module has its line, every command and file exists."""

from __future__ import annotations

import importlib.util
import re
import subprocess

import pytest

from tests.conftest import ROOT
from tests.test_layers import modules

README = (ROOT / "README.md").read_text(encoding="utf-8")
LAYOUT = README.split("## Layout")[1].split("```")[1].strip("\n")


def sections() -> dict[str, str]:
    """Folder -> the layout's lines about it."""
    found: dict[str, str] = {}
    for line in LAYOUT.split("\n"):
        if not line.startswith(" "):
            folder = line.split("/ ")[0]
        found[folder] = found.get(folder, "") + line + "\n"
    return found


def test_every_module_has_its_line():
    parts = sections()
    missing = []
    for file in modules():
        name = file.relative_to(ROOT).as_posix()
        folder = max((f for f in parts if name.startswith(f + "/")), key=len)
        if file.name != "__init__.py" and not re.search(
            rf"(?<![\w.]){re.escape(file.name)}", parts[folder]
        ):
            missing.append(name)
    assert not missing, f"README.md, ## Layout: give a line to {', '.join(missing)}"


def test_every_line_has_its_file():
    lines = [
        (folder, match[1])
        for folder, text in sections().items()
        for match in re.finditer(r"^  ([\w./]+[\w/])  *\S", text, re.M)
    ]
    assert len(lines) > 60 and len(set(lines)) == len(lines)
    assert [
        f"{folder}/{name}" for folder, name in lines if not (ROOT / folder / name).exists()
    ] == []


SHELL = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S))
COMMANDS = sorted(set(re.findall(r"python -m ([\w.]+)", README)))
FILES = sorted(set(re.findall(r"(?:recipes|docs|serve)/[\w/]+\.\w+", README)))
TARGETS = sorted(set(re.findall(r"^make ([\w-]+)", SHELL, re.M)))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_exists(name):
    assert importlib.util.find_spec(name) is not None


def test_every_file_named_exists():
    assert len(FILES) >= 3 and [name for name in FILES if not (ROOT / name).exists()] == []


def test_every_make_target_exists():
    assert {"demo", "test", "setup"} <= set(TARGETS)
    for target in TARGETS:
        command = ["make", "--dry-run", "--directory", str(ROOT), target]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
