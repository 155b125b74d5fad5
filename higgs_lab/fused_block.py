"""One decoder block over fused weights, forth and back, without autograd: see fused.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from higgs_lab.engine import _rotate


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

    def back(
        self, dys: list[Tensor], x: Tensor, low: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """dys: the gradient of each layer's outputs [N, O_j]; the input and `low` of forth.

        -> terms of the input's gradient [N, I], and the gradients of `trained`. Terms and parts
        stay apart, since to join them would be a pass over large tensors, and `_total` is none
        inside of a compiled kernel.
        """
        parts = self.whole[: self.outputs].split([dy.shape[1] for dy in dys])
        if self.masters:
            return [dy @ w for dy, w in zip(dys, parts, strict=True)], [dy.t() @ x for dy in dys]
        if not self.downs:
            return [dy @ w for dy, w in zip(dys, parts, strict=True)], []
        if self.outputs < self.inputs and len(dys) == 1:  # dy is the smaller one to read once more
            d_low = dys[0] @ self.whole[: self.outputs, self.inputs :]
            terms = [torch.cat([dys[0], d_low], dim=1) @ self.whole[:, : self.inputs]]
        else:
            wide = [dy @ w for dy, w in zip(dys, parts, strict=True)]
            d_low = _total([w[:, self.inputs :] for w in wide])
            terms = [w[:, : self.inputs] for w in wide] + [d_low @ self.down]
        d_down = d_low.t() @ x * self.scale  # [P, I]
        downs, ups, column = [], [], 0
        for dy, up in zip(dys, self.ups, strict=True):
            place = slice(column, column + up.shape[1])
            downs.append(d_down[place])
            ups.append(dy.t() @ low[:, place])
            column += up.shape[1]
        return terms, downs + ups


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
    q, k, v = _heads(qkv, block, head_dim)
    q = _rotate(rms_norm(q, block.q_norm, eps), cos, sin)
    k = _rotate(rms_norm(k, block.k_norm, eps), cos, sin)
    return q, k, v.contiguous(), qkv, low


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
    gate, up = gate_up.chunk(2, dim=-1)
    acted = F.silu(gate)
    terms, of_down = block.down.back([dy], acted * up, low_down)
    d_acted = _total(terms)
    d_gate = torch.ops.aten.silu_backward(d_acted * up, gate)
    d_normed, of_gate_up = block.gate_up.back([d_gate, d_acted * acted], normed, low_gate_up)
    d_middle, of_norm = _rms_norm_back(d_normed, middle, block.mlp_norm, eps, dy)
    terms, of_out = block.out.back([d_middle], attended, low_out)
    return d_middle, _total(terms), [*of_out, *of_gate_up, *of_down], of_norm


def before_back(
    dq: Tensor, dk: Tensor, dv: Tensor, d_middle: Tensor, x: Tensor, qkv: Tensor, low: Tensor,
    block: Block, cos: Tensor, sin: Tensor, head_dim: int, eps: float,
):  # fmt: skip
    """-> gradients of x, of qkv's site, and of the norms of block, q and k."""
    q, k, _ = _heads(qkv, block, head_dim)
    dq, of_q = _rms_norm_back([_rotate_back(dq, cos, sin)], q, block.q_norm, eps)
    dk, of_k = _rms_norm_back([_rotate_back(dk, cos, sin)], k, block.k_norm, eps)
    parts = [t.flatten(1) for t in (dq, dk, dv)]
    d_normed, of_qkv = block.qkv.back(parts, rms_norm(x, block.norm, eps), low)
    dx, of_norm = _rms_norm_back(d_normed, x, block.norm, eps, d_middle)
    return dx, of_qkv, [*of_norm, *of_q, *of_k]


def _heads(qkv: Tensor, block: Block, head_dim: int) -> tuple[Tensor, ...]:
    parts = qkv.unflatten(-1, (-1, head_dim))
    heads = block.out.inputs // head_dim
    kv_heads = (parts.shape[1] - heads) // 2
    return parts.split((heads, kv_heads, kv_heads), dim=1)


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
