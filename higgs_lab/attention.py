"""Attention over packed documents: none sees another.

Five ways to the same result (`Documents.attend`):
- "sdpa", one call with an explicit block-causal mask: the reference, runs anywhere;
- "triton", `packed_attention`: own kernels for short documents, on an H100 or H200;
- "varlen", `torch.nn.attention.varlen`: flash attention on CUDA that skips what lies outside a
  document and never builds a mask;
- "flex", FlexAttention with a block mask: CUDA of any dtype, compiled;
- "split", one call a document: the least work where there is no such kernel.

Transformers' Qwen3 blocks know the first and varlen, as "sdpa" and "higgs_varlen".
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from higgs_lab.trial import kernels_agree

VARLEN = "higgs_varlen"


def documents(cu_seqlens: Tensor, length: int) -> Tensor:
    """[L] index of the document that each position belongs to. cu_seqlens: int [D+1], 0 to L."""
    lengths = cu_seqlens.diff().long()
    index = torch.arange(len(lengths), device=cu_seqlens.device)
    return index.repeat_interleave(lengths, output_size=length)


def packed_mask(cu_seqlens: Tensor, length: int) -> Tensor:
    """[1, 1, L, L] bool, True where a query (row) may see a key (column)."""
    document = documents(cu_seqlens, length)
    same = document[:, None] == document[None, :]
    return (same & torch.ones_like(same).tril())[None, None]


def packed_positions(cu_seqlens: Tensor, length: int) -> Tensor:
    """[1, L] position ids that start at 0 in each document."""
    starts = cu_seqlens[:-1].long()[documents(cu_seqlens, length)]
    return (torch.arange(length, device=cu_seqlens.device) - starts)[None]


def document_spans(cu_seqlens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """int32 [L] each: where the document of a position begins, and where it has ended."""
    document = documents(cu_seqlens, length)
    cu_seqlens = cu_seqlens.int()
    return cu_seqlens[:-1][document], cu_seqlens[1:][document]


def _varlen_forward(
    module: torch.nn.Module,
    query: Tensor,  # [1, H, L, d]
    key: Tensor,  # [1, H_kv, L, d]
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    if cu_seqlens is None:  # not packed: speaking, or a padded batch
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    # fp32 norm weights under autocast raise query and key; the kernel takes one dtype
    query, key = query.to(value.dtype), key.to(value.dtype)
    out = varlen_attention(
        query[0].transpose(0, 1),  # [L, H, d]
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        cu_seqlens,
        max_seqlen,
        scaling,
    )
    return out[None], None


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float | None = None
) -> Tensor:
    """Flash attention over packed documents: q [L, H, d], k and v [L, H_kv, d] -> [L, H, d]."""
    call, grouped = _varlen_call(q.device)
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and not grouped:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return call(q, k, v, cu_seqlens, max_seqlen, scale)


@cache
def _varlen_call(device: torch.device) -> tuple[Callable, bool]:
    """How this torch is asked, and whether key-value heads may be fewer than query heads.

    torch 2.10 said is_causal=True, later releases window_size=(-1, 0). The kernel has always taken
    grouped heads; `varlen_attn` has let them through since enable_gqa, so that in older releases
    they go to the operator below it, where a trial shows that it works.
    """
    from torch.nn.attention.varlen import varlen_attn

    names = inspect.signature(varlen_attn).parameters
    if "is_causal" in names:

        def call(q, k, v, cu, longest, scale):
            return varlen_attn(q, k, v, cu, cu, longest, longest, is_causal=True, scale=scale)

        return call, False
    if "enable_gqa" in names:

        def call(q, k, v, cu, longest, scale):
            return varlen_attn(
                q, k, v, cu, cu, longest, longest,
                scale=scale, window_size=(-1, 0), enable_gqa=True,
            )  # fmt: skip

        return call, True

    def operator(q, k, v, cu, longest, scale):
        made = torch.ops.torch_attn._varlen_attn(
            q, k, v, cu, cu, longest, longest, True, scale, [-1, 0]
        )
        return made[0]

    def call(q, k, v, cu, longest, scale):
        return varlen_attn(q, k, v, cu, cu, longest, longest, scale=scale, window_size=(-1, 0))

    # In a thread of its own: a checkpointed block, in which it may be asked for first, counts what
    # its own thread saves for the way back, and takes the trial's tensors for the block's.
    with ThreadPoolExecutor(1) as pool:
        grouped = pool.submit(_takes_groups, operator, device).result()
    return (operator, True) if grouped else (call, False)


def _takes_groups(operator: Callable, device: torch.device) -> bool:
    """Whether grouped heads give what repeated ones do, gradients too."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device), torch.enable_grad(), torch.autocast("cuda", enabled=False):
        generator = torch.Generator(device).manual_seed(0)
        q, k, v = (
            torch.randn(40, heads, 64, generator=generator, device=device, dtype=torch.bfloat16)
            for heads in (4, 2, 2)
        )
        cu = torch.tensor([0, 25, 40], dtype=torch.int32, device=device)
        found = []
        for repeat in (1, 2):
            leaves = [t.clone().requires_grad_() for t in (q, k, v)]
            wide = [leaves[0], *(t.repeat_interleave(repeat, dim=1) for t in leaves[1:])]
            try:
                out = operator(*wide, cu, 25, None)
                out.float().square().sum().backward()
            except (RuntimeError, ValueError, TypeError, AttributeError):
                return False
            found.append([out.detach(), *(t.grad for t in leaves)])
        return all(
            bool((a - b).float().norm() < 0.02 * b.float().norm())
            for a, b in zip(*found, strict=True)
        )


