"""The sampling ladder and both engines' state machines: logits to rows.

The servers differ in what they mask, when they accept the end and how many rows they emit (facts
§3.3-3.7), so each is a named mode:

"vllm"    BOC is forbidden on active codebooks, EOC outside codebook 0; after codebook 0's EOC the
          others are locked one a row; T+8 rows for T frames, the last frame is cut
          (vllm-omni higgs_audio_v3_talker.py::_apply_delay_pattern_masking_batched,
          _update_delay_state_batched; stage_input_processors/higgs_audio_v3.py::talker2code2wav)
"sglang"  nothing is masked; an EOC counts only after the 8 ramp-up rows; the model must emit the
          EOC staircase itself; T+7 rows (sglang-omni higgs_tts/sampler.py::step)

Draws depend on (request seed, step, codebook) alone, so a request's batch mates cannot change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from higgs_lab.delay import skew
from higgs_lab.vocab import BOC, EOC

# What each engine samples with when a request says nothing (facts §3.6).
ENGINE_DEFAULTS = {
    "vllm": {"temperature": 1.0, "top_p": 0.95, "top_k": 50, "seed": 42},
    "sglang": {"temperature": 0.8, "top_p": 0.8, "top_k": 30, "seed": 0},
}
MAX_FRAMES = 2040  # both engines' ceiling of 2048 rows, 81.6 s


@dataclass(frozen=True)
class Sampling:
    """How one request is sampled. Order: temperature, top-k, top-p, draw; each codebook alone."""

    temperature: float = 1.0  # 0: greedy
    top_k: int = 50  # 0: off
    top_p: float = 0.95  # 1: off
    seed: int = 42
    max_frames: int = MAX_FRAMES  # stop after this many frames (25 are a second)
    mode: str = "vllm"  # whose state machine, "vllm" or "sglang"

    def __post_init__(self):
        if self.mode not in ENGINE_DEFAULTS:
            raise ValueError(
                f"mode {self.mode!r} is unknown; there are {', '.join(ENGINE_DEFAULTS)}"
            )
        in_range = 0 <= self.temperature < float("inf") and 0 < self.top_p <= 1  # False for NaN
        if not in_range or self.top_k < 0 or self.max_frames < 1:
            raise ValueError(
                "sampling needs temperature >= 0, 0 < top_p <= 1, top_k >= 0 and max_frames >= 1, "
                f"got {self}"
            )

    @classmethod
    def of_engine(cls, mode: str, **changes) -> Sampling:
        """The engine's own defaults, changed where asked."""
        return cls(**{"mode": mode, **ENGINE_DEFAULTS.get(mode, {}), **changes})

    @property
    def greedy(self) -> bool:
        return self.temperature <= 1e-5 or (self.mode == "sglang" and self.top_k == 1)


@dataclass
class RampState:
    """Where each request stands in the delay pattern. All [B]."""

    delay: Tensor  # rows emitted, up to where the ramp-up ends
    countdown: Tensor  # rows still to come after codebook 0's EOC; -1 before it
    done: Tensor  # bool

    @classmethod
    def start(cls, batch: int, device: torch.device | str = "cpu") -> RampState:
        return cls(
            torch.zeros(batch, dtype=torch.long, device=device),
            torch.full((batch,), -1, dtype=torch.long, device=device),
            torch.zeros(batch, dtype=torch.bool, device=device),
        )


def mask_logits(logits: Tensor, state: RampState, mode: str) -> Tensor:
    """logits [B, K, V] with what the mode forbids at -inf. A copy; fp32 in, fp32 out."""
    if mode == "sglang":
        return logits
    K = logits.shape[1]
    book = torch.arange(K, device=logits.device)
    ramp = (state.countdown >= 0)[:, None]
    locked = ramp & (book < K - state.countdown[:, None])  # already ended: EOC only
    delayed = ~ramp & (book > state.delay[:, None])  # not yet begun: BOC only
    free = ~locked & ~delayed
    forbidden = torch.zeros_like(logits, dtype=torch.bool)
    forbidden |= (locked | delayed)[..., None]
    forbidden[..., BOC] = ~delayed
    forbidden[..., EOC] = delayed | (free & (ramp | (book > 0)))
    return logits.masked_fill(forbidden, float("-inf"))


