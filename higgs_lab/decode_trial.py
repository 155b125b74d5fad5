"""Whether the Triton kernels of a decode step run on a card and are right: `engine.Engine` asks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from higgs_lab.trial import kernels_agree

if TYPE_CHECKING:
    from higgs_lab.engine import Engine


@cache
def split_kv_runs(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> bool:
    """Whether `decode_attention` runs here, shown by a trial against SDPA."""

    def results() -> Iterator[tuple[Tensor, Tensor]]:
        from higgs_lab.decode_attention import decode_attention

        random = torch.Generator(device).manual_seed(0)
        q, keys, values = (
            torch.randn(2, *shape, head_dim, generator=random, device=device, dtype=dtype)
            for shape in ((heads,), (kv_heads, 90), (kv_heads, 90))
        )
        lengths = torch.tensor([90, 77], device=device)
        for one in (keys, values):
            one[1, :, :64] = one[0, :, :64]
        seen = (torch.arange(90, device=device) < lengths[:, None])[:, None, None]
        wide = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (keys, values))
        wanted = F.scaled_dot_product_attention(q[:, :, None], *wide, attn_mask=seen)[:, :, 0]
        for one in (keys, values):
            one[1, :, :64] = float("nan")  # not to be read
        shared = torch.tensor([[0, 0], [0, 64]], device=device)
        yield decode_attention(q, keys, values, lengths, shared=shared), wanted

    def fits() -> bool:
        from higgs_lab import decode_attention

        return decode_attention.fits(heads, kv_heads, head_dim)

    return kernels_agree(device, dtype, fits, results, "speaking is slower")


def blocks_run(engine: Engine, single: bool) -> bool:
    """Whether `decode_blocks` runs here and is right, of a single row or of two and more.

    Shown by trials, and never but for compute capability 9.0.
    """
    if not engine.split_kv or torch.cuda.get_device_capability(engine.device) != (9, 0):
        return False
    from higgs_lab import decode_block

    feed_forward = engine.layers[0].down.shape[1]
    if not decode_block.fits(len(engine.norm), feed_forward, engine.heads, engine.head_dim):
        return False
    name = "a single row" if single else "few rows"
    try:
        each = (1,) if single else (3, 17, decode_block.MAX_ROWS)
        errors = [trial(engine, rows) for rows in each]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton's own share no class; old drivers record no such launch
        text = f"Triton's blocks of {name} do not run, speaking is slower: {error}"
        warnings.warn(text, stacklevel=2)
        return False
    if not all(error < 0.05 for error in errors):  # a NaN is not
        text = f"Triton's blocks of {name} are wrong here, speaking is slower"
        warnings.warn(text, stacklevel=2)
        return False
    return True


@torch.no_grad()
def trial(engine: Engine, rows: int = 3) -> float:
    """How far `decode_blocks` is from the engine's functions, over the first two blocks.

    A norm relative to another. On a GPU the blocks are recorded, as they will be.
    """
    from higgs_lab.decode_block import decode_blocks

    device, dtype, room = engine.device, engine.dtype, 160
    random = torch.Generator(device).manual_seed(0)
    layers = engine.layers[:2]
    shape = (2, len(layers), 2, rows, engine.kv_heads, room, engine.head_dim)
    start = torch.randn(rows, len(engine.norm), generator=random, device=device).to(dtype)
    cache = torch.randn(shape[1:], generator=random, device=device).to(dtype).expand(shape).clone()
    # the first is the last place, for at the first one attention has nothing to choose from
    position = torch.linspace(room - 1, 0, rows, device=device).long()
    slot = torch.arange(rows, device=device)
    nothing = torch.stack([slot, slot * 0])
    shared = nothing.clone()
    if rows > 1:  # the second slot begins as the first does, and reads it there
        shared[:, 1] = torch.tensor([0, 64])
        cache[:, :, :, 1, :, :64] = cache[:, :, :, 0, :, :64]
        cache[1, :, :, 1, :, :64] = float("nan")
    rope = engine.rope(room)
    cos, sin = rope[0][position, None], rope[1][position, None]
    x = start.clone()
    for layer, (keys, values) in zip(layers, cache[0], strict=True):
        q = engine.cached_project(x, layer, cos, sin, keys, values, slot, position)
        at = torch.arange(room, device=device)
        hidden = torch.zeros(rows, room, device=device, dtype=dtype)
        hidden = hidden.masked_fill_(at > position[:, None], float("-inf"))[:, None, None]
        attended = engine.attend(q, keys, values, position + 1, hidden, nothing)
        engine.finish(x, attended, layer, engine.feed_forward)
    wanted = F.rms_norm(x, x.shape[-1:], engine.norm, engine.eps).float()

    def blocks() -> Tensor:
        x = start.clone()
        return decode_blocks(x, layers, engine.norm, engine.eps, cache[1], rope, position, shared)

    before = cache[1].clone()
    found = blocks()  # compiles
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                found = blocks()
            cache[1].copy_(before)  # the first call's keys would hide a read that comes too early
            graph.replay()
    return float((found.float() - wanted).norm() / wanted.norm())
