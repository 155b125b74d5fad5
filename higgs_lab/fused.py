"""Training blocks as plain functions over fused weights: what a fine-tune runs on packed batches.

The modules stay what they are, so PEFT, checkpoints, merging and speaking see nothing of this; a
talker that is fused only takes another way through its blocks when a packed batch comes. What is
gained against the modules:

- q, k and v are one matrix, gate and up another: 4 large products a block instead of 7;
- a LoRA costs no pass over a large tensor: the product is [x | x A'] @ [W | B]', with B in extra
  columns beside the frozen weights, so that the low-rank part is added inside the matrix units'
  fp32 sum; the way back has A in extra rows, or takes d(x A') from extra columns;
- what trains is an fp32 master; the products use copies in bf16, taken anew each pass;
- the way back is written out, so it is known what is kept for it and what is computed again
  (`CHECKPOINTING`), compiled or not;
- weights are arguments of the compiled functions: one compilation serves all blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from higgs_lab.attention import Documents
from higgs_lab.engine import _rotate
from higgs_lab.talker import Talker

# What the way back computes again, in shares of a block's forward products at 4B size.
# none: norms and activations alone. selective: gate and up too, a half. full: also q, k, v and
# attention, two thirds; two hidden states a block are kept. The products that write into the
# residual stream are needed by nobody and never computed again.
CHECKPOINTING = ("none", "selective", "full")


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

    def copies(self) -> list[tuple[Tensor, Tensor]]:
        """(where, what) is to be copied before a forward pass; A still without its scale."""
        pairs, row, column = [], 0, 0
        for up, down in zip(self.ups, self.downs, strict=True):
            outputs, rank = up.shape
            place = slice(self.inputs + column, self.inputs + column + rank)
            pairs.append((self.whole[row : row + outputs, place], up))
            pairs.append((self.down[column : column + rank], down))
            row, column = row + outputs, column + rank
        for master in self.masters:
            pairs.append((self.whole[row : row + len(master)], master))
            row += len(master)
        return pairs

    def forth(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [N, I] -> outputs [N, O], and x A' [N, P], which the way back wants."""
        if not self.downs:
            return F.linear(x, self.whole), None
        low = F.linear(x, self.down)
        return F.linear(torch.cat([x, low], dim=1), self.whole[: self.outputs]), low

    def back(self, dy: Tensor, x: Tensor, low: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """dy [N, O], the input and `low` of forth -> dx and the gradients of `trained`."""
        if self.masters:
            parts = dy.split([len(master) for master in self.masters], dim=1)
            return dy @ self.whole, [part.t() @ x for part in parts]
        if not self.downs:
            return dy @ self.whole, []
        if self.outputs < self.inputs:  # dy is the smaller one to read once more
            d_low = dy @ self.whole[: self.outputs, self.inputs :]
            dx = torch.cat([dy, d_low], dim=1) @ self.whole[:, : self.inputs]
        else:
            wide = dy @ self.whole[: self.outputs]
            d_low = wide[:, self.inputs :]
            dx = torch.addmm(wide[:, : self.inputs], d_low, self.down)
        d_down, d_up = d_low.t() @ x, dy.t() @ low  # [P, I], [O, P]
        downs, ups, row, column = [], [], 0, 0
        for up in self.ups:
            outputs, rank = up.shape
            downs.append(d_down[column : column + rank] * self.scale)
            ups.append(d_up[row : row + outputs, column : column + rank])
            row, column = row + outputs, column + rank
        return dx, downs + ups


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


def _before(x: Tensor, block: Block, cos: Tensor, sin: Tensor, head_dim: int, eps: float):
    """x -> q [N, H, d], k, v [N, H_kv, d]; and what the way back wants."""
    qkv, low = block.qkv.forth(_rms_norm(x, block.norm, eps))
    q, k, v = _heads(qkv, block, head_dim)
    q = _rotate(_rms_norm(q, block.q_norm, eps), cos, sin)
    k = _rotate(_rms_norm(k, block.k_norm, eps), cos, sin)
    return q, k, v.contiguous(), qkv, low


def _after(x: Tensor, attended: Tensor, block: Block, eps: float):
    """x and attended [N, H d] -> the block's output; and what the way back wants."""
    made, low_out = block.out.forth(attended)
    middle = x + made
    gate_up, low_gate_up = block.gate_up.forth(_rms_norm(middle, block.mlp_norm, eps))
    gate, up = gate_up.chunk(2, dim=-1)
    made, low_down = block.down.forth(F.silu(gate) * up)
    return middle + made, middle, gate_up, low_out, low_gate_up, low_down


def _after_back(
    dy: Tensor, attended: Tensor, middle: Tensor, gate_up: Tensor | None,
    low_out: Tensor, low_gate_up: Tensor, low_down: Tensor, block: Block, eps: float,
):  # fmt: skip
    """-> gradients of middle, of attended, of each site but qkv, and of the feed-forward norm."""
    normed = _rms_norm(middle, block.mlp_norm, eps)
    if gate_up is None:
        gate_up, low_gate_up = block.gate_up.forth(normed)
    gate, up = gate_up.chunk(2, dim=-1)
    acted = F.silu(gate)
    d_acted, of_down = block.down.back(dy, acted * up, low_down)
    d_gate = torch.ops.aten.silu_backward(d_acted * up, gate)
    d_gate_up = torch.cat([d_gate, d_acted * acted], dim=1)
    d_normed, of_gate_up = block.gate_up.back(d_gate_up, normed, low_gate_up)
    d_middle, of_norm = _rms_norm_back(d_normed, middle, block.mlp_norm, eps, dy)
    d_attended, of_out = block.out.back(d_middle, attended, low_out)
    return d_middle, d_attended, [*of_out, *of_gate_up, *of_down], of_norm


def _before_back(
    dq: Tensor, dk: Tensor, dv: Tensor, d_middle: Tensor, x: Tensor, qkv: Tensor, low: Tensor,
    block: Block, cos: Tensor, sin: Tensor, head_dim: int, eps: float,
):  # fmt: skip
    """-> gradients of x, of qkv's site, and of the norms of block, q and k."""
    q, k, _ = _heads(qkv, block, head_dim)
    dq, of_q = _rms_norm_back(_rotate_back(dq, cos, sin), q, block.q_norm, eps)
    dk, of_k = _rms_norm_back(_rotate_back(dk, cos, sin), k, block.k_norm, eps)
    d_qkv = torch.cat([dq.flatten(1), dk.flatten(1), dv.flatten(1)], dim=1)
    d_normed, of_qkv = block.qkv.back(d_qkv, _rms_norm(x, block.norm, eps), low)
    dx, of_norm = _rms_norm_back(d_normed, x, block.norm, eps, d_middle)
    return dx, of_qkv, [*of_norm, *of_q, *of_k]


def _heads(qkv: Tensor, block: Block, head_dim: int) -> tuple[Tensor, ...]:
    parts = qkv.unflatten(-1, (-1, head_dim))
    heads = block.out.inputs // head_dim
    kv_heads = (parts.shape[1] - heads) // 2
    return parts.split((heads, kv_heads, kv_heads), dim=1)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)  # a trained weight is fp32


