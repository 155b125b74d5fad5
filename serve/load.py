"""Load on a server, and what each request met: the measuring half of serve.bench.

Closed loop: N callers, each sends its next request when the last has been answered; shows what the
server can do. Open loop: requests arrive at random at a given rate, whether or not the server keeps
up, as users do; a server that is too slow shows as latency that grows without end. Open-loop times
count from the arrival, not from when a thread got round to it (else slowness would hide itself:
"coordinated omission").
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from serve.client import ServerError, load_reference, stream

BYTES_PER_SEC = 2 * 24000  # of the PCM that servers stream


@dataclass(frozen=True)
class Target:
    """A server, and how to speak to it."""

    name: str
    url: str
    dialect: str = "vllm"
    api_key: str | None = None
    options: dict = field(default_factory=dict)  # of serve.client.stream


@dataclass
class Take:
    """One request. Times are seconds since the load began, on one clock."""

    number: int
    due: float  # when it should have been sent
    sent: float = 0.0
    arrivals: list[tuple[float, float]] = field(default_factory=list)  # (time, seconds of sound)
    done: float = 0.0
    error: str = ""

    @property
    def first_audio_sec(self) -> float:
        return self.arrivals[0][0] - self.due

    @property
    def total_sec(self) -> float:
        return self.done - self.due

    @property
    def audio_sec(self) -> float:
        return sum(seconds for _, seconds in self.arrivals)

    @property
    def real_time_factor(self) -> float:
        """Seconds of waiting per second of sound: below 1 is faster than speech."""
        return self.total_sec / self.audio_sec


@dataclass(frozen=True)
class Playback:
    """What a listener meets who plays the sound as it comes."""

    underruns: int  # silences in the middle of speech
    silent_sec: float  # their length together
    needed_sec: float  # the least delay after the first piece that avoids them all


def play(arrivals: Sequence[tuple[float, float]], delay_sec: float = 0.0) -> Playback:
    """A real-time player: begins `delay_sec` after the first piece, stops when it has nothing left
    and goes on with the next piece.

    arrivals: (time, seconds of sound) of each piece, in order of time.
    """
    if not arrivals:
        return Playback(0, 0.0, 0.0)
    first = arrivals[0][0]
    empty = first + delay_sec  # when the player runs dry
    underruns, silent, needed, got = 0, 0.0, 0.0, 0.0
    for at, seconds in arrivals:
        if at > empty + 1e-9:
            underruns, silent, empty = underruns + 1, silent + at - empty, at
        needed = max(needed, at - first - got)
        empty, got = empty + seconds, got + seconds
    return Playback(underruns, silent, needed)


def poisson_arrivals(rate_hz: float, count: int, seed: int) -> np.ndarray:
    """Times in seconds [count] of requests that arrive at random at a mean rate; the first at 0."""
    if rate_hz <= 0 or count < 1:
        raise ValueError(f"rate and count must be positive, got {rate_hz} a second, {count}")
    gaps = np.random.default_rng(seed).exponential(1 / rate_hz, count - 1)
    return np.concatenate([[0.0], np.cumsum(gaps)])


@dataclass(frozen=True)
class Load:
    """What came of a load."""

    takes: list[Take]
    end_sec: float  # until then all callers were busy (closed loop), or all was answered (open)


def closed_loop(
    target: Target, texts: Sequence[str], concurrency: int, count: int, seed: int = 0
) -> Load:
    """`count` requests, `concurrency` of them under way at any time."""
    numbers, lock = iter(range(count)), threading.Lock()
    takes: list[Take] = []
    begin, dry = time.monotonic(), []

    def caller() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                dry.append(time.monotonic() - begin)
                return
            take = Take(number, due=time.monotonic() - begin)
            _ask(target, texts, take, begin, seed)
            takes.append(take)

    with ThreadPoolExecutor(concurrency) as pool:
        for done in [pool.submit(caller) for _ in range(min(concurrency, count))]:
            done.result()
    return Load(sorted(takes, key=lambda take: take.number), min(dry))


def open_loop(
    target: Target, texts: Sequence[str], rate_hz: float, count: int, seed: int = 0
) -> Load:
    """`count` requests that arrive at random, `rate_hz` a second in the mean."""
    due = poisson_arrivals(rate_hz, count, seed)
    takes = [Take(number, float(at)) for number, at in enumerate(due)]
    begin = time.monotonic()
    # A thread for each, so that none waits for another; they are made as they are needed.
    with ThreadPoolExecutor(count) as pool:
        running = []
        for take in takes:
            time.sleep(max(0.0, begin + take.due - time.monotonic()))
            running.append(pool.submit(_ask, target, texts, take, begin, seed))
        for done in running:
            done.result()
    return Load(takes, max(take.done for take in takes))


def _ask(target: Target, texts: Sequence[str], take: Take, begin: float, seed: int) -> None:
    """Send request `take.number` and write down when its sound came. Each has a seed of its own,
    the same on every server and at every load: so the work is the same too."""

    def clock() -> float:
        return time.monotonic() - begin

    take.sent = clock()
    try:
        pieces = stream(
            target.url,
            texts[take.number % len(texts)],
            split=False,
            dialect=target.dialect,
            api_key=target.api_key,
            **{"seed": seed + take.number} | target.options,
        )
        for piece in pieces:
            take.arrivals.append((clock(), len(piece) / BYTES_PER_SEC))
        if not take.arrivals:
            take.error = "an answer without sound"
    except (ServerError, ValueError) as error:
        take.error = str(error)
    take.done = clock()


def prepare(target: Target) -> Target:
    """Read the reference once, not with every request."""
    reference = target.options.get("ref_audio")
    if reference is None:
        return target
    known = load_reference(reference, target.dialect)
    return Target(**vars(target) | {"options": target.options | {"ref_audio": known}})


@dataclass(frozen=True)
class Level:
    """One load: callers (closed loop) or requests a second (open loop), and how many requests."""

    kind: str  # "closed" or "open"
    value: float
    count: int

    @property
    def warm_up(self) -> int:
        """Requests before it that are not counted: every place in the server's batch once."""
        return int(self.value) if self.kind == "closed" else 4

    def measure(self, target: Target, texts: Sequence[str], seed: int) -> Load:
        if self.kind == "closed":
            return closed_loop(target, texts, int(self.value), self.count, seed)
        return open_loop(target, texts, self.value, self.count, seed)

    def __str__(self) -> str:
        return f"{self.value:g} at a time" if self.kind == "closed" else f"{self.value:g} a second"
