"""Native directories: every key read or refused by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from higgs_lab.checkpoint import (
    CODEC_PREFIX,
    load_talker,
    read_config,
    resolve_checkpoint,
    to_native_key,
    to_talker_key,
)
from tests.tiny import (
    TEXT_CONFIG_4B,
    meta_talker,
    run_one,
    same,
    three_examples,
    tiny_native,
    tiny_talker,
)
from tests.tiny_checkpoint import HEADS, TABLE, TEXT, rewrite, shard


@pytest.fixture
def base(tmp_path) -> Path:
    return tiny_native(tmp_path / "base")


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
