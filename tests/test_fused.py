"""Fused blocks are the modules: loss, sums and every gradient; and they follow what is trained."""

from __future__ import annotations

import shutil

import pytest
import torch

import higgs_lab.fused as fused
from higgs_lab.adapter import TARGETS, adapter_off, attach_lora, merge_lora
from higgs_lab.attention import Documents, attention_kind
from higgs_lab.batches import pack
from higgs_lab.cost import GIB, Shape, training_gib
from higgs_lab.fused import CHECKPOINTING, fuse, unfusable
from higgs_lab.loss import LossSums, codebook_loss
from tests.tiny import pad_examples, run_one, three_examples, tiny_talker

WEIGHTS = torch.linspace(0.5, 1.5, 8)
WAYS = ["attention", "attention_mlp", "attention_mlp_table", "full"]


def model(way: str, dropout: float = 0.0, **changes) -> torch.nn.Module:
    talker = tiny_talker(scale=4, **changes)
    if way == "full":
        return talker.train().requires_grad_(True)
    made = attach_lora(talker, way, rank=4, alpha=8, dropout=dropout)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:  # a fresh one is zero, and so would be A's gradient
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return made.train()


def step(made: torch.nn.Module, batch, by_targets: bool = True):
    """(weighted loss, sums, gradients by name)."""
    if by_targets:
        out = made(**batch.inputs(), targets=batch.targets(WEIGHTS))
        loss, sums = out.loss, out.sums
    else:
        at = batch.supervised.any(-1)
        logits = made(**batch.inputs(), logits_at=at).logits
        sums = codebook_loss(logits, batch.labels[at], batch.supervised[at])
        loss, _ = sums.weighted(WEIGHTS)
    (loss / 100).backward()
    grads = {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}
    made.zero_grad()
    return loss.detach(), LossSums.stack(sums).detach(), grads


