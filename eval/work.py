"""Sharing the work of a run among processes that see one folder: ledgers, claims, a cache.

A stage's rows lie in an append-only JSONL file, its ledger. A process claims a batch by locking the
positions of the batch's keys, works, appends all rows in one go and lets go. The kernel frees the
locks of a process that dies, so that another takes its batch. Batches are cut from the whole list
of keys, done or not, so that they are the same ones in every process and after every resume, and so
are the results: one process, four, or one killed and started again differ in no digit.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from higgs_lab.runlog import Progress, RunLog

WAIT_SEC = 0.2  # between looks at what the other processes have left


class Ledger:
    """Rows of one stage by key, shared with the other processes that have the same file open.

    names: the fields that make up a row's key. Of two rows with one key the first counts.
    """

    def __init__(self, path: str | Path, names: Sequence[str] = ("id", "take")):
        self.path, self.names = Path(path), tuple(names)
        self.rows: dict[tuple, dict] = {}
        self._offset = 0
        self._locks = Locks(self.path.parent / f".{self.path.name}.lock")
        self.refresh()

    def refresh(self) -> None:
        """Read what has been appended since the last look; an unfinished last line is left."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data.rfind(b"\n") + 1
        for line in data[:whole].splitlines():
            try:
                row = json.loads(line)
                key = tuple(row[name] for name in self.names)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}: {line[:80]!r} is no row of this stage ({error!r}); delete that "
                    "line, and its clip is done again"
                ) from error
            self.rows.setdefault(key, row)
        self._offset += whole

    def append(self, rows: Sequence[dict]) -> None:
        """Add rows, except those whose key is there already."""
        with self._locks.held(0):
            with RunLog(self.path) as log:  # cuts a line that a killed writer left unfinished
                self.refresh()
                for row in rows:
                    if tuple(row[name] for name in self.names) not in self.rows:
                        log.log(**row)
            # Read back, so that a resumed run has the same digits as this one.
            self.refresh()

    def claim(
        self, batches: Sequence[Sequence[tuple]], label: str = ""
    ) -> Iterator[Sequence[tuple]]:
        """Batches of keys that are this process's to do; returns when all are done by anyone.

        The loop's body must append a row for every key. A batch of which some keys are done (a
        writer was killed) is given whole. label: shows the progress of all processes under it.
        """
        total = sum(len(batch) for batch in batches)
        begun = len(self.rows)
        show = bool(label) and begun < total  # nothing to say where all was done before
        with Progress(total, "clips", label, start=begun, enabled=show) as progress:
            for batch in self._claim(batches):
                if batch:
                    yield batch
                progress.update(len(self.rows) - progress.done)

    def _claim(self, batches: Sequence[Sequence[tuple]]) -> Iterator[Sequence[tuple]]:
        """Batches as they can be had; an empty one for each look at the others' work."""
        starts = [0]
        for batch in batches:
            starts.append(starts[-1] + len(batch))
        waiting = [number for number, batch in enumerate(batches) if not self._done(batch)]
        while waiting:
            left = []
            for number in waiting:
                batch = batches[number]
                if self._done(batch):
                    continue
                # Position 0 is the appending lock. Other batch sizes elsewhere overlap, and wait.
                place = 1 + starts[number], len(batch)
                if not self._locks.take(*place):
                    left.append(number)
                    continue
                try:
                    self.refresh()
                    if not self._done(batch):
                        yield batch
                finally:
                    self._locks.free(*place)
            if left:
                time.sleep(WAIT_SEC)
                self.refresh()
                yield ()
            waiting = [number for number in left if not self._done(batches[number])]

    def close(self) -> None:
        self._locks.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _done(self, batch: Sequence[tuple]) -> bool:
        return all(key in self.rows for key in batch)


class Locks:
    """Places of a lock file, each held by one process at most; they go with the process."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")

    def take(self, place: int, length: int = 1, shared: bool = False) -> bool:
        """Whether the places could be had at once."""
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.lockf(self._file, kind | fcntl.LOCK_NB, length, place)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def free(self, place: int, length: int = 1) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN, length, place)

    @contextlib.contextmanager
    def held(self, place: int, shared: bool = False) -> Iterator[None]:
        """Wait for a place and hold it."""
        fcntl.lockf(self._file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, 1, place)
        try:
            yield
        finally:
            self.free(place)

    def close(self) -> None:
        self._file.close()


class Cache:
    """What a judge made of a sound, kept across runs by (sound, judge).

    details: what decides the judge's answers (its name is left out: the same weights may lie
    elsewhere). A folder of None keeps nothing.
    """

    def __init__(self, folder: str | Path | None, kind: str, details: dict, names: Sequence[str]):
        self.names = tuple(names)
        decisive = {key: value for key, value in details.items() if key != "name"}
        text = json.dumps(decisive, sort_keys=True, ensure_ascii=False)
        name = f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
        self._ledger = None if folder is None else Ledger(Path(folder) / name, names)

    def get(self, *key) -> dict | None:
        """The row kept for a key, the key's own fields left out."""
        row = self._ledger.rows.get(key) if self._ledger else None
        return row and {name: value for name, value in row.items() if name not in self.names}

    def put(self, rows: Sequence[dict]) -> None:
        if self._ledger and rows:
            self._ledger.append(rows)

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *exc) -> None:
        if self._ledger:
            self._ledger.close()


def chunks(keys: Sequence, size: int) -> list[Sequence]:
    return [keys[begin : begin + size] for begin in range(0, len(keys), size)]


def rank() -> tuple[int, int]:
    """(rank, processes) as accelerate or torchrun say; (0, 1) without them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