def _rms_norm_back(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, more: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Gradient of x, plus `more` that reaches it past the norm; and [that of a trained weight]."""
    wide, dy = x.float(), dy.float()
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed, pulled = wide * scale, dy * weight.float()
    dx = scale * (pulled - normed * (pulled * normed).mean(-1, keepdim=True))
    if more is not None:
        dx = dx + more.float()
    of_weight = [(dy * normed).flatten(0, -2).sum(0)] if weight.requires_grad else []
    return dx.to(x.dtype), of_weight


def _rotate_back(dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = dy.shape[-1] // 2
    turned = dy * sin
    return dy * cos + torch.cat([turned[..., half:], -turned[..., :half]], dim=-1)


class _BlockFunction(torch.autograd.Function):
    """One block; trained: `Block.trained`, so that autograd knows whose gradients come back."""

    @staticmethod
    def forward(ctx, x, engine, block, cos, sin, where, *trained):
        ctx.of = engine, block, cos, sin, where
        ctx.dtypes = [t.dtype for t in trained]
        x = x.detach()  # the first block's may need no gradient: the same compiled code for all
        before = engine.before(x, block, cos, sin, engine.head_dim, engine.eps)
        attention = _attend(where, *before[:3])
        attended = attention[-1].detach().flatten(1)
        y, *after = engine.after(x, attended, block, engine.eps)
        if engine.checkpointing != "none":
            after[1] = None  # gate_up
        if engine.checkpointing == "full":
            after[2:4], attention, before = (after[2], None), None, None
        ctx.kept = x, before and before[3:], attention, after
        return y

    @staticmethod
    def backward(ctx, dy):
        engine, block, cos, sin, where = ctx.of
        (x, before, attention, after), ctx.kept = ctx.kept, None
        options = (engine.head_dim, engine.eps)
        with torch.autocast(dy.device.type, enabled=False):
            if attention is None:
                *heads, qkv, low = engine.before(x, block, cos, sin, *options)
                before, attention = (qkv, low), _attend(where, *heads)
            *heads, out = attention
            d_middle, d_attended, of_sites, of_mlp_norm = engine.after_back(
                dy, out.detach().flatten(1), *after, block, engine.eps
            )
            grads = torch.autograd.grad(out, heads, d_attended.view_as(out))
            dx, of_qkv, of_norms = engine.before_back(
                *grads, d_middle, x, *before, block, cos, sin, *options
            )
        found = [*of_qkv, *of_sites, *of_norms, *of_mlp_norm]
        found = [g.to(dtype) for g, dtype in zip(found, ctx.dtypes, strict=True)]
        return dx, None, None, None, None, None, *found


@torch.enable_grad()
def _attend(where: Documents, *heads: Tensor) -> tuple[Tensor, ...]:
    """(q, k, v, attention of them), with a graph of its own between these."""
    leaves = [t.detach().requires_grad_() for t in heads]
    return *leaves, where.attend(*leaves)


class FusedBlocks:
    """All blocks of a talker in training, and its final norm. Held as `Talker.fused`."""

    def __init__(
        self,
        talker: Talker,
        attention: str,
        checkpointing: str,
        compile: bool,
        dtype: torch.dtype,
    ):
        config = talker.config
        self.attention, self.checkpointing, self.compiled = attention, checkpointing, compile
        self.head_dim, self.eps, self.dtype = config.head_dim, config.rms_norm_eps, dtype
        self.blocks = [_fuse_block(layer, dtype) for layer in talker.model.layers]
        self.norm = talker.model.norm.weight
        sites = [site for block in self.blocks for site in block.sites()]
        self.pairs = [pair for site in sites for pair in site.copies()]
        self.scaled = [(site.down, site.scale) for site in sites if site.downs]
        # never dynamic: every pack size that comes is compiled for itself, so let them be few
        wrap: Callable = partial(torch.compile, dynamic=False) if compile else lambda f: f
        self.before, self.after = wrap(_before), wrap(_after)
        self.after_back, self.before_back = wrap(_after_back), wrap(_before_back)

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> Tensor:
        """Embeddings [1, L, D] of a packed batch -> hidden states [1, L, D] after the last norm."""
        self.refresh()
        where = Documents.of(self.attention, cu_seqlens, max_seqlen, x.shape[1])
        with torch.autocast(x.device.type, enabled=False):  # every dtype is chosen here
            x = x[0].to(self.dtype)
            cos, sin = (t[0, :, None].to(self.dtype) for t in (cos, sin))
            for block in self.blocks:
                x = _BlockFunction.apply(x, self, block, cos, sin, where, *block.trained())
            return _rms_norm(x, self.norm, self.eps)[None]

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the masters, each time: fused optimisers change them without counting a version."""
        torch._foreach_copy_([where for where, _ in self.pairs], [what for _, what in self.pairs])
        for down, scale in self.scaled:
            down.mul_(scale)


def fuse(
    model: nn.Module,
    attention: str,
    checkpointing: str = "none",
    compile: bool = False,
    dtype: torch.dtype | None = None,
) -> FusedBlocks:
    """Make packed batches take the fused way through `model`: a Talker, or a PEFT model of one.

    attention: a kind that `attention.attention_kind` chose; dtype: of the products, the weights'
    own unless those are fp32 masters. Raises ValueError where `unfusable` says why.
    """
    why = unfusable(model)
    if why:
        raise ValueError(f"cannot be fused: {why}")
    talker = _talker(model)
    dtype = dtype or talker.dtype
    talker.fused = FusedBlocks(talker, attention, checkpointing, compile, dtype)
    return talker.fused


def unfusable(model: nn.Module) -> str | None:
    """Why a model must go through its modules; None when it can be fused."""
    from peft.tuners.lora import Linear as LoraLinear

    talker = _talker(model)
    config = talker.config
    for layer in talker.model.layers:
        for names in _SITES.values():
            modules = [layer.get_submodule(name) for name in names]
            if len({isinstance(module, LoraLinear) for module in modules}) > 1:
                return "a LoRA on some of the layers that share an input"
            for module in modules:
                if isinstance(module, LoraLinear):
                    if any(getattr(d, "p", 0) for d in module.lora_dropout.values()):
                        return "LoRA dropout drops another part of the input in each layer"
                    if list(module.active_adapters) != ["default"] or any(module.use_dora.values()):
                        return "more than one plain LoRA"
                    module = module.get_base_layer()
                if type(module) is not nn.Linear or module.bias is not None:
                    return f"{type(module).__name__} layers (quantised weights, biases)"
    if config.hidden_act != "silu" or set(config.layer_types) != {"full_attention"}:
        return "another kind of block"
    return None


def _talker(model: nn.Module) -> Talker:
    return next(m for m in model.modules() if isinstance(m, Talker))


_SITES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


def _fuse_block(layer: nn.Module, dtype: torch.dtype) -> Block:
    norms = {
        "norm": layer.input_layernorm,
        "q_norm": layer.self_attn.q_norm,
        "k_norm": layer.self_attn.k_norm,
        "mlp_norm": layer.post_attention_layernorm,
    }
    sites = {
        name: _fuse_site([layer.get_submodule(part) for part in parts], dtype)
        for name, parts in _SITES.items()
    }
    return Block(**sites, **{name: norm.weight for name, norm in norms.items()})


@torch.no_grad()
def _fuse_site(modules: list[nn.Module], dtype: torch.dtype) -> Site:
    bases = [_base(module) for module in modules]
    weights = [base.weight for base in bases]
    outputs, inputs = sum(map(len, weights)), weights[0].shape[1]
    if weights[0].requires_grad:
        whole = torch.cat([w.to(dtype) for w in weights])
        return Site(whole, outputs, inputs, [], [], weights, 1.0)
    adapted = bases[0] is not modules[0]
    downs = [m.lora_A["default"].weight for m in modules] if adapted else []
    ups = [m.lora_B["default"].weight for m in modules] if adapted else []
    align = 64 if weights[0].device.type == "cuda" else 8  # the matrix units' tiles
    extra = -(-sum(map(len, downs)) // align) * align
    whole = weights[0].new_zeros(outputs + extra, inputs + extra, dtype=dtype)
    row = 0
    for base, weight in zip(bases, weights, strict=True):
        part = whole[row : row + len(weight), :inputs]
        part.copy_(weight)
        base.weight.data = part  # a view: the model takes no second copy
        row += len(weight)
    scale = modules[0].scaling["default"] if adapted else 1.0
    return Site(whole, outputs, inputs, ups, downs, [], scale)


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module
