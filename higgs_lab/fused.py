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
- what trains is an fp32 master; the products use copies in bf16, taken anew each pass. An adapter
  is many small matrices, 504 in the 4B's 36 blocks, and a kernel for each would cost more than the
  bytes do: those of `GROUP` blocks are one tensor, which one kernel copies;
- the way back is written out, so it is known what is kept for it and what is computed again
  (`CHECKPOINTING`), compiled or not;
- weights are arguments of the compiled functions: one compilation serves all blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn

from higgs_lab.attention import Documents
from higgs_lab.fused_block import (
    Block,
    Site,
    after,
    after_back,
    before,
    before_back,
    kernels_run,
    rms_norm,
)
from higgs_lab.talker import Talker

# What the way back computes again, in shares of a block's forward products at 4B size.
# none: norms and activations alone. selective: gate and up too, a half. full: also q, k, v and
# attention, two thirds; two hidden states a block are kept. The products that write into the
# residual stream are needed by nobody and never computed again.
CHECKPOINTING = ("none", "selective", "full")
# Blocks whose matrices lie in one tensor. Making it takes room for that of gate and up beside the
# model, .6 GB at 4B size; more blocks would save few kernels of the 66 that copy an adapter there.
GROUP = 6

Copy = tuple[Tensor, Tensor, float]  # (part of a product's matrix, its master, scale)
Home = tuple[nn.Parameter, Tensor]  # (of an adapter, its part of such a master)


class _BlockFunction(torch.autograd.Function):
    """One block; trained: `Block.trained`, so that autograd knows whose gradients come back."""

    @staticmethod
    def forward(ctx, x, engine, block, cos, sin, where, *trained):
        ctx.of = engine, block, cos, sin, where
        ctx.dtype = trained[0].dtype if trained else None
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
                *grads, d_middle, x, *products, block, cos, sin, engine.eps
            )
        grads = [*of_qkv, *of_sites]
        if grads and grads[0].dtype != ctx.dtype:
            wide = [torch.empty_like(g, dtype=ctx.dtype) for g in grads]
            torch._foreach_copy_(wide, grads)  # one kernel, where `to` takes one for each
            grads = wide
        return dx, None, None, None, None, None, *grads, *of_norms, *of_mlp_norm


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
        kernels = kernels_run(talker.device, dtype, config.head_dim)
        fused = [_fuse_blocks(layers, dtype, kernels) for layers in _groups(talker.model.layers)]
        self.blocks = [block for blocks, _, _ in fused for block in blocks]
        self.copies = [copy for _, copies, _ in fused for copy in copies]
        self.homes = [home for _, _, homes in fused for home in homes]
        self.norm = talker.model.norm.weight
        self.lora = next((m for m in talker.modules() if isinstance(m, LoraLayer)), None)
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
        for parameter, home in self.homes:
            if parameter.data_ptr() != home.data_ptr():  # a module's `to` gave it other memory
                home.copy_(parameter)
        for where, what, scale in self.copies:
            if scale == 1:
                where.copy_(what)
            else:
                torch.mul(what, scale, out=where)


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


def _groups(layers: Iterable[nn.Module]) -> Iterator[list[nn.Module]]:
    """Runs of at most `GROUP` layers that train the same things."""

    def kind(layer: nn.Module) -> list:
        modules = [layer.get_submodule(name) for names in _SITES.values() for name in names]
        return [
            (_base(m).weight.requires_grad, getattr(m, "r", None), getattr(m, "scaling", None))
            for m in modules
        ]

    for _, run in groupby(layers, kind):
        run = list(run)
        yield from (run[i : i + GROUP] for i in range(0, len(run), GROUP))


