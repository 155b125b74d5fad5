"""The Triton kernels of training against PyTorch's functions, on a CPU in Triton's interpreter."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

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
    L = sum(lengths)
    more = torch.randn(L + 70, 2 * heads + 2 * kv_heads, width, generator=random)
    more[L:] = float("nan")  # behind the pack, where nobody may look
    q, k, v = more[:L, : heads + 2 * kv_heads].split((heads, kv_heads, kv_heads), dim=1)
    d_out = more[:, -heads:].contiguous()[:L]
    return q, k, v, d_out, document_spans(cu, L), tuple(cu.tolist())


def results(attend, q, k, v, d_out) -> list[torch.Tensor]:
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


def interpreted() -> None:
    """Runs in a process of its own, for Triton must know at its import that it shall interpret."""
    print(json.dumps({"errors": errors(), "alone": alone(), "steps": steps()}))


def errors() -> list[float]:
    from higgs_lab.attention import _split_attention
    from higgs_lab.packed_attention import PackedAttention

    worst = []
    for case in CASES:
        *parts, spans, bounds = tensors(case)
        found = results(lambda q, k, v: PackedAttention.apply(q, k, v, *spans), *parts)  # noqa: B023
        wanted = results(lambda q, k, v: _split_attention(q, k, v, bounds), *parts)  # noqa: B023
        pairs = zip(found, wanted, strict=True)
        worst += [float((a - b).abs().max()) for a, b in pairs]
    return worst


def alone() -> list[bool]:
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
    return same


def steps() -> list[float]:
    """How far a training step with kernels is from one with none, by gradient.

    SDPA's plain way gives gradients whose heads lie before positions.
    """
    from higgs_lab import fused
    from higgs_lab.batches import pack
    from tests.test_fused import model, step
    from tests.tiny import three_examples

    batch, found = pack(three_examples()), []
    for way in ("attention_mlp", "full"):
        grads = []
        for kind, kernels in (("split", False), ("triton", True), ("sdpa", True)):
            fused.kernels_run = lambda *_: kernels  # noqa: B023
            made = model(way)
            fused.fuse(made, kind, "selective")
            with sdpa_kernel(SDPBackend.MATH):
                grads.append(step(made, batch)[2])
        wanted, *others = grads
        found += [float((g[n] - w).norm() / w.norm()) for g in others for n, w in wanted.items()]
    return found


@pytest.fixture(scope="module")
def found() -> dict:
    return run("interpreted", HERE)


def test_it_is_one_call_a_document_forth_and_back(found):
    assert len(found["errors"]) == 4 * len(CASES)
    assert all(error < 1e-5 for error in found["errors"])  # a NaN is not


def test_what_other_documents_hold_changes_no_bit(found):
    assert found["alone"] == [True] * len(CASES[1][-1])


def test_a_step_with_kernels_is_one_with_none(found):
    assert len(found["steps"]) > 80
    assert all(error < 1e-4 for error in found["steps"])
