"""Text to rows: the sampling ladder, both engines' state machines, and a slow twin.

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
from transformers import DynamicCache

from higgs_lab.delay import skew
from higgs_lab.prompt import Prompt
from higgs_lab.talker import Talker
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
class Generation:
    """What one request produced."""

    codes: Tensor  # [T, K] real codes
    rows: Tensor  # [S, K] as emitted, specials and all
    stop_reason: str  # "eoc", or "max_frames" when the cap cut it
    log_probs: Tensor | None = None  # [S, K] of the chosen ids, before top-k and top-p


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
    """Picked ids [B, K] -> (the row that is emitted and fed back [B, K], the next state)."""
    K = picked.shape[1]
    book = torch.arange(K, device=picked.device)
    delay, countdown = state.delay, state.countdown
    ramp_down = countdown >= 0
    if mode == "sglang":
        ramp_up = delay < K
        row = torch.where(ramp_up[:, None] & (book > delay[:, None]), BOC, picked)
        ends = ~ramp_up & ~ramp_down & (picked[:, 0] == EOC)
        after = torch.where(ends, K - 2, countdown - (ramp_down & ~ramp_up).long())
        done = ~ramp_up & (ends | ramp_down) & (after <= 0)
        return row, RampState(delay + ramp_up.long(), after, state.done | done)
    ramp_up = ~ramp_down & (delay + 1 < K)
    row = torch.where(ramp_up[:, None] & (book > delay[:, None]), BOC, picked)
    row = torch.where(ramp_down[:, None] & (book < K - countdown[:, None]), EOC, row)
    # the last codebook with an EOC ends all before it; with the masks only codebook 0 can
    last = torch.where((row == EOC) & ~ramp_down[:, None], book, -1).amax(dim=1)
    row = torch.where(book <= last[:, None], EOC, row)
    after = torch.where(ramp_down, countdown - 1, torch.where(last >= 0, K - 1 - last, -1))
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


def uniforms(seeds: Tensor, step: int, num_codebooks: int) -> Tensor:
    """[B, K] numbers in [0, 1), a hash of (seed, step, codebook): splitmix64, top 24 bits."""
    book = torch.arange(num_codebooks, device=seeds.device)
    x = _mix(_mix(seeds)[:, None] + step * 0x9E3779B9 + 1) + book * 0x632BE59BD9B4E019
    return (_shift(_mix(x), 40)).float() / 2**24


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical shift of a signed int64


def _mix(x: Tensor) -> Tensor:
    x = x + -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed int64
    x = (x ^ _shift(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shift(x, 31)


@dataclass
class SamplingTensors:
    """`Sampling` of a batch as tensors [B, 1, 1]; seeds [B]."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    greedy: Tensor
    seeds: Tensor

    @classmethod
    def of(
        cls, requests: Sequence[Sampling], size: int, device: torch.device | str
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
            seeds=torch.tensor([r.seed for r in requests], dtype=torch.long, device=device),
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


def sample(logits: Tensor, options: SamplingTensors, step: int) -> Tensor:
    """Masked fp32 logits [B, K, V] -> ids [B, K].

    The draw goes through the ids in their own order, not by rank: entries of almost equal logits
    swap ranks with the rounding of another batch size, and the draw would go with them.
    """
    best = logits.argmax(-1)
    probs, ids = keep_probabilities(logits, options)
    by_id = torch.zeros_like(probs).scatter(-1, ids, probs)
    cumulative = by_id.cumsum(-1)
    u = uniforms(options.seeds, step, logits.shape[1])[..., None]
    place = (cumulative <= u * cumulative[..., -1:]).sum(-1).clamp(max=logits.shape[-1] - 1)
    possible = by_id.gather(-1, place[..., None])[..., 0] > 0  # rounding must not pick what was cut
    return torch.where(options.greedy[..., 0] | ~possible, best, place)


@torch.no_grad()  # not inference_mode: what comes out may serve in training
def generate(
    talker: Talker,
    prompts: Sequence[Prompt],
    sampling: Sampling | Sequence[Sampling] = Sampling(),
    log_probs: bool = False,
) -> list[Generation]:
    """Speak a batch of prompts, each with its own sampling; results in the order given.

    Prompts are padded on the left and share one key-value cache; a request that has ended idles
    until the last one ends.
    """
    requests = _per_prompt(prompts, sampling)
    if not prompts:
        return []
    device, K = talker.device, talker.num_codebooks
    ids, is_audio, rows, mask = (t.to(device) for t in _pad_left(prompts))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=talker.config)
    run = _Run(requests, K, talker.codebook_size, device, log_probs)
    inputs = {"ids": ids, "is_audio": is_audio, "rows": rows}
    padded = not bool(mask.all())
    while True:
        last = torch.zeros_like(inputs["ids"], dtype=torch.bool)
        last[:, -1] = True
        out = talker(
            **inputs,
            position_ids=positions,
            attention_mask=mask if padded else None,
            past_key_values=cache,
            use_cache=True,
            logits_at=last,
        )
        row = run.step(out.logits.float())
        if row is None:
            return run.results()
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1
        inputs = {
            "ids": row.new_zeros(len(row), 1),
            "is_audio": torch.ones(len(row), 1, dtype=torch.bool, device=device),
            "rows": row[:, None],
        }


