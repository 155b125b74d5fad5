"""Packing examples into a position budget: no padding, no truncation, the same order for any rank.

An epoch is a seeded shuffle cut into packs by first fit over a window of examples; packs are dealt
to ranks in turn, so that all ranks take the same number of steps and one process that accumulates
over N packs sees exactly what N processes see. The loader's position is three numbers, so a killed
run goes on at the very pack it was about to take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from higgs_lab.loss import Targets
from higgs_lab.prompt import Example


@dataclass
class Batch:
    """Packed documents, L positions in one row."""

    ids: Tensor  # [1, L]
    is_audio: Tensor  # [1, L] bool
    rows: Tensor  # [1, L, K]
    labels: Tensor  # [1, L, K]
    supervised: Tensor  # [1, L, K] bool
    position_ids: Tensor  # [1, L], from 0 in each document
    cu_seqlens: Tensor  # [D+1] int32; padding, if any, is more documents
    max_seqlen: int
    real_positions: int  # without padding
    num_documents: int  # without padding
    text: Tensor | None = None  # [1, L, D] embeddings of ids, when the host looks them up

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        moved = {
            f.name: value.to(device, non_blocking=non_blocking)
            if isinstance(value := getattr(self, f.name), Tensor)
            else value
            for f in fields(self)
        }
        return Batch(**moved)

    def pin(self) -> Batch:
        """In page-locked memory, from which a GPU copies while the host goes on."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(
            **{k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in moved.items()}
        )

    def inputs(self) -> dict:
        """Keyword arguments of `Talker.forward`."""
        names = ("ids", "is_audio", "rows", "position_ids", "cu_seqlens", "max_seqlen", "text")
        return {name: getattr(self, name) for name in names}

    def targets(self, weights: Tensor) -> Targets:
        """The cells that bear loss; weights [K] of the codebooks. On the CPU: it looks at them."""
        at = self.supervised[0].any(-1).nonzero()[:, 0]
        return Targets(at, self.labels[0, at], self.supervised[0, at], weights.to(at.device))


def pack(examples: Sequence[Example], pad_to: int | None = None) -> Batch:
    """Lay examples end to end; pad_to adds unsupervised documents for a static shape."""
    if not examples:
        raise ValueError("nothing to pack: no examples given")
    lengths = [len(e.ids) for e in examples]
    real = sum(lengths)
    columns = [
        torch.cat([getattr(e, name) for e in examples])
        for name in ("ids", "is_audio", "rows", "labels", "supervised")
    ]
    positions = torch.cat([torch.arange(n) for n in lengths])
    if pad_to is not None and pad_to != real:
        missing = pad_to - real
        if missing < 0:
            raise ValueError(f"examples hold {real} positions, more than pad_to={pad_to}")
        columns = [torch.cat([c, c.new_zeros((missing, *c.shape[1:]))]) for c in columns]
        longest = max(lengths)  # padding must not become the longest document
        padding = [min(longest, missing - start) for start in range(0, missing, longest)]
        positions = torch.cat([positions, *(torch.arange(n) for n in padding)])
        lengths = [*lengths, *padding]
    ids, is_audio, rows, labels, supervised = (c[None] for c in columns)
    return Batch(
        ids=ids,
        is_audio=is_audio,
        rows=rows,
        labels=labels,
        supervised=supervised,
        position_ids=positions[None],
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        max_seqlen=max(lengths),
        real_positions=real,
        num_documents=len(examples),
    )


