"""Native directories: every key read or refused by name; what is saved is what was loaded."""

from __future__ import annotations

import copy
import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from higgs_lab.checkpoint import (
    CODEC_PREFIX,
    INDEX,
    TIED_COPIES,
    NativeFiles,
    load_talker,
    read_config,
    resolve_checkpoint,
    rewrite_native,
    save_native,
    to_native_key,
    to_talker_key,
)
from tests.tiny import (
    TEXT_CONFIG_4B,
    meta_talker,
    run_one,
    three_examples,
    tiny_native,
    tiny_talker,
)

TABLE = "tied.embedding.modality_embeddings.0.embedding.weight"
TEXT = "tied.embedding.text_embedding.weight"
HEADS = sorted(TIED_COPIES)


@pytest.fixture
def base(tmp_path) -> Path:
    return tiny_native(tmp_path / "base")


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= {k: v.clone() for k, v in load_file(file).items()}
    return found


def rewrite(path: Path, change) -> None:
    """Spoil the one file of a directory: change(tensors), the index following."""
    tensors = tensors_of(path)
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    weight_map = {k: "model.safetensors" for k in tensors if k not in TIED_COPIES}
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def shard(path: Path, files: int = 3) -> None:
    """Spread the directory's tensors over several files, as larger checkpoints are."""
    tensors = tensors_of(path)
    keys = sorted(tensors)
    (path / "model.safetensors").unlink()
    weight_map = {}
    for i in range(files):
        name = f"model-{i + 1:05}-of-{files:05}.safetensors"
        save_file({k: tensors[k] for k in keys[i::files]}, path / name)
        weight_map |= {k: name for k in keys[i::files] if k not in TIED_COPIES}
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


# --- the key table


def test_trap12_keys_of_the_4b_model():
    """Facts §1.2: 399 talker keys by name, from the real configuration."""
    names = {
        to_native_key(k): tuple(v.shape)
        for k, v in meta_talker(TEXT_CONFIG_4B).state_dict().items()
    }
    layer = {
        "input_layernorm.weight": (2560,),
        "post_attention_layernorm.weight": (2560,),
        "self_attn.q_proj.weight": (4096, 2560),
        "self_attn.k_proj.weight": (1024, 2560),
        "self_attn.v_proj.weight": (1024, 2560),
        "self_attn.o_proj.weight": (2560, 4096),
        "self_attn.q_norm.weight": (128,),
        "self_attn.k_norm.weight": (128,),
        "mlp.gate_proj.weight": (9728, 2560),
        "mlp.up_proj.weight": (9728, 2560),
        "mlp.down_proj.weight": (2560, 9728),
    }
    expected = {f"body.layers.{i}.{k}": v for i in range(36) for k, v in layer.items()}
    expected |= {"body.norm.weight": (2560,), TABLE: (8208, 2560), TEXT: (151936, 2560)}
    assert names == expected
    assert len(names) == 399
    for ours in meta_talker(TEXT_CONFIG_4B).state_dict():
        assert to_talker_key(to_native_key(ours)) == ours


def test_codec_keys_and_tied_copies_are_no_talker_keys():
    assert to_talker_key(CODEC_PREFIX + "fc.weight") is None
    assert [to_talker_key(k) for k in HEADS] == [None, None]


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "serve.export"),
        ("body.layers.0.self_attn.q_proj.lora_A.weight", "adapter"),
        ("body.layers.0.self_attn.q_proj.base_layer.weight", "adapter"),
        ("model.layers.0.self_attn.q_proj.weight", "Hugging Face port"),
        ("audio_embedding.weight", "Hugging Face port"),
        ("tied.head.modality_heads.1.weight", "unexpected"),
        ("body.embed_tokens.weight", "unexpected"),  # the text embedding's key in our model
        ("tied.embedding.modality_embeddings.1.embedding.weight", "unexpected"),
        ("lm_head.weight", "unexpected"),
        ("", "unexpected"),
    ],
)
def test_trap12_unknown_keys_are_refused_by_name(key, hint):
    with pytest.raises(ValueError, match=hint) as error:
        to_talker_key(key)
    assert repr(key) in str(error.value)


def test_a_talker_key_without_a_native_name_is_an_error():
    with pytest.raises(KeyError, match="lora_A"):
        to_native_key("base_model.lora_A")


# --- loading


@torch.no_grad()
def test_loading_gives_the_stored_weights(tmp_path):
    talker = tiny_talker(scale=4, dtype=torch.bfloat16)
    loaded = load_talker(tiny_native(tmp_path / "a", talker))
    assert not loaded.training
    assert loaded.dtype == torch.bfloat16
    assert same(loaded.state_dict(), talker.state_dict())
    example = three_examples()[2]
    assert torch.equal(run_one(loaded, example), run_one(talker, example))
    wide = load_talker(tmp_path / "a", dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert not any(p.is_meta for p in (*wide.parameters(), *wide.buffers()))


def test_trap08_a_loaded_model_rotates_by_the_checkpoints_theta(base):
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["rope_parameters"]["rope_theta"] = 50_000
    (base / "config.json").write_text(json.dumps(config))
    inv_freq = load_talker(base).model.rotary_emb.inv_freq
    torch.testing.assert_close(inv_freq, 1.0 / 50_000 ** (torch.arange(0, 16, 2) / 16))
    del config["text_config"]["rope_parameters"]
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="rope_theta"):
        load_talker(base)


