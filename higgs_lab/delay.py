"""The delay pattern: codes [T, K] <-> rows [S = T+K-1, K]. The only delay code of the project.

Codebook c is shifted down by c rows, BOC above, EOC below. K=4, T=3, code = 10t+c:

    row0  0  B  B  B        row3  E 21 12  3
    row1 10  1  B  B        row4  E  E 22 13
    row2 20 11  2  B        row5  E  E  E 23

There is no all-BOC first row and no all-EOC last row: the hidden state at <|audio|> predicts row 0
(vllm-omni higgs_audio_v3_tokenizer.py::apply_delay_pattern, sglang-omni higgs_tts/utils.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from higgs_lab.vocab import BOC, EOC


def delay(codes: Tensor) -> Tensor:
    """codes [T, K] -> rows [T+K-1, K]; T = 0 gives no rows. Same dtype and device.

    Raises ValueError for another rank or codes that are not real codes (0..1023).
    """
    _check_codes(codes)
    T, K = codes.shape
    if T == 0:
        return codes.new_empty((0, K))
    step = torch.arange(T + K - 1, device=codes.device)[:, None]  # [S, 1]
    book = torch.arange(K, device=codes.device)[None, :]  # [1, K]
    frame = step - book  # [S, K] which frame of the codebook this row holds
    rows = codes.gather(0, frame.clamp(0, T - 1))
    rows = torch.where(frame < 0, BOC, rows)
    return torch.where(frame >= T, EOC, rows).to(codes.dtype)


def undelay(rows: Tensor) -> Tensor:
    """rows [S, K] -> codes [S-K+1, K], the inverse of `delay`.

    Raises ValueError when a BOC or EOC (or any id that is no real code) stands where a code must
    be: clipping it would turn it into a valid code and an audible click. Generated rows go
    through `generate.codes_from_rows`, which knows each engine's ending.
    """
    if rows.ndim != 2:
        raise ValueError(f"rows must be [S, K], got shape {tuple(rows.shape)}")
    S, K = rows.shape
    if S == 0:
        return rows.new_empty((0, K))
    T = S - K + 1
    if T < 1:
        raise ValueError(f"{S} rows of {K} codebooks hold no whole frame; at least {K} are needed")
    codes = skew(rows)
    bad = (codes < 0) | (codes >= BOC)
    if bad.any():
        t, c = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"id {int(codes[t, c])} at frame {t}, codebook {c} (row {t + c}) is no real code: "
            "the rows are cut, not delayed, or end in an engine's ramp-down"
        )
    return codes


def skew(rows: Tensor) -> Tensor:
    """rows [S, K] -> [S-K+1, K] by the index alone, specials and all: out[t, c] = rows[t+c, c]."""
    S, K = rows.shape
    T = max(S - K + 1, 0)
    index = torch.arange(T, device=rows.device)[:, None] + torch.arange(K, device=rows.device)
    return rows.gather(0, index) if T else rows.new_empty((0, K))


class DelayCursor:
    """`delay` and `undelay` one step at a time, for streaming.

    push_frame / finish turn frames into rows as they come; push_row turns rows into frames as soon
    as a frame is whole, K-1 rows after its first code.
    """

    def __init__(self, num_codebooks: int):
        self.num_codebooks = num_codebooks
        self._tail: list[Tensor] = []  # the last K-1 items seen, oldest first

    def push_frame(self, frame: Tensor) -> Tensor:
        """frame [K] -> the next row [K]."""
        _check_codes(frame[None])
        self._tail = [*self._tail, frame][-self.num_codebooks :]
        row = torch.full_like(frame, BOC)
        for age, past in enumerate(reversed(self._tail)):
            row[age] = past[age]
        return row

    def finish(self) -> list[Tensor]:
        """The K-1 rows that close the stream after the last frame."""
        rows, K = [], self.num_codebooks
        if not self._tail:
            return rows
        for extra in range(1, K):
            row = torch.full_like(self._tail[0], BOC)
            row[:extra] = EOC
            for age, past in enumerate(reversed(self._tail)):
                if age + extra < K:
                    row[age + extra] = past[age + extra]
            rows.append(row)
        return rows

    def push_row(self, row: Tensor) -> Tensor | None:
        """row [K] -> the frame [K] completed by it, or None while the first one is incomplete."""
        K = self.num_codebooks
        self._tail = [*self._tail, row][-K:]
        if len(self._tail) < K:
            return None
        return undelay(torch.stack(self._tail))[0]


def _check_codes(codes: Tensor) -> None:
    if codes.ndim != 2:
        raise ValueError(f"codes must be [T, K], got shape {tuple(codes.shape)}")
    if codes.dtype not in (torch.int64, torch.int32, torch.int16):
        raise ValueError(
            f"codes must be int16, int32 or int64 integers, which hold {EOC}, got {codes.dtype}: "
            "convert them with .long()"
        )
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= BOC):
        raise ValueError(
            f"codes must lie in 0..{BOC - 1}, got {int(codes.min())}..{int(codes.max())}: "
            "are these rows already delayed?"
        )
