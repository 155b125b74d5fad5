"""The Triton kernels of training against PyTorch's functions, on a CPU in Triton's interpreter."""

from __future__ import annotations

import json

import torch

from tests.test_decode_attention import run

HERE = "tests.test_packed_attention"
# query heads, key-value heads, head width, lengths of documents
CASES = [
    (4, 2, 16, (1,)),
    (4, 1, 16, (30, 5, 1, 100, 64)),  # several in a tile, one over several
    (2, 2, 32, (33, 32, 31, 1, 1, 1)),
    (8, 1, 16, (64, 64, 1)),  # ends where tiles do
]


def tensors(case):
    """q, k, v as views of one product, of which more stands between positions; spans, bounds."""
    from higgs_lab.attention import document_spans

    heads, kv_heads, width, lengths = case
    random = torch.Generator().manual_seed(0)
    cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    qkv = torch.randn(sum(lengths), heads + 2 * kv_heads, width, generator=random)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    d_out = torch.randn(q.shape, generator=random)
    return q, k, v, d_out, document_spans(cu, sum(lengths)), tuple(cu.tolist())


def results(attend, q, k, v, d_out) -> list[torch.Tensor]:
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


def interpreted() -> None:
    """Runs in a process of its own, for Triton must know at its import that it shall interpret."""
    from higgs_lab.attention import _split_attention
    from higgs_lab.packed_attention import PackedAttention

    errors = []
    for case in CASES:
        *parts, spans, bounds = tensors(case)
        found = results(lambda q, k, v: PackedAttention.apply(q, k, v, *spans), *parts)  # noqa: B023
        wanted = results(lambda q, k, v: _split_attention(q, k, v, bounds), *parts)  # noqa: B023
        pairs = zip(found, wanted, strict=True)
        errors.append(max(float((a - b).abs().max()) for a, b in pairs))
    print(json.dumps(errors))


def alone() -> None:
    """Whether a document's results are the same, bit for bit, whatever the others hold."""
    from higgs_lab.packed_attention import PackedAttention

    *parts, spans, bounds = tensors(CASES[1])
    same = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        found = []
        for fill in (1.0, 1e4):
            others = torch.full((bounds[-1], 1, 1), fill)
            others[start:end] = 1
            changed = [t * others for t in parts]
            made = results(lambda q, k, v: PackedAttention.apply(q, k, v, *spans), *changed)
            found.append([t[start:end] for t in made])
        same.append(all(map(torch.equal, *found)))
    print(json.dumps(same))


def stepped() -> None:
    """How far a training step with every kernel is from one with none, by gradient."""
    from higgs_lab import fused
    from higgs_lab.batches import pack
    from tests.test_fused import model, step
    from tests.tiny import three_examples

    batch, errors = pack(three_examples()), []
    for way in ("attention_mlp", "full"):
        grads = []
        for kind in ("triton", "split"):
            fused.kernels_run = lambda *_: kind == "triton"  # noqa: B023
            made = model(way)
            fused.fuse(made, kind, "selective")
            grads.append(step(made, batch)[2])
        errors += [float((grads[0][n] - g).norm() / g.norm()) for n, g in grads[1].items()]
    print(json.dumps(errors))


def test_it_is_one_call_a_document_forth_and_back():
    assert max(run("interpreted", HERE)) < 1e-5


def test_other_documents_change_no_bit():
    assert run("alone", HERE) == [True] * len(CASES[1][-1])


def test_a_step_with_all_kernels_is_one_with_none():
    errors = run("stepped", HERE)
    assert len(errors) > 40
    assert max(errors) < 1e-4
