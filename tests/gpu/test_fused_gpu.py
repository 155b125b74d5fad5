"""Fused blocks on a GPU: every kind of attention, compiled or not, against fp32 on the CPU."""

from __future__ import annotations

import pytest
import torch

from higgs_lab.adapter import attach_lora
from higgs_lab.attention import (
    VARLEN,
    Documents,
    _varlen_call,
    attention_kind,
    triton_runs,
    varlen_available,
)
from higgs_lab.batches import pack
from higgs_lab.fused import CHECKPOINTING, fuse
from higgs_lab.fused_block import kernels_run
from tests.tiny import three_examples, tiny_talker

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
WEIGHTS = torch.ones(8)


def model(way: str, device: str, dtype: torch.dtype) -> torch.nn.Module:
    talker = tiny_talker(scale=4, head_dim=64)
    if way == "full":
        return talker.to(device).train().requires_grad_(True)
    made = attach_lora(talker, rank=4, alpha=8)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    made.base_model.model.to(dtype)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return made.to(device).train()


def step(made, batch, device) -> tuple[float, dict]:
    device = torch.device(device)
    targets = batch.targets(WEIGHTS).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        out = made(**batch.to(device).inputs(), targets=targets)
    (out.loss / 100).backward()
    grads = {n: p.grad.float().cpu() for n, p in made.named_parameters() if p.grad is not None}
    return out.loss.item(), grads


@pytest.mark.parametrize("kind", ["triton", "varlen", "flex", "sdpa"])
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("way", ["lora", "full"])
def test_every_way_is_near_fp32(way, compile, kind):
    if kind == "varlen" and not varlen_available(torch.device("cuda"), torch.bfloat16):
        pytest.skip("no varlen kernel here")
    torch._dynamo.reset()
    batch = pack(three_examples(), 384)
    reference = model(way, "cpu", torch.float32)
    fuse(reference, "split")
    wanted = step(reference, batch, "cpu")
    for checkpointing in CHECKPOINTING if not compile else ("full",):
        made = model(way, "cuda", torch.bfloat16)
        fuse(made, kind, checkpointing, compile, torch.bfloat16)
        found = step(made, batch, "cuda")
        assert abs(found[0] / wanted[0] - 1) < 0.03
        assert found[1].keys() == wanted[1].keys()
        for name, grad in wanted[1].items():
            cosine = torch.cosine_similarity(found[1][name].flatten(), grad.flatten(), 0)
            assert cosine > 0.95, (name, float(cosine))


def test_own_kernels_are_chosen_on_hopper():
    device, heads = torch.device("cuda"), (32, 8, 128)
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("no H100 or H200")
    assert kernels_run(device, torch.bfloat16, 128) and kernels_run(device, torch.float16, 64)
    assert not kernels_run(device, torch.bfloat16, 96)
    with torch.inference_mode():  # as somebody who only speaks may be
        assert triton_runs(device, torch.float16, (4, 2, 64))
    assert attention_kind("auto", device, torch.bfloat16, heads) == "triton"
    assert attention_kind("auto", device, torch.bfloat16, (12, 4, 128)) == "varlen"  # 3 a head


@pytest.mark.parametrize("other", ["varlen", "triton"])
def test_grouped_heads_give_sdpas_gradients(other):
    device = torch.device("cuda")
    if not varlen_available(device, torch.bfloat16):
        pytest.skip("no varlen kernel here")
    print("grouped:", _varlen_call(device)[1])
    cu = torch.tensor([0, 300, 301, 700], dtype=torch.int32, device=device)
    generator = torch.Generator(device).manual_seed(0)
    found = []
    base = [
        torch.randn(700, h, 128, generator=generator, device=device, dtype=torch.bfloat16)
        for h in (8, 2, 2)
    ]
    for kind in (other, "sdpa"):
        leaves = [t.clone().requires_grad_() for t in base]
        out = Documents.of(kind, cu, 399, 700).attend(*leaves)
        out.float().square().sum().backward()
        found.append([out.detach(), *(t.grad for t in leaves)])
    for a, b in zip(*found, strict=True):
        assert (a - b).float().norm() < 0.02 * b.float().norm()


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_embeddings_are_autocasts(weights):
    """CUDA's autocast makes sums fp32 unless told; bf16 is what the checkpoint is served with."""
    talker = tiny_talker().to("cuda", weights)
    inputs = pack(three_examples(), 384).to("cuda").inputs()
    with torch.autocast("cuda", torch.bfloat16):
        embeds = talker.embed(inputs["ids"], inputs["is_audio"], inputs["rows"])
    assert embeds.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["varlen", "sdpa"])
def test_qlora_steps_by_modules(kind):
    """Four-bit layers answer in their input's dtype, where autocast would have chosen."""
    pytest.importorskip("bitsandbytes")
    from higgs_lab.quantize import quantize_nf4

    if kind == "varlen" and not varlen_available(torch.device("cuda"), torch.bfloat16):
        pytest.skip("no varlen kernel here")
    batch = pack(three_examples(), 384)
    wanted, _ = step(tiny_talker(scale=4, head_dim=64), batch, "cpu")
    talker = quantize_nf4(tiny_talker(scale=4, head_dim=64).bfloat16(), "cuda")
    if kind == "varlen":
        talker.model.set_attn_implementation(VARLEN)
    talker.model.gradient_checkpointing_enable({"use_reentrant": False})
    loss, grads = step(attach_lora(talker, rank=4, alpha=8).train(), batch, "cuda")
    assert abs(loss / wanted - 1) < 0.05
    assert any(float(g.norm()) > 0 for n, g in grads.items() if "lora_B" in n)
