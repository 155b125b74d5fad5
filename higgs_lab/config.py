"""One dataclass per command, filled from a YAML file and then from `key=value` arguments.

    @dataclass
    class SpeakConfig:
        model: str = MISSING  # checkpoint: folder, hub name[@revision] or nano
        seed: int = 0  # the same seed gives the same take

    if __name__ == "__main__":
        with one_line_errors("speak"):
            main(cli(SpeakConfig, "Speak a text."))

    python speak.py --config speak.yaml model=nano seed=3

The comment of a field is its line in `--help`, so the dataclass is the only place where an option
is named, typed, given its default and explained. OmegaConf does the merging and the type checks.
"""

import argparse
import ast
import contextlib
import dataclasses
import difflib
import inspect
import io
import os
import sys
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from higgs_lab.runlog import atomic_path

Config = TypeVar("Config")

MISSING: typing.Any = "???"  # the default of a field that the user must give (OmegaConf's marker)


def load_config(cls: type[Config], path: str | Path | None, overrides: list[str]) -> Config:
    """Defaults of `cls`, then the YAML file, then `key=value` overrides; later ones win.

    Values of text fields are taken as typed (`text=Yes: 007` needs no YAML quoting); the others
    are YAML. `key=null` unsets. Nested fields are written `outer.inner=value`.

    Raises FileNotFoundError for a missing file; ValueError, naming the file or argument and the
    key, for YAML that does not parse, an unknown key (with near matches), a wrong type, or a
    required field that nobody gave.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config = OmegaConf.structured(cls)
    if path is not None:
        config = _merge(cls, config, _read_yaml(path), str(path))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or key.startswith("-"):
            raise ValueError(
                f"argument {override!r}: options are written key=value, without dashes"
            )
        if _takes_text(cls, key) and value != "null":
            layer = OmegaConf.create()
            OmegaConf.update(layer, key, value)
        else:
            try:
                layer = OmegaConf.from_dotlist([override])
            except Exception as error:  # PyYAML's own errors
                raise ValueError(f"argument {override!r}: {_first_line(error)}") from error
        config = _merge(cls, config, layer, f"argument {override!r}")
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        place = f"in {path} or " if path else ""
        raise ValueError(
            f"{cls.__name__} needs {', '.join(missing)}: give {missing[0]}=... {place}on the "
            "command line"
        )
    try:
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ValueError(f"{path or 'config'}: {_first_line(error)}") from error


def save_config(config: object, path: str | Path) -> None:
    """Write a config as YAML that `load_config` reads back to an equal object. Atomic."""
    with atomic_path(path) as temporary:
        temporary.write_text(to_yaml(config), encoding="utf-8")


def to_yaml(config: object) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def cli(cls: type[Config], description: str, argv: list[str] | None = None) -> Config:
    """The command line of every recipe: `--config FILE key=value ...`.

    `--help` lists all fields with types, defaults and comments; `--print-config` prints the
    resolved config and stops. A user's mistake prints one line and exits with status 2.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog="options (key=value, or lines of the YAML file):\n" + describe(cls),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of options")
    parser.add_argument("--print-config", action="store_true", help="print all options and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options; win over FILE")
    args, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        parser.error(f"{unknown[0]!r}: options are written key=value, without dashes")
    try:
        config = load_config(cls, args.config, args.overrides)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if args.print_config:
        print(to_yaml(config), end="")
        sys.exit(0)
    return config


@contextlib.contextmanager
def one_line_errors(command: str) -> Iterator[None]:
    """What a user can mend ends the command with one line and status 1, not with a traceback.

    HIGGS_LAB_TRACEBACK=1 in the environment shows the traceback, for reports of what was no mistake
    of the user's.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("HIGGS_LAB_TRACEBACK"):
            raise
        sys.exit(f"{command}: {error}")


def describe(cls: type) -> str:
    """One line per field of a config class: name, type, default, comment."""
    lines = []
    for key, hint, default, comment in _fields(cls):
        shown = "required" if default == MISSING else f"= {default}"
        lines.append(f"  {key} ({_type_name(hint)}) {shown}")
        lines += textwrap.wrap(comment, 96, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _merge(cls: type, config, layer, source: str):
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.merge(config, layer)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or ""
        if "not in" in str(error):
            known = [field[0] for field in _fields(cls)]
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
            near += [name for name in known if key and key in name and name not in near]
            hint = (
                f"did you mean {' or '.join(near[:3])}?" if near else f"known: {', '.join(known)}"
            )
            raise ValueError(f"{source}: unknown option {key!r}; {hint}") from error
        raise ValueError(f"{source}: {key}: {_first_line(error)}") from error


def _read_yaml(path: str | Path):
    from omegaconf import DictConfig, OmegaConf

    if not Path(path).is_file():
        raise FileNotFoundError(f"config file {path} does not exist (working folder {Path.cwd()})")
    try:
        layer = OmegaConf.load(path)
    except Exception as error:  # PyYAML's own errors, with line and column
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(layer, DictConfig):
        raise ValueError(f"{path}: expected lines of `key: value`, got a list or plain text")
    return layer


def _fields(cls: type, prefix: str = "") -> list[tuple[str, object, object, str]]:
    """(dotted key, type hint, default, comment) of every leaf field."""
    hints, comments, result = typing.get_type_hints(cls), _comments(cls), []
    for field in dataclasses.fields(cls):
        hint, key = hints[field.name], prefix + field.name
        if dataclasses.is_dataclass(hint):
            result += _fields(hint, key + ".")
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        elif default is dataclasses.MISSING:
            default = MISSING
        result.append((key, hint, default, comments.get(field.name, "")))
    return result


def _comments(cls: type) -> dict[str, str]:
    """The comment of each field: behind it on its line, or on the lines right above it."""
    comments: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):  # defined at a prompt: no source, no comments
            continue
        by_line, whole_line = {}, set()
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                by_line[token.start[0]] = token.string.lstrip("#").strip()
                if not token.line[: token.start[1]].strip():
                    whole_line.add(token.start[0])
        for node in ast.parse(source).body[0].body:
            if not isinstance(node, ast.AnnAssign):
                continue
            above, line = [], node.lineno - 1
            while line in whole_line:
                above.insert(0, by_line[line])
                line -= 1
            beside = [by_line.get(n, "") for n in range(node.lineno, node.end_lineno + 1)]
            comments[node.target.id] = " ".join(filter(None, [*above, *beside]))
    return comments


def _takes_text(cls: type, key: str) -> bool:
    """Whether a key names a field whose value is text, so that YAML must not reinterpret it."""
    hint = next((hint for name, hint, *_ in _fields(cls) if name == key), None)
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    options = [option for option in options if option is not type(None)]
    return bool(options) and all(
        option in (str, Path)
        or typing.get_origin(option) is typing.Literal
        and all(isinstance(value, str) for value in typing.get_args(option))
        for option in options
    )


def _is_union(hint: object) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _type_name(hint: object) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
