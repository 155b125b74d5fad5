"""serve.export: the merge is true, the layout is the base's, and nothing half-written is left."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import HiggsAudioV2TokenizerModel

from higgs_lab.adapter import (
    attach_lora,
    base_fingerprint,
    load_adapter,
    merge_lora,
    probe_logits,
    save_adapter,
)
from higgs_lab.checkpoint import TIED_COPIES, NativeFiles, load_talker, to_native_key
from higgs_lab.codec import Codec
from higgs_lab.prompt import render_prompt
from higgs_lab.vocab import Vocab
from serve.card import model_card
from serve.export import export, main
from serve.sources import read_adapter
from tests.tiny import num_layers

TABLE = "tied.embedding.modality_embeddings.0.embedding.weight"


def make_adapter(base: Path, out: Path, preset="attention_mlp", size=0.05, **options) -> Path:
    """An adapter as if trained: random B matrices, and a changed table where the preset has one."""
    model = attach_lora(load_talker(base), preset, rank=4, alpha=8, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += (size * noise).to(parameter.dtype)
    save_adapter(model, out, {"base": "nano", "fingerprint": base_fingerprint(base)})
    return out


@pytest.fixture(scope="module")
def plain(nano, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("export") / "plain"
    export(nano, out)
    return out


@pytest.fixture(scope="module")
def adapter(nano, tmp_path_factory) -> Path:
    return make_adapter(nano, tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.fixture(scope="module")
def tuned(nano, adapter, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("export") / "tuned"
    export("nano", out, adapter)
    return out


def layout(path: Path) -> dict:
    files = NativeFiles(path)
    return {
        k: (f, dtype, shape) for f in files.files for k, (dtype, shape) in files.specs(f).items()
    }


def native(path: Path) -> dict[str, torch.Tensor]:
    return dict(NativeFiles(path).items())


def test_trap12_keys_shapes_dtypes_and_shards_are_the_bases(nano, plain, tuned):
    assert layout(nano) == layout(plain) == layout(tuned)
    index = json.loads((tuned / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(layout(nano)) - set(TIED_COPIES)


def test_without_adapter_every_tensor_is_the_bases(nano, plain):
    base, ours = native(nano), native(plain)
    assert all(torch.equal(base[k], ours[k]) for k in base)


def test_merged_weights_are_the_in_memory_merges(nano, adapter, tuned):
    """Streaming merge == PEFT's merge in fp32, bit for bit after the cast."""
    merged = merge_lora(load_adapter(load_talker(nano), adapter)).state_dict()
    ours = native(tuned)
    changed = 0
    for key, tensor in merged.items():
        theirs = ours[to_native_key(key)]
        difference = (tensor.float() - theirs.float()).abs().max()
        assert difference <= 2**-8 * tensor.float().abs().max()
        assert (tensor != theirs).float().mean() < 1e-3  # rounding of another summation order
        changed += not torch.equal(theirs, native(nano)[to_native_key(key)])
    assert changed == num_layers(nano) * 7  # linears


def test_trap37_merged_logits_are_the_adapters(nano, adapter, tuned):
    prompt = render_prompt(Vocab.from_pretrained(nano), "Hello there.")
    with_adapter = load_adapter(load_talker(nano, dtype=torch.float32), adapter)
    before = probe_logits(load_talker(nano, dtype=torch.float32), prompt)
    want = probe_logits(with_adapter, prompt)
    got = probe_logits(load_talker(tuned, dtype=torch.float32), prompt)
    assert (want - before).abs().max() > 20 * (got - want).abs().max()


def test_trap16_codec_is_untouched_and_stands_beside_in_float32(nano, tuned):
    codec, bundled = Codec.from_pretrained(nano), Codec.from_pretrained(tuned)
    assert codec.hash == bundled.hash == Codec.from_pretrained(tuned / "audio_tokenizer").hash
    model = HiggsAudioV2TokenizerModel.from_pretrained(tuned / "audio_tokenizer")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    wav = np.sin(np.arange(30000) * 0.05).astype(np.float32) * 0.3
    with torch.inference_mode():
        theirs = model.eval().encode(torch.from_numpy(wav)[None, None]).audio_codes[0].T
    assert torch.equal(theirs, codec.encode(wav))  # what vLLM-Omni's clone encoder will compute


