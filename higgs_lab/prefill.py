"""Passes over prompts: keys and values of all positions but the last, into the caches of slots.

Prompts are packed end to end. What a slot in use holds of the same prompt, its reference, is copied
from there, which is the same up to rounding: a pass then computes the rest alone, whose queries see
what was copied as well. On a GPU short passes are filled up to one of few lengths and recorded, for
launched kernel by kernel one takes the host longer than the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from higgs_lab.attention import Documents, attention_kind, bound_of
from higgs_lab.engine import Engine

if TYPE_CHECKING:
    from higgs_lab.slots import Slots

# positions of a recorded pass; the host keeps up with longer ones
PASSES = (64, 128, 192, 256, 384, 512, 768, *range(1024, 2048, 256), *range(2048, 4097, 512))
# positions of its prompts, where some of them are copied
WHOLES = (512, 1024, 2048, 3072, 4096, 6144, 9216)
PASS_PROMPTS = 32  # of a recorded pass, at most


class Passes:
    """The passes of one set of slots: their buffers and recordings."""

    def __init__(self, engine: Engine):
        self.engine, device = engine, engine.device
        heads = (engine.heads, engine.kv_heads, engine.head_dim)
        self.attention = attention_kind("auto", device, engine.dtype, heads, gradients=False)
        # a pass of any kind else waits for its ends
        self.records = self.attention in ("triton", "varlen")
        self.recorded: dict[tuple, torch.cuda.CUDAGraph | None] = {}
        self.x = torch.zeros(PASSES[-1], engine.table.shape[1], dtype=engine.dtype, device=device)
        self.mine, self.whole = (
            torch.zeros(3, most, dtype=torch.long, device=device)
            for most in (PASSES[-1], WHOLES[-1])
        )
        self.ends = torch.zeros(PASS_PROMPTS + 2, dtype=torch.int32, device=device)

    def fill(
        self,
        slots: Slots,
        x: Tensor,
        taken: Sequence[int],
        lengths: Sequence[int],
        holders: Sequence[int],
        copied: Sequence[int],
        compile: bool,
    ) -> None:
        """Fill the caches of slots `taken` from prompts packed end to end: x [N, D].

        Prompt i begins with copied[i] positions that slot holders[i] has by now or from this pass,
        and goes on with lengths[i] of x.
        """
        # numpy's, for torch's threads wait for each other over so little
        taken, holders, lengths, copied = map(np.asarray, (taken, holders, lengths, copied))
        lasts = lengths + copied  # where prompts have their last position, which is left out
        ends = np.cumsum([0, *lasts])
        starts = np.repeat(ends[:-1], lengths)  # of each one's prompt
        at = np.arange(len(x)) + np.repeat(np.cumsum(copied), lengths)
        mine, whole = np.stack([np.repeat(taken, lengths), at - starts, at]), None
        if copied.any():
            target = np.repeat(taken, lasts)
            place = np.arange(ends[-1]) - np.repeat(ends[:-1], lasts)
            is_copied = place < np.repeat(copied, lasts)
            whole = np.stack(
                [np.where(is_copied, np.repeat(holders, lasts), target), target, place]
            )
        room = next((n for n in PASSES if n >= len(x)), None)
        span = room if whole is None else next((n for n in WHOLES if n > ends[-1]), None)
        if self.records and room and span and len(lengths) <= PASS_PROMPTS:
            # What fills it up is a document, too. Its keys and values go where a prompt's last
            # position stands, whose own come with the first step.
            self.x[: len(x)], self.x[len(x) : room] = x, 0
            self._set(self.mine, mine, [taken[0], lasts[0], span - 1], room)
            if whole is not None:
                self._set(self.whole, whole, [taken[0], taken[0], lasts[0]], span)
            more = np.full(len(self.ends) - len(ends), span)
            self.ends.copy_(self.engine.send(np.append(ends, more)))
            # which own kernels need not know
            longest = max(*lasts, span - ends[-1])
            longest = span if self.attention == "triton" else bound_of(int(longest))
            self._replay(slots, room, span, longest, whole is not None, compile)
            return
        bounds = torch.as_tensor(ends, dtype=torch.int32)
        if self.attention != "split":  # which reads them on the host
            bounds = self.engine.send(bounds)
        documents = Documents.of(self.attention, bounds, int(lasts.max()), int(ends[-1]))
        mine, whole = (None if part is None else self.engine.send(part) for part in (mine, whole))
        self.engine.prefill(x, mine, whole, documents, slots.cache, slots.rope, compile)

    def _set(self, buffer: Tensor, values: np.ndarray, filler: list[int], length: int) -> None:
        more = np.repeat(np.array(filler)[:, None], length - values.shape[1], axis=1)
        buffer[:, :length] = self.engine.send(np.concatenate([values, more], axis=1))

    def _pass(
        self, slots: Slots, room: int, span: int, longest: int, copies: bool, compile: bool
    ) -> None:
        """A pass over what lies in the buffers: so many positions, of prompts of `span` in all."""
        whole = self.whole[:, :span] if copies else None
        documents = Documents.of(self.attention, self.ends, longest, span)
        given = (documents, slots.cache, slots.rope, compile)
        self.engine.prefill(self.x[:room], self.mine[:, :room], whole, *given)

    def _replay(self, slots: Slots, *key) -> None:
        """`_pass`, the first time as it is, which loads its kernels, then as a CUDA graph."""
        if key not in self.recorded:
            self.recorded[key] = None
            self._pass(slots, *key)
            return
        if self.recorded[key] is None:
            self.recorded[key] = slots.capture(self._pass, (slots, *key))
        self.recorded[key].replay()