@dataclass
class Documents:
    """Where the documents of a pack lie, in the form that one kind of attention needs.

    Made once a pass, outside of what is compiled; `attend` is called in every block.
    """

    kind: str  # one of KINDS
    cu_seqlens: Tensor
    max_seqlen: int
    bounds: tuple[int, ...] = ()  # split: from 0 to L
    mask: Tensor | None = None  # sdpa
    block_mask: object = None  # flex
    spans: tuple[Tensor, ...] = ()  # triton: int32 [L] each, `document_spans`

    @classmethod
    def of(cls, kind: str, cu_seqlens: Tensor, max_seqlen: int, length: int) -> Documents:
        if kind == "split":
            return cls(kind, cu_seqlens, max_seqlen, bounds=tuple(cu_seqlens.tolist()))
        if kind == "sdpa":
            return cls(kind, cu_seqlens, max_seqlen, mask=packed_mask(cu_seqlens, length))
        if kind == "flex":
            return cls(kind, cu_seqlens, max_seqlen, block_mask=block_mask(cu_seqlens, length))
        if kind == "triton":
            return cls(kind, cu_seqlens, max_seqlen, spans=document_spans(cu_seqlens, length))
        return cls(kind, cu_seqlens, bound_of(max_seqlen))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [L, H, d], k and v [L, H_kv, d] -> [L, H, d]."""
        if self.kind == "triton":
            from higgs_lab.packed_attention import PackedAttention

            return PackedAttention.apply(q, k, v, *self.spans)
        if self.kind == "varlen":
            return varlen_attention(q, k, v, self.cu_seqlens, self.max_seqlen)
        if self.kind == "split":
            return _split_attention(q, k, v, self.bounds)
        one = [t[None].transpose(1, 2) for t in (q, k, v)]  # [1, H, L, d]
        grouped = q.shape[1] != k.shape[1]
        if self.kind == "flex":
            out = _flex()(*one, block_mask=self.block_mask, enable_gqa=grouped)
        else:
            out = torch.nn.functional.scaled_dot_product_attention(
                *one, attn_mask=self.mask, enable_gqa=grouped
            )
        return out[0].transpose(0, 1)


def bound_of(longest: int) -> int:
    """What varlen attention is told of the longest document.

    One value for almost all packs, so that nothing is compiled or recorded anew; the kernel's
    blocks beyond a document's end return at once.
    """
    return -(-longest // 1024) * 1024


KINDS = ("triton", "varlen", "flex", "sdpa", "split")


def attention_kind(
    wanted: str,
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    gradients: bool = True,
) -> str:
    """The kind for "auto", or the one wanted; ValueError where that cannot run.

    heads: how many of queries, of keys and values, and how large they are. gradients: whether they
    will be asked for; who speaks need not wait for their kernels' compilation.
    """
    varlen = varlen_available(device, dtype)
    if wanted == "triton" and not triton_runs(device, dtype, heads, gradients):
        raise ValueError(
            "attention=triton needs a card of compute capability 8.0 or more, bf16 or fp16, "
            "Triton, heads of width 16, 32, 64 or 128, and 1, 2, 4 or 8 query heads for each "
            "key-value head: use auto"
        )
    if wanted == "varlen" and not varlen:
        raise ValueError("attention=varlen needs CUDA, bf16 and a torch with varlen_attn: use sdpa")
    if wanted == "flex" and device.type != "cuda":
        raise ValueError("attention=flex has no gradient on a CPU: use sdpa or split")
    if wanted != "auto":
        return wanted
    # measured on an H100; on other cards torch's own has the longer record
    if varlen and torch.cuda.get_device_capability(device) == (9, 0):
        if triton_runs(device, dtype, heads, gradients):
            return "triton"
    # with a mask and grouped heads SDPA writes out every score of the pack: 9 GB at 8192 in fp32
    return "varlen" if varlen else "split"


@cache
def _flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    # uncompiled it writes out every score
    return (
        torch.compile(flex_attention, dynamic=False)
        if torch.cuda.is_available()
        else flex_attention
    )


def block_mask(cu_seqlens: Tensor, length: int):
    """FlexAttention's block mask of packed documents."""
    from torch.nn.attention.flex_attention import create_block_mask

    document = documents(cu_seqlens, length)

    def causal_within(batch, head, query, key):
        return (document[query] == document[key]) & (query >= key)

    return create_block_mask(causal_within, None, None, length, length, document.device)