def assert_same(a, b, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(a[0], b[0], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(a[1], b[1], rtol=1e-5, atol=1e-3)
    assert a[2].keys() == b[2].keys() and a[2]
    for name, grad in a[2].items():
        error = float((grad - b[2][name]).norm() / grad.norm())
        assert error < tolerance, (name, error)


@pytest.mark.parametrize("way", WAYS)
def test_fused_blocks_give_the_modules_loss_and_gradients(way):
    batch = pack(three_examples(), 500)
    plain = step(model(way), batch, by_targets=False)
    assert_same(plain, step(model(way), batch))  # the fused head alone
    for checkpointing in CHECKPOINTING:
        for kind in ("sdpa", "split"):
            made = model(way)
            fuse(made, kind, checkpointing)
            assert_same(plain, step(made, batch))


def test_blocks_that_differ_are_fused_with_their_own_kind(monkeypatch):
    """Ranks of 4, 4, 2, 4 and 4, blocks together by two: three copy 11 tensors each."""
    from peft import LoraConfig, get_peft_model

    monkeypatch.setattr(fused, "GROUP", 2)

    def made() -> torch.nn.Module:
        talker = tiny_talker(scale=4, num_hidden_layers=5, layer_types=["full_attention"] * 5)
        ranks = dict(r=4, rank_pattern={r"layers\.2\..*": 2})
        config = LoraConfig(**ranks, lora_alpha=12, **TARGETS["attention_mlp"])
        torch.manual_seed(0)
        adapted = get_peft_model(talker, config)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape)
        return adapted.train()

    batch, model = pack(three_examples(), 500), made()
    assert len(fuse(model, "split").copies) == 3 * 11
    assert_same(step(made(), batch), step(model, batch))


def test_packed_is_padded_is_one_by_one_in_loss_and_gradient():
    examples, made = three_examples(), model("attention_mlp")
    columns = pad_examples(examples)
    inputs = {name: columns[name] for name in ("ids", "is_audio", "rows", "attention_mask")}
    logits = made(**inputs).logits
    labels, supervised = (columns[name].flatten(0, 1) for name in ("labels", "supervised"))
    sums = codebook_loss(logits.flatten(0, 1), labels, supervised)
    loss, _ = sums.weighted(WEIGHTS)
    (loss / 100).backward()
    grads = {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}
    made.zero_grad()
    padded = loss.detach(), sums.stack().detach(), grads
    fuse(made, "split")
    assert_same(padded, step(made, pack(examples)))
    alone = [step(made, pack([e])) for e in examples]
    added = {name: sum(a[2][name] for a in alone) for name in grads}
    assert_same(padded, (sum(a[0] for a in alone), sum(a[1] for a in alone), added))


@pytest.mark.parametrize("way", ["attention_mlp", "full"])
def test_traced_blocks_are_the_eager_ones_and_one_trace_serves_all(way, monkeypatch):
    """What torch.compile makes of the four functions, without a C++ compiler."""
    from torch._dynamo.utils import counters

    compile = torch.compile
    monkeypatch.setattr(
        fused.torch, "compile", lambda f, **options: compile(f, backend="aot_eager", **options)
    )
    torch._dynamo.reset()
    counters.clear()
    batch, other = pack(three_examples(), 500), pack(three_examples()[:2], 500)
    plain = [step(model(way), b) for b in (batch, other)]
    made = model(way)
    fuse(made, "sdpa", "selective", compile=True)
    for wanted, b in zip(plain, (batch, other), strict=True):
        assert_same(wanted, step(made, b))
    # two blocks and two packs of one size: two functions forth, two back
    assert counters["stats"]["unique_graphs"] == 4
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile wants a C++ compiler")
def test_compiled_blocks_are_the_eager_ones():
    batch = pack(three_examples(), 500)
    made = model("attention_mlp")
    fuse(made, "split", "full", compile=True)
    assert_same(step(model("attention_mlp"), batch), step(made, batch))


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_checkpointing_keeps_what_it_says(checkpointing):
    """Values a position that a block holds for the way back; D 64, qkv 128, H d 64, F 96."""
    made = model("attention_mlp")
    blocks = fuse(made, "split", checkpointing)
    batch = pack(three_examples())
    L = batch.ids.shape[1]
    made(**batch.inputs(), targets=batch.targets(WEIGHTS))
    out = blocks.__call__(
        torch.randn(1, L, 64, requires_grad=True), *torch.ones(2, 1, L, 16), batch.cu_seqlens, 99
    )
    node, held = out.grad_fn, None
    while held is None:  # from the last norm to the last block
        node = node.next_functions[0][0]
        held = getattr(node, "kept", None)
    seen: dict[int, int] = {}

    def count(value):
        if isinstance(value, torch.Tensor):
            seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes() // 4
        elif isinstance(value, (tuple, list)):
            for item in value:
                count(item)

    count(held)
    # x A' of qkv, out, gate and up, down
    adapters = {"none": 16 + 3 * 8, "selective": 16 + 3 * 8, "full": 2 * 8}[checkpointing]
    wanted = {
        "none": 2 * 64 + 128 + (64 + 32) + 64 + 2 * 96,
        "selective": 2 * 64 + 128 + (64 + 32) + 64,
        "full": 2 * 64,
    }[checkpointing]
    assert sum(seen.values()) / L == wanted + adapters
    shape = Shape.of(made.base_model.model.config, 8 * 1026)
    told = training_gib(shape, "lora", 4, L, checkpointing)["activations"]  # in bf16
    assert told * GIB == pytest.approx(2 * L * shape.layers * wanted)


def test_the_copies_follow_an_optimiser_and_a_checkpoint():
    made, batch = model("attention_mlp"), pack(three_examples())
    blocks, talker = fuse(made, "split"), made.base_model.model

    def assert_followed():
        talker.fused = None
        wanted = step(made, batch)
        talker.fused = blocks
        assert_same(wanted, step(made, batch))

    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], 1e-2)
    for fused_step in (False, True):
        optimizer.param_groups[0]["fused"] = fused_step
        made(**batch.inputs(), targets=batch.targets(WEIGHTS)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_followed()
    with torch.no_grad():
        for parameter in (p for p in made.parameters() if p.requires_grad):
            parameter.detach().copy_(0.5 * parameter)  # as resume.load_step does
    assert_followed()
    for parameter in (p for p in made.parameters() if p.requires_grad):
        parameter.data = 2 * parameter.data  # other memory, as after .to("cpu:0")
    assert_followed()


def test_fusing_takes_no_second_copy_and_merging_still_works():
    made, twin, example = model("attention_mlp"), model("attention_mlp"), three_examples()[0]
    blocks = fuse(made, "split")
    layer = made.base_model.model.model.layers[0]
    whole = blocks.blocks[0].qkv.whole.untyped_storage().data_ptr()
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = getattr(layer.self_attn, name).base_layer.weight
        assert weight.untyped_storage().data_ptr() == whole
    merged, wanted = merge_lora(made).eval(), merge_lora(twin).eval()
    packed = pack(three_examples()).inputs()
    with torch.no_grad():
        torch.testing.assert_close(run_one(merged, example), run_one(wanted, example))
        merged.model.layers[0].mlp.down_proj.weight.mul_(2)  # packed batches follow it too
        wanted.model.layers[0].mlp.down_proj.weight.mul_(2)
        torch.testing.assert_close(merged(**packed).logits, wanted(**packed).logits)


@torch.no_grad()
def test_a_switched_off_adapter_is_off_in_packed_batches():
    made, packed = model("attention_mlp"), pack(three_examples()).inputs()
    wanted = tiny_talker(scale=4)(**packed).logits
    fuse(made, "split")
    with adapter_off(made):
        torch.testing.assert_close(made(**packed).logits, wanted)
        assert "switched off" in unfusable(made)
    assert not torch.allclose(made(**packed).logits, wanted)


@pytest.mark.parametrize("head_dim", [16, 4])  # 4: q, k and v together narrower than the block
def test_bf16_products_stay_near_fp32(head_dim):
    batch = pack(three_examples())
    wanted = step(model("attention_mlp", head_dim=head_dim), batch)
    made = model("attention_mlp", head_dim=head_dim)
    made.base_model.model.bfloat16()
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    fuse(made, "split", dtype=torch.bfloat16)
    found = step(made, batch)
    assert abs(float(found[0] / wanted[0]) - 1) < 0.02
    for name, grad in wanted[2].items():
        assert found[2][name].dtype == torch.float32
        assert torch.cosine_similarity(found[2][name].flatten(), grad.flatten(), 0) > 0.97, name


def test_what_cannot_be_fused_is_named():
    assert unfusable(model("attention_mlp")) is None and unfusable(model("full")) is None
    assert "dropout" in unfusable(model("attention_mlp", dropout=0.1))
    with pytest.raises(ValueError, match="cannot be fused: LoRA dropout"):
        fuse(model("attention_mlp", dropout=0.1), "sdpa")
    half, odd = model("full"), model("attention_mlp")
    half.model.layers[0].self_attn.k_proj.weight.requires_grad_(False)
    assert "some of the layers that share an input train" in unfusable(half)
    odd.base_model.model.model.layers[1].mlp.up_proj.scaling["default"] = 3.0
    assert "different scales" in unfusable(odd)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_who_only_speaks_waits_for_no_kernel_of_gradients(monkeypatch):
    from higgs_lab import attention, slots
    from higgs_lab.engine import Engine

    asked = []
    monkeypatch.setattr(attention, "triton_runs", lambda *given: asked.append(given[3:]) or True)
    monkeypatch.setattr(attention, "varlen_available", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    cuda, heads = torch.device("cuda"), (4, 2, 16)
    assert attention_kind("auto", cuda, torch.bfloat16, heads) == "triton"
    slots.Slots(Engine(tiny_talker()), 1, 8, 8, False)
    assert asked == [(True,), (False,)]


def test_attention_kinds_agree_and_are_chosen_by_what_runs():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(60, heads, 16, generator=generator) for heads in (4, 2, 2))
    cu = torch.tensor([0, 11, 12, 60], dtype=torch.int32)
    found = [Documents.of(kind, cu, 48, 60).attend(q, k, v) for kind in ("sdpa", "split", "flex")]
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0], found[2], rtol=1e-5, atol=1e-5)
    cpu, cuda, bf16 = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
    heads = (4, 2, 16)
    assert attention_kind("auto", cpu, bf16, heads) == "split"
    assert attention_kind("auto", cuda, torch.float32, heads) == "split"
    with pytest.raises(ValueError, match="varlen needs CUDA"):
        attention_kind("varlen", cpu, bf16, heads)
    with pytest.raises(ValueError, match="no gradient on a CPU"):
        attention_kind("flex", cpu, bf16, heads)
    with pytest.raises(ValueError, match="triton needs a card"):
        attention_kind("triton", cpu, bf16, heads)