def plan_packs(
    lengths: np.ndarray, budget_positions: int, order: np.ndarray, window: int = 256
) -> list[list[int]]:
    """Cut `order` (indices into lengths) into packs of at most budget_positions each.

    Within each window the longest go first and each goes to the first pack with room (first fit
    decreasing). Packs that are less than 98 % full take from the next window too: what a window
    leaves open would be a tenth of all.
    """
    packs: list[list[int]] = []
    open_packs: list[list[int]] = []
    room: list[int] = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        for index in sorted(part.tolist(), key=lambda i: (-lengths[i], i)):
            need = int(lengths[index])
            slot = next((s for s, free in enumerate(room) if free >= need), None)
            if slot is None:
                open_packs.append([])
                room.append(budget_positions)
                slot = len(room) - 1
            open_packs[slot].append(index)
            room[slot] -= need
        full = [free <= 0.02 * budget_positions for free in room]
        packs += [pack for pack, done in zip(open_packs, full, strict=True) if done]
        open_packs = [pack for pack, done in zip(open_packs, full, strict=True) if not done]
        room = [free for free, done in zip(room, full, strict=True) if not done]
    return packs + open_packs


class PackedLoader:
    """Endless iterator over packed batches of one rank.

    lengths: positions of each example, or a function of the epoch that gives them. build(index,
    epoch) makes the example; it is given the epoch so that references may be drawn anew each time,
    from a seed and not from a global state.
    """

    def __init__(
        self,
        lengths: Sequence[int] | Callable[[int], Sequence[int]],
        build: Callable[[int, int], Example],
        budget_positions: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pad: bool = False,
        packs_per_step: int = 1,
    ):
        self.lengths = lengths if callable(lengths) else lambda epoch: lengths
        self.build, self.budget_positions, self.seed = build, budget_positions, seed
        self.rank, self.world_size, self.pad = rank, world_size, pad
        self.packs_per_step = packs_per_step  # over all ranks; an epoch holds whole steps
        self.checked_lengths(0)
        self.epoch, self.cursor = 0, 0  # cursor: packs of this epoch that the whole world has taken

    def epoch_packs(self, epoch: int) -> list[list[int]]:
        """All packs of an epoch in the order taken, the same on every rank.

        Packs are shuffled, then filled up to whole steps with packs from the epoch's beginning, so
        that no rank runs dry before another.
        """
        lengths = self.checked_lengths(epoch)
        rng = np.random.default_rng([self.seed, epoch])
        packs = plan_packs(lengths, self.budget_positions, rng.permutation(len(lengths)))
        packs = [packs[i] for i in rng.permutation(len(packs))]
        unit = int(np.lcm(self.world_size, self.packs_per_step))
        missing = -len(packs) % unit
        return packs + [packs[i % len(packs)] for i in range(missing)]

    def checked_lengths(self, epoch: int) -> np.ndarray:
        lengths = np.asarray(self.lengths(epoch), dtype=np.int64)
        if len(lengths) == 0:
            raise ValueError("no training examples: is the split empty, or were all rows rejected?")
        too_long = np.flatnonzero(lengths > self.budget_positions)
        if len(too_long):
            raise ValueError(
                f"{len(too_long)} examples are longer than the budget of {self.budget_positions} "
                f"positions (the longest has {int(lengths.max())}, the first is row "
                f"{int(too_long[0])}): raise budget_positions or drop them"
            )
        return lengths

    def largest(self) -> Batch:
        """The pack of the first epoch that needs the most memory."""
        lengths = self.checked_lengths(0)
        members = max(self.epoch_packs(0), key=lambda part: sum(lengths[i] for i in part))
        examples = [self.build(index, 0) for index in members]
        return pack(examples, self.budget_positions if self.pad else None)

    def steps_per_epoch(self) -> int:
        return len(self.epoch_packs(0)) // self.packs_per_step

    def __iter__(self) -> Iterator[Batch]:
        while True:
            packs = self.epoch_packs(self.epoch)
            while self.cursor < len(packs):
                epoch, mine = self.epoch, packs[self.cursor + self.rank]
                self.cursor += self.world_size
                examples = [self.build(index, epoch) for index in mine]
                yield pack(examples, self.budget_positions if self.pad else None)
            self.epoch, self.cursor = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "cursor": self.cursor, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if state["seed"] != self.seed:
            raise ValueError(f"the run used seed {state['seed']}, the config says {self.seed}")
        self.epoch, self.cursor = state["epoch"], state["cursor"]
