"""Deploy profiles as files: self-contained, each key explained. (Parsed by the engine's own classes
in tests/engines/test_profiles_engines.py.)"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

PROFILES = Path(__file__).parents[1] / "serve" / "profiles"
NAMES = ("throughput", "low_latency", "small_gpu", "two_gpu", "cpu_smoke")
SOURCE = re.compile(r"\[(engine|arithmetic|card|server|choice)\b[^\]]*\]")
STRUCTURE = {"base_config", "stages", "stage_id", "default_sampling_params", "compilation_config"}


def test_the_five_profiles_are_there():
    assert sorted(p.stem for p in PROFILES.glob("*.yaml")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_profile_is_an_overlay_on_a_file_beside_it(name):
    raw = yaml.safe_load((PROFILES / f"{name}.yaml").read_text())
    assert (PROFILES / raw["base_config"]).is_file()
    assert set(raw) <= {"base_config", "stages", "dtype"}


@pytest.mark.parametrize("name", NAMES)
def test_every_key_stands_under_its_reason_and_the_source_of_it(name):
    above = ""
    for line in (PROFILES / f"{name}.yaml").read_text().splitlines():
        word = line.strip().removeprefix("- ")
        if word.startswith("#"):
            above += word
            continue
        if word and word.partition(":")[0] not in STRUCTURE:
            assert SOURCE.search(above), f"{name}.yaml: {word}"
        above = ""


def test_every_key_of_the_base_is_under_a_comment():
    """Its values have one source, the engine's file."""
    explained = True
    for line in (PROFILES / "base" / "vllm_omni_0.30.yaml").read_text().splitlines():
        explained = bool(line.strip()) and (explained or "#" in line)
        named = line.partition(":")[0].strip().removeprefix("- ") in STRUCTURE
        assert explained or named or not line.strip(), line


@pytest.mark.parametrize("name", NAMES)
def test_trap23_no_profile_fixes_the_seed(name):
    """The engine's own file gives every request without a seed the same take."""
    raw = yaml.safe_load((PROFILES / f"{name}.yaml").read_text())
    talker = next(s for s in raw["stages"] if s["stage_id"] == 0)
    assert talker["default_sampling_params"]["seed"] is None


@pytest.mark.parametrize("name", NAMES)
def test_header_says_what_it_is_for_and_how_to_run_it(name):
    head = (PROFILES / f"{name}.yaml").read_text().partition("base_config")[0]
    assert "serve" in head and f"{name}.yaml" in head or "--device cpu" in head
