"""Slots of a static cache: the buffers of many requests, and one step of them all.

A step takes every slot one row further and touches static buffers alone, so that on a GPU it is one
recorded CUDA graph: per batch size and cache length, over a shared memory pool. The last position
of a prompt goes through the step like any row, so there is one place where rows are sampled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from higgs_lab.engine import Engine
from higgs_lab.prefill import Passes
from higgs_lab.prompt import Prompt
from higgs_lab.sampling import (
    RampState,
    Sampling,
    SamplingTensors,
    chosen_log_probs,
    max_rows,
    next_row,
)


@dataclass
class Request:
    """A prompt with its settings and its place in the caller's list."""

    index: int
    prompt: Prompt
    sampling: Sampling
    rows: int  # at most
    shared: int = 0  # positions of its reference, which other requests may have, too
    reference: bytes = b""  # equal where what stands there is

    @property
    def positions(self) -> int:
        """Cache positions that it can come to need."""
        return len(self.prompt) + self.rows


class Slots:
    """The buffers of `size` requests; every tensor keeps its address until the cache grows."""

    def __init__(self, engine: Engine, size: int, length: int, rows: int, log_probs: bool):
        self.engine, self.size, self.length, self.log_probs = engine, size, 0, log_probs
        device, K = engine.device, engine.num_codebooks

        def zeros(*shape, dtype=torch.long):
            return torch.zeros(size, *shape, dtype=dtype, device=device)

        self.fed = zeros(engine.table.shape[1], dtype=engine.dtype)  # next: a prompt's end or a row
        self.position, self.step, self.limit = zeros(), zeros(), zeros()
        self.active, self.ended = zeros(dtype=torch.bool), zeros(dtype=torch.bool)
        self.state = RampState.start(size, device)
        self.options = SamplingTensors.of([Sampling()] * size, engine.codebook_size, device, K)
        self.vllm = zeros(dtype=torch.bool)
        self.out = zeros(rows + 1, K, dtype=torch.short)  # one to spare: an idle slot writes on
        self.chances = zeros(rows + 1, K, dtype=torch.float32) if log_probs else None
        self.max_rows = rows
        self.number = torch.arange(size, device=device)
        self.begins = torch.stack([self.number, zeros()])  # `shared` of `decode_attention`
        self._begins = [(slot, 0) for slot in range(size)]  # the same, on the host
        self.cache: list[tuple[Tensor, Tensor]] = []
        self.rope = engine.rope(1)
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        self.passes = Passes(engine)
        # One for all recordings: cuBLAS keeps a workspace for every stream that it has seen. They
        # keep its priority: the small kernels of a step go before the codec's large ones.
        self.stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self.grow(length)

    def grow(self, length: int) -> None:
        """Room for `length` positions a slot. Zeros, since 0 times what stood there may be NaN."""
        if length <= self.length:
            return
        engine = self.engine
        shape = (self.size, engine.kv_heads, length, engine.head_dim)
        self.graphs.clear()  # they know the old addresses
        self.passes.recorded.clear()
        # a pool whose last graph is gone may not be recorded into again
        self.pool = torch.cuda.graph_pool_handle() if self.stream is not None else None
        for i in range(len(engine.layers)):
            pair = tuple(
                torch.zeros(shape, dtype=engine.dtype, device=engine.device) for _ in range(2)
            )
            if self.length:
                for new, old in zip(pair, self.cache[i], strict=True):
                    new[:, :, : self.length] = old
                self.cache[i] = pair
            else:
                self.cache.append(pair)
            if self.size > 1:  # one compilation for all cache lengths
                for tensor in pair:
                    torch._dynamo.maybe_mark_dynamic(tensor, (0, 2))
        self.length, self.rope = length, engine.rope(length)

    def small(self) -> list[Tensor]:
        """What a step changes beside the cache and the output."""
        state = self.state
        return [
            self.fed, self.position, self.step, self.active, self.ended, state.delay,
            state.countdown, state.done,
        ]  # fmt: skip

    def per_slot(self) -> list[Tensor]:
        """Every buffer of a slot but the cache."""
        options = self.options
        more = [options.temperature, options.top_k, options.top_p, options.greedy, options.keys]
        extra = [] if self.chances is None else [self.chances]
        return [*self.small(), self.limit, self.vllm, self.out, *more, *extra]

    def move(self, source: list[int], target: list[int]) -> None:
        """Copy slots with all they hold; the sources are free afterwards."""
        a, b = self.engine.send(source), self.engine.send(target)
        for tensor in (*self.per_slot(), *(t for pair in self.cache for t in pair)):
            tensor[b] = tensor[a]
        self.release(source)

    def release(self, slots: list[int]) -> None:
        index = self.engine.send(slots)
        self.active.index_fill_(0, index, False)
        self.position.index_fill_(0, index, 0)

    def share(self, begins: Mapping[int, tuple[int, int]]) -> None:
        """From now on, by slot: from which one its first positions are read, and how many."""
        rows = [begins.get(slot, (slot, 0)) for slot in range(self.size)]
        if rows != self._begins:
            self.begins.copy_(self.engine.send(rows).T)
            self._begins = rows

    def to_come(self, size: int) -> Tensor:
        """[size] rows until a slot's end by EOC; -1: none in sight, 0: it is over."""
        return self.state.countdown[:size].masked_fill(~self.active[:size], 0)

    def admit(
        self,
        slots: list[int],
        requests: list[Request],
        compile: bool = False,
        holders: list[int] | None = None,
    ) -> None:
        """Put requests into free slots: their prompts into the cache, their settings beside it.

        holders: of each, a slot in use or of these that holds the same reference; none, or its own:
        it is computed. It queues work and waits for none, so that the device steps on while the
        host is here.
        """
        engine, prompts = self.engine, [r.prompt for r in requests]
        holders = holders or slots
        copied = [
            0 if holder == slot else r.shared
            for slot, holder, r in zip(slots, holders, requests, strict=True)
        ]
        # all but the last positions end to end, then the last ones, which go through the step
        parts = [(p, slice(n, -1)) for p, n in zip(prompts, copied, strict=True)]
        parts += [(p, slice(-1, None)) for p in prompts]
        packed = (
            engine.send(torch.cat([getattr(p, name)[part] for p, part in parts]))
            for name in ("ids", "is_audio", "rows")
        )
        x = engine.embed(*packed)
        lengths = [len(p) - 1 - n for p, n in zip(prompts, copied, strict=True)]
        body, last = x.split([sum(lengths), len(prompts)])
        self._write(engine.send(slots), requests, last)
        if len(body):
            self.passes.fill(self, body, slots, lengths, holders, copied, compile)

    def _write(self, index: Tensor, requests: list[Request], fed: Tensor) -> None:
        engine, state, settings = self.engine, self.state, [r.sampling for r in requests]
        # index_fill_, for a number that is assigned by index is copied to the device, and waits
        self.active.index_fill_(0, index, True)
        for tensor in (self.step, self.ended, state.delay, state.done):
            tensor.index_fill_(0, index, 0)
        state.countdown.index_fill_(0, index, -1)
        self.fed[index] = fed
        self.position[index] = engine.send([len(r.prompt) - 1 for r in requests])
        self.limit[index] = engine.send([r.rows for r in requests])
        self.vllm[index] = engine.send([s.mode == "vllm" for s in settings])
        new = SamplingTensors.of(settings, engine.codebook_size, "cpu", engine.num_codebooks)
        for name, value in vars(new).items():
            getattr(self.options, name)[index] = engine.send(value)

    # --- the step

    def step_once(
        self,
        size: int,
        length: int,
        modes: tuple[str, ...],
        draw: bool,
        compile: bool,
        exact: bool = False,
    ) -> None:
        """One row further for the first `size` slots, whose caches hold at most `length`.

        All reads and writes are of static buffers; nothing here may wait for the device. exact:
        all slots are at `length`, so that SDPA needs nothing hidden.
        """
        engine, part, number = self.engine, slice(0, size), self.number[:size]
        logits = self._logits(size, length, compile, exact)
        state = RampState(*(t[part] for t in vars(self.state).values()))
        options = SamplingTensors(*(t[part] for t in vars(self.options).values()))
        mine = self.vllm[part]
        named = {"vllm": mine, "sglang": ~mine}
        named = {mode: named[mode] for mode in modes}
        noted = [self.out[part]] if self.chances is None else [self.out[part], self.chances[part]]
        own = [self.step, self.limit, self.position, self.active, self.ended, self.fed]
        own = [number, *(t[part] for t in own)]
        finish = engine.compiled(take_row, size) if compile else take_row
        if compile:
            several = (*vars(options).values(), *vars(state).values(), *named.values(), *own)
            engine.any_batch(size, logits, *noted, *several)
            for tensor in noted:  # as many rows as the longest request of a call
                torch._dynamo.maybe_mark_dynamic(tensor, 1)
        finish(logits, options, state, named, draw, noted, *own, engine.table, engine.offsets)

    def _logits(self, size: int, length: int, compile: bool, exact: bool) -> Tensor:
        """The blocks of `step_once`, and the head."""
        engine, part = self.engine, slice(0, size)
        position, number = self.position[part], self.number[part]
        x = self.fed[part]  # overwritten
        if engine.by_blocks(size):
            from higgs_lab.decode_block import decode_blocks

            blocks = (engine.layers, engine.norm, engine.eps)
            given = (self.cache, self.rope, position, self.begins[:, part])
            found = decode_blocks(x, *blocks, *given)
            return engine.logits(found, normed=True)
        lengths, hidden = position + 1, None
        if not exact and not engine.split_kv:
            at = torch.arange(length, device=engine.device)
            hidden = torch.zeros(size, length, dtype=engine.dtype, device=engine.device)
            hidden = hidden.masked_fill_(at > position[:, None], float("-inf"))[:, None, None]
        if engine.few_rows:  # the trial of the blocks has seen this kernel of theirs
            from higgs_lab.decode_block import rotate

            project, given = engine.joined, ()
        else:
            cos, sin = self.rope[0][position, None], self.rope[1][position, None]
            project, given = engine.cached_project, (cos, sin, number, position)
        between = engine.feed_forward
        if compile:
            project, between = engine.compiled(project, size), engine.compiled(between, size)
            engine.any_batch(size, x, *given)
        for layer, (keys, values) in zip(engine.layers, self.cache, strict=True):
            if engine.few_rows:
                mine = keys[part], values[part]
                q = rotate(project(x, layer)[None], layer, engine.eps, *self.rope, position, *mine)
            else:
                cos, sin, *where = given
                q = project(x, layer, cos, sin, keys, values, *where)
            seen = (keys[part, :, :length], values[part, :, :length])
            attended = engine.attend(q, *seen, lengths, hidden, self.begins[:, part])
            if compile and size == 1:
                x = engine.finish_one(x, attended, layer)
            else:
                engine.finish(x, attended, layer, between)
        return engine.logits(x)

    def replay(self, *key) -> None:
        """`step_once` as a CUDA graph, recorded the first time."""
        if key not in self.graphs:
            self.graphs[key] = self._record(key)
        self.graphs[key].replay()

    def _record(self, key: tuple) -> torch.cuda.CUDAGraph:
        """Warm up on a side stream, put the state back, record.

        The warm-up compiles, loads kernels and lets cuBLAS take its workspace. What it writes into
        the cache and the output stands at the very places that the next real step writes.
        """
        saved = [t.clone() for t in self.small()]
        side = self.stream
        with torch.cuda.device(self.engine.device):  # which need not be the first
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    self.step_once(*key)
                    for tensor, value in zip(self.small(), saved, strict=True):
                        tensor.copy_(value)
            torch.cuda.current_stream().wait_stream(side)
        return self.capture(self.step_once, key)

    def capture(self, function: Callable, arguments: tuple) -> torch.cuda.CUDAGraph:
        """A recording of function(*arguments), which is not run."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: a codec in another thread may allocate meanwhile
        options = dict(pool=self.pool, stream=self.stream, capture_error_mode="thread_local")
        with torch.cuda.device(self.engine.device), torch.cuda.graph(graph, **options):
            function(*arguments)
        return graph


def take_row(
    logits: Tensor,
    options: SamplingTensors,
    state: RampState,
    modes: dict[str, Tensor],
    draw: bool,
    noted: list[Tensor],
    number: Tensor,
    step: Tensor,
    limit: Tensor,
    position: Tensor,
    active: Tensor,
    ended: Tensor,
    fed: Tensor,
    table: Tensor,
    offsets: Tensor,
) -> None:
    """The end of a step: choose a row from logits [B, K, V] and go on from it, all in place.

    noted: rows [B, S, K], and log-probabilities where wanted. One function, so that compiled it is
    few kernels: what each of a step's many small ones takes is its start.
    """
    row, after, masked = next_row(logits, options, state, step, modes, draw)
    noted[0][number, step] = row.short()
    if len(noted) > 1:
        noted[1][number, step] = chosen_log_probs(masked, row, options)
    ended |= active & after.done
    step += active
    active &= ~after.done & (step < limit)
    position += active
    state.delay.copy_(after.delay)  # by name: torch 2.11's compiler knows no vars()
    state.countdown.copy_(after.countdown)
    state.done.copy_(after.done)
    fed.copy_(F.embedding(row + offsets, table).sum(dim=-2))


def requests_of(
    prompts: Sequence[Prompt], settings: Sequence[Sampling], num_codebooks: int
) -> list[Request]:
    return [
        Request(i, prompt, sampling, max_rows(sampling, num_codebooks), *reference_of(prompt))
        for i, (prompt, sampling) in enumerate(zip(prompts, settings, strict=True))
    ]


def reference_of(prompt: Prompt) -> tuple[int, bytes]:
    """Positions up to the last row of a prompt's reference, and a hash of what stands there.

    Of a prompt something is left to a pass, and its last position to the step.
    """
    audio = prompt.is_audio[:-2].nonzero()
    if not len(audio):
        return 0, b""
    count = int(audio[-1]) + 1
    digest = hashlib.sha256()
    for part in (prompt.is_audio, prompt.ids.masked_fill(prompt.is_audio, 0), prompt.rows):
        digest.update(part[:count].numpy().tobytes())
    return count, digest.digest()