def test_trap11_a_trained_table_refreshes_its_tied_copy(nano, tmp_path):
    adapter = make_adapter(nano, tmp_path / "adapter", "attention_mlp_table", size=0.5)
    record = export(nano, tmp_path / "out", adapter)
    before, after = native(nano), native(tmp_path / "out")
    assert not torch.equal(before[TABLE], after[TABLE])
    for twin, source in TIED_COPIES.items():
        assert torch.equal(after[twin], after[source])
    assert record["merge"]["tensors"] == num_layers(nano) * 7 + 1


def test_rslora_and_alpha_patterns_scale_as_in_peft(nano, tmp_path):
    adapter = make_adapter(nano, tmp_path / "adapter", "attention", use_rslora=True)
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text()) | {"alpha_pattern": {"layers.1.self_attn.q_proj": 2}}
    file.write_text(json.dumps(config))
    pairs = read_adapter(adapter).pairs
    assert pairs["body.layers.0.self_attn.q_proj.weight"][2] == 8 / 4**0.5
    assert pairs["body.layers.1.self_attn.q_proj.weight"][2] == 2 / 4**0.5
    model = load_adapter(load_talker(nano), adapter)
    layers = model.base_model.model.model.layers
    for i in (0, 1):
        scale = layers[i].self_attn.q_proj.scaling["default"]
        assert scale == pairs[f"body.layers.{i}.self_attn.q_proj.weight"][2]


def test_what_stands_beside_the_weights(nano, tuned):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tuned / name).read_bytes() == (nano / name).read_bytes()
    assert (tuned / "deploy" / "throughput.yaml").is_file()
    card = (tuned / "README.md").read_text()
    assert "consent" in card and "HIGGS_AUDIO_TOKENIZER_PATH" in card and "Apache-2.0" in card
    record = json.loads((tuned / "export.json").read_text())
    assert (
        record["merge"]["changed"] == 7 * num_layers(nano)
        and 0.5 < record["merge"]["delta_kept"] < 1.5
    )
    assert record["checks"]["talker keys complete"] == {"vllm": "ok", "sglang": "ok"}
    assert record["codec_hash"] == Codec.from_pretrained(nano).hash


def test_card_tells_data_consent_and_evaluation(nano, adapter, tmp_path):
    """Stated or not stated; never silent. The table is made of what eval.run writes."""
    from eval.acoustics import AudioFacts
    from eval.metrics import score_clip, summarise

    fine = AudioFacts(2.0, 1.8, 0.1, 0.1, -25.0, 0.0)
    heard = ("one two three four", "one too three four")
    scores = [
        {"language": lang, "sim_ref": 0.8} | score_clip(heard[0], heard[i % 2], lang, audio=fine)
        for i in range(6)
        for lang in ("en", "de")
    ]
    summary = summarise(scores) | {
        "config": {
            "system": {"name": "nano"},
            "set": {"name": "test.jsonl", "rows": 12},
            "asr": {"name": "large-v3"},
            "encoder": None,
            "normalizer": "fair-1",
        }
    }
    run = tmp_path / "eval"
    run.mkdir()
    with pytest.raises(FileNotFoundError, match="finish that run"):
        export(nano, tmp_path / "out", adapter, evaluation=run)
    (run / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match="no summary of eval.run"):
        export(nano, tmp_path / "out", adapter, evaluation=run)
    assert not (tmp_path / "out").exists()
    (run / "summary.json").write_text(json.dumps(summary))
    said = {"data": "Two hours of Ann.", "consent": "Ann, in writing."}
    export(nano, tmp_path / "out", adapter, evaluation=run, **said)
    card = (tmp_path / "out" / "README.md").read_text()
    assert said["data"] in card and said["consent"] in card
    assert "| en | 6 | 0 | 12.50 % WER |" in card and "mean of languages | 12" in card
    assert "heard by large-v3" in card
    silent = model_card("x", json.loads((tmp_path / "out" / "export.json").read_text()) | {
        "data": None, "consent": None,
    })  # fmt: skip
    assert "Not stated by whoever exported it" in silent and "None is stated" in silent


@pytest.mark.parametrize(
    "repo, words", [("ann/voice", "does not know you"), ("no hub name", "--push-to-hub")]
)
def test_a_hub_that_does_not_know_you_is_found_before_any_work(tmp_path, repo, words):
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match=words):
        main(["--model", "nano", "--out", str(out), "--push-to-hub", repo])
    assert not out.exists()


