"""One decoder block over fused weights, forth and back, without autograd: see fused.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from higgs_lab.engine import _rotate
from higgs_lab.trial import kernels_agree


@dataclass
class Site:
    """Linear layers that share an input, as one product: I inputs, O outputs, P for the adapters.

    A frozen base with LoRA has whole [O + P, I + P]: W top left, of which the modules' weights are
    views; B block by block in the columns on the right, scale * A in the rows below, zeros in the
    corner. A trained base has whole [O, I], a copy of the masters.
    """

    whole: Tensor
    outputs: int
    inputs: int
    ups: list[nn.Parameter]  # B of each layer, [O_j, r]
    downs: list[nn.Parameter]  # A of each layer, [r, I]
    masters: list[nn.Parameter]  # trained base weights, [O_j, I]
    scale: float

    @property
    def down(self) -> Tensor:
        """scale * A, [P, I]."""
        return self.whole[self.outputs :, : self.inputs]

    def trained(self) -> list[nn.Parameter]:
        return [*self.downs, *self.ups, *self.masters]

    def forth(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [N, I] -> outputs [N, O], and x A' [N, P], which the way back wants.

        [x | x A'] is one product. Where the output is the smaller one and goes into the residual
        stream at once (a site of one layer), the adapters' part is added to it instead: outputs are
        fp32 then, and compiled it is no pass of its own.
        """
        if not self.downs:
            return F.linear(x, self.whole), None
        low = F.linear(x, self.down)
        if self.outputs < self.inputs and len(self.ups) == 1:
            base, ups = self.whole[: self.outputs].split((self.inputs, low.shape[1]), dim=1)
            return F.linear(x, base).float() + F.linear(low, ups).float(), low
        return F.linear(torch.cat([x, low], dim=1), self.whole[: self.outputs]), low

    def back(self, dy: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """dy: the gradient of all outputs [N, O] -> terms of the input's [N, I], and low's [N, P].

        Terms stay apart, since to join them would be a pass over large tensors, and `_total` is
        none inside of a compiled kernel.
        """
        if not self.downs:
            return [dy @ self.whole[: self.outputs]], None
        if self.outputs < self.inputs and len(self.ups) == 1:  # dy: the smaller one to read again
            d_low = dy @ self.whole[: self.outputs, self.inputs :]
            return [torch.cat([dy, d_low], dim=1) @ self.whole[:, : self.inputs]], d_low
        wide = dy @ self.whole[: self.outputs]
        d_low = wide[:, self.inputs :].contiguous()
        return [wide[:, : self.inputs], d_low @ self.down], d_low

    def gradients(
        self, dy: Tensor, d_low: Tensor | None, x: Tensor, low: Tensor | None
    ) -> list[Tensor]:
        """Of `trained`; x and low: the input and what `forth` gave beside the outputs."""
        if self.masters:
            return list((dy.t() @ x).split([len(w) for w in self.masters]))
        if not self.downs:
            return []
        d_down = d_low.t() @ x * self.scale  # [P, I]
        downs, ups, row, column = [], [], 0, 0
        for up in self.ups:
            outputs, rank = up.shape
            downs.append(d_down[column : column + rank])
            ups.append(dy[:, row : row + outputs].t() @ low[:, column : column + rank])
            row, column = row + outputs, column + rank
        return downs + ups


@dataclass
class Block:
    """Sites and norms of one decoder block."""

    qkv: Site
    out: Site
    gate_up: Site
    down: Site
    norm: Tensor
    q_norm: Tensor
    k_norm: Tensor
    mlp_norm: Tensor
    kernels: bool  # whether `backward_kernels` takes part

    def sites(self) -> list[Site]:
        return [self.qkv, self.out, self.gate_up, self.down]

    def norms(self) -> list[Tensor]:
        return [self.norm, self.q_norm, self.k_norm, self.mlp_norm]

    def trained(self) -> list[Tensor]:
        """In the order in which the way back gives gradients."""
        found = [parameter for site in self.sites() for parameter in site.trained()]
        return found + [norm for norm in self.norms() if norm.requires_grad]


# --- the halves of a block, forth and back, without autograd. x [N, D]; cos, sin [N, 1, d].


def before(x: Tensor, block: Block, cos: Tensor, sin: Tensor, head_dim: int, eps: float):
    """x -> q [N, H, d], k, v [N, H_kv, d]; and what the way back wants."""
    qkv, low = block.qkv.forth(rms_norm(x, block.norm, eps))
    heads = block.out.inputs // head_dim
    kv_heads = (block.qkv.outputs // head_dim - heads) // 2
    q, k, v = qkv.unflatten(-1, (-1, head_dim)).split((heads, kv_heads, kv_heads), dim=1)
    q = _rotate(rms_norm(q, block.q_norm, eps), cos, sin)
    k = _rotate(rms_norm(k, block.k_norm, eps), cos, sin)
    return q, k, v, qkv, low


def after(x: Tensor, attended: Tensor, block: Block, eps: float):
    """x and attended [N, H d] -> the block's output; and what the way back wants."""
    made, low_out = block.out.forth(attended)
    middle = (x + made).to(x.dtype)
    gate_up, low_gate_up = block.gate_up.forth(rms_norm(middle, block.mlp_norm, eps))
    gate, up = gate_up.chunk(2, dim=-1)
    made, low_down = block.down.forth(F.silu(gate) * up)
    return (middle + made).to(x.dtype), middle, gate_up, low_out, low_gate_up, low_down


def after_back(
    dy: Tensor, attended: Tensor, middle: Tensor, gate_up: Tensor | None,
    low_out: Tensor, low_gate_up: Tensor, low_down: Tensor, block: Block, eps: float,
):  # fmt: skip
    """-> gradients of middle, of attended, of each site but qkv, and of the feed-forward norm."""
    normed = rms_norm(middle, block.mlp_norm, eps)
    if gate_up is None:
        gate_up, low_gate_up = block.gate_up.forth(normed)
    terms, d_low = block.down.back(dy)
    d_gate_up, acted = _swiglu_back(_total(terms), gate_up, block.kernels)
    of_down = block.down.gradients(dy, d_low, acted, low_down)
    d_normed, d_low = block.gate_up.back(d_gate_up)
    of_gate_up = block.gate_up.gradients(d_gate_up, d_low, normed, low_gate_up)
    d_middle, of_norm = _rms_norm_back(d_normed, middle, block.mlp_norm, eps, dy)
    terms, d_low = block.out.back(d_middle)
    of_out = block.out.gradients(d_middle, d_low, attended, low_out)
    return d_middle, _total(terms), [*of_out, *of_gate_up, *of_down], of_norm


def before_back(
    dq: Tensor, dk: Tensor, dv: Tensor, d_middle: Tensor, x: Tensor, qkv: Tensor, low: Tensor,
    block: Block, cos: Tensor, sin: Tensor, eps: float,
):  # fmt: skip
    """-> gradients of x, of qkv's site, and of the norms of block, q and k."""
    d_qkv, of_heads = _heads_back(
        dq, dk, dv, qkv, block.q_norm, block.k_norm, cos, sin, eps, block.kernels
    )
    d_normed, d_low = block.qkv.back(d_qkv)
    of_qkv = block.qkv.gradients(d_qkv, d_low, rms_norm(x, block.norm, eps), low)
    dx, of_norm = _rms_norm_back(d_normed, x, block.norm, eps, d_middle)
    return dx, of_qkv, [*of_norm, *of_heads]


def _swiglu_back(d_acted: Tensor, gate_up: Tensor, kernels: bool) -> tuple[Tensor, Tensor]:
    """-> the gradient of [gate | up], and silu(gate) * up."""
    if kernels:
        from higgs_lab.backward_kernels import swiglu_back

        return swiglu_back(d_acted, gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    acted = F.silu(gate)
    d_gate = torch.ops.aten.silu_backward(d_acted * up, gate)
    return torch.cat([d_gate, d_acted * acted], dim=1), acted * up


def _heads_back(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, q_norm: Tensor, k_norm: Tensor,
    cos: Tensor, sin: Tensor, eps: float, kernels: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """-> the gradient of qkv, and [those of the trained norms of q and k]."""
    dq, dk, dv = (t.contiguous() for t in (dq, dk, dv))  # SDPA gives heads before positions
    if kernels and not (q_norm.requires_grad or k_norm.requires_grad):
        from higgs_lab.backward_kernels import heads_back

        return heads_back(dq, dk, dv, qkv, q_norm, k_norm, cos, sin, eps), []
    heads = [t.shape[1] for t in (dq, dk, dv)]
    q, k, _ = qkv.unflatten(-1, (-1, dq.shape[2])).split(heads, dim=1)
    dq, of_q = _rms_norm_back([_rotate_back(dq, cos, sin)], q, q_norm, eps)
    dk, of_k = _rms_norm_back([_rotate_back(dk, cos, sin)], k, k_norm, eps)
    return torch.cat([t.flatten(1) for t in (dq, dk, dv)], dim=1), [*of_q, *of_k]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)  # a trained weight is fp32


def _rms_norm_back(
    terms: list[Tensor], x: Tensor, weight: Tensor, eps: float, more: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Gradient of x, plus `more` that reaches it past the norm; and [that of a trained weight].

    terms: of the output's gradient.
    """
    wide, dy = x.float(), _total(terms, torch.float32)
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed, pulled = wide * scale, dy * weight.float()
    dx = scale * (pulled - normed * (pulled * normed).mean(-1, keepdim=True))
    if more is not None:
        dx = dx + more.float()
    of_weight = [(dy * normed).flatten(0, -2).sum(0)] if weight.requires_grad else []
    return dx.to(x.dtype), of_weight


def _total(terms: list[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """The sum, taken in fp32."""
    total = terms[0]
    for term in terms[1:]:
        total = total.float() + term.float()
    return total.to(dtype or terms[0].dtype)


def _rotate_back(dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = dy.shape[-1] // 2
    turned = dy * sin
    return dy * cos + torch.cat([turned[..., half:], -turned[..., :half]], dim=-1)


@cache
def kernels_run(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `backward_kernels` runs here and is right, by a trial; else the compiler's do."""

    def results() -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        d = head_dim
        of_mlp = (random(20, 2200), random(20, 4400))
        of_heads = (random(20, 4, d), random(20, 2, d), random(20, 2, d), random(20, 8 * d))
        of_heads += (random(d), random(d), random(20, 1, d), random(20, 1, d), 1e-6)
        found, wanted = (
            (*_swiglu_back(*of_mlp, own), _heads_back(*of_heads, own)[0]) for own in (True, False)
        )
        yield from zip(found, wanted, strict=True)

    def fits() -> bool:
        return head_dim & (head_dim - 1) == 0  # a power of two, as Triton's ranges are

    return kernels_agree(device, dtype, fits, results, "training is slower")
