"""Config: one dataclass, a YAML file, key=value; every mistake names its place and the fix."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from higgs_lab.config import MISSING, cli, describe, load_config, save_config


@dataclass
class Optim:
    lr: float = 1e-4  # peak learning rate


@dataclass
class RunConfig:
    # checkpoint to start from
    model: str = MISSING
    steps: int = 10  # optimiser steps
    mode: Literal["fast", "slow"] = "fast"
    out: Path | None = (  # where to
        None  # write
    )
    note: str | None = None
    langs: list[str] = field(default_factory=list)
    optim: Optim = field(default_factory=Optim)

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")


def _yaml(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_yaml_then_overrides(tmp_path):
    path = _yaml(tmp_path, "model: nano\nsteps: 3\noptim:\n  lr: 1e-3\n")
    config = load_config(RunConfig, path, ["steps=5", "optim.lr=2e-5", "langs=[de, fr]"])
    assert config == RunConfig("nano", 5, langs=["de", "fr"], optim=Optim(2e-5))
    assert isinstance(config.optim.lr, float)


def test_text_values_are_taken_as_typed():
    typed = ["model=0012", "note=Yes: 3.10, no", "out=a/b"]
    config = load_config(RunConfig, None, typed)
    assert (config.model, config.note, config.out) == ("0012", "Yes: 3.10, no", Path("a/b"))
    assert load_config(RunConfig, None, ["model=x", "note=y", "note=null"]).note is None


def test_save_and_load_give_the_same_config(tmp_path):
    config = RunConfig("0012", 7, "slow", Path("a"), "x: y", ["de"], Optim(3e-6))
    save_config(config, tmp_path / "sub" / "config.yaml")
    assert load_config(RunConfig, tmp_path / "sub" / "config.yaml", []) == config


def test_unknown_key_names_the_file_and_near_matches(tmp_path):
    path = _yaml(tmp_path, "model: nano\nstep: 3\n")
    with pytest.raises(ValueError, match=r"run.yaml: unknown option 'step'; did you mean steps\?"):
        load_config(RunConfig, path, [])
    with pytest.raises(ValueError, match=r"'optim.rl=1'.*did you mean optim.lr\?"):
        load_config(RunConfig, None, ["optim.rl=1"])
    with pytest.raises(ValueError, match="unknown option 'zzz'; known: model, steps"):
        load_config(RunConfig, None, ["zzz=1"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=x", "steps=3.5"], "steps=3.5.*could not be converted to Integer"),
        (["model=x", "mode=medium"], r"expected one of \['fast', 'slow'\]"),
        (["steps=3"], "needs model: give model=... on the command line"),
        (["--steps"], "written key=value, without dashes"),
        (["model=x", "steps=0"], "steps must be at least 1, not 0"),
        (["model=x", "langs=[de"], r"argument 'langs=\[de'"),
    ],
)
def test_bad_values_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(RunConfig, None, overrides)


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no.yaml does not exist"):
        load_config(RunConfig, tmp_path / "no.yaml", [])
    with pytest.raises(ValueError, match=r"(?s)run.yaml is not valid YAML.*line 2"):
        load_config(RunConfig, _yaml(tmp_path, "model: a\nsteps: [1\n"), [])
    with pytest.raises(ValueError, match="expected lines of `key: value`"):
        load_config(RunConfig, _yaml(tmp_path, "- a\n- b\n"), [])


def test_cli_takes_config_and_overrides_in_any_order(tmp_path):
    path = _yaml(tmp_path, "model: nano\nsteps: 3\n")
    for argv in (["--config", str(path), "steps=4"], ["steps=4", "--config", str(path)]):
        assert cli(RunConfig, "Run.", argv) == RunConfig("nano", 4)


def test_cli_mistake_is_one_line_and_status_2(capsys):
    for argv, message in (
        (["model=nano", "stps=4"], "unknown option 'stps'; did you mean steps?"),
        (["--steps", "4"], "'--steps': options are written key=value, without dashes"),
        (["--config", "no.yaml"], "config file no.yaml does not exist"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli(RunConfig, "Run.", argv)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_help_lists_every_field_with_default_and_comment(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli(RunConfig, "Run something.", ["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "Run something." in text
    assert "model (str) required\n      checkpoint to start from" in text
    assert "steps (int) = 10\n      optimiser steps" in text
    assert "(pathlib.Path | None) = None\n      where to write" in text
    assert "optim.lr (float) = 0.0001\n      peak learning rate" in text
    assert len([line for line in describe(RunConfig).splitlines() if " (" in line]) == 7


def test_print_config_shows_the_resolved_config(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli(RunConfig, "Run.", ["model=nano", "steps=4", "--print-config"])
    assert stopped.value.code == 0
    assert "model: nano\nsteps: 4\n" in capsys.readouterr().out
