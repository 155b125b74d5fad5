"""Training blocks as plain functions over fused weights: what a fine-tune runs on packed batches.

The modules stay what they are, so PEFT, checkpoints, merging and speaking see nothing of this; a
talker that is fused only takes another way through its blocks when a packed batch comes. What is
gained against the modules:

- q, k and v are one matrix, gate and up another: 4 large products a block instead of 7;
- a LoRA costs few passes over large tensors, compiled hardly any: the product is
  [x | x A'] @ [W | B]', with B in extra columns beside the frozen weights, so that the low-rank
  part is added inside the matrix units' fp32 sum; where the output is the smaller one, a second
  product is added to it in fp32. The way back has A in extra rows, or takes d(x A') from extra
  columns;
- what trains is an fp32 master; the products use copies in bf16, taken anew each pass;
- the way back is written out, so it is known what is kept for it and what is computed again
  (`CHECKPOINTING`), compiled or not;
- weights are arguments of the compiled functions: one compilation serves all blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from higgs_lab.attention import Documents
from higgs_lab.fused_block import Block, Site, after, after_back, before, before_back, rms_norm
from higgs_lab.talker import Talker

# What the way back computes again, in shares of a block's forward products at 4B size.
# none: norms and activations alone. selective: gate and up too, a half. full: also q, k, v and
# attention, two thirds; two hidden states a block are kept. The products that write into the
# residual stream are needed by nobody and never computed again.
CHECKPOINTING = ("none", "selective", "full")


class _BlockFunction(torch.autograd.Function):
    """One block; trained: `Block.trained`, so that autograd knows whose gradients come back."""

    @staticmethod
    def forward(ctx, x, engine, block, cos, sin, where, *trained):
        ctx.of = engine, block, cos, sin, where
        ctx.dtypes = [t.dtype for t in trained]
        x = x.detach()  # the first block's may need no gradient: the same compiled code for all
        heads = engine.before(x, block, cos, sin, engine.head_dim, engine.eps)
        attention = _attend(where, *heads[:3])
        attended = attention[-1].detach().flatten(1)
        y, *rest = engine.after(x, attended, block, engine.eps)
        if engine.checkpointing != "none":
            rest[1] = None  # gate_up
        if engine.checkpointing == "full":
            rest[3], attention, heads = None, None, None
        ctx.kept = x, heads and heads[3:], attention, rest
        return y

    @staticmethod
    def backward(ctx, dy):
        engine, block, cos, sin, where = ctx.of
        (x, products, attention, rest), ctx.kept = ctx.kept, None
        options = (engine.head_dim, engine.eps)
        with torch.autocast(dy.device.type, enabled=False):
            if attention is None:
                *heads, qkv, low = engine.before(x, block, cos, sin, *options)
                products, attention = (qkv, low), _attend(where, *heads)
            *heads, out = attention
            d_middle, d_attended, of_sites, of_mlp_norm = engine.after_back(
                dy, out.detach().flatten(1), *rest, block, engine.eps
            )
            grads = torch.autograd.grad(out, heads, d_attended.reshape(out.shape))
            dx, of_qkv, of_norms = engine.before_back(
                *grads, d_middle, x, *products, block, cos, sin, *options
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
        from peft.tuners.lora import LoraLayer

        config = talker.config
        self.attention, self.checkpointing, self.compiled = attention, checkpointing, compile
        self.head_dim, self.eps, self.dtype = config.head_dim, config.rms_norm_eps, dtype
        self.blocks = [_fuse_block(layer, dtype) for layer in talker.model.layers]
        self.norm = talker.model.norm.weight
        self.lora = next((m for m in talker.modules() if isinstance(m, LoraLayer)), None)
        sites = [site for block in self.blocks for site in block.sites()]
        self.pairs = [pair for site in sites for pair in site.copies()]
        self.scaled = [(site.down, site.scale) for site in sites if site.downs]
        # never dynamic: every pack size that comes is compiled for itself, so let them be few
        wrap: Callable = partial(torch.compile, dynamic=False) if compile else lambda f: f
        self.before, self.after = wrap(before), wrap(after)
        self.after_back, self.before_back = wrap(after_back), wrap(before_back)

    @property
    def usable(self) -> bool:
        """False while the adapter is switched off: the base alone goes through the modules."""
        return self.lora is None or not self.lora.disable_adapters

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
            return rms_norm(x, self.norm, self.eps)[None]

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
            if len({_base(module).weight.requires_grad for module in modules}) > 1:
                return "some of the layers that share an input train, some do not"
            if len({getattr(m, "scaling", {}).get("default") for m in modules}) > 1:
                return "LoRA of different scales on layers that share an input"
            for module in modules:
                if isinstance(module, LoraLinear):
                    if any(getattr(d, "p", 0) for d in module.lora_dropout.values()):
                        return "LoRA dropout drops another part of the input in each layer"
                    if list(module.active_adapters) != ["default"] or any(module.use_dora.values()):
                        return "more than one plain LoRA"
                    if module.disable_adapters or module.merged or any(module.lora_bias.values()):
                        return "a LoRA that is switched off, merged or has a bias"
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