def advance(picked: Tensor, state: RampState, mode: str) -> tuple[Tensor, RampState]:
    """Picked ids [B, K] -> (the row that is emitted and fed back [B, K], the next state).

    masked_fill, not where with a number: `where` would copy the number to the GPU and wait for it,
    which a CUDA graph cannot record.
    """
    K = picked.shape[1]
    book = torch.arange(K, device=picked.device)
    delay, countdown = state.delay, state.countdown
    ramp_down = countdown >= 0
    if mode == "sglang":
        ramp_up = delay < K
        row = picked.masked_fill(ramp_up[:, None] & (book > delay[:, None]), BOC)
        ends = ~ramp_up & ~ramp_down & (picked[:, 0] == EOC)
        after = (countdown - (ramp_down & ~ramp_up).long()).masked_fill(ends, K - 2)
        done = ~ramp_up & (ends | ramp_down) & (after <= 0)
        return row, RampState(delay + ramp_up.long(), after, state.done | done)
    ramp_up = ~ramp_down & (delay + 1 < K)
    row = picked.masked_fill(ramp_up[:, None] & (book > delay[:, None]), BOC)
    row = row.masked_fill(ramp_down[:, None] & (book < K - countdown[:, None]), EOC)
    # the last codebook with an EOC ends all before it; with the masks only codebook 0 can
    ended = (row == EOC) & ~ramp_down[:, None]
    last = book.expand_as(row).masked_fill(~ended, -1).amax(dim=1)
    row = row.masked_fill(book <= last[:, None], EOC)
    begun = (K - 1 - last).masked_fill(last < 0, -1)
    after = torch.where(ramp_down, countdown - 1, begun)
    return row, RampState(delay + ramp_up.long(), after, state.done | (after == 0))


def max_rows(sampling: Sampling, num_codebooks: int) -> int:
    """Rows after which a request is cut so that max_frames frames come out."""
    return sampling.max_frames + num_codebooks - (sampling.mode == "sglang")


def codes_from_rows(rows: Tensor, mode: str) -> Tensor:
    """Emitted rows [S, K] -> codes [T, K], as the engine's vocoder stage makes them.

    Special ids become 0 (a clamp would make EOC 1023, a valid code and a click); "vllm" drops the
    last frame, which its ramp-down leaves half sampled.
    """
    codes = skew(rows)
    codes = torch.where((codes >= BOC) | (codes < 0), 0, codes)
    return codes[:-1] if mode == "vllm" and len(codes) >= 2 else codes


def draw_keys(seeds: Tensor, num_codebooks: int) -> Tensor:
    """Seeds [B] -> [B, K], where the draws of each codebook begin."""
    book = torch.arange(num_codebooks, device=seeds.device)
    return _mix(_mix(seeds)[:, None] + book * 0x632BE59BD9B4E019)


def uniforms(keys: Tensor, step: int | Tensor) -> Tensor:
    """[B, K] numbers in [0, 1) of a step: splitmix64 from `draw_keys` on, top 24 bits.

    The codebooks stand in keys, for a compiled `arange` times a 64-bit number is cut to 32 bits
    (torch 2.11).

    step: one for all, or [B].
    """
    step = step[:, None] if isinstance(step, Tensor) else step
    return (_shift(_mix(keys + step * 0x9E3779B9), 40)).float() / 2**24


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical shift of a signed int64


