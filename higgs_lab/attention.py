"""Attention over packed documents: none sees another.

Two twins behind one call, both fed by transformers' Qwen3 blocks:
- "sdpa" with an explicit block-causal mask: the reference, runs anywhere;
- "higgs_varlen": `torch.nn.attention.varlen`, flash attention on CUDA that skips what lies outside
  a document and never builds a mask.
"""

from __future__ import annotations

import inspect
from importlib.util import find_spec

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

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
    from torch.nn.attention.varlen import varlen_attn

    groups = q.shape[1] // k.shape[1]
    if groups > 1:  # the grouped call is newer than torch 2.11
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    cu, longest = cu_seqlens, max_seqlen
    extra = _causal_kwargs(varlen_attn)
    return varlen_attn(q, k, v, cu, cu, longest, longest, scale=scale, **extra)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, bounds: list[int]) -> Tensor:
    """The same where there is no varlen kernel too; bounds: the documents' ends, from 0 to L."""
    if varlen_available(q.device, q.dtype):
        cu = torch.tensor(bounds, dtype=torch.int32, device=q.device)
        longest = max(b - a for a, b in zip(bounds, bounds[1:], strict=False))
        return varlen_attention(q, k, v, cu, longest)
    parts = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        one = (t[None, start:end].transpose(1, 2) for t in (q, k, v))  # [1, H, n, d]
        out = torch.nn.functional.scaled_dot_product_attention(
            *one, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def _causal_kwargs(varlen_attn) -> dict:
    """torch 2.10 said is_causal=True, later releases window_size=(-1, 0)."""
    if "is_causal" in inspect.signature(varlen_attn).parameters:
        return {"is_causal": True}
    return {"window_size": (-1, 0)}


AttentionInterface.register(VARLEN, _varlen_forward)
AttentionMaskInterface.register(VARLEN, sdpa_mask)


def varlen_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the varlen kernel can run: CUDA, half precision, a torch that has it."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    if find_spec("torch.nn.attention.varlen") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
