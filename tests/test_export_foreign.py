"""serve.export of what other trainers made: names differ, weights must not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from higgs_lab.checkpoint import (
    CODEC_PREFIX,
    TIED_COPIES,
    NativeFiles,
    foreign_native_key,
    load_talker,
    to_native_key,
)
from higgs_lab.codec import Codec
from serve.export import Job, export, export_many
from serve.sources import read_adapter
from tests.tiny import num_layers

TABLE = "tied.embedding.modality_embeddings.0.embedding.weight"


class Port(nn.Module):
    """The module tree of the Hugging Face port, around a native checkpoint's weights."""

    def __init__(self, native: Path, dtype=None):
        super().__init__()
        talker = load_talker(native, dtype=dtype)
        self.config = talker.config
        self.model = talker.model
        self.audio_embedding = nn.Embedding(*talker.codebooks.weight.shape)
        self.audio_head = nn.Linear(*talker.codebooks.weight.shape[::-1], bias=False)
        self.audio_embedding.weight = talker.codebooks.weight
        self.audio_head.weight = talker.codebooks.weight


def nudge(module: nn.Module, words: tuple[str, ...], size: float = 0.05) -> None:
    """As if trained: noise on the parameters whose names hold one of the words."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if any(word in name for word in words):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += (size * noise).to(parameter.dtype)


def native(path: Path) -> dict[str, torch.Tensor]:
    return dict(NativeFiles(path).items())


def same_weights(path: Path, merged: dict[str, torch.Tensor]) -> int:
    """Hold an export against fp32 weights under the port's names; how many differ from each other
    by more than bf16 rounding is none, and how many tensors were compared is returned."""
    ours, count = native(path), 0
    for name, tensor in merged.items():
        key = foreign_native_key(name)
        error = (ours[key].float() - tensor.float()).abs().max()
        assert error <= 2**-8 * tensor.abs().max(), name
        count += 1
    return count


def refuses(base, tmp_path, source, words, **options):
    with pytest.raises((ValueError, OSError), match=words):
        export_many(base, [Job(tmp_path / "out", source)], **options)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize(
    "name, key",
    [
        ("model.embed_tokens.weight", "tied.embedding.text_embedding.weight"),
        ("model.layers.3.mlp.up_proj.weight", "body.layers.3.mlp.up_proj.weight"),
        ("model.norm.weight", "body.norm.weight"),
        ("audio_embedding.weight", TABLE),
        ("audio_head.weight", TABLE),
        ("codebooks.weight", TABLE),
        ("layers.3.self_attn.q_norm.weight", "body.layers.3.self_attn.q_norm.weight"),
        ("norm.weight", "body.norm.weight"),
        ("base_model.model.model.norm.weight", "body.norm.weight"),
        ("module._orig_mod.model.norm.weight", "body.norm.weight"),
        ("body.norm.weight", "body.norm.weight"),
        (TABLE, TABLE),
        ("tied.head.modality_heads.0.weight", TABLE),
        (CODEC_PREFIX + "fc.bias", CODEC_PREFIX + "fc.bias"),
    ],
)
def test_one_table_of_names(name, key):
    assert foreign_native_key(name) == key


@pytest.mark.parametrize("name", ["lm_head.weight", "encoder.norm.weight", "tied.other.weight"])
def test_unknown_names_are_no_names(name):
    with pytest.raises(KeyError):
        foreign_native_key(name)


@pytest.fixture(scope="module")
def port_weights(narrow) -> dict[str, torch.Tensor]:
    """A full fine-tune in fp32 under the port's names."""
    port = Port(narrow, torch.float32)
    nudge(port, ("q_proj", "norm", "audio_embedding"))
    return {k: v.clone() for k, v in port.state_dict().items()}