def _mix(x: Tensor) -> Tensor:
    x = x + -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed int64
    x = (x ^ _shift(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shift(x, 31)


@dataclass
class SamplingTensors:
    """`Sampling` of a batch as tensors [B, 1, 1]; keys [B, K] of the draws."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    greedy: Tensor
    keys: Tensor

    @classmethod
    def of(
        cls,
        requests: Sequence[Sampling],
        size: int,
        device: torch.device | str,
        num_codebooks: int = 8,
    ) -> SamplingTensors:
        def column(values, dtype):
            return torch.tensor(list(values), dtype=dtype, device=device)[:, None, None]

        return cls(
            temperature=column(
                (1.0 if r.greedy else r.temperature for r in requests), torch.float32
            ),
            top_k=column((r.top_k or size for r in requests), torch.long),
            top_p=column((r.top_p for r in requests), torch.float32),
            greedy=column((r.greedy for r in requests), torch.bool),
            keys=draw_keys(
                torch.tensor([r.seed for r in requests], dtype=torch.long, device=device),
                num_codebooks,
            ),
        )


def keep_probabilities(logits: Tensor, options: SamplingTensors) -> tuple[Tensor, Tensor]:
    """(probabilities after temperature, top-k and top-p, ids), both [B, K, V], most likely first.

    top-p keeps the entry that crosses the threshold, and always the first. The sort is stable and
    whole: bf16 logits tie often, and topk orders ties by how many it was asked for, so that a batch
    mate's top_k would change what is drawn here.
    """
    scaled = logits / options.temperature
    top, ids = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    top = top.masked_fill(rank >= options.top_k, float("-inf"))
    probs = top.softmax(-1)
    before = probs.cumsum(-1) - probs
    # rounding lifts `before` over 1 in the tail: top_p = 1 must cut nothing
    cut = (before > options.top_p) & (rank > 0) & (options.top_p < 1)
    probs = probs.masked_fill(cut, 0)
    return probs, ids


def sample(logits: Tensor, options: SamplingTensors, step: int | Tensor) -> Tensor:
    """Masked fp32 logits [B, K, V] -> ids [B, K].

    The draw goes through the ids in their own order, not by rank: entries of almost equal logits
    swap ranks with the rounding of another batch size, and the draw would go with them.
    """
    best = logits.argmax(-1)
    probs, ids = keep_probabilities(logits, options)
    by_id = torch.zeros_like(probs).scatter(-1, ids, probs)
    cumulative = by_id.cumsum(-1)
    u = uniforms(options.keys, step)[..., None]
    place = (cumulative <= u * cumulative[..., -1:]).sum(-1).clamp(max=logits.shape[-1] - 1)
    possible = by_id.gather(-1, place[..., None])[..., 0] > 0  # rounding must not pick what was cut
    return torch.where(options.greedy[..., 0] | ~possible, best, place)


def next_row(
    logits: Tensor,
    options: SamplingTensors,
    state: RampState,
    step: int | Tensor,
    modes: dict[str, Tensor],
    draw: bool = True,
) -> tuple[Tensor, RampState, Tensor]:
    """fp32 logits [B, K, V] -> (row [B, K], the next state, logits as the mode masks them).

    modes: mode -> bool [B], whose requests are of it; draw: False where all are greedy.
    """
    masked = logits
    for mode, mine in modes.items():
        allowed = mask_logits(logits, state, mode)
        masked = torch.where(mine[:, None, None], allowed, masked) if len(modes) > 1 else allowed
    picked = sample(masked, options, step) if draw else masked.argmax(-1)
    row, after = None, None
    for mode, mine in modes.items():
        row_, after_ = advance(picked, state, mode)
        if row is None:
            row, after = row_, after_
        else:
            row = torch.where(mine[:, None], row_, row)
            after = _choose(mine, after_, after)
    return row, after, masked


def chosen_log_probs(masked: Tensor, row: Tensor, options: SamplingTensors) -> Tensor:
    """[B, K] log-probabilities of the ids of a row, before top-k and top-p."""
    scaled = (masked / options.temperature).log_softmax(-1)
    return scaled.gather(-1, row[..., None])[..., 0]


def _choose(mine: Tensor, a: RampState, b: RampState) -> RampState:
    return RampState(
        torch.where(mine, a.delay, b.delay),
        torch.where(mine, a.countdown, b.countdown),
        torch.where(mine, a.done, b.done),
    )
