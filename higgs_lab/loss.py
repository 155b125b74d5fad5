"""Cross-entropy over codebooks as sums and counts; the caller adds them up and divides once.

Dividing per sample or per micro-batch would weight short clips more and make the result depend
on how a batch was cut (facts trap 34).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from higgs_lab.vocab import EOC


@dataclass
class LossSums:
    """fp32 sums and counts per codebook, real codes and EOC apart. All [K]."""

    code_sum: Tensor
    code_count: Tensor
    eoc_sum: Tensor
    eoc_count: Tensor

    def __add__(self, other: LossSums) -> LossSums:
        return LossSums(*(a + b for a, b in zip(self.stack(), other.stack(), strict=True)))

    def stack(self) -> Tensor:
        """[4, K], for reducing over processes in one call."""
        return torch.stack([self.code_sum, self.code_count, self.eoc_sum, self.eoc_count])

    @classmethod
    def unstack(cls, stacked: Tensor) -> LossSums:
        return cls(*stacked)

    def weighted(self, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(loss sum, weight sum) over codebooks, codes and EOC together; scalars."""
        total, count = self.code_sum + self.eoc_sum, self.code_count + self.eoc_count
        if weights is None:
            return total.sum(), count.sum()
        weights = weights.to(total)
        return (total * weights).sum(), (count * weights).sum()

    def means(self) -> dict[str, float]:
        """For the log: loss, loss_code/k, loss_eoc and loss_eoc/0; empty parts are left out."""
        sums = LossSums.unstack(self.stack().detach().cpu())  # one transfer, not one a figure
        total, count = sums.weighted()
        figures = {"loss": float(total / count.clamp(min=1))}
        for k in range(len(sums.code_sum)):
            if sums.code_count[k] > 0:
                figures[f"loss_code/{k}"] = float(sums.code_sum[k] / sums.code_count[k])
        if sums.eoc_count.sum() > 0:
            figures["loss_eoc"] = float(sums.eoc_sum.sum() / sums.eoc_count.sum())
            # The stop decision both engines read: codebook 0's EOC.
            figures["loss_eoc/0"] = float(sums.eoc_sum[0] / sums.eoc_count[0].clamp(min=1))
        return figures


@dataclass
class Targets:
    """What a batch of one row is to predict; N positions that bear loss."""

    at: Tensor  # [N] positions, long
    labels: Tensor  # [N, K]
    supervised: Tensor  # [N, K] bool
    weights: Tensor  # [K] fp32, of the codebooks

    def to(self, device: torch.device) -> Targets:
        """On the device, without waiting for what it still has to do."""
        parts = vars(self).values()
        if device.type == "cuda":  # from pageable memory a copy would wait its turn
            parts = [part.pin_memory() for part in parts]
        return Targets(*(part.to(device, non_blocking=True) for part in parts))


def codebook_loss(
    logits: Tensor, labels: Tensor, supervised: Tensor, chunk_positions: int = 1024
) -> LossSums:
    """Masked cross-entropy sums of logits [N, K, V] against labels [N, K] where supervised [N, K].

    Logits are raised to fp32 chunk by chunk, so that [N, K, V] in fp32 never exists as a whole.
    """
    N, K, V = logits.shape
    if labels.shape != (N, K) or supervised.shape != (N, K):
        raise ValueError(
            f"logits {tuple(logits.shape)} need labels and supervised of shape {(N, K)}, got "
            f"{tuple(labels.shape)} and {tuple(supervised.shape)}"
        )
    sums = logits.new_zeros((4, K), dtype=torch.float32)
    for start in range(0, N, chunk_positions):
        part = slice(start, start + chunk_positions)
        nll = F.cross_entropy(
            logits[part].float().reshape(-1, V), labels[part].reshape(-1), reduction="none"
        ).view(-1, K)
        is_eoc = supervised[part] & (labels[part] == EOC)
        is_code = supervised[part] & ~is_eoc
        sums = sums + torch.stack(
            [
                (nll * is_code).sum(0),
                is_code.sum(0).float(),
                (nll * is_eoc).sum(0),
                is_eoc.sum(0).float(),
            ]
        )
    return LossSums.unstack(sums)


def head_loss(
    hidden: Tensor, table: Tensor, targets: Targets, chunk_positions: int | None = None
) -> tuple[Tensor, LossSums]:
    """Head and `codebook_loss` in one: (weighted sum, plain sums) of hidden [N, D], table [K*V, D].

    Neither the logits nor their gradient exist for more than chunk_positions at a time (by default
    1024 on a GPU, 256 on a CPU, whose cache they must not leave): the
    gradient of the hidden states is computed on the way forth and scaled on the way back (as Liger
    Kernel's fused linear cross-entropy does). The sums carry no gradient.
    """
    if chunk_positions is None:
        chunk_positions = 256 if hidden.device.type == "cpu" else 1024
    loss, sums = _HeadLoss.apply(
        hidden, table, targets.labels, targets.supervised, targets.weights, chunk_positions
    )
    return loss, LossSums.unstack(sums)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, table, labels, supervised, weights, chunk_positions):
        K, dtype = labels.shape[1], hidden.dtype
        flat = table.to(dtype)
        want_hidden, want_table = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if want_hidden else None
        d_table = torch.zeros_like(table) if want_table else None
        sums = torch.zeros(4, K, dtype=torch.float32, device=hidden.device)
        eoc = labels == EOC
        for start in range(0, len(hidden), chunk_positions):
            part = slice(start, start + chunk_positions)
            logits = F.linear(hidden[part], flat).float().unflatten(-1, (K, -1))
            label, mine = labels[part, :, None], supervised[part]
            log_probs = logits.log_softmax(-1)
            nll = -log_probs.gather(-1, label)[..., 0]
            is_eoc, is_code = mine & eoc[part], mine & ~eoc[part]
            sums += torch.stack(
                [(nll * is_code).sum(0), is_code.sum(0), (nll * is_eoc).sum(0), is_eoc.sum(0)]
            )
            if not (want_hidden or want_table):
                continue
            grad = log_probs.exp_()
            grad.scatter_add_(-1, label, -torch.ones_like(nll)[..., None])
            grad = (grad * (mine * weights)[..., None]).to(dtype).flatten(1)
            if want_hidden:
                torch.mm(grad, flat, out=d_hidden[part])
            if want_table:
                d_table += grad.t() @ hidden[part]
        ctx.save_for_backward(d_hidden, d_table)
        ctx.mark_non_differentiable(sums)
        return ((sums[0] + sums[2]) * weights).sum(), sums

    @staticmethod
    def backward(ctx, d_loss, _):
        d_hidden, d_table = ctx.saved_tensors
        d_hidden = None if d_hidden is None else d_hidden * d_loss.to(d_hidden.dtype)
        d_table = None if d_table is None else d_table * d_loss.to(d_table.dtype)
        return d_hidden, d_table, None, None, None, None
