"""LoRA: a fresh one changes nothing, only what was named trains, merged is what was trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from higgs_lab.adapter import (
    TARGETS,
    adapter_effect,
    adapter_off,
    adapter_parameters,
    attach_lora,
    base_fingerprint,
    find_adapter,
    load_adapter,
    merge_lora,
    merge_parity,
    probe_logits,
    read_meta,
    save_adapter,
    trainable_names,
)
from higgs_lab.checkpoint import load_talker, save_native
from higgs_lab.loss import codebook_loss
from higgs_lab.talker import Talker
from tests.tiny import (
    TEXT_CONFIG_4B,
    meta_talker,
    run_one,
    three_examples,
    three_prompts,
    tiny_native,
    tiny_talker,
)

PRESETS = sorted(TARGETS)


def train(model, steps: int = 3, lr: float = 3e-2) -> None:
    """A few real steps on one clip."""
    example = three_examples()[2]
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr)
    batch = (example.ids[None], example.is_audio[None], example.rows[None])
    for _ in range(steps):
        logits = model(*batch).logits[0]
        total, count = codebook_loss(logits, example.labels, example.supervised).weighted()
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def randomise(model, std: float) -> None:
    """An adapter of a known small size, as if trained."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


@pytest.fixture
def base(tmp_path) -> Path:
    return tiny_native(tmp_path / "base", tiny_talker(scale=4))


def trained(base: Path, out: Path, preset: str = "attention_mlp", dtype=torch.float32, **meta):
    """(adapter folder, the model it was saved from)."""
    model = attach_lora(load_talker(base, dtype=dtype), preset, rank=4, alpha=8)
    train(model)
    info = {"base": "org/base", "revision": "abc", "fingerprint": base_fingerprint(base)} | meta
    save_adapter(model, out, info)
    return out, model


# --- attaching


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_no_logit(preset, dtype):
    talker = tiny_talker(scale=4, dtype=dtype)
    probes = [probe_logits(talker, p) for p in three_prompts()]
    model = attach_lora(talker, preset, rank=4)
    for probe, prompt in zip(probes, three_prompts(), strict=True):
        assert torch.equal(probe_logits(model, prompt), probe)


ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("preset", "modules", "table"),
    [
        ("attention", ATTENTION, False),
        ("attention_mlp", ATTENTION | MLP, False),
        ("attention_mlp_table", ATTENTION | MLP, True),
    ],
)
def test_trap36_only_what_the_preset_names_trains(preset, modules, table):
    model = attach_lora(tiny_talker(), preset, rank=4)
    names = trainable_names(model)
    lora = [n for n in names if "lora_" in n]
    assert {n.split(".")[-4] for n in lora} == modules
    assert len(lora) == 2 * 2 * len(modules)  # A and B, two layers
    assert all(n.startswith("base_model.model.model.layers.") for n in lora)
    rest = [n for n in names if "lora_" not in n]
    assert rest == (["base_model.model.codebooks.modules_to_save.default.weight"] if table else [])


@pytest.mark.parametrize("rank", [8, 16])
def test_trap36_trainable_count_of_the_4b_model(rank):
    """Facts §1.2: 57,344 r a layer on all seven linears; 16.5 M at r8, 33.0 M at r16."""
    model = attach_lora(meta_talker(TEXT_CONFIG_4B), "attention_mlp", rank=rank)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == 57_344 * rank * 36
    assert round(trainable / 1e6, 1) == {8: 16.5, 16: 33.0}[rank]
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert frozen == 4_043_480_576


def test_trap36_the_table_preset_adds_the_table_once():
    model = attach_lora(meta_talker(TEXT_CONFIG_4B), "attention_mlp_table", rank=8)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == 57_344 * 8 * 36 + 21_012_480


def test_trap36_training_moves_nothing_frozen():
    model = attach_lora(tiny_talker(), "attention_mlp", rank=4)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(trainable_names(model))


