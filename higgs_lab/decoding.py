"""Many requests at once: slots of a static cache, filled anew when they are done.

The host never waits for the steps that it has just queued. After codebook 0's EOC a request has at
least K - 2 rows to come, and its cap is known from the start: so where the slots stood some steps
ago tells which of them are over by the end of the steps queued since. Those are taken out, and
waiting prompts let in, while the device is still busy with these steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from higgs_lab.cost import free_gpu_memory
from higgs_lab.engine import Engine
from higgs_lab.generate import Generation
from higgs_lab.sampling import codes_from_rows
from higgs_lab.slots import Request, Slots

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # recorded batch sizes
LENGTHS = (256, 384, 512, 640, 768, 1024, 1280, 1536, 2048, 3072, 4096)  # and cache lengths
STEPS = 4  # queued at a time on a GPU; up to half the rows that an end shows ahead none is lost
# of all slots: what a pass over prompts costs at least beside their own products
ADMIT_STEPS = 0.25
# rows of idle slots, some 17 us each, that cost what a recording does, 0.1 s (4B shape, H100)
RECORD_ROWS = 6000
PREFILL_POSITIONS = 8192  # of one packed pass over new prompts
MEMORY_SHARE = 0.8  # of the free memory, for the cache


@dataclass
class Running:
    """A request in a slot, as far as the host knows."""

    request: Request
    ends: int  # rows after which it is over: at most, and exactly once its end is in sight
    rows: int = 0  # queued

    @property
    def left(self) -> int:
        return self.ends - self.rows

    @property
    def reached(self) -> int:
        """Positions that the next row sees."""
        return len(self.request.prompt) + self.rows


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
        """(index, result) of each request as it ends; those of the most rows begin first.

        graphs: fixed sizes, several steps at a time, recorded; none: on a GPU.
        """
        waiting = deque(sorted(requests, key=lambda r: -r.rows))  # so that few are left at the end
        if graphs is None:
            graphs = self.engine.device.type == "cuda"
        most = STEPS if graphs else 1
        slots = self._slots(list(waiting), max_batch, most, log_probs, graphs)
        modes = tuple(sorted({r.sampling.mode for r in requests}))
        flags = (modes, any(not r.sampling.greedy for r in requests), compile)
        limit = min(slots.size, max_batch or slots.size)
        # one slot has kernels and compiled functions of its own: the last of many is not worth them
        several = len(requests) > 1 and limit > 1
        least = 2 if several and (compile or graphs) else 1
        busy: dict[int, Running] = {}
        wasted: dict[int, int] = {}
        idle = 0  # steps of slots that waited for a prompt, since the last pass over prompts
        look: Callable[[], None] | None = None
        done: Iterator[tuple[int, Generation]] = iter(())
        try:
            while waiting or busy:
                # every pass reads all weights, for one prompt as for many: let as much be lost by
                # idle slots first
                if waiting and (not graphs or not busy or idle >= ADMIT_STEPS * limit):
                    self._admit(waiting, busy, limit, most, graphs, compile and several)
                    idle = 0
                size = self._compact(busy, self._size(busy, graphs, least, wasted))
                steps = min(most, max(one.left for one in busy.values()))
                self._step(steps, size, busy, graphs, flags)
                before, look = look, self._look(busy, size)
                yield from done
                if before is not None:
                    before()
                over = [slot for slot, one in sorted(busy.items()) if one.left <= 0]
                idle += steps * (limit - len(busy)) - sum(busy[slot].left for slot in over)
                done = self._take(busy, over)
            yield from done
        finally:
            if busy:  # the caller left early: nothing may stay active
                slots.release(list(busy))

    def _slots(
        self, waiting: list[Request], max_batch, steps: int, log_probs: bool, graphs: bool
    ) -> Slots:
        """Slots that fit, those of the last call where they do."""
        # not to the row, or the next call's longest would have all recorded anew
        rows = -(-max(r.rows for r in waiting) // 256) * 256
        needed = max(r.positions for r in waiting) + steps + 1
        whole = _at_least(needed, LENGTHS) if graphs else needed  # that it may come to hold
        wanted = min(len(waiting), max_batch or (256 if self.engine.device.type == "cuda" else 32))
        old = self.slots
        if (
            old is not None
            and wanted <= old.size <= 4 * wanted
            and rows <= old.max_rows
            and old.log_probs == log_probs
            and (needed <= old.length or _fitting(self.engine, whole) >= old.size)
        ):
            return old
        self.slots = old = None  # frees the old cache first
        size = max(1, min(wanted, _fitting(self.engine, whole)))
        begin = max(len(r.prompt) for r in waiting) + steps + 1
        if graphs and _fitting(self.engine, whole) >= 2 * size:
            begin = needed  # there is room: to grow would be to record anew
        length = _at_least(begin, LENGTHS) if graphs else begin
        self.slots = Slots(self.engine, size, length, rows, log_probs)
        return self.slots

    def _admit(self, waiting, busy, limit: int, steps: int, graphs: bool, compile: bool) -> None:
        free = [s for s in range(limit) if s not in busy]
        while waiting and free:
            part: list[Request] = []
            total = 0
            while waiting and len(part) < len(free):
                total += len(waiting[0].prompt)  # copied or not, for a pass gathers it
                if part and total > PREFILL_POSITIONS:
                    break
                part.append(waiting.popleft())
            taken, free = free[: len(part)], free[len(part) :]
            self._reserve(max(len(r.prompt) for r in part) + steps + 1, graphs)
            holders = {one.request.reference: slot for slot, one in busy.items()}
            holding = []
            for slot, request in zip(taken, part, strict=True):
                busy[slot] = Running(request, request.rows)
                holder = holders.setdefault(request.reference, slot)
                holding.append(holder if request.shared else slot)
            self.slots.admit(taken, part, compile, holding)

    def _reserve(self, length: int, graphs: bool) -> None:
        slots = self.slots
        if length > slots.length:
            more = max(length, slots.length * 3 // 2)
            slots.grow(_at_least(length, LENGTHS) if graphs else more)

    def _size(self, busy: dict[int, Running], graphs: bool, least: int, wasted: dict) -> int:
        """The number of slots to step.

        Where a size is one recording, a larger one that this call has stepped before, until the
        idle slots of such steps have cost as much as to record the size that fits. Earlier calls
        do not count, be it recorded or not: a size rounds as it does, and who starts a job again
        in another process wants the same takes.

        wasted: of each size, the rows of idle slots that this call has stepped for want of it.
        """
        size = max(least, len(busy))
        if graphs:
            size = _at_least(size, SIZES)
        size = min(size, self.slots.size)
        if not (graphs and self.engine.split_kv):
            return size
        larger = [n for n, rows in wasted.items() if n > size and rows >= RECORD_ROWS]
        if not larger or wasted.get(size, 0) >= RECORD_ROWS:
            wasted[size] = RECORD_ROWS
            return size
        wasted[size] = wasted.get(size, 0) + STEPS * (min(larger) - size)
        return min(larger)

    def _compact(self, busy: dict[int, Running], size: int) -> int:
        """Have the busy slots be among the first `size`, which is returned."""
        if max(busy) >= size:
            holes = [s for s in range(len(busy)) if s not in busy]
            movers = sorted(s for s in busy if s >= len(busy))
            self.slots.move(movers, holes)
            for source, target in zip(movers, holes, strict=True):
                busy[target] = busy.pop(source)
        return size

    def _step(
        self, steps: int, size: int, busy: dict[int, Running], graphs: bool, flags: tuple
    ) -> None:
        """Queue so many steps of the first slots."""
        slots, longest = self.slots, max(one.reached for one in busy.values())
        self._reserve(longest + steps + 1, graphs)
        self._share(busy)
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
        for one in busy.values():
            one.rows += steps

    def _share(self, busy: dict[int, Running]) -> None:
        """Have all slots of one reference read it where the first of them has it.

        Each has a copy of its own, for the first may end before the others.
        """
        if not self.engine.split_kv:
            return
        firsts: dict[bytes, int] = {}
        begins = {}
        for slot in sorted(busy):
            request = busy[slot].request
            first = firsts.setdefault(request.reference, slot)
            if request.shared and first != slot:
                begins[slot] = first, request.shared
        self.slots.share(begins)

    def _look(self, busy: dict[int, Running], size: int) -> Callable[[], None]:
        """Queue a look at the slots behind the steps so far.

        Called, it waits for those alone and notes the ends that are in sight.
        """
        copies = _fetch([self.slots.to_come(size)])
        then = [(slot, one, one.rows) for slot, one in busy.items()]

        def note() -> None:
            to_come = copies()[0].tolist()
            for slot, one, rows in then:
                if to_come[slot] >= 0:
                    one.ends = min(one.ends, rows + to_come[slot])

        return note

    def _take(self, busy: dict[int, Running], over: list[int]) -> Iterator[tuple[int, Generation]]:
        """Free slots that are over once the queued steps are done; their results.

        Those are copied to the host before any later step may overwrite them, and waited for when
        they are asked for.
        """
        if not over:
            return iter(())
        slots, index = self.slots, self.engine.send(over)
        done = [busy.pop(slot) for slot in over]
        most = max(one.ends for one in done)
        wanted = [slots.step[index], slots.ended[index], slots.out[index, :most]]
        if slots.chances is not None:
            wanted.append(slots.chances[index, :most])
        copies = _fetch(wanted)
        slots.release(over)
        return _results([one.request for one in done], copies)


def _results(
    requests: list[Request], copies: Callable[[], list[Tensor]]
) -> Iterator[tuple[int, Generation]]:
    """(index, result) of requests that are over.

    copies: gives of each its number of rows, whether it ended by EOC, its rows [at least so many,
    K], and where wanted their log-probabilities.
    """
    counts, ended, rows, *chances = copies()
    for i, request in enumerate(requests):
        mine = rows[i, : counts[i]].long()
        yield (
            request.index,
            Generation(
                codes=codes_from_rows(mine, request.sampling.mode),
                rows=mine,
                stop_reason="eoc" if ended[i] else "max_frames",
                log_probs=chances[0][i, : counts[i]].clone() if chances else None,
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
    room = free_gpu_memory(engine.device) * MEMORY_SHARE
    return max(1, int(room) // (each * positions))