@torch.no_grad()  # not inference_mode: what comes out may serve in training
def generate_naive(
    talker: Talker, prompt: Prompt, sampling: Sampling = Sampling(), log_probs: bool = False
) -> Generation:
    """The slow twin of `generate`: one request, the whole sequence anew for each row, no cache."""
    device, K = talker.device, talker.num_codebooks
    ids, is_audio, rows = (t.to(device)[None] for t in (prompt.ids, prompt.is_audio, prompt.rows))
    run = _Run([sampling], K, talker.codebook_size, device, log_probs)
    while True:
        logits = talker(ids, is_audio, rows).logits[:, -1]
        row = run.step(logits.float())
        if row is None:
            return run.results()[0]
        ids = torch.cat([ids, ids.new_zeros(1, 1)], dim=1)
        is_audio = torch.cat([is_audio, is_audio.new_ones(1, 1)], dim=1)
        rows = torch.cat([rows, row[:, None]], dim=1)


class _Run:
    """The rows of a batch while it is spoken."""

    def __init__(self, requests, num_codebooks, codebook_size, device, log_probs):
        self.requests = requests
        self.options = SamplingTensors.of(requests, codebook_size, device)
        self.modes = {
            mode: torch.tensor([r.mode == mode for r in requests], device=device)
            for mode in sorted({r.mode for r in requests})
        }
        self.state = RampState.start(len(requests), device)
        self.limit = torch.tensor([max_rows(r, num_codebooks) for r in requests], device=device)
        self.length = torch.zeros_like(self.limit)
        self.active = torch.ones_like(self.limit, dtype=torch.bool)
        self.ended = torch.zeros_like(self.active)  # by its own EOC, not while idle after the cap
        self.rows: list[Tensor] = []
        self.log_probs: list[Tensor] | None = [] if log_probs else None

    def step(self, logits: Tensor) -> Tensor | None:
        """logits [B, K, V] -> the next row of each request [B, K], None when all have ended."""
        masked, row, state = logits, None, self.state
        for mode, mine in self.modes.items():
            masked = torch.where(mine[:, None, None], mask_logits(logits, state, mode), masked)
        picked = sample(masked, self.options, len(self.rows))
        for mode, mine in self.modes.items():
            row_, state_ = advance(picked, state, mode)
            row = row_ if row is None else torch.where(mine[:, None], row_, row)
            self.state = state_ if state is self.state else _choose(mine, state_, self.state)
        if self.log_probs is not None:
            scaled = (masked / self.options.temperature).log_softmax(-1)
            self.log_probs.append(scaled.gather(-1, row[..., None])[..., 0])
        self.rows.append(row)
        self.length += self.active
        self.ended |= self.active & self.state.done
        self.active = self.active & ~self.state.done & (self.length < self.limit)
        return row if bool(self.active.any()) else None

    def results(self) -> list[Generation]:
        rows = torch.stack(self.rows, dim=1).cpu()  # [B, S, K]
        chances = None if self.log_probs is None else torch.stack(self.log_probs, dim=1).cpu()
        found = []
        for i, request in enumerate(self.requests):
            n = int(self.length[i])
            found.append(
                Generation(
                    codes=codes_from_rows(rows[i, :n], request.mode),
                    rows=rows[i, :n].clone(),
                    stop_reason="eoc" if bool(self.ended[i]) else "max_frames",
                    log_probs=None if chances is None else chances[i, :n].clone(),
                )
            )
        return found


def _choose(mine: Tensor, a: RampState, b: RampState) -> RampState:
    return RampState(
        torch.where(mine, a.delay, b.delay),
        torch.where(mine, a.countdown, b.countdown),
        torch.where(mine, a.done, b.done),
    )


def _per_prompt(prompts, sampling) -> list[Sampling]:
    requests = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    if len(requests) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(requests)} sampling settings")
    return requests


def _pad_left(prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids [B, P], is_audio [B, P], rows [B, P, K], attention mask [B, P]."""
    longest = max(len(p) for p in prompts)

    def column(name: str) -> Tensor:
        values = [getattr(p, name) for p in prompts]
        return torch.stack(
            [torch.cat([v.new_zeros(longest - len(v), *v.shape[1:]), v]) for v in values]
        )

    mask = torch.stack([(torch.arange(longest) >= longest - len(p)).long() for p in prompts])
    return column("ids"), column("is_audio"), column("rows"), mask