@torch.no_grad()
def test_trap11_the_head_is_the_table_after_loading(base):
    talker = load_talker(base)
    assert [n for n, _ in talker.named_parameters() if not n.startswith("model.")] == [
        "codebooks.weight"
    ]
    talker.codebooks.weight.zero_()
    assert float(talker.codebooks.logits(torch.ones(1, 64, dtype=torch.bfloat16)).abs().sum()) == 0


def test_training_a_loaded_model_does_not_write_into_the_checkpoint(base):
    """Tensors may map the file: a step in place must stay in memory."""
    before = (base / "model.safetensors").read_bytes()
    talker = load_talker(base)
    with torch.no_grad():
        for parameter in talker.parameters():
            parameter.add_(1)
    assert (base / "model.safetensors").read_bytes() == before


def test_a_missing_tensor_is_named(base):
    rewrite(base, lambda t: t.pop("body.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match="lacks 1 tensors.*body.layers.1.mlp.up_proj.weight"):
        load_talker(base)


def test_trap40_a_missing_audio_table_is_named(base):
    """SGLang-Omni would serve random values without a word."""
    rewrite(base, lambda t: t.pop(TABLE))
    with pytest.raises(ValueError, match=TABLE):
        load_talker(base)


def test_an_unknown_tensor_is_named(base):
    rewrite(base, lambda t: t.update({"body.layers.2.mlp.up_proj.weight": torch.zeros(96, 64)}))
    with pytest.raises(ValueError, match="body.layers.2.mlp.up_proj.weight.*does not belong"):
        load_talker(base)


@pytest.mark.parametrize("prefix", ["base_model.model.", "model.layers.0."])
def test_trap12_a_directory_with_foreign_keys_is_refused(base, prefix):
    rewrite(base, lambda t: t.update({prefix + "x.weight": torch.zeros(2)}))
    with pytest.raises(ValueError, match=f"unexpected checkpoint key '{prefix}x.weight'"):
        load_talker(base)


def test_trap12_unmerged_lora_inside_body_says_so(base):
    """Not "lacks q_proj": the hint is what helps."""

    def spoil(tensors):
        q = "body.layers.0.self_attn.q_proj"
        tensors[f"{q}.base_layer.weight"] = tensors.pop(f"{q}.weight")
        tensors[f"{q}.lora_A.default.weight"] = torch.zeros(4, 64)

    rewrite(base, spoil)
    with pytest.raises(ValueError, match="unmerged adapter"):
        load_talker(base)


def test_another_shape_is_refused_with_both_shapes(base):
    rewrite(base, lambda t: t.update({TABLE: torch.zeros(8 * 1024, 64)}))
    with pytest.raises(ValueError, match=r"\(8192, 64\).*\(8208, 64\)"):
        load_talker(base)


@pytest.mark.parametrize("left", [0.999, 0.5, 0.01, 0])
def test_a_truncated_file_is_named(base, left):
    file = base / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[: int(len(raw) * left)])
    with pytest.raises(ValueError, match="model.safetensors cannot be read.*cut or damaged"):
        load_talker(base)


def test_a_missing_shard_is_noticed_through_the_index(base):
    shard(base)
    (base / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="a shard is missing or truncated"):
        load_talker(base)


def test_one_tensor_in_two_files_is_refused(base):
    """A stray file beside the checkpoint: which of the two is right?"""
    save_file({TABLE: torch.zeros(2)}, base / "extra.safetensors")
    with pytest.raises(ValueError, match="is in extra.safetensors and model.safetensors"):
        load_talker(base)


def test_no_weights_or_config_at_all(tmp_path, base):
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        load_talker(tmp_path)
    (base / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds no"):
        load_talker(base)


@pytest.mark.parametrize("part", ["text_config", "audio_encoder_config"])
def test_a_config_of_another_model_is_refused(base, part):
    config = json.loads((base / "config.json").read_text())
    del config[part]
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"no '{part}'"):
        read_config(base)


@pytest.mark.parametrize("part", ["text_config", "audio_encoder_config"])
def test_trap11_an_untied_head_is_refused(base, part):
    config = json.loads((base / "config.json").read_text())
    config[part]["tie_word_embeddings"] = False
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{part}.*untied"):
        load_talker(base)


# --- saving


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


# --- names


def test_names_resolve(nano, base):
    assert resolve_checkpoint("nano").path == nano
    found = resolve_checkpoint(base)
    assert (found.path, found.name, found.revision) == (base.resolve(), str(base), None)


@pytest.mark.parametrize("name", ["no/such/folder", "nowhere", "./a/b", "/a/b", "~/x"])
def test_a_wrong_path_is_not_looked_for_on_the_hub(name):
    with pytest.raises(FileNotFoundError, match="no directory on this disk and no hub name"):
        resolve_checkpoint(name)


def test_a_hub_name_that_cannot_be_had_says_so():
    """Offline, as all of these tests run."""
    with pytest.raises(FileNotFoundError, match="nobody/nothing@abc.*could not be fetched"):
        resolve_checkpoint("nobody/nothing@abc")


def test_copies_of_the_config_stay_apart():
    """tiny builders share a dict: loading must not edit what it was given."""
    before = copy.deepcopy(TEXT_CONFIG_4B)
    meta_talker(TEXT_CONFIG_4B)
    assert before == TEXT_CONFIG_4B