def _fuse_blocks(
    layers: list[nn.Module], dtype: torch.dtype, kernels: bool
) -> tuple[list[Block], list[Copy], list[Home]]:
    """Blocks of layers that are alike, what is to be copied into them, and where its parts live."""
    sites, copies, homes = {}, [], []
    for name, parts in _SITES.items():
        modules = [[layer.get_submodule(part) for part in parts] for layer in layers]
        trains = _base(modules[0][0]).weight.requires_grad
        fuse_sites = _trained_sites if trains else _frozen_sites
        sites[name], more_copies, more_homes = fuse_sites(modules, dtype)
        copies += more_copies
        homes += more_homes
    blocks = []
    for i, layer in enumerate(layers):
        norms = {
            "norm": layer.input_layernorm,
            "q_norm": layer.self_attn.q_norm,
            "k_norm": layer.self_attn.k_norm,
            "mlp_norm": layer.post_attention_layernorm,
        }
        weights = {name: norm.weight for name, norm in norms.items()}
        of_block = {name: of[i] for name, of in sites.items()}
        blocks.append(Block(**of_block, **weights, kernels=kernels))
    return blocks, copies, homes


@torch.no_grad()
def _trained_sites(
    layers: list[list[nn.Module]], dtype: torch.dtype
) -> tuple[list[Site], list[Copy], list[Home]]:
    """A site for the modules of each layer, whose base trains."""
    sites, copies = [], []
    for modules in layers:
        masters = [module.weight for module in modules]
        whole = torch.cat([w.to(dtype) for w in masters])
        sites.append(Site(whole, *whole.shape, [], [], masters, 1.0))
        parts = whole.split([len(w) for w in masters])
        copies += [(part, master, 1.0) for part, master in zip(parts, masters, strict=True)]
    return sites, copies, []


@torch.no_grad()
def _frozen_sites(
    layers: list[list[nn.Module]], dtype: torch.dtype
) -> tuple[list[Site], list[Copy], list[Home]]:
    """A site for the modules of each layer, whose base is frozen.

    Weights, A and B become views of tensors over all the layers.
    """
    first = layers[0]
    adapted = _base(first[0]) is not first[0]
    weights = [_base(module).weight for module in first]
    outputs, inputs = sum(map(len, weights)), weights[0].shape[1]
    downs = [[m.lora_A["default"].weight for m in modules if adapted] for modules in layers]
    ups = [[m.lora_B["default"].weight for m in modules if adapted] for modules in layers]
    rank = sum(map(len, downs[0]))
    align = 64 if weights[0].device.type == "cuda" else 8  # the matrix units' tiles
    extra = -(-rank // align) * align
    scale = first[0].scaling["default"] if adapted else 1.0
    whole = weights[0].new_zeros(len(layers), outputs + extra, inputs + extra, dtype=dtype)
    _gather([[_base(m).weight for m in modules] for modules in layers], whole[:, :outputs, :inputs])
    copies: list[Copy] = []
    homes: list[Home] = []
    if adapted:
        masters = downs[0][0].new_empty(len(layers), rank, inputs)
        homes += _gather(downs, masters)
        copies.append((whole[:, outputs : outputs + rank, :inputs], masters, scale))
    row, column = 0, inputs
    for of_module in zip(*ups, strict=True):
        height, width = of_module[0].shape
        masters = of_module[0].new_empty(len(layers), height, width)
        homes += _gather([[up] for up in of_module], masters)
        copies.append((whole[:, row : row + height, column : column + width], masters, 1.0))
        row, column = row + height, column + width
    made = zip(whole, ups, downs, strict=True)
    sites = [Site(w, outputs, inputs, up, down, [], scale) for w, up, down in made]
    return sites, copies, homes


def _gather(layers: list[list[nn.Parameter]], whole: Tensor) -> list[Home]:
    """From now on a layer's parameters are the rows of whole[layer], one below the other."""
    homes = []
    for parameters, place in zip(layers, whole, strict=True):
        row = 0
        for parameter in parameters:
            part = place[row : row + len(parameter)]
            part.copy_(parameter)
            parameter.data = part
            homes.append((parameter, part))
            row += len(parameter)
    return homes


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module