def test_card_of_boson_weights_names_their_licence():
    record = {"base": "bosonai/higgs-tts-3-4b", "revision": "5402f01", "merge": None}
    card = model_card("mine", record | {"adapter_meta": {}, "checks": {}, "codec_hash": "0"})
    assert "Derived from Higgs Audio v3, licensed from Boson AI USA, Inc." in card
    assert "base_model: bosonai/higgs-tts-3-4b" in card and "license: other" in card


def refuses(nano, tmp_path, adapter, words):
    out = tmp_path / "out"
    with pytest.raises((ValueError, OSError), match=words):
        export(nano, out, adapter)
    assert not out.exists() and not list(tmp_path.glob(".tmp-*"))


def test_an_adapter_without_effect_is_refused(nano, tmp_path):
    refuses(nano, tmp_path, make_adapter(nano, tmp_path / "a", size=0.0), "no effect")


def test_an_adapter_too_small_for_the_stored_dtype_is_refused(nano, tmp_path):
    refuses(nano, tmp_path, make_adapter(nano, tmp_path / "a", size=1e-5), "parity failed")


def test_an_adapter_of_another_base_is_refused(nano, tmp_path):
    adapter = make_adapter(nano, tmp_path / "a")
    meta = json.loads((adapter / "higgs_lab.json").read_text())
    (adapter / "higgs_lab.json").write_text(json.dumps(meta | {"fingerprint": "0" * 16}))
    refuses(nano, tmp_path, adapter, "trained on")


def edit_adapter(source: Path, out: Path, change) -> Path:
    shutil.copytree(source, out)
    file = out / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    return out


def test_adapters_of_wrong_shape_kind_or_keys_are_refused(nano, adapter, tmp_path):
    wide = edit_adapter(
        adapter,
        tmp_path / "wide",
        lambda t: {k: (torch.zeros(4, 999) if "lora_A" in k else v) for k, v in t.items()},
    )
    refuses(nano, tmp_path, wide, "another base")
    half = edit_adapter(
        adapter, tmp_path / "half", lambda t: {k: v for k, v in t.items() if "lora_B" not in k}
    )
    refuses(nano, tmp_path, half, "without its partner")
    odd = edit_adapter(
        adapter, tmp_path / "odd", lambda t: {k.replace("base_model.", ""): v for k, v in t.items()}
    )
    refuses(nano, tmp_path, odd, "model.model.layers.*lacks: another base")
    infinite = edit_adapter(
        adapter, tmp_path / "inf", lambda t: {k: v * float("inf") for k, v in t.items()}
    )
    refuses(nano, tmp_path, infinite, "NaN or infinite")
    dora = edit_adapter(adapter, tmp_path / "dora", lambda t: t)
    file = dora / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": True}))
    refuses(nano, tmp_path, dora, "use_dora")
    cut = edit_adapter(adapter, tmp_path / "cut", lambda t: t)
    data = (cut / "adapter_model.safetensors").read_bytes()
    (cut / "adapter_model.safetensors").write_bytes(data[: len(data) // 2])
    refuses(nano, tmp_path, cut, "damaged")
    refuses(nano, tmp_path, tmp_path / "nowhere", "no directory")
    (tmp_path / "empty").mkdir()
    refuses(nano, tmp_path, tmp_path / "empty", "adapter_config.json")


def test_a_disk_too_small_is_found_before_anything_is_written(nano, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refuses(nano, tmp_path, None, "GB free")


def test_a_disk_that_fills_up_leaves_nothing(nano, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Codec, "save_tokenizer_folder", full)
    refuses(nano, tmp_path, None, "disk is full")


def test_a_folder_that_is_no_export_is_not_overwritten(nano, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no export"):
        export(nano, tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_a_sharded_base_gives_the_same_shards(nano, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(nano, base)
    tensors = native(nano)
    (base / "model.safetensors").unlink()
    keys = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((keys[::2], keys[1::2]), start=1):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file({k: tensors[k] for k in part}, base / name, metadata={"format": "pt"})
        weight_map |= {k: name for k in part if k not in TIED_COPIES}
    index = {"metadata": {}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    export(base, tmp_path / "out")
    assert layout(base) == layout(tmp_path / "out")
    ours = native(tmp_path / "out")
    assert all(torch.equal(tensors[k], ours[k]) for k in tensors)