def write_sharded(weights: dict[str, torch.Tensor], out: Path) -> Path:
    """As transformers' save_pretrained shards: several files and an index."""
    out.mkdir()
    names, weight_map = sorted(weights), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({k: weights[k].contiguous() for k in part}, out / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return out


def test_a_full_fine_tune_of_the_port_becomes_native(narrow, port_weights, tmp_path):
    theirs = write_sharded(port_weights, tmp_path / "theirs")
    record = export(narrow, tmp_path / "out", theirs)
    assert same_weights(tmp_path / "out", port_weights) == len(port_weights)
    ours, before = native(tmp_path / "out"), native(narrow)
    assert set(ours) == set(before) and {v.dtype for v in ours.values()} == {torch.bfloat16}
    for twin, source in TIED_COPIES.items():
        assert torch.equal(ours[twin], ours[source])
    assert Codec.from_pretrained(tmp_path / "out").hash == Codec.from_pretrained(narrow).hash
    assert record["adapter"] is None and record["from"] == str(theirs)
    assert record["merge"]["tensors"] == len(port_weights) - 1  # the head is the table again
    assert "another checkpoint" in (tmp_path / "out" / "README.md").read_text()


def test_native_names_without_a_codec_are_taken_too(narrow, port_weights, tmp_path):
    """What save_pretrained of the port writes: it maps names back, and never had the codec."""
    renamed = {foreign_native_key(k): v for k, v in port_weights.items()}
    export(narrow, tmp_path / "out", write_sharded(renamed, tmp_path / "theirs"))
    assert same_weights(tmp_path / "out", port_weights) == len(port_weights)


def test_the_base_under_other_names_is_the_base(narrow, tmp_path):
    weights = {k: v.clone() for k, v in Port(narrow).state_dict().items()}
    record = export(narrow, tmp_path / "out", write_sharded(weights, tmp_path / "theirs"))
    assert record["merge"]["changed"] == 0
    before, ours = native(narrow), native(tmp_path / "out")
    assert all(torch.equal(before[k], ours[k]) for k in before)


def test_foreign_checkpoints_that_cannot_be_used_name_the_key(narrow, port_weights, tmp_path):
    def theirs(name: str, **changes) -> Path:
        weights = {k: v for k, v in (port_weights | changes).items() if v is not None}
        return write_sharded(weights, tmp_path / name)

    one = {"lm_head.weight": torch.zeros(2, 2)}
    refuses(narrow, tmp_path, theirs("a", **one), "lm_head.weight' is no weight of a Higgs talker")
    one = {"model.layers.1.mlp.up_proj.weight": None}
    refuses(narrow, tmp_path, theirs("b", **one), r"no weight for 'body\.layers\.1\.mlp\.up_proj")
    one = {"model.layers.9.mlp.up_proj.weight": torch.zeros(2, 2)}
    refuses(narrow, tmp_path, theirs("c", **one), "model.layers.9.mlp.up_proj.*another base")
    one = {"model.norm.weight": torch.zeros(7)}
    refuses(narrow, tmp_path, theirs("d", **one), r"body\.norm\.weight is \(\d+,\) there, \(7,\)")
    one = {"model.norm.weight": port_weights["model.norm.weight"] * float("nan")}
    refuses(narrow, tmp_path, theirs("e", **one), "NaN or infinite")
    one = {"audio_head.weight": port_weights["audio_head.weight"] + 1}
    refuses(narrow, tmp_path, theirs("f", **one), "trained apart")
    one = {CODEC_PREFIX + "fc.bias": native(narrow)[CODEC_PREFIX + "fc.bias"] + 1}
    refuses(narrow, tmp_path, theirs("g", **one), "another codec.*fc.bias")
    refuses(narrow, tmp_path, tmp_path / "nowhere", "no directory")


def save_peft(model: nn.Module, out: Path) -> Path:
    model.save_pretrained(out, save_embedding_layers=False)
    return out


def test_an_adapter_of_the_port_with_its_table_trained_whole(narrow, tmp_path):
    """modules_to_save copies embedding and head apart; a native checkpoint has one table."""
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"layers.0.self_attn.q_proj": 2},
        alpha_pattern={"down_proj": 3},
        use_rslora=True,
        modules_to_save=["audio_embedding", "audio_head"],
    )
    model = get_peft_model(Port(narrow, torch.float32), config)
    nudge(model, ("lora_B", "modules_to_save"))
    adapter = save_peft(model, tmp_path / "adapter")
    assert "base_model.model.audio_head.weight" in load_file(adapter / "adapter_model.safetensors")
    refuses(narrow, tmp_path, adapter, "--table embedding or --table head")
    merged = {k: v.clone() for k, v in model.merge_and_unload().state_dict().items()}
    head = merged.pop("audio_head.weight")
    export_many(narrow, [Job(tmp_path / "out", adapter)], "embedding")
    assert same_weights(tmp_path / "out", merged) == len(merged)
    merged["audio_embedding.weight"] = head
    export_many(narrow, [Job(tmp_path / "head", adapter)], "head")
    assert same_weights(tmp_path / "head", merged) == len(merged)