def _split_attention(q: Tensor, k: Tensor, v: Tensor, bounds: Sequence[int]) -> Tensor:
    parts = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        one = (t[None, start:end].transpose(1, 2) for t in (q, k, v))  # [1, H, n, d]
        out = torch.nn.functional.scaled_dot_product_attention(
            *one, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


AttentionInterface.register(VARLEN, _varlen_forward)
AttentionMaskInterface.register(VARLEN, sdpa_mask)


def varlen_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the varlen kernel can run: CUDA, half precision, a torch that has it."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    if find_spec("torch.nn.attention.varlen") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def triton_runs(
    device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int], gradients: bool = True
) -> bool:
    """Whether `packed_attention` runs here and is right, shown by a trial against SDPA in fp32."""

    def results() -> Iterable[tuple[Tensor, Tensor]]:
        from higgs_lab.packed_attention import PackedAttention

        bounds, random = (0, 100, 101, 256), torch.Generator(device).manual_seed(0)
        spans = document_spans(torch.tensor(bounds, dtype=torch.int32, device=device), bounds[-1])
        *leaves, d_out = (
            torch.randn(bounds[-1], n, heads[2], generator=random, device=device).to(dtype)
            for n in (heads[0], heads[1], heads[1], heads[0])
        )
        found = []
        for exact in (False, True):
            inputs = [(t.float() if exact else t.clone()).requires_grad_() for t in leaves]
            if exact:
                out = _split_attention(*inputs, bounds)
            else:
                out = PackedAttention.apply(*inputs, *spans)
            found.append([out])
            if gradients:
                found[-1] += torch.autograd.grad(out, inputs, d_out.to(out.dtype))
        return zip(*found, strict=True)

    def fits() -> bool:
        from higgs_lab import packed_attention

        return packed_attention.fits(*heads)

    return kernels_agree(device, dtype, fits, results, "packs are slower")


def heads_of(config) -> tuple[int, int, int]:
    """Of a talker's config, for `attention_kind`."""
    return config.num_attention_heads, config.num_key_value_heads, config.head_dim
