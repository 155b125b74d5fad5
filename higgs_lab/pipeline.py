"""Prompts to waves: the codec decodes what has ended while the talker goes on with the rest."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from higgs_lab.codec import Codec
from higgs_lab.generate import Generation, Sampling, generate_each
from higgs_lab.prompt import Prompt
from higgs_lab.talker import Talker

Spoken = tuple[int, Generation, np.ndarray]


def speak_each(
    talker: Talker,
    codec: Codec,
    prompts: Sequence[Prompt],
    sampling: Sampling | Sequence[Sampling],
    max_batch: int | None = None,
    compile: bool | None = None,
    precision: str = "fp32",
    decode_together: int | None = None,
) -> Iterator[Spoken]:
    """(index, codes, wave) of each prompt, soon after it has ended; see `generate_each`.

    precision: of the codec. decode_together: clips in a batch of the codec, the last are fewer;
    none: a quarter of those spoken at once, 8 at least.
    """
    decode_together = decode_together or max(8, min(max_batch or 256, len(prompts)) // 4)
    gpu = codec.device.type == "cuda"
    stream = _side_stream(codec.device) if gpu else None

    def decode(part: list[tuple[int, Generation]]) -> list[Spoken]:
        with torch.cuda.stream(stream):  # None: the thread's own; on a CPU nothing
            codes = [made.codes for _, made in part]
            # on a CPU padding costs what it would in speech, and a batch gains nothing
            waves = codec.decode_batch(codes, ragged=gpu, precision=precision)
        return [(index, made, wave) for (index, made), wave in zip(part, waves, strict=True)]

    under_way: deque[Future] = deque()
    ready: list[tuple[int, Generation]] = []
    pool = ThreadPoolExecutor(1)
    try:
        for item in generate_each(talker, prompts, sampling, False, max_batch, compile):
            ready.append(item)
            if len(ready) >= decode_together:
                under_way.append(pool.submit(decode, ready))
                ready = []
            while under_way and under_way[0].done():
                yield from under_way.popleft().result()
        if ready:
            under_way.append(pool.submit(decode, ready))
        while under_way:
            yield from under_way.popleft().result()
    finally:  # who stops need not wait for what is queued
        pool.shutdown(cancel_futures=True)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all calls: the allocator keeps freed memory for the stream that it was used on."""
    return torch.cuda.Stream(device)
