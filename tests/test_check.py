"""serve.check finds every broken export before a server does."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from higgs_lab.checkpoint import CODEC_PREFIX, NativeFiles
from serve.check import FAIL, OK, Finding, check_export, failures, main
from serve.export import export

INDEX = "model.safetensors.index.json"
TABLE = "tied.embedding.modality_embeddings.0.embedding.weight"


@pytest.fixture(scope="module")
def good(narrow, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("export") / "good"
    export(narrow, out)
    return out


def broken(good: Path, out: Path, change=None, config=None) -> Path:
    """A copy of `good` with tensors changed by `change(dict)` (the index follows) or its config."""
    shutil.copytree(good, out)
    if change is not None:
        tensors = change(dict(NativeFiles(good).items()))
        tensors = {k: v.clone().contiguous() for k, v in tensors.items()}
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        listed = {k: "model.safetensors" for k in tensors if not k.startswith("tied.head.")}
        (out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    if config is not None:
        raw = json.loads((out / "config.json").read_text())
        config(raw)
        (out / "config.json").write_text(json.dumps(raw))
    return out


def verdicts(path: Path) -> dict[str, tuple[str, str]]:
    return {f.rule: (f.vllm, f.sglang) for f in check_export(path)}


def test_a_good_export_passes_every_rule_of_vllm_omni(good):
    findings = check_export(good)
    assert not failures(findings, "vllm")
    # nano's codec encoder is smaller than the released one, which SGLang-Omni hard-codes
    assert [f.rule for f in failures(findings, "sglang")] == ["codec as released"]


def test_trap12_missing_key(good, tmp_path):
    bad = broken(
        good, tmp_path / "x", lambda t: {k: v for k, v in t.items() if k != "body.norm.weight"}
    )
    found = check_export(bad)
    [problem] = failures(found, "vllm")
    assert problem.rule == "talker keys complete" and "body.norm.weight" in problem.detail


def test_trap40_missing_audio_table_which_sglang_would_serve_as_random(good, tmp_path):
    bad = broken(good, tmp_path / "x", lambda t: {k: v for k, v in t.items() if k != TABLE})
    assert verdicts(bad)["talker keys complete"] == (FAIL, FAIL)


def test_extra_key(good, tmp_path):
    bad = broken(good, tmp_path / "x", lambda t: t | {"body.extra.weight": torch.zeros(3)})
    assert verdicts(bad)["no unknown keys"] == (FAIL, "warn")


def test_trap12_peft_prefixes(good, tmp_path):
    def rename(tensors):
        moved = {k: v for k, v in tensors.items() if k.startswith("body.layers.0.self_attn.q")}
        kept = {k: v for k, v in tensors.items() if k not in moved}
        name = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
        return kept | {name: next(iter(moved.values()))}

    found = failures(check_export(broken(good, tmp_path / "x", rename)), "vllm")
    assert [f.rule for f in found] == ["talker keys complete", "no unknown keys"]
    assert "unmerged adapter" in found[1].detail


def test_truncated_shard(good, tmp_path):
    bad = broken(good, tmp_path / "x")
    data = (bad / "model.safetensors").read_bytes()
    (bad / "model.safetensors").write_bytes(data[: len(data) * 2 // 3])
    [problem] = failures(check_export(bad), "vllm")
    assert problem.rule == "shards readable" and "model.safetensors" in problem.detail


def test_missing_shard(good, tmp_path):
    bad = broken(good, tmp_path / "x")
    index = json.loads((bad / INDEX).read_text())
    index["weight_map"]["body.norm.weight"] = "model-00002-of-00002.safetensors"
    (bad / INDEX).write_text(json.dumps(index))
    assert verdicts(bad)["shards readable"] == (FAIL, FAIL)


def test_trap12_codec_key_absent_from_the_index(good, tmp_path):
    """SGLang-Omni reads only what the index lists and leaves the rest of the codec random."""
    bad = broken(good, tmp_path / "x")
    index = json.loads((bad / INDEX).read_text())
    lost = CODEC_PREFIX + "fc2.bias"
    del index["weight_map"][lost]
    (bad / INDEX).write_text(json.dumps(index))
    found = {f.rule: f for f in check_export(bad)}["index lists the codec"]
    assert found.sglang == FAIL and lost in found.detail


def test_trap13_missing_codec_tensor(good, tmp_path):
    lost = CODEC_PREFIX + "fc2.bias"
    bad = broken(good, tmp_path / "x", lambda t: {k: v for k, v in t.items() if k != lost})
    assert verdicts(bad)["codec keys complete"] == (FAIL, FAIL)
    lost = CODEC_PREFIX + "encoder_semantic.conv.weight"
    bad = broken(good, tmp_path / "y", lambda t: {k: v for k, v in t.items() if k != lost})
    assert verdicts(bad)["codec keys complete"] == ("warn", FAIL)  # vLLM-Omni decodes only


def test_no_codec_at_all(good, tmp_path):
    bad = broken(
        good, tmp_path / "x", lambda t: {k: v for k, v in t.items() if CODEC_PREFIX not in k}
    )
    assert verdicts(bad)["codec bundled"] == (FAIL, FAIL)


def test_wrong_shape(good, tmp_path):
    bad = broken(
        good,
        tmp_path / "x",
        lambda t: t | {TABLE: t[TABLE][:-8], "body.norm.weight": torch.ones(7)},
    )
    [problem] = [f for f in check_export(bad) if f.rule == "talker shapes"]
    assert problem.vllm == FAIL and TABLE in problem.detail and "body.norm" in problem.detail


def test_codec_of_another_decoder_size(good, tmp_path):
    key = CODEC_PREFIX + "acoustic_decoder.conv1.weight"
    bad = broken(good, tmp_path / "x", lambda t: t | {key: t[key][:512]})
    assert verdicts(bad)["codec decoder sizes"][0] == FAIL


def test_trap11_stale_tied_head(good, tmp_path):
    key = "tied.head.modality_heads.0.weight"

    def age(tensors):
        stale = tensors[key].clone()
        stale[5000, 3] += 1  # one value somewhere in the middle
        return tensors | {key: stale}

    [problem] = failures(check_export(broken(good, tmp_path / "x", age)), "vllm")
    assert problem.rule == "tied copies fresh" and key in problem.detail


def test_tied_heads_may_be_absent(good, tmp_path):
    bad = broken(
        good, tmp_path / "x", lambda t: {k: v for k, v in t.items() if "tied.head" not in k}
    )
    assert not failures(check_export(bad), "vllm")


def test_pruned_text_vocabulary(good, tmp_path):
    """vLLM-Omni reports healthy and fails every request when its stop ids lie outside."""
    bad = broken(good, tmp_path / "x", config=lambda c: c["text_config"].update(vocab_size=151670))
    assert verdicts(bad)["text vocabulary"] == (FAIL, FAIL)


def test_trap07_stock_qwen_tokenizer(good, tmp_path):
    bad = broken(good, tmp_path / "x")
    file = bad / "tokenizer.json"
    file.write_text(file.read_text().replace("<|tts|>", "<tool_response>"))
    [problem] = failures(check_export(bad), "vllm")
    assert problem.rule == "control tokens" and "<|tts|> is None" in problem.detail


def test_trap08_missing_rope_theta_is_said(good, tmp_path):
    def drop(config):
        config["text_config"].pop("rope_parameters")

    assert verdicts(broken(good, tmp_path / "x", config=drop))["rope_theta"] == ("warn", "warn")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_files(good, tmp_path, name):
    bad = broken(good, tmp_path / "x")
    (bad / name).unlink()
    found = failures(check_export(bad), "vllm")
    assert found and any(name.split(".")[0] in f.detail or "safetensors" in f.detail for f in found)


def test_another_codec_beside_the_bundled_one(good, tmp_path):
    """Clones would be encoded by one codec and continued with another."""
    bad = broken(good, tmp_path / "x")
    file = bad / "audio_tokenizer" / "model.safetensors"
    tensors = dict(NativeFiles(bad / "audio_tokenizer").items())
    save_file({k: v * 1.01 if "fc." in k else v for k, v in tensors.items()}, file)
    assert verdicts(bad)["clone encoder"][0] == FAIL


def test_broken_deploy_profile(good, tmp_path):
    bad = broken(good, tmp_path / "x")
    (bad / "deploy" / "mine.yaml").write_text("base_config: nowhere.yaml\n")
    found = {f.rule: f for f in check_export(bad)}["deploy profiles"]
    assert found.vllm == FAIL and "nowhere.yaml" in found.detail


def test_command_line_says_so_and_exits_with_one(good, tmp_path, monkeypatch, capsys):
    bad = broken(good, tmp_path / "x")
    save_file({"lora_a": torch.zeros(1)}, bad / "more.safetensors")
    monkeypatch.setattr(sys, "argv", ["check", str(bad)])
    with pytest.raises(SystemExit) as ended:
        main()
    out = capsys.readouterr().out
    assert ended.value.code == 1 and "lora_a" in out and "1 problems" in out


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ("vllm", "fit to be served by vllm; sglang would refuse it"),
        ("both", "1 problems"),
        ("sglang", "1 problems"),
    ],
)
def test_the_last_line_names_who_would_serve_it(engine, said, monkeypatch, capsys):
    found = [Finding("tied copies", OK, FAIL, "why")]
    monkeypatch.setattr("serve.check.check_export", lambda path: found)
    monkeypatch.setattr(sys, "argv", ["check", "somewhere", "--engine", engine])
    with pytest.raises(SystemExit) as ended:
        main()
    assert capsys.readouterr().out.splitlines()[-1] == said
    assert ended.value.code == (engine != "vllm")
