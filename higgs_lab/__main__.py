"""`python -m higgs_lab COMMAND ...` (also installed as `higgs-lab`): the tools outside a clone.

In a clone the tools are run as `python -m eval.run`, `python -m serve.export`,
`accelerate launch recipes/finetune.py`. The wheel carries the same folders inside this package,
where they collide with nothing; here they are put on sys.path under their clone names and run:

    python -m higgs_lab eval.run --model ...
    accelerate launch -m higgs_lab recipes.finetune --config speaker_lora.yaml ...
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOTS = ("eval", "serve", "recipes")


def tools_folder() -> Path:
    """Folder that holds eval/, serve/ and recipes/: inside the wheel, or the clone's root."""
    bundled = PACKAGE / "_tools"
    return bundled if bundled.is_dir() else PACKAGE.parent


def commands(folder: Path) -> list[str]:
    """Dotted names of all runnable modules, such as "eval.run"."""
    found = []
    for root in ROOTS:
        for file in sorted((folder / root).rglob("*.py")):
            if 'if __name__ == "__main__":' in file.read_text(encoding="utf-8"):
                found.append(".".join(file.relative_to(folder).with_suffix("").parts))
    return found


def main() -> None:
    folder = tools_folder()
    names = commands(folder)
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        print("Commands:\n  " + "\n  ".join(names))
        return
    command = sys.argv[1]
    if command not in names:
        import difflib

        near = difflib.get_close_matches(command, names, n=3, cutoff=0.4)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        sys.exit(f"higgs-lab: no command {command!r}.{hint} `higgs-lab --help` lists them.")
    sys.path.insert(0, str(folder))
    sys.argv = sys.argv[1:]
    runpy.run_module(command, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