def test_an_adapter_on_the_bare_backbone_and_one_on_an_embedding(narrow, tmp_path):
    """Keys then read base_model.model.layers.N..., without the second `model`."""
    backbone = load_talker(narrow, dtype=torch.float32).model
    config = LoraConfig(
        task_type=TaskType.FEATURE_EXTRACTION, r=4, target_modules=["v_proj", "embed_tokens"]
    )
    model = get_peft_model(backbone, config)
    nudge(model, ("lora_B", "lora_embedding_A", "lora_embedding_B"))
    adapter = tmp_path / "theirs" / "qwen3_lora"
    model.save_pretrained(adapter)  # with the whole text table, as PEFT does by itself
    assert "base_model.model.layers.0.self_attn.v_proj.lora_A.weight" in load_file(
        adapter / "adapter_model.safetensors"
    )
    record = export(narrow, tmp_path / "out", adapter.parent)
    merged = dict(model.merge_and_unload().state_dict())
    assert same_weights(tmp_path / "out", merged) == len(merged)
    assert record["merge"]["changed"] == num_layers(narrow) + 1


def test_a_pickled_adapter_gives_the_same(narrow, tmp_path):
    model = get_peft_model(Port(narrow), LoraConfig(r=2, target_modules=["o_proj"]))
    nudge(model, ("lora_B",))
    save_peft(model, tmp_path / "new")
    model.save_pretrained(tmp_path / "old", safe_serialization=False)
    weights = load_file(tmp_path / "new" / "adapter_model.safetensors")
    for leftover in (tmp_path / "old").glob("adapter_model.*"):
        leftover.unlink()
    torch.save(weights, tmp_path / "old" / "adapter_model.bin")
    new, old = read_adapter(tmp_path / "new"), read_adapter(tmp_path / "old")
    assert new.keys == old.keys == {
        f"body.layers.{i}.self_attn.o_proj.weight" for i in range(num_layers(narrow))
    }  # fmt: skip
    for key in new.keys:
        assert torch.equal(new.pairs[key][0], old.pairs[key][0])
        assert torch.equal(new.pairs[key][1], old.pairs[key][1])


@pytest.mark.parametrize("begun", ["pissa", "olora", "loftq"])
def test_adapters_that_began_by_changing_the_base_are_refused(narrow, tmp_path, begun):
    model = get_peft_model(Port(narrow), LoraConfig(r=2, target_modules=["o_proj"]))
    nudge(model, ("lora_B",))
    adapter = save_peft(model, tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": begun}))
    refuses(narrow, tmp_path, adapter, "changes the base")


def test_several_adapters_in_one_pass_are_each_what_they_are_alone(narrow, tmp_path, monkeypatch):
    from higgs_lab import checkpoint

    adapters = []
    for name, words in (("a", ("lora_B",)), ("b", ("lora_A", "lora_B"))):
        model = get_peft_model(Port(narrow), LoraConfig(r=2, target_modules=["k_proj"]))
        nudge(model, words)
        adapters.append(save_peft(model, tmp_path / name))
    reads = []
    read = checkpoint.SafetensorsReader.read
    monkeypatch.setattr(
        checkpoint.SafetensorsReader, "read", lambda self, key: reads.append(key) or read(self, key)
    )
    outs = [tmp_path / "out_a", tmp_path / "out_b", tmp_path / "out_base"]
    sources = [*adapters, None]
    records = export_many(narrow, [Job(o, s) for o, s in zip(outs, sources, strict=True)])
    assert len(reads) == len(native(narrow))  # each tensor of the base once
    monkeypatch.undo()
    assert [record["merge"] is None for record in records] == [False, False, True]
    export(narrow, tmp_path / "alone", adapters[1])
    alone, together, plain = native(tmp_path / "alone"), native(outs[1]), native(outs[2])
    assert all(torch.equal(alone[k], together[k]) for k in alone)
    assert all(torch.equal(v, plain[k]) for k, v in native(narrow).items())
    a, b = native(outs[0]), native(outs[1])
    assert sum(not torch.equal(a[k], b[k]) for k in a) == num_layers(narrow)


def test_one_bad_adapter_of_several_leaves_nothing(narrow, tmp_path):
    good = get_peft_model(Port(narrow), LoraConfig(r=2, target_modules=["k_proj"]))
    nudge(good, ("lora_B",))
    untrained = get_peft_model(Port(narrow), LoraConfig(r=2, target_modules=["k_proj"]))
    jobs = [
        Job(tmp_path / "out_good", save_peft(good, tmp_path / "good")),
        Job(tmp_path / "out_bad", save_peft(untrained, tmp_path / "bad")),
    ]
    with pytest.raises(ValueError, match="bad has no effect"):
        export_many(narrow, jobs)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "good"]
    with pytest.raises(ValueError, match="named for two exports"):
        export_many(narrow, [Job(tmp_path / "x"), Job(tmp_path / "x")])
    assert to_native_key("model.norm.weight") in native(narrow)