def test_the_seed_alone_decides_a_fresh_adapter():
    def fresh(seed):
        model = attach_lora(tiny_talker(), rank=4, seed=seed)
        return torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_A" in n])

    torch.manual_seed(1)
    first, state = fresh(3), torch.random.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(fresh(3), first)
    assert not torch.equal(fresh(4), first)
    torch.manual_seed(1)
    tiny_talker()  # builds with a seed of its own
    assert torch.equal(torch.random.get_rng_state(), state)  # attaching draws from no global state


@pytest.mark.parametrize("preset", PRESETS)
def test_what_trains_on_a_bf16_base_is_fp32(preset):
    """Steps of an optimiser are smaller than a bf16 table can show: it would stand still."""
    model = attach_lora(tiny_talker(dtype=torch.bfloat16), preset, rank=4)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    before = {n: p.clone() for n, p in trainable.items() if "codebooks" in n}
    optimizer = torch.optim.SGD(trainable.values(), lr=1e-3)
    example = three_examples()[0]
    with torch.autocast("cpu", torch.bfloat16):
        run_one(model, example)[example.supervised].logsumexp(-1).mean().backward()
    optimizer.step()
    for name, old in before.items():
        moved = trainable[name] != old
        seen = trainable[name].grad.abs() > 1e-6 * old.abs().max()  # lr * gradient: tiny steps
        assert seen.any() and moved[seen].float().mean() > 0.9, name


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="'all'; there are attention, attention_mlp"):
        attach_lora(tiny_talker(), "all")


# --- the tie


def test_trap11_the_trained_table_is_still_embedding_and_head():
    """PEFT trains a copy: both uses must be the copy, and with the adapter off neither."""
    talker = tiny_talker(scale=4)
    prompt = three_prompts()[1]
    before = probe_logits(talker, prompt)
    model = attach_lora(talker, "attention_mlp_table", rank=4)
    wrapper = model.base_model.model.codebooks
    table = wrapper.modules_to_save["default"].weight
    rows = torch.full((1, 8), 5)
    assert torch.autograd.grad(wrapper(rows).sum(), table)[0].abs().sum() > 0
    head = torch.autograd.grad(wrapper.logits(torch.ones(1, 64)).sum(), table)[0]
    assert head.abs().sum() > 0
    with torch.no_grad():
        table.mul_(1.5)
    assert float((probe_logits(model, prompt) - before).abs().max()) > 0.1
    with adapter_off(model):
        assert torch.equal(probe_logits(model, prompt), before)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trap11_one_table_after_attach_train_merge_and_save(base, tmp_path, preset, dtype):
    model = attach_lora(load_talker(base, dtype=dtype), preset, rank=4)
    train(model)
    merged = merge_lora(model)
    assert isinstance(merged, Talker)
    fresh = load_talker(base, dtype=dtype)
    assert list(merged.state_dict()) == list(fresh.state_dict())
    assert {p.dtype for p in merged.parameters()} == {dtype}
    changed = not torch.equal(merged.codebooks.weight, fresh.codebooks.weight)
    assert changed == (preset == "attention_mlp_table")
    save_native(merged, base, tmp_path / "out")
    back = load_talker(tmp_path / "out", dtype=dtype)
    for name, value in merged.state_dict().items():
        assert torch.equal(back.state_dict()[name], value.bfloat16().to(dtype)), name


def test_an_unmerged_model_is_not_saved(base, tmp_path):
    model = attach_lora(load_talker(base), rank=4)
    for what in (model, model.base_model.model):
        with pytest.raises(ValueError, match="merge adapters first"):
            save_native(what, base, tmp_path / "out")


# --- merging


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("rslora", [False, True])
def test_merged_speaks_as_the_adapter_did(preset, rslora):
    """In fp32 to rounding; the probe must have changed visibly for that to mean anything."""
    talker = tiny_talker(scale=4)
    model = attach_lora(talker, preset, rank=4, alpha=8, use_rslora=rslora)
    train(model)
    prompt = three_prompts()[2]
    assert adapter_effect(model, prompt) > 0.05
    before = probe_logits(model, prompt)
    after = probe_logits(merge_lora(model), prompt)
    parity = merge_parity(before, after)
    assert parity["max_abs"] < 1e-4
    assert 0 <= parity["kl"] + 1e-7 < 1e-6


