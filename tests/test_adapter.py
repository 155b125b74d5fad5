"""LoRA: a fresh one changes nothing, only what was named trains, merged is what was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from higgs_lab.adapter import (
    TARGETS,
    adapter_effect,
    adapter_off,
    attach_lora,
    merge_lora,
    merge_parity,
    probe_logits,
    trainable_names,
)
from higgs_lab.checkpoint import load_talker, save_native
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
from tests.tiny_adapter import randomise, train

PRESETS = sorted(TARGETS)


@pytest.fixture
def base(tmp_path) -> Path:
    return tiny_native(tmp_path / "base", tiny_talker(scale=4))


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
