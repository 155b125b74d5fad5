"""Native directories: what is saved is what was loaded, whole or not at all."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from higgs_lab.checkpoint import (
    CODEC_PREFIX,
    INDEX,
    TIED_COPIES,
    NativeFiles,
    load_talker,
    read_config,
    rewrite_native,
    save_native,
)
from tests.tiny import (
    run_one,
    same,
    three_examples,
    tiny_native,
    tiny_talker,
)
from tests.tiny_checkpoint import HEADS, TABLE, rewrite, shard, tensors_of


@pytest.fixture
def base(tmp_path) -> Path:
    return tiny_native(tmp_path / "base")


def changed_talker(path: Path):
    """What training leaves: every weight another, in fp32."""
    talker = load_talker(path, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in talker.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 8)
    return talker


@pytest.mark.parametrize("kind", ["one file", "sharded", "no tied copies", "no index", "mixed"])
def test_load_then_save_is_exact(base, tmp_path, kind):
    """Keys, dtypes, values, files and the index's key set are those of the base."""
    if kind == "sharded":
        shard(base)
    elif kind == "no tied copies":
        rewrite(base, lambda t: [t.pop(k) for k in HEADS])
    elif kind == "no index":
        (base / INDEX).unlink()
    elif kind == "mixed":  # another dtype for some, as a repacked checkpoint may have
        rewrite(base, lambda t: t.update({"body.norm.weight": t["body.norm.weight"].float()}))
    out = tmp_path / "out"
    save_native(load_talker(base, dtype=torch.float32), base, out)
    assert same(tensors_of(out), tensors_of(base))
    assert sorted(p.name for p in out.glob("*.safetensors")) == sorted(
        p.name for p in base.glob("*.safetensors")
    )
    wanted = set(tensors_of(base)) - set(TIED_COPIES)
    weight_map = json.loads((out / INDEX).read_text())["weight_map"]
    assert set(weight_map) == wanted
    assert all(k in NativeFiles(out).shard for k in weight_map)
    assert load_talker(out).state_dict().keys() == load_talker(base).state_dict().keys()


@pytest.mark.parametrize("shards", [1, 3])
def test_trap11_tied_copies_are_refreshed(base, tmp_path, shards):
    """Readers may use either: a stale copy speaks with the old voice."""
    if shards > 1:
        shard(base, shards)
    talker = changed_talker(base)
    save_native(talker, base, tmp_path / "out")
    saved, old = tensors_of(tmp_path / "out"), tensors_of(base)
    assert set(saved) == set(old)
    for copy_, source in TIED_COPIES.items():
        assert torch.equal(saved[copy_], saved[source])
        assert not torch.equal(saved[copy_], old[copy_])
    assert torch.equal(saved[TABLE], talker.codebooks.weight.detach().bfloat16())
    codec = [k for k in old if k.startswith(CODEC_PREFIX)]
    assert len(codec) == 3
    assert all(torch.equal(saved[k], old[k]) for k in codec)  # the codec is not touched


def test_what_is_saved_is_what_speaks(base, tmp_path):
    talker = changed_talker(base).bfloat16()
    save_native(talker, base, tmp_path / "out")
    example = three_examples()[1]
    with torch.no_grad():
        assert torch.equal(
            run_one(load_talker(tmp_path / "out"), example), run_one(talker, example)
        )


def test_trap12_the_index_lists_codec_keys_that_the_bases_index_forgot(base, tmp_path):
    """SGLang-Omni loads only what is listed, the rest of the codec would be random."""
    index = json.loads((base / INDEX).read_text())
    index["weight_map"] = {
        k: f for k, f in index["weight_map"].items() if not k.startswith(CODEC_PREFIX)
    }
    (base / INDEX).write_text(json.dumps(index))
    save_native(load_talker(base), base, tmp_path / "out")
    weight_map = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert {k for k in tensors_of(base) if k.startswith(CODEC_PREFIX)} <= set(weight_map)
    assert not set(weight_map) & set(TIED_COPIES)


def test_trap12_nano_has_the_key_groups_of_the_released_file(nano):
    """The same rules as at 4B: 11 a layer, two tables, the norm, the codec with its mask, two
    copies that the index leaves out."""
    files = NativeFiles(nano)
    layers = read_config(nano)["text_config"]["num_hidden_layers"]
    codec = files.keys(CODEC_PREFIX)
    assert len(files.keys("body.layers.")) == 11 * layers
    assert CODEC_PREFIX + "semantic_model.masked_spec_embed" in codec
    assert len(files.keys()) == 11 * layers + 3 + len(codec) + 2
    assert set(files.keys()) - set(files.indexed) == set(TIED_COPIES)
    for copy_, source in TIED_COPIES.items():
        pair = dict(files.items([copy_, source]))
        assert torch.equal(pair[copy_], pair[source])
    with safe_open(nano / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(k).get_dtype() for k in file.keys()} == {"BF16"}
        assert file.metadata() == {"format": "pt"}


def test_side_files_come_along_and_weights_of_others_do_not(base, tmp_path):
    (base / "LICENSE").write_text("licence")
    (base / "README.md").write_text("the base's card")
    save_native(load_talker(base), base, tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE", INDEX} <= names
    assert "README.md" not in names  # an export writes its own
    for name in ("config.json", "tokenizer.json", "LICENSE"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def test_saving_over_the_base_itself(base):
    """In place: readers map the old file until the new directory stands."""
    talker = changed_talker(base)
    save_native(talker, base, base)
    assert torch.equal(tensors_of(base)[TABLE], talker.codebooks.weight.detach().bfloat16())


def test_a_failed_save_leaves_nothing(base, tmp_path):
    talker = tiny_talker(num_hidden_layers=3, layer_types=["full_attention"] * 3)
    with pytest.raises(ValueError, match="no key for 'model.layers.2"):
        save_native(talker, base, tmp_path / "out")
    small = tiny_talker(num_hidden_layers=1, layer_types=["full_attention"])
    with pytest.raises(ValueError, match="body.layers.1"):
        save_native(small, base, tmp_path / "out")
    other = tiny_talker(intermediate_size=128)
    with pytest.raises(ValueError, match="mlp"):
        save_native(other, base, tmp_path / "out")

    def breaks_late(key, tensor):
        if key == "body.norm.weight":
            raise RuntimeError("out of luck")
        return tensor

    with pytest.raises(RuntimeError, match="out of luck"):
        rewrite_native(base, tmp_path / "out", breaks_late)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_a_full_disk_is_named_and_leaves_nothing(base, tmp_path):
    def full(key, tensor):
        if key == "body.norm.weight":
            raise OSError(errno.ENOSPC, "No space left on device")
        return tensor

    with pytest.raises(OSError, match="disk is full|No space left"):
        rewrite_native(base, tmp_path / "out", full)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_a_failed_save_keeps_what_stood_there(base, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(base, out)
    before = tensors_of(out)
    with pytest.raises(ValueError, match="no key for"):
        save_native(tiny_talker(num_hidden_layers=3, layer_types=["full_attention"] * 3), base, out)
    assert same(tensors_of(out), before)