def test_a_merge_is_the_formula_and_leaves_the_rest_alone():
    talker = tiny_talker(scale=4)
    before = {k: v.clone() for k, v in talker.state_dict().items()}
    model = attach_lora(talker, "attention", rank=4, alpha=12)
    randomise(model, 0.3)
    lora = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    merged = merge_lora(model).state_dict()
    for name, old in before.items():
        path = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{path}.lora_A.default.weight" in lora:
            A, B = (lora[f"{path}.lora_{x}.default.weight"] for x in "AB")
            torch.testing.assert_close(merged[name], old + 3.0 * B @ A)
        else:
            assert torch.equal(merged[name], old), name


def test_trap37_a_merge_in_bf16_would_lose_small_deltas():
    """Rounding the delta to bf16 first, or adding in bf16 piece by piece, errs more than one cast.

    The yardstick is the fp32 sum of the bf16 base and the delta: no bf16 model can be nearer to it
    than its single rounding, which is what `merge_lora` must give, bit for bit.
    """
    talker = tiny_talker(scale=4, dtype=torch.bfloat16)
    base = {k: v.clone() for k, v in talker.state_dict().items()}
    model = attach_lora(talker, "attention_mlp", rank=4, alpha=4)
    randomise(model, 0.02)  # deltas of about 1/1000 of the weights
    lora = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    assert {p.dtype for p in lora.values()} == {torch.float32}
    merged = merge_lora(model).state_dict()
    ours, theirs, kept = 0.0, 0.0, 0
    for name, old in base.items():
        path = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{path}.lora_A.default.weight" not in lora:
            continue
        A, B = (lora[f"{path}.lora_{x}.default.weight"] for x in "AB")
        exact = old.double() + B.double() @ A.double()
        low = old + (B.bfloat16() @ A.bfloat16())
        assert merged[name].dtype == torch.bfloat16
        assert torch.equal(merged[name], exact.float().bfloat16())
        ours += float((merged[name].double() - exact).square().sum())
        theirs += float((low.double() - exact).square().sum())
        kept += int((merged[name] != old).sum())
    assert kept > 0
    assert ours < theirs


def test_trap37_merged_log_probs_are_the_adapters(base):
    """A bf16 base: adapter on fp32 weights of it against the merged, cast model."""
    folder_dtype = torch.bfloat16
    model = attach_lora(load_talker(base, dtype=folder_dtype), "attention_mlp", rank=4)
    train(model)
    example = three_examples()[1]
    with torch.no_grad():
        before = run_one(model, example).float().log_softmax(-1)
        after = run_one(merge_lora(model), example).float().log_softmax(-1)
    picked = [x.gather(-1, example.labels[..., None])[example.supervised] for x in (before, after)]
    assert float((picked[0] - picked[1]).abs().mean()) < 0.05


def test_an_adapter_of_nan_is_not_merged():
    model = attach_lora(tiny_talker(), "attention", rank=4)
    randomise(model, float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        merge_lora(model)


def test_parity_measures_a_difference():
    a = torch.zeros(3, 8, 1026)
    b = a.clone()
    b[1, 2, 3] = 2.0
    parity = merge_parity(a, b)
    assert parity["max_abs"] == 2.0
    assert parity["kl"] > 0
    assert merge_parity(a, a) == {"max_abs": 0.0, "kl": 0.0}


# --- the effect check


def test_an_adapter_without_effect_is_refused():
    model = attach_lora(tiny_talker(), rank=4)
    with pytest.raises(ValueError, match="no effect.*Was it trained"):
        adapter_effect(model, three_prompts()[0])
    train(model)
    assert adapter_effect(model, three_prompts()[0]) > 0


# --- folders


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
