"""Packed documents do not see each other; packed, padded and one by one give the same logits."""

from __future__ import annotations

import pytest
import torch

from higgs_lab.attention import documents, packed_mask, packed_positions, varlen_available
from higgs_lab.batches import pack
from tests.tiny import pad_examples, run_one, three_examples, tiny_talker


def test_the_mask_of_two_documents_by_hand():
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    assert documents(cu, 5).tolist() == [0, 0, 1, 1, 1]
    assert packed_positions(cu, 5).tolist() == [[0, 1, 0, 1, 2]]
    assert packed_mask(cu, 5)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]


@pytest.mark.parametrize("pad_to", [None, 200])
@torch.no_grad()
def test_trap33_packed_is_one_by_one(pad_to):
    talker, examples = tiny_talker(scale=4), three_examples()
    batch = pack(examples, pad_to)
    out = talker(**batch.inputs()).logits[0]
    start = 0
    for example in examples:
        part = out[start : start + len(example)]
        torch.testing.assert_close(part, run_one(talker, example), atol=2e-5, rtol=1e-4)
        start += len(example)
    assert not torch.isnan(out).any()  # padding is a document of its own, not an empty row


@torch.no_grad()
def test_trap33_packed_is_padded():
    talker, examples = tiny_talker(scale=4), three_examples()
    columns = pad_examples(examples)
    inputs = {name: columns[name] for name in ("ids", "is_audio", "rows", "attention_mask")}
    padded = talker(**inputs).logits
    packed = talker(**pack(examples).inputs()).logits[0]
    torch.testing.assert_close(
        packed, padded[columns["attention_mask"].bool()], atol=2e-5, rtol=1e-4
    )


@torch.no_grad()
def test_no_document_sees_another():
    """Exactly: other documents' content, however large, leaves a document's logits bit for bit."""
    talker, examples = tiny_talker(scale=4), three_examples()
    batch = pack(examples)
    before = talker(**batch.inputs()).logits[0]
    bounds = batch.cu_seqlens.tolist()
    for d in range(3):
        changed = pack(examples)
        part = slice(bounds[d], bounds[d + 1])
        changed.rows[:, part] = (changed.rows[:, part] + 3) % 1026
        after = talker(**changed.inputs()).logits[0]
        same = (after == before).flatten(1).all(-1)
        assert not same[part].all()
        assert same[: bounds[d]].all() and same[bounds[d + 1] :].all()


def test_order_within_a_pack_does_not_matter_to_the_gradient():
    def gradient(order):
        talker = tiny_talker(scale=4)
        batch = pack([three_examples()[i] for i in order])
        out = talker(**batch.inputs(), logits_at=batch.supervised.any(-1))
        (out.logits**2).sum().backward()
        return talker.codebooks.weight.grad

    torch.testing.assert_close(gradient([0, 1, 2]), gradient([2, 0, 1]), atol=1e-3, rtol=1e-3)


def test_varlen_is_for_cuda_in_half_precision_only():
    assert not varlen_available(torch.device("cpu"), torch.bfloat16)
    assert not varlen_available(torch.device("cuda"), torch.float32)
