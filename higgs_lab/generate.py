"""Text to rows: many prompts at once, and a slow twin.

`generate` runs `decoding.Decoder` over fused weights and a static cache; models whose weights are
not plain matrices go through their own modules. What is drawn and when it ends: `sampling.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache

from higgs_lab.prompt import Prompt
from higgs_lab.sampling import (
    ENGINE_DEFAULTS,
    MAX_FRAMES,
    RampState,
    Sampling,
    SamplingTensors,
    advance,
    chosen_log_probs,
    codes_from_rows,
    keep_probabilities,
    mask_logits,
    max_rows,
    next_row,
    sample,
    uniforms,
)
from higgs_lab.talker import Talker

__all__ = [
    "ENGINE_DEFAULTS",
    "MAX_FRAMES",
    "Generation",
    "RampState",
    "Sampling",
    "SamplingTensors",
    "advance",
    "codes_from_rows",
    "generate",
    "generate_each",
    "generate_naive",
    "keep_probabilities",
    "mask_logits",
    "max_rows",
    "next_row",
    "sample",
    "uniforms",
]

DEFAULT = Sampling()


@dataclass
class Generation:
    """What one request produced."""

    codes: Tensor  # [T, K] real codes
    rows: Tensor  # [S, K] as emitted, specials and all
    stop_reason: str  # "eoc", or "max_frames" when the cap cut it
    log_probs: Tensor | None = None  # [S, K] of the chosen ids, before top-k and top-p


def generate(
    talker: Talker,
    prompts: Sequence[Prompt],
    sampling: Sampling | Sequence[Sampling] = DEFAULT,
    log_probs: bool = False,
    max_batch: int | None = None,
    compile: bool | None = None,
) -> list[Generation]:
    """Speak prompts, each with its own sampling; results in the order given.

    max_batch: requests at a time; none: as many as fit, at most 256 on a GPU and 32 on a CPU.
    compile: see `generate_each`.
    """
    found: list[Generation | None] = [None] * len(prompts)
    for i, made in generate_each(talker, prompts, sampling, log_probs, max_batch, compile):
        found[i] = made
    return found  # type: ignore[return-value]


_DECODERS: WeakKeyDictionary[Talker, object] = WeakKeyDictionary()
COMPILE_FROM_ROWS = 100_000  # below, compiling costs more time than it saves


@torch.no_grad()  # not inference_mode: what comes out may serve in training
def generate_each(
    talker: Talker,
    prompts: Sequence[Prompt],
    sampling: Sampling | Sequence[Sampling] = DEFAULT,
    log_probs: bool = False,
    max_batch: int | None = None,
    compile: bool | None = None,
) -> Iterator[tuple[int, Generation]]:
    """(index, result) of each prompt as soon as it has ended, so that its codes can be decoded.

    compile: fuse the kernels of a step with torch.compile; none: on a GPU, when the job may take
    so many rows that the half minute is worth it. An adapter that is not merged, quantised weights
    and autocast go through the modules, slower.
    """
    from higgs_lab.decoding import Decoder
    from higgs_lab.engine import Engine
    from higgs_lab.slots import requests_of

    settings = _per_prompt(prompts, sampling)
    if not prompts:
        return
    plain = not torch.is_autocast_enabled(talker.device.type)  # or it is kept for later
    # popped: a caller may generate while this is under way
    decoder = _DECODERS.pop(talker, None) if plain else None
    if decoder is not None and not decoder.engine.fits(talker):
        decoder = None  # frees the cache before the next is made
    if decoder is None and not Engine.supports(talker):
        size = max_batch or 32
        for start in range(0, len(prompts), size):
            part = slice(start, start + size)
            made = _generate_modules(talker, prompts[part], settings[part], log_probs)
            yield from enumerate(made, start)
        return
    requests = requests_of(prompts, settings, talker.num_codebooks)
    if compile is None:
        rows = sum(r.rows for r in requests)
        compile = talker.device.type == "cuda" and rows >= COMPILE_FROM_ROWS
    decoder = decoder or Decoder(Engine(talker))
    try:
        yield from decoder.run(requests, max_batch, log_probs, compile)
    except GeneratorExit:  # the caller has heard enough: what was recorded and compiled stays
        _DECODERS[talker] = decoder
        raise
    _DECODERS[talker] = decoder


@torch.no_grad()
def _generate_modules(
    talker: Talker, prompts: Sequence[Prompt], requests: list[Sampling], log_probs: bool
) -> list[Generation]:
    """`generate` through the talker's own modules, whatever they have become.

    Prompts are padded on the left and share one key-value cache; a request that has ended idles
    until the last one ends.
    """
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
            cache=cache,
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
    talker: Talker, prompt: Prompt, sampling: Sampling = DEFAULT, log_probs: bool = False
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
        self.options = SamplingTensors.of(requests, codebook_size, device, num_codebooks)
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
        row, self.state, masked = next_row(
            logits, self.options, self.state, len(self.rows), self.modes
        )
        if self.log_probs is not None:
            self.log_probs.append(chosen_log_probs(masked, row, self.options))
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
