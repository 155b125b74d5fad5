"""Adapter folders: saved whole, loaded as saved, refused with another base or other weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from higgs_lab.adapter import (
    TARGETS,
    adapter_effect,
    adapter_parameters,
    base_fingerprint,
    find_adapter,
    load_adapter,
    probe_logits,
    read_meta,
    save_adapter,
)
from higgs_lab.checkpoint import load_talker, save_native
from tests.tiny import (
    three_prompts,
    tiny_native,
    tiny_talker,
)
from tests.tiny_adapter import trained

PRESETS = sorted(TARGETS)


@pytest.fixture
def base(tmp_path) -> Path:
    return tiny_native(tmp_path / "base", tiny_talker(scale=4))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_loads_as_it_was_saved(base, tmp_path, preset, dtype):
    folder, model = trained(base, tmp_path / "adapter", preset, dtype)
    prompt = three_prompts()[2]
    loaded = load_adapter(load_talker(base, dtype=dtype), folder, base=base)
    assert not loaded.training
    assert torch.equal(probe_logits(loaded, prompt), probe_logits(model, prompt))
    assert adapter_effect(loaded, prompt) > 0


def test_an_adapter_folder_is_a_standard_peft_one(base, tmp_path):
    """Other tools must be able to read it: plain PEFT, without our loader."""
    folder, model = trained(base, tmp_path / "run" / "adapter")
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "higgs_lab.json",
    ]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)
    assert config["target_modules"] == sorted(config["target_modules"])  # PEFT's set has no order
    plain = PeftModel.from_pretrained(load_talker(base, dtype=torch.float32), str(folder)).eval()
    prompt = three_prompts()[0]
    assert torch.equal(probe_logits(plain, prompt), probe_logits(model, prompt))
    keys = [name for name, _ in adapter_parameters(model)]
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight" in keys
    assert find_adapter(tmp_path / "run") == find_adapter(folder) == folder
    assert read_meta(folder)["revision"] == "abc"
    assert read_meta(tmp_path) == {}


def other_base(path: Path, kind: str) -> Path:
    """A base that is not the adapter's, in one respect."""
    talker = load_talker(tiny_native(path, tiny_talker(scale=4)))
    with torch.no_grad():
        if kind == "table":
            talker.codebooks.weight.add_(0.1)
        elif kind == "layer":  # a fine-tune of the base: LoRA leaves the table as it was
            talker.model.layers[1].self_attn.v_proj.weight.add_(0.01)
        elif kind == "text":
            talker.model.embed_tokens.weight.add_(0.1)
    save_native(talker, path, path)
    if kind == "config":
        config = json.loads((path / "config.json").read_text())
        config["text_config"]["rope_parameters"]["rope_theta"] = 5e5
        (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("kind", ["table", "layer", "text", "config"])
def test_an_adapter_of_another_base_is_refused(base, tmp_path, kind):
    folder, _ = trained(base, tmp_path / "adapter")
    other = other_base(tmp_path / "other", kind)
    with pytest.raises(ValueError, match="trained on org/base@abc.*its own base"):
        load_adapter(load_talker(other), folder, base=other)
    load_adapter(load_talker(base), folder, base=base)


def test_the_fingerprint_does_not_hang_on_the_place_or_the_shards(base, tmp_path):
    same = other_base(tmp_path / "elsewhere", "nothing")
    assert base_fingerprint(same) == base_fingerprint(base)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_an_adapter_that_does_not_fit_is_refused(base, tmp_path):
    folder, _ = trained(base, tmp_path / "adapter")
    wide = tiny_talker(intermediate_size=128)
    with pytest.raises(ValueError, match="does not fit this model"):
        load_adapter(wide, folder)
    shallow = tiny_talker(num_hidden_layers=1, layer_types=["full_attention"])
    with pytest.raises(ValueError, match="unknown to this model"):
        load_adapter(shallow, folder)
    deep = tiny_talker(num_hidden_layers=3, layer_types=["full_attention"] * 3)
    with pytest.raises(ValueError, match="missing for this model"):
        load_adapter(deep, folder)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_keys_that_match_nothing_are_noticed(base, tmp_path):
    """PEFT only warns, and the adapter does nothing."""
    from safetensors.torch import load_file, save_file

    folder, _ = trained(base, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    renamed = {k.replace("model.layers", "layers"): v for k, v in load_file(file).items()}
    save_file(renamed, file)
    with pytest.raises(ValueError, match="this model"):
        load_adapter(load_talker(base), folder)


def test_a_cut_or_missing_adapter_file_is_named(base, tmp_path):
    folder, _ = trained(base, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match="adapter_model.safetensors cannot be read.*cut"):
        load_adapter(load_talker(base), folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors is missing"):
        load_adapter(load_talker(base), folder)


def test_a_folder_without_adapter_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no adapter_config.json.*run directory"):
        find_adapter(tmp_path)
    with pytest.raises(FileNotFoundError, match="no adapter_config.json"):
        find_adapter("./nowhere")


def test_saving_replaces_whole_or_not_at_all(base, tmp_path):
    folder, model = trained(base, tmp_path / "adapter")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(TypeError):
        save_adapter(model, folder, {"base": "x", "bad": object()})
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".tmp")] == []
