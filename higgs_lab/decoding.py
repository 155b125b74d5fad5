"""Many requests at once: slots of a static cache, filled anew when they are done.

Nothing in a step of the slots waits for the GPU; the host looks at them every few steps, takes what
has ended, and lets waiting prompts in: on a GPU once enough slots have idled to pay for the pass.
Half of the next steps are queued before it does, so that the GPU has work meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from higgs_lab.engine import Engine
from higgs_lab.generate import Generation
from higgs_lab.sampling import codes_from_rows
from higgs_lab.slots import Request, Slots

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # recorded batch sizes
LENGTHS = (256, 384, 512, 640, 768, 1024, 1280, 1536, 2048, 3072, 4096)  # and cache lengths
STEPS_PER_LOOK = 8  # on a GPU: how often the host looks; a slot that has ended idles so long
ADMIT_STEPS = 2  # of all slots: what a pass over prompts costs at least beside their own products
PREFILL_POSITIONS = 8192  # of one packed pass over new prompts
MEMORY_SHARE = 0.8  # of the free memory, for the cache


class Decoder:
    """Runs requests through an engine; keeps slots and graphs for the next call."""

    def __init__(self, engine: Engine):
        self.engine, self.slots = engine, None

    def run(
        self,
        requests: Sequence[Request],
        max_batch: int | None = None,
        log_probs: bool = False,
        compile: bool = False,
        graphs: bool | None = None,
    ) -> Iterator[tuple[int, Generation]]:
        """(index, result) of each request as it ends; those that may last longest begin first.

        graphs: fixed sizes, looked at every few steps, recorded; none: on a GPU.
        """
        waiting = deque(sorted(requests, key=lambda r: -r.positions))
        if graphs is None:
            graphs = self.engine.device.type == "cuda"
        look = STEPS_PER_LOOK if graphs else 1
        slots = self._slots(list(waiting), max_batch, look, log_probs, graphs)
        modes = tuple(sorted({r.sampling.mode for r in requests}))
        flags = (modes, any(not r.sampling.greedy for r in requests), compile)
        limit = min(slots.size, max_batch or slots.size)
        # one slot has compiled functions of its own, which the last of many is not worth
        several = len(requests) > 1 and limit > 1
        least = 2 if compile and several else 1
        busy: dict[int, Request] = {}
        reached: dict[int, int] = {}  # positions in the cache, at most
        idle = 0  # steps of slots that waited for a prompt, since the last pass over prompts
        queued = 0  # steps of this look that were queued before the prompts
        try:
            while waiting or busy:
                # every pass reads all weights, for one prompt as for many: let as much be lost by
                # idle slots first
                if waiting and (not graphs or not busy or idle >= ADMIT_STEPS * limit):
                    self._admit(waiting, busy, reached, limit, look, graphs, compile and several)
                    idle = 0
                size = self._compact(busy, reached, graphs, least)
                self._step(look - queued, size, reached, graphs, flags)
                done = self._look(busy, reached, size)
                idle += look * (limit - len(busy))
                # for the device, while results are handed out and prompts laid out here
                queued = look // 2 if busy else 0
                self._step(queued, size, reached, graphs, flags)
                yield from done
        finally:
            if busy:  # the caller left early: nothing may stay active
                slots.release(list(busy))

    def _slots(
        self, waiting: list[Request], max_batch, look: int, log_probs: bool, graphs: bool
    ) -> Slots:
        """Slots that fit, those of the last call where they do."""
        rows = max(r.rows for r in waiting)
        needed = waiting[0].positions + look + 1
        wanted = min(len(waiting), max_batch or (256 if self.engine.device.type == "cuda" else 32))
        old = self.slots
        if (
            old is not None
            and wanted <= old.size <= 4 * wanted
            and rows <= old.max_rows
            and old.log_probs == log_probs
            and (needed <= old.length or _fitting(self.engine, needed) >= old.size)
        ):
            return old
        self.slots = None  # frees the old cache first
        size = max(1, min(wanted, _fitting(self.engine, needed)))
        begin = max(len(r.prompt) for r in waiting) + look + 1
        length = _at_least(begin, LENGTHS) if graphs else begin
        self.slots = Slots(self.engine, size, length, rows, log_probs)
        return self.slots

    def _admit(
        self, waiting, busy, reached, limit: int, look: int, graphs: bool, compile: bool
    ) -> None:
        free = [s for s in range(limit) if s not in busy]
        while waiting and free:
            part: list[Request] = []
            total = 0
            while waiting and len(part) < len(free):
                total += len(waiting[0].prompt)
                if part and total > PREFILL_POSITIONS:
                    break
                part.append(waiting.popleft())
            taken, free = free[: len(part)], free[len(part) :]
            self._reserve(max(len(r.prompt) for r in part) + look + 1, graphs)
            self.slots.admit(taken, part, compile)
            for slot, request in zip(taken, part, strict=True):
                busy[slot], reached[slot] = request, len(request.prompt)

    def _reserve(self, length: int, graphs: bool) -> None:
        slots = self.slots
        if length > slots.length:
            more = max(length, slots.length * 3 // 2)
            slots.grow(_at_least(length, LENGTHS) if graphs else more)

    def _compact(self, busy, reached, graphs: bool, least: int) -> int:
        """The number of slots to step, the busy ones moved to the front where that saves a size."""
        top = max(busy) + 1
        size = max(least, _at_least(len(busy), SIZES) if graphs else len(busy))
        if _at_least(top, SIZES) <= size if graphs else top <= size:
            return min(size, self.slots.size)
        holes = [s for s in range(len(busy)) if s not in busy]
        movers = sorted(s for s in busy if s >= len(busy))
        self.slots.move(movers, holes)
        for source, target in zip(movers, holes, strict=True):
            busy[target], reached[target] = busy.pop(source), reached.pop(source)
        return min(size, self.slots.size)

    def _step(
        self, steps: int, size: int, reached: dict[int, int], graphs: bool, flags: tuple
    ) -> None:
        """Queue so many steps of the first slots."""
        if not steps:
            return
        slots, longest = self.slots, max(reached.values())
        self._reserve(longest + steps + 1, graphs)
        length = longest + steps - 1
        if self.engine.split_kv:  # reads what each slot has: one recording a batch size
            length = slots.length
        elif graphs:
            length = min(_at_least(length, LENGTHS), slots.length)
        for _ in range(steps):
            if graphs:
                slots.replay(size, length, *flags)
            else:
                slots.step_once(size, length, *flags, exact=size == 1)
        for slot in reached:
            reached[slot] += steps

    def _look(self, busy, reached, size: int) -> Iterator[tuple[int, Generation]]:
        """Look at the slots: the one place where the host waits for all that is queued.

        Frees those that have ended. Their results are copied to the host before any later step may
        overwrite them, and built when they are asked for.
        """
        slots = self.slots
        names = ("active", "position", "step", "ended")
        seen = torch.stack([getattr(slots, n)[:size].long() for n in names]).cpu()
        active, position, step, ended = seen.tolist()
        over = [s for s in sorted(busy) if not active[s]]
        for s in busy:
            reached[s] = position[s] + 1
        if not over:
            return iter(())
        index = self.engine.send(over)
        most = max(step[s] for s in over)
        buffers = [slots.out] if slots.chances is None else [slots.out, slots.chances]
        copies = _fetch([buffer[index, :most] for buffer in buffers])
        slots.release(over)
        done = [(busy.pop(s), step[s], bool(ended[s])) for s in over]
        for s in over:
            del reached[s]
        return _results(done, copies)


def _results(
    done: list[tuple[Request, int, bool]], copies: Callable[[], list[Tensor]]
) -> Iterator[tuple[int, Generation]]:
    """(index, result) of requests that have ended, of each its number of rows and whether by EOC.

    copies: gives their rows, and log-probabilities where wanted, [len(done), at least so many, K].
    """
    rows, *chances = copies()
    for i, (request, count, ended) in enumerate(done):
        mine = rows[i, :count].long()
        yield (
            request.index,
            Generation(
                codes=codes_from_rows(mine, request.sampling.mode),
                rows=mine,
                stop_reason="eoc" if ended else "max_frames",
                log_probs=chances[0][i, :count].clone() if chances else None,
            ),
        )


def _fetch(tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
    """Queue copies to the host; what comes back waits for them, not for what is queued later."""
    copies = [t.to("cpu", non_blocking=True) for t in tensors]
    if not tensors[0].is_cuda:
        return lambda: copies
    there = torch.cuda.current_stream(tensors[0].device).record_event()

    def wait() -> list[Tensor]:
        there.synchronize()
        return copies

    return wait


def _at_least(number: int, steps: tuple[int, ...]) -> int:
    """The first of steps that is enough; beyond them a multiple of the last."""
    return next((s for s in steps if s >= number), -(-number // steps[-1]) * steps[-1])


def _fitting(engine: Engine, positions: int) -> int:
    """Requests of so many positions that the device's free memory holds; at least 1."""
    if engine.device.type != "cuda":
        return 1 << 20
    each = 2 * len(engine.layers) * engine.kv_heads * engine.head_dim * engine.dtype.itemsize
    free, _ = torch.cuda.mem_get_info(engine.device)
    reserved = torch.cuda.memory_reserved(engine.device) - torch.cuda.memory_allocated(
        engine.device
    )
    return max(1, int((free + reserved) * MEMORY_SHARE) // (each * positions))
