"""Loss sums: right by hand, independent of how the batch is cut, codes and EOC apart."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from higgs_lab.batches import pack
from higgs_lab.loss import LossSums, codebook_loss
from higgs_lab.vocab import BOC, EOC
from tests.tiny import K, V, run_one, three_examples, tiny_talker


def random_case(N: int = 40, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(N, K, V, generator=generator)
    labels = torch.randint(0, 1024, (N, K), generator=generator)
    labels[N // 2 :, ::2] = EOC
    labels[: N // 4, 1::3] = BOC
    supervised = torch.rand(N, K, generator=generator) < 0.7
    return logits, labels, supervised


def by_hand(logits, labels, supervised) -> tuple[list, list, list, list]:
    """Cell by cell in Python: the slow twin."""
    code_sum, code_count, eoc_sum, eoc_count = ([0.0] * K for _ in range(4))
    for n in range(len(labels)):
        for c in range(K):
            if not supervised[n, c]:
                continue
            cell, label = logits[n, c].double(), int(labels[n, c])
            nll = float(torch.logsumexp(cell, 0) - cell[label])
            sums, counts = (eoc_sum, eoc_count) if label == EOC else (code_sum, code_count)
            sums[c] += nll
            counts[c] += 1
    return code_sum, code_count, eoc_sum, eoc_count


def test_sums_and_counts_are_those_by_hand():
    case = random_case()
    sums = codebook_loss(*case)
    for mine, hand in zip(sums.stack(), by_hand(*case), strict=True):
        torch.testing.assert_close(mine, torch.tensor(hand, dtype=torch.float32))


def test_uniform_logits_are_at_chance():
    N = 12
    sums = codebook_loss(
        torch.zeros(N, K, V), torch.randint(0, 1024, (N, K)), torch.ones(N, K, dtype=torch.bool)
    )
    assert sums.means()["loss"] == pytest.approx(math.log(1026), abs=1e-4)


@settings(max_examples=20, deadline=None)
@given(chunk=st.integers(1, 50), cut=st.integers(0, 40))
def test_trap34_cuts_of_the_batch_change_nothing(chunk, cut):
    """Chunks within a call and calls within a step: sums add up to the same."""
    logits, labels, supervised = random_case()
    whole = codebook_loss(logits, labels, supervised)
    parts = [
        codebook_loss(logits[part], labels[part], supervised[part], chunk_positions=chunk)
        for part in (slice(0, cut), slice(cut, None))
    ]
    torch.testing.assert_close((parts[0] + parts[1]).stack(), whole.stack())


def test_trap34_one_batch_of_four_has_the_gradient_of_four_batches_of_one():
    """The mean of means over clips would weight the short one more; see the last lines."""
    examples = [*three_examples(), three_examples()[1]]

    def gradient(groups, per_group_mean=False) -> torch.Tensor:
        talker = tiny_talker(scale=2)
        count = sum(int(e.supervised.sum()) for e in examples)
        for group in groups:
            batch = pack(group)
            at = batch.supervised.any(-1)
            out = talker(**batch.inputs(), logits_at=at)
            total, n = codebook_loss(out.logits, batch.labels[at], batch.supervised[at]).weighted()
            (total / (n * len(groups) if per_group_mean else count)).backward()
        return torch.cat([p.grad.flatten() for p in talker.parameters() if p.grad is not None])

    whole = gradient([examples])
    singles = [[e] for e in examples]
    torch.testing.assert_close(gradient(singles), whole, atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(gradient([examples[:3], examples[3:]]), whole, atol=1e-7, rtol=1e-4)
    wrong = gradient(singles, per_group_mean=True)
    assert float((wrong - whole).norm() / whole.norm()) > 0.02


def test_trap03_the_stop_decision_gets_a_gradient():
    """Codebook 0's EOC at row T bears loss, and its gradient raises exactly that entry."""
    talker = tiny_talker()
    example = three_examples()[0]
    logits = run_one(talker, example).detach().requires_grad_()
    total, _ = codebook_loss(logits, example.labels, example.supervised).weighted()
    total.backward()
    stop = example.prompt_length - 1 + 10
    assert float(logits.grad[stop, 0, EOC]) < -0.9
    assert bool((logits.grad[example.supervised].sum(-1).abs() < 1e-4).all())
    assert float(logits.grad[~example.supervised].abs().sum()) == 0


def test_only_supervised_cells_count():
    logits, labels, supervised = random_case()
    base = codebook_loss(logits, labels, supervised).stack()
    other = torch.where(supervised, labels, (labels + 1) % V)
    noise = logits + 5 * torch.randn_like(logits) * ~supervised[..., None]
    assert torch.equal(codebook_loss(noise, other, supervised).stack(), base)


def test_nothing_supervised_is_zero_not_nan():
    logits, labels, supervised = random_case(N=3)
    sums = codebook_loss(logits, labels, torch.zeros_like(supervised))
    assert float(sums.stack().abs().sum()) == 0
    assert sums.means() == {"loss": 0.0}
    empty = codebook_loss(logits[:0], labels[:0], supervised[:0])
    assert float(empty.stack().abs().sum()) == 0


def test_bf16_logits_are_summed_in_fp32():
    logits, labels, supervised = random_case(N=400)
    low = logits.bfloat16()
    sums = codebook_loss(low, labels, supervised)
    assert sums.code_sum.dtype == torch.float32
    torch.testing.assert_close(
        sums.stack(), codebook_loss(low.float(), labels, supervised).stack(), rtol=1e-6, atol=1e-4
    )


def test_weights_scale_codebooks():
    sums = codebook_loss(*random_case())
    weights = torch.tensor([2.0, 1, 1, 1, 0, 0, 0, 0.5])
    total, count = sums.weighted(weights)
    cells = sums.code_sum + sums.eoc_sum
    assert float(total) == pytest.approx(float((cells * weights).sum()))
    assert float(count) == pytest.approx(
        float(((sums.code_count + sums.eoc_count) * weights).sum())
    )
    plain = [float(x) for x in sums.weighted()]
    assert [float(x) for x in sums.weighted(torch.ones(K))] == pytest.approx(plain)


def test_means_name_each_codebook_and_the_stop():
    sums = codebook_loss(*random_case())
    means = sums.means()
    assert {f"loss_code/{k}" for k in range(K)} | {"loss", "loss_eoc", "loss_eoc/0"} == set(means)
    assert means["loss_code/3"] == pytest.approx(float(sums.code_sum[3] / sums.code_count[3]))
    assert means["loss_eoc/0"] == pytest.approx(float(sums.eoc_sum[0] / sums.eoc_count[0]))
    everything = (sums.code_sum + sums.eoc_sum).sum() / (sums.code_count + sums.eoc_count).sum()
    assert means["loss"] == pytest.approx(float(everything))


def test_sums_survive_the_trip_through_one_tensor():
    sums = codebook_loss(*random_case())
    assert torch.equal(LossSums.unstack(sums.stack()).stack(), sums.stack())


def test_shapes_that_do_not_fit_are_refused():
    logits, labels, supervised = random_case(N=4)
    with pytest.raises(ValueError, match=r"\(4, 8\).*\(3, 8\)"):
        codebook_loss(logits, labels[:3], supervised)
