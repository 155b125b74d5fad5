"""Packs made ahead by a thread, in pinned memory, without losing the loader's position."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator
from dataclasses import replace

import torch

from higgs_lab.batches import Batch, PackedLoader
from higgs_lab.text_table import HostTable


def one_thread_beside_a_gpu() -> None:
    """For a process that trains on one: as `accelerate launch` has it, unless OMP_NUM_THREADS says
    otherwise.

    Over what little the host computes in a step, the threads of many cores wait for each other
    longer than one of them would need.
    """
    if torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


class Prefetch:
    """Iterator over a loader that builds up to `depth` packs ahead of what is taken.

    `state_dict` is the position behind the last pack taken, not behind the last one built. An error
    while building is raised where its pack would have come. table: of text, to be looked up here.
    """

    def __init__(
        self,
        loader: PackedLoader,
        depth: int = 2,
        pin: bool = False,
        table: HostTable | None = None,
    ):
        self.loader, self.pin, self.table = loader, pin, table
        self.state = loader.state_dict()
        self.made: queue.Queue = queue.Queue(maxsize=depth)
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._build, daemon=True)
        self.thread.start()

    def _build(self) -> None:
        try:
            for batch in self.loader:
                if self.table is not None:
                    batch = replace(batch, text=self.table(batch.ids))
                item = (batch.pin() if self.pin else batch, self.loader.state_dict())
                if not self._put(item):
                    return
        except BaseException as error:  # for the thread that takes
            self._put(error)

    def _put(self, item) -> bool:
        while not self.closed.is_set():
            try:
                self.made.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        item = self.made.get()
        if isinstance(item, BaseException):
            raise item
        batch, self.state = item
        return batch

    def state_dict(self) -> dict[str, int]:
        return self.state

    def close(self) -> None:
        self.closed.set()
        self.thread.join()
