"""Prepared rows -> training examples, with references drawn anew each epoch.

A fine-tune that never sees a reference forgets how to clone, one that never sees a bare prompt
forgets how to speak without; so each epoch mixes the three prompt modes in stated shares. A
reference is another clip of the same speaker with another text: the clip itself would be copied
(facts trap 27).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from higgs_lab.prepared import text_key
from higgs_lab.prompt import Example, render_example
from higgs_lab.vocab import Vocab

OWN = -1  # the reference that the manifest gave the row itself


@dataclass(frozen=True)
class Modes:
    """Shares of the prompt modes; the rest is zero-shot. They hold where a reference exists."""

    clone: float = 0.25  # reference audio alone
    clone_text: float = 0.5  # reference audio and its transcript

    def __post_init__(self):
        if min(self.clone, self.clone_text) < 0 or self.clone + self.clone_text > 1:
            raise ValueError(
                f"shares must be at least 0 and add up to at most 1, got clone={self.clone}, "
                f"clone_text={self.clone_text}"
            )


@dataclass(frozen=True)
class Choice:
    """How one row is shown in one epoch."""

    reference: int | None  # row index, OWN, or None for zero-shot
    with_text: bool

    @property
    def mode(self) -> str:
        if self.reference is None:
            return "zero_shot"
        return "clone_text" if self.with_text else "clone"


class TrainingSet:
    """Rows of prepared data (mappings with text, codes, speaker, ref_codes, ref_text)."""

    def __init__(
        self,
        rows: Sequence[dict],
        vocab: Vocab,
        modes: Modes = Modes(),
        seed: int = 0,
        max_ref_sec: float = 10.0,
        budget_positions: int | None = None,
        supervise_boc: bool = False,
    ):
        self.rows, self.vocab, self.modes, self.seed = rows, vocab, modes, seed
        self.supervise_boc = supervise_boc
        self.budget_positions = budget_positions
        K = vocab.num_codebooks
        columns = _columns(rows, ("text", "speaker", "frames", "ref_text"))
        self.texts, self.frames = columns["text"], np.array(columns["frames"])
        self.text_ids = [len(vocab.encode(text, f"row {i}")) for i, text in enumerate(self.texts)]
        self.own = _own_frames(rows)  # of the row's own reference, 0 where there is none
        self.own_text = columns["ref_text"]
        self.keys = [text_key(text) for text in self.texts]
        self.speakers = columns["speaker"]
        self.pools: dict[str, list[int]] = defaultdict(list)  # speaker -> rows fit as references
        self.place: dict[int, int] = {}  # row -> where it stands in its speaker's pool
        limit = max_ref_sec * vocab.frame_rate_hz
        for i, speaker in enumerate(self.speakers):
            if speaker is not None and K <= self.frames[i] <= limit:
                self.place[i] = len(self.pools[speaker])
                self.pools[speaker].append(i)
        self.choices = lru_cache(maxsize=2)(self._choices)

    def __len__(self) -> int:
        return len(self.texts)

    def _choices(self, epoch: int) -> list[Choice]:
        """One choice per row, a function of (seed, epoch) alone."""
        rng = np.random.default_rng([self.seed, epoch, 1])
        draws = rng.random((len(self), 2))
        return [self._choose(i, *draws[i]) for i in range(len(self))]

    def _choose(self, i: int, mode: float, pick: float) -> Choice:
        none = Choice(None, False)
        if mode >= self.modes.clone + self.modes.clone_text:
            return none
        with_text = mode < self.modes.clone_text
        if self.own[i] >= self.vocab.num_codebooks:
            choice = Choice(OWN, with_text and bool(self.own_text[i]))
        elif (other := self._other_clip(i, pick)) is not None:
            choice = Choice(other, with_text)
        else:
            return none
        budget = self.budget_positions
        return none if budget is not None and self._length(i, choice) > budget else choice

    def _other_clip(self, i: int, pick: float) -> int | None:
        """A row of the same speaker with another text; pick in [0, 1) chooses among all of them."""
        pool, mine = self.pools.get(self.speakers[i], ()), self.place.get(i)
        others = len(pool) - (mine is not None)
        start = int(pick * others)
        for step in range(others):
            at = (start + step) % others
            j = pool[at + (mine is not None and at >= mine)]  # the row itself is passed over
            if self.keys[j] != self.keys[i]:
                return j
        return None

    def _length(self, i: int, choice: Choice) -> int:
        K = self.vocab.num_codebooks
        length = 3 + self.text_ids[i] + int(self.frames[i]) + K - 2  # tts, text, audio; S - 1 rows
        if choice.reference is not None:
            own = choice.reference == OWN
            length += 1 + (self.own[i] if own else int(self.frames[choice.reference])) + K - 1
            if choice.with_text:
                said = self.own_text[i] if own else None
                ids = len(self.vocab.encode(said)) if own else self.text_ids[choice.reference]
                length += 1 + ids
        return length

    def lengths(self, epoch: int) -> list[int]:
        """Positions of each row's example in this epoch, without building it."""
        return [self._length(i, choice) for i, choice in enumerate(self.choices(epoch))]

    def build(self, index: int, epoch: int) -> Example:
        choice = self.choices(epoch)[index]
        row = self.rows[index]
        ref_codes, ref_text = None, None
        if choice.reference == OWN:
            ref_codes, ref_text = _codes(row["ref_codes"]), row["ref_text"]
        elif choice.reference is not None:
            other = self.rows[choice.reference]
            ref_codes, ref_text = _codes(other["codes"]), other["text"]
        return render_example(
            self.vocab,
            row["text"],
            _codes(row["codes"]),
            ref_codes,
            ref_text if choice.with_text else None,
            self.supervise_boc,
        )

    def mode_shares(self, epoch: int = 0) -> dict[str, float]:
        """Share of each prompt mode in an epoch, as it came out."""
        modes = [choice.mode for choice in self.choices(epoch)]
        return {m: modes.count(m) / len(modes) for m in ("zero_shot", "clone", "clone_text")}


def _codes(value) -> Tensor:
    return torch.as_tensor(np.asarray(value, dtype=np.int64))


def _own_frames(rows: Sequence[dict]) -> list[int]:
    """Frames of each row's own reference; a `datasets.Dataset` is asked for lengths alone."""
    if not hasattr(rows, "select_columns"):
        return [len(row["ref_codes"]) for row in rows]
    import pyarrow.compute

    frames = []
    for part in rows.select_columns(["ref_codes"]).with_format("arrow").iter(1000):
        for chunk in part["ref_codes"].chunks:
            frames += pyarrow.compute.list_value_length(chunk.storage).to_pylist()
    return frames


def _columns(rows: Sequence[dict], names: tuple[str, ...]) -> dict[str, list]:
    """Small columns as lists, without touching the codes when the rows are a `datasets.Dataset`."""
    if hasattr(rows, "select_columns"):
        table = rows.select_columns(list(names)).with_format(None)[:]
        return {name: list(table[name]) for name in names}
    return {name: [row.get(name) for row in rows] for name in names}
