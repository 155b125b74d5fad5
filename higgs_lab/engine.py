"""The talker as plain functions over fused weights: what `generate` runs instead of the modules.

One matrix for q, k and v and one for gate and up halve the kernels of a step; a key-value cache of
fixed shape lets a CUDA graph record it. The fused matrices take no memory of their own: the
modules' weights become views of them, so training, saving and merging see what they always saw.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from higgs_lab.attention import Documents
from higgs_lab.decode_trial import blocks_run, split_kv_runs
from higgs_lab.talker import Talker


@dataclass(frozen=True)
class Layer:
    """Weights of one block; D hidden, H heads, H_kv key-value heads of width d, F feed-forward."""

    norm: Tensor  # [D], before attention
    qkv: Tensor  # [(H + 2 H_kv) d, D]
    q_norm: Tensor  # [d]
    k_norm: Tensor  # [d]
    out: Tensor  # [D, H d]
    mlp_norm: Tensor  # [D]
    gate_up: Tensor  # [2 F, D]
    down: Tensor  # [D, F]


class Engine:
    """Fused weights of a talker and the two halves of a block.

    It holds tensors, never the talker; `fits` says whether they are still the talker's.
    """

    def __init__(self, talker: Talker):
        config, model = talker.config, talker.model
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.eps = config.head_dim, config.rms_norm_eps
        self.num_codebooks, self.codebook_size = talker.num_codebooks, talker.codebook_size
        self.layers = [_fuse_layer(block) for block in model.layers]
        self.norm = model.norm.weight.data
        self.table, self.text_table = talker.codebooks.weight.data, model.embed_tokens.weight.data
        self.inv_freq = model.rotary_emb.inv_freq
        self.device, self.dtype = self.table.device, self.table.dtype
        books = torch.arange(self.num_codebooks, device=self.device)
        self.offsets = books * self.codebook_size
        heads = (self.heads, self.kv_heads, self.head_dim)
        self.split_kv = split_kv_runs(self.device, self.dtype, *heads)
        self.made_of = _made_of(talker)
        self._compiled: dict[str, Callable] = {}

    @staticmethod
    def supports(talker: nn.Module) -> bool:
        """False for what the functions below are not: adapters, quantised or split weights."""
        if type(talker) is not Talker or torch.is_autocast_enabled(talker.device.type):
            return False
        config = talker.config
        parameters = list(talker.parameters())
        weights = {type(p) for p in parameters} | {type(p.data) for p in parameters}
        return (
            all(type(m) is nn.Linear for m in talker.modules() if hasattr(m, "in_features"))
            and weights <= {nn.Parameter, Tensor}
            and type(talker.model.embed_tokens) is nn.Embedding
            and len({p.dtype for p in parameters}) == 1
            and talker.dtype.is_floating_point
            and not config.attention_bias
            and config.hidden_act == "silu"
            and set(config.layer_types) == {"full_attention"}
            and config.rope_parameters["rope_type"] == "default"
        )

    @cached_property
    def one_row(self) -> bool:
        """Whether `decode_blocks` takes a step of a single row, which has kernels of its own.

        A trial, when it is first asked: its kernels take seconds to compile.
        """
        return blocks_run(self, single=True)

    @cached_property
    def few_rows(self) -> bool:
        """The same of two rows up to decode_block.MAX_ROWS."""
        return blocks_run(self, single=False)

    def by_blocks(self, rows: int) -> bool:
        """Whether `decode_blocks` takes a step of so many rows."""
        if rows == 1:
            return self.one_row
        if not self.few_rows:
            return False
        from higgs_lab.decode_block import MAX_ROWS

        return rows <= MAX_ROWS

    def fits(self, talker: Talker) -> bool:
        """Whether the talker's weights still lie where they were fused, changed or not."""
        return self.made_of == _made_of(talker)

    def send(self, values: Sequence | np.ndarray | Tensor) -> Tensor:
        """Host values as a tensor on the device.

        Without waiting: of memory that is not pinned a copy ends after all that is queued before.
        """
        tensor = torch.as_tensor(values)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def embed(self, ids: Tensor, is_audio: Tensor, rows: Tensor) -> Tensor:
        """[N, D], as `Talker.embed`."""
        return torch.where(
            is_audio[..., None], self.embed_rows(rows), F.embedding(ids, self.text_table)
        )

    def embed_rows(self, rows: Tensor) -> Tensor:
        return F.embedding(rows + self.offsets, self.table).sum(dim=-2)

    def logits(self, x: Tensor, normed: bool = False) -> Tensor:
        """Last block's output [N, D], or its norm -> fp32 logits [N, K, V]."""
        hidden = x if normed else F.rms_norm(x, x.shape[-1:], self.norm, self.eps)
        flat = F.linear(hidden, self.table).float()
        return flat.unflatten(-1, (self.num_codebooks, self.codebook_size))

    def rope(self, length: int) -> tuple[Tensor, Tensor]:
        """cos, sin [length, d], computed in fp32 and rounded once, as transformers does."""
        at = torch.arange(length, device=self.device).float()
        angles = at[:, None] * self.inv_freq.to(self.device, torch.float32)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def joined(self, x: Tensor, layer: Layer) -> Tensor:
        """x [N, D] -> q, k and v side by side [N, (H + 2 H_kv) d], without norm or rotation."""
        return F.linear(F.rms_norm(x, x.shape[-1:], layer.norm, self.eps), layer.qkv)

    def project(self, x: Tensor, layer: Layer, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """x [N, D], cos and sin [N, d] -> q [N, H, d], k and v [N, H_kv, d], rotated."""
        heads = self.heads + 2 * self.kv_heads
        qkv = self.joined(x, layer).unflatten(-1, (heads, self.head_dim))
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q = F.rms_norm(q, (self.head_dim,), layer.q_norm, self.eps)
        k = F.rms_norm(k, (self.head_dim,), layer.k_norm, self.eps)
        return _rotate(q, cos, sin), _rotate(k, cos, sin), v

    def packed_project(
        self, x: Tensor, layer: Layer, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor,
        slots: Tensor, position: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """`project`, with k and v written into the caches [slots, H_kv, C, d] too."""
        q, k, v = self.project(x, layer, cos, sin)
        keys[slots, :, position] = k
        values[slots, :, position] = v
        return q, k, v

    def cached_project(self, *args) -> Tensor:
        """`packed_project` where q is all that is wanted: k need not be stored twice."""
        return self.packed_project(*args)[0]

    def finish(self, x: Tensor, attended: Tensor, layer: Layer, between: Callable) -> None:
        """The rest of a block, in place: x [N, D] before it, attended [N, H d].

        The products add to x themselves. Compiled, a sum with a product becomes a product that adds
        to a copy of x, so only what lies between them is: `between`, which is `feed_forward`.
        """
        x.addmm_(attended, layer.out.T)
        x.addmm_(between(x, layer), layer.down.T)

    def feed_forward(self, x: Tensor, layer: Layer) -> Tensor:
        """x [N, D] after attention -> silu(gate) * up [N, F]."""
        h = F.rms_norm(x, x.shape[-1:], layer.mlp_norm, self.eps)
        gate, up = F.linear(h, layer.gate_up).chunk(2, dim=-1)
        return F.silu(gate) * up

    def finish_one(self, x: Tensor, attended: Tensor, layer: Layer) -> Tensor:
        """`finish` of one request, compiled as two functions; a new x.

        In one, silu(gate) * up may be computed anew within the sum of every row of `down` (torch
        2.11). Gate and up are products of their own, so that one kernel sums both and stores
        silu(gate) * up alone.
        """
        widen, lower = self.compiled(self.widen, 1), self.compiled(self.lower, 1)
        return lower(*widen(x, attended, layer, *layer.gate_up.chunk(2)), layer)

    def widen(
        self, x: Tensor, attended: Tensor, layer: Layer, gate: Tensor, up: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x [N, D] and attended [N, H d] -> x after attention, silu(gate) * up [N, F]."""
        x = x + F.linear(attended, layer.out)
        h = F.rms_norm(x, x.shape[-1:], layer.mlp_norm, self.eps)
        return x, F.silu(F.linear(h, gate)) * F.linear(h, up)

    def lower(self, x: Tensor, wide: Tensor, layer: Layer) -> Tensor:
        return x + F.linear(wide, layer.down)

    def attend(
        self, q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, hidden: Tensor | None,
        shared: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """One query a slot over its cache: q [B, H, d], caches [B, H_kv, C, d] -> [B, H d].

        lengths: [B] positions that each slot may see, and shared, of `decode_attention`, are read
        where `split_kv`. hidden, elsewhere: what is added to the scores, [B, 1, 1, C], 0 or -inf;
        none where all C may be seen.
        """
        if self.split_kv:
            from higgs_lab.decode_attention import decode_attention

            made = decode_attention(q.contiguous(), keys, values, lengths, shared=shared)
            return made.flatten(1)
        # heads that share a key-value head are laid as queries of that head: no key is repeated
        B = len(q)
        grouped = q.reshape(B, self.kv_heads, -1, self.head_dim)
        if hidden is not None:
            hidden = hidden.expand(B, self.kv_heads, grouped.shape[2], -1)
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=hidden)
        return out.reshape(B, -1)

    def prefill(
        self, x: Tensor, mine: Tensor, whole: Tensor | None, documents: Documents,
        cache: list[tuple[Tensor, Tensor]], rope: tuple[Tensor, Tensor], compile: bool,
    ) -> None:  # fmt: skip
        """Fill caches from documents packed end to end: x [N, D], overwritten.

        mine: [3, N] where x's keys and values go, slot and position, and where x stands among the
        documents. whole: [3, S] of all positions of the documents, where x is not all there is: the
        slot that has their keys and values once x's are written; the slot that they are for; and
        the position. What follows the last block's keys and values is left out, for nobody reads
        it. compile: for any N, caches of several slots. Nothing here waits for the device.
        """
        slot, position, at = mine
        cos, sin = rope[0][position, None], rope[1][position, None]
        project, between = self.packed_project, self.feed_forward
        if compile and len(x) > 1:
            project, between = self.compiled(project, len(x)), self.compiled(between, len(x))
            self.any_batch(len(x), x, cos, sin, slot, position)
        for i, (layer, (keys, values)) in enumerate(zip(self.layers, cache, strict=True)):
            q, k, v = project(x, layer, cos, sin, keys, values, slot, position)
            if whole is not None:
                source, target, place = whole
                k, v = keys[source, :, place], values[source, :, place]
                keys[target, :, place], values[target, :, place] = k, v
            if i + 1 == len(self.layers):
                return
            if whole is not None:  # queries that nobody asks for stand beside copied keys
                q = q.new_zeros(len(k), *q.shape[1:]).index_copy_(0, at, q)
            attended = documents.attend(q, k, v).flatten(1)
            attended = attended if whole is None else attended[at]
            self.finish(x, attended, layer, between)

    def compiled(self, function: Callable, batch: int) -> Callable:
        """A function compiled for one request, or for any number of them.

        The weights are arguments, so one compilation serves all blocks. For one request a matrix
        product is a reduction over the weights, which Inductor writes better than cuBLAS does
        (gpt-fast's trick); for more, the batch is symbolic, so that no size compiles again.
        """
        key = (function.__name__, batch == 1)
        if key not in self._compiled:
            # one code, many traces: modes, greedy or drawn, dtypes; beyond the limit it would raise
            config = torch._dynamo.config
            config.recompile_limit = max(config.recompile_limit, 64)
            options = None
            if self.device.type == "cuda":  # a sum over the codebooks is no kernel of its own
                options = {"unroll_reductions_threshold": self.num_codebooks + 1}
                options |= {"coordinate_descent_tuning": True} if batch == 1 else {}
            made = torch.compile(function, fullgraph=True, options=options)
            self._compiled[key] = _or_plain(made, function)
        return self._compiled[key]

    @staticmethod
    def any_batch(batch: int, *tensors: Tensor) -> None:
        """Tell the compiler that the first dimension varies."""
        if batch > 1:
            for tensor in tensors:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)


def _or_plain(compiled: Callable, function: Callable) -> Callable:
    """The compiled function, until the compiler refuses it: before anything has run."""
    refused: list[bool] = []

    def call(*args):
        try:
            return function(*args) if refused else compiled(*args)
        except torch._dynamo.exc.TorchDynamoException as error:
            refused.append(True)
            text = f"torch.compile refuses {function.__name__}, speaking is slower: {error}"
            warnings.warn(text, stacklevel=3)
        return function(*args)

    return call


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [N, H, d]; cos and sin [N, 1, d]."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos + turned * sin


def _fuse_layer(block: nn.Module) -> Layer:
    attention, mlp = block.self_attn, block.mlp
    return Layer(
        norm=block.input_layernorm.weight.data,
        qkv=_fuse([attention.q_proj, attention.k_proj, attention.v_proj]),
        q_norm=attention.q_norm.weight.data,
        k_norm=attention.k_norm.weight.data,
        out=attention.o_proj.weight.data,
        mlp_norm=block.post_attention_layernorm.weight.data,
        gate_up=_fuse([mlp.gate_proj, mlp.up_proj]),
        down=mlp.down_proj.weight.data,
    )


def _fuse(linears: list[nn.Linear]) -> Tensor:
    """One matrix of all; the modules' weights become its rows."""
    whole = torch.cat([linear.weight.data for linear in linears])
    for linear, part in zip(linears, whole.split([len(m.weight) for m in linears]), strict=True):
        linear.weight.data = part
    return whole


def _made_of(talker: Talker) -> tuple[list[type], list[int]]:
    return [type(m) for m in talker.modules()], [p.data_ptr() for p in talker.parameters()]
