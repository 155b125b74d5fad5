"""Adapters beside an export: what vLLM would refuse late, or ignore, is refused before it starts.
tests/serve/test_lora_server.py hears them through the real server."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from higgs_lab.adapter import attach_lora, base_fingerprint, save_adapter
from higgs_lab.checkpoint import load_talker
from serve.adapters import check_lora, parse_lora, with_adapters
from serve.launch import make_plan
from tests.tiny import tiny_native, tiny_talker


@pytest.fixture
def export_dir(tmp_path) -> Path:
    out = tiny_native(tmp_path / "base", tiny_talker(scale=4))
    (out / "deploy").mkdir()
    (out / "deploy" / "cpu_smoke.yaml").write_text("stages: []\n")
    return out


def adapter_at(out: Path, base: Path, preset: str = "attention", rank: int = 4, **options) -> Path:
    model = attach_lora(load_talker(base, dtype=torch.float32), preset, rank=rank, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    info = {"base": "b", "revision": None, "fingerprint": base_fingerprint(base)}
    save_adapter(model, out, info)
    return out


@pytest.fixture
def vllm(tmp_path) -> str:
    """A vllm whose environment has the plugin, which is all that is asked of it here."""
    bin_folder = tmp_path / "env" / "bin"
    bin_folder.mkdir(parents=True)
    (bin_folder / "vllm").write_text("")
    site = tmp_path / "env" / "site"
    info = site / "higgs_lab_vllm_lora-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: higgs_lab_vllm_lora\n")
    python = bin_folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return str(bin_folder / "vllm")


def plan_of(export_dir: Path, vllm: str):
    return make_plan(export_dir, device="cpu", vllm=vllm, state=export_dir.parent / "state")


def test_plan_gets_the_deploy_file_and_the_names(export_dir, vllm, tmp_path):
    adapters = {
        "ann": adapter_at(tmp_path / "ann", export_dir, rank=4),
        "bob": adapter_at(tmp_path / "bob", export_dir, "attention_mlp", rank=12),
    }
    before = plan_of(export_dir, vllm)
    plan = with_adapters(before, export_dir, adapters)
    assert plan.command[plan.command.index("--deploy-config") + 1] == str(plan.deploy)
    overlay = yaml.safe_load(plan.deploy.read_text())
    assert overlay["base_config"] == str(before.deploy)
    assert overlay["stages"] == [
        {
            "stage_id": 0,
            "additional_config": {
                "higgs_lab_lora": {
                    "enable_lora": True,
                    "max_loras": 2,
                    "max_cpu_loras": 2,
                    "max_lora_rank": 16,  # of what vLLM allows, the next above 12
                }
            },
        }
    ]
    assert plan.command[-3:] == ["--lora-modules", *(f"{n}={p}" for n, p in adapters.items())]
    assert with_adapters(before, export_dir, {}) == before


def test_batch_may_be_limited_to_fewer_adapters(export_dir, vllm, tmp_path):
    adapters = {n: adapter_at(tmp_path / n, export_dir) for n in ("a", "b", "c")}
    plan = with_adapters(plan_of(export_dir, vllm), export_dir, adapters, max_active=1)
    settings = yaml.safe_load(plan.deploy.read_text())["stages"][0]["additional_config"][
        "higgs_lab_lora"
    ]
    assert (settings["max_loras"], settings["max_cpu_loras"]) == (1, 3)


def test_names_are_told_apart(export_dir, vllm, tmp_path):
    assert parse_lora(["ann=runs/ann"]) == {"ann": Path("runs/ann")}
    for words in (["runs/ann"], ["=runs/ann"], ["ann="]):
        with pytest.raises(ValueError, match="NAME=FOLDER"):
            parse_lora(words)
    with pytest.raises(ValueError, match="twice"):
        parse_lora(["a=x", "a=y"])
    adapter = adapter_at(tmp_path / "ann", export_dir)
    with pytest.raises(ValueError, match="the base's own name"):
        with_adapters(plan_of(export_dir, vllm), export_dir, {"base": adapter})


def test_missing_plugin_is_named_with_the_command_that_installs_it(export_dir, vllm, tmp_path):
    adapter = adapter_at(tmp_path / "ann", export_dir)
    plan = plan_of(export_dir, vllm)
    (Path(vllm).parents[1] / "site" / "higgs_lab_vllm_lora-0.1.0.dist-info" / "METADATA").unlink()
    (Path(vllm).parents[1] / "site" / "higgs_lab_vllm_lora-0.1.0.dist-info").rmdir()
    with pytest.raises(FileNotFoundError, match=r"pip install .*serve/lora"):
        with_adapters(plan, export_dir, {"ann": adapter})


def test_a_trained_table_cannot_be_swapped(export_dir, tmp_path):
    adapter = adapter_at(tmp_path / "ann", export_dir, "attention_mlp_table")
    with pytest.raises(ValueError, match=r"modules_to_save.*serve\.export"):
        check_lora(adapter, export_dir)


@pytest.mark.parametrize(
    "setting, words",
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"r": 1024}, "rank 1024"),
    ],
)
def test_settings_that_vllm_refuses_or_does_not_read(export_dir, tmp_path, setting, words):
    adapter = adapter_at(tmp_path / "ann", export_dir)
    assert check_lora(adapter, export_dir) == (adapter, 4)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | setting))
    with pytest.raises(ValueError, match=words):
        check_lora(adapter, export_dir)


def rewrite(adapter: Path, edit) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file(dict(map(edit, load_file(file).items())), file)


def test_keys_that_match_nothing_are_refused_because_vllm_ignores_them(export_dir, tmp_path):
    adapter = adapter_at(tmp_path / "ann", export_dir)
    rewrite(adapter, lambda item: (item[0].replace("self_attn", "attention"), item[1]))
    with pytest.raises(ValueError, match=r"would ignore 'base_model.*attention"):
        check_lora(adapter, export_dir)


def test_layers_that_the_base_lacks_are_refused(export_dir, tmp_path):
    adapter = adapter_at(tmp_path / "ann", export_dir)
    rewrite(adapter, lambda item: (item[0].replace("layers.1.", "layers.7."), item[1]))
    with pytest.raises(ValueError, match=r"layer 7.*2 layers"):
        check_lora(adapter, export_dir)


def test_untrained_adapter_is_refused(export_dir, tmp_path):
    adapter = adapter_at(tmp_path / "ann", export_dir)
    rewrite(adapter, lambda item: (item[0], item[1] * ("lora_B" not in item[0])))
    with pytest.raises(ValueError, match="no effect"):
        check_lora(adapter, export_dir)


def test_adapter_of_another_base_is_refused(export_dir, tmp_path):
    other = tiny_native(tmp_path / "other", tiny_talker(scale=2))
    with pytest.raises(ValueError, match="trained on"):
        check_lora(adapter_at(tmp_path / "ann", other), export_dir)
