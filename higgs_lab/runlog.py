"""What a run leaves behind: metrics as JSONL, where it came from, files that are whole or absent.

`RunLog` appends one JSON object per line and survives a kill in the middle of a line.
`atomic_path` is how every file and folder of this project is written. No torch is imported.
"""

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import resource
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

_PACKAGES = ("torch", "torchaudio", "transformers", "accelerate", "peft", "datasets")
_PACKAGES += ("safetensors", "numpy", "soundfile", "soxr", "vllm", "vllm-omni")
SETTLED_SEC = 3.0  # of work, at least, before a rate is shown


class RunLog:
    """An append-only JSONL file, flushed line by line.

    Opening an existing file cuts a last line that a kill left unfinished, so appending goes on
    cleanly. Values may be numbers, text, lists, dicts, numpy or torch scalars; NaN and infinities
    are written as the strings "nan", "inf" and "-inf" (JSON has no such numbers), which `float()`
    reads back.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _cut_unfinished_line(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def log(self, **values) -> None:
        """Append one line, such as log(step=3, loss=2.5). Raises OSError on a full disk."""
        self.log_all([values])

    def log_all(self, rows: Iterable[dict]) -> None:
        """Append lines in one write, so that a kill hardly ever leaves some of them only."""
        lines = [json.dumps(_plain(row), ensure_ascii=False) + "\n" for row in rows]
        with _explain_disk_full(self.path):
            self._file.write("".join(lines))
            self._file.flush()

    def rows(self) -> list[dict]:
        return read_jsonl(self.path)

    def cut_after(self, step: int) -> None:
        """Drop rows whose `step` is greater: a run resumed at a checkpoint writes them again."""
        kept = [row for row in self.rows() if row.get("step", step) <= step]
        self._file.close()
        with atomic_path(self.path) as temporary:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
            temporary.write_text("".join(lines), encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def read_jsonl(path: str | Path) -> list[dict]:
    """All rows of a JSONL file; an unfinished last line is left out.

    Raises ValueError with file and line for a broken line before the last.
    """
    rows = []
    lines = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):  # no newline behind it: the writer was killed here
                break
            raise ValueError(f"{path}:{number}: not a line of JSON ({error})") from error
    return rows


def provenance(**extra) -> dict:
    """Where a result comes from: code, versions, command, time; plus what the caller adds.

    `git_commit` and `git_dirty` are those of the clone that higgs_lab runs from, None when it is
    installed as a wheel. `extra` holds what only the caller knows (config, codec hash, seed).
    """
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    commit, dirty = _git_state()
    result = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git_commit": commit,
        "git_dirty": dirty,
        "versions": versions,
        "platform": platform.platform(),
    }
    torch = sys.modules.get("torch")  # never imported just to ask
    if torch is not None and torch.cuda.is_available():
        result["device"] = torch.cuda.get_device_name()
    return result | _plain(extra)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on leaving, what was made there becomes `path`.

        with atomic_path("out/model") as temporary:
            temporary.mkdir()
            ...

    The body writes a file or makes a folder there (the name keeps its suffix, as audio writers
    look at it). It is synced to disk, then renamed. An existing `path` is replaced; for a folder
    there is an instant in which neither stands, never one in which a half-written one does. If the
    body raises, the temporary is removed and `path` is untouched. A full disk says so.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{secrets.token_hex(4)}-{path.name}")
    try:
        with _explain_disk_full(path):
            yield temporary
            if not temporary.exists():
                raise RuntimeError(f"nothing was written to {temporary} for {path}")
            _sync(temporary)
            _replace(temporary, path)
    finally:
        _remove(temporary)


def write_json_atomic(path: str | Path, obj: object) -> None:
    with atomic_path(path) as temporary:
        text = json.dumps(_plain(obj), ensure_ascii=False, indent=2)
        temporary.write_text(text + "\n", encoding="utf-8")


def remove_leftovers(folder: str | Path) -> None:
    """Remove temporaries that a killed process left in a folder. Call it when no other writes."""
    for leftover in Path(folder).glob(".tmp-*"):
        _remove(leftover)


def files_hash(files: Iterable[Path], folder: str | Path) -> str:
    """Hash of files' names below `folder` and of their bytes, in any order (16 hex digits)."""
    digest = hashlib.sha256()
    for path in sorted(path for path in files if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def fingerprint(folder: str | Path) -> str:
    """Hash of a folder's configs whole and of its weight files in samples (16 hex digits).

    Start, middle and end of each file, and its size: a retrained model under an old name is told
    apart without reading 9 GB. Raises FileNotFoundError for a folder without weights.
    """
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix in (".json", ".safetensors"))
    if not any(p.suffix == ".safetensors" for p in files):
        raise FileNotFoundError(f"{folder} holds no .safetensors weights")
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(json.dumps([path.relative_to(folder).as_posix(), size]).encode())
        with path.open("rb") as file:
            if path.suffix == ".json" or size < 3 << 20:
                digest.update(file.read())
                continue
            for offset in (0, size // 2, size - (1 << 20)):
                file.seek(offset)
                digest.update(file.read(1 << 20))
    return digest.hexdigest()[:16]


class Progress:
    """Progress of long work: share done, rate, time left; on stderr.

    On a terminal one line is rewritten; otherwise (log files, CI) a line is printed every
    `every_sec` and at the end. Work done before a resume is `start`: it counts as done, not for
    the rate. Rate and time left leave out the first update, which waits for loading and compiling.
    Use as a context manager and call `update(n)`.
    """

    def __init__(
        self,
        total: float,
        unit: str,
        label: str = "",
        start: float = 0,
        every_sec: float = 10.0,
        enabled: bool = True,
    ):
        self.total, self.unit, self.label, self.done = total, unit, label, start
        self._start, self._begin, self._every_sec = start, time.monotonic(), every_sec
        self._first: tuple[float, float] | None = None  # when it came, and what was done then
        self._shown_at = self._begin
        self._terminal = sys.stderr.isatty()
        self._enabled = enabled
        self._note = ""

    def update(self, n: float = 1, note: str = "") -> None:
        self.done += n
        self._note = note
        now = time.monotonic()
        if n > 0 and self._first is None:
            self._first = now, self.done
        whole = self.done >= self.total and not self._terminal  # close() prints that line
        if now - self._shown_at >= (0.2 if self._terminal else self._every_sec) and not whole:
            self._shown_at = now
            self._show("\r" if self._terminal else "")

    def line(self) -> str:
        """Such as "encode 120/600 clips (20 %), 3.1 clips/s, 2 min 35 s left"."""
        now = time.monotonic()
        share = f" ({100 * self.done / self.total:.0f} %)" if self.total else ""
        parts = [
            f"{self.label} {_number(self.done)}/{_number(self.total)} {self.unit}{share}".strip()
        ]
        if self.done >= self.total:
            elapsed = now - self._begin
            rate = (self.done - self._start) / elapsed if elapsed > 0 else 0.0
            parts.append(f"{_number(rate)} {self.unit}/s, took {duration(elapsed)}")
        elif rate := self._settled_rate(now):
            left = duration((self.total - self.done) / rate)
            parts.append(f"{_number(rate)} {self.unit}/s, {left} left")
        return ", ".join(parts + [self._note] * bool(self._note))

    def _settled_rate(self, now: float) -> float:
        """Since the first update; 0 while too little time has passed since.

        Too little is also less than half the wait for the first: clips of one batch come at once,
        and then it is long until the next.
        """
        first_at, first_done = self._first or (now, self.done)
        elapsed = now - first_at
        settled = elapsed >= max(SETTLED_SEC, (first_at - self._begin) / 2)
        return (self.done - first_done) / elapsed if settled else 0.0

    def close(self) -> None:
        self._show("\r" if self._terminal else "", end="\n")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _show(self, lead: str, end: str | None = None) -> None:
        if self._enabled:
            clear = "\x1b[K" if self._terminal else ""
            end = end or ("" if self._terminal else "\n")
            print(lead + self.line() + clear, end=end, file=sys.stderr, flush=True)


def peak_memory_gb() -> float:
    """The most memory that this process has held so far, pages of mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9  # bytes there, KiB here


def duration(seconds: float) -> str:
    """Such as "45 s", "2 min 35 s", "3 h 05 min"."""
    seconds = int(math.ceil(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) or value >= 100 else f"{value:.3g}"


def _plain(value: object) -> object:
    """Values as JSON knows them."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, os.PathLike):
        return str(value)
    if hasattr(value, "tolist"):  # numpy and torch: scalars and arrays
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    raise TypeError(f"cannot write {type(value).__name__} {value!r} as JSON")


def _cut_unfinished_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        tail = b""
        while end and b"\n" not in tail:
            step = min(end, 65536)
            end -= step
            file.seek(end)
            tail = file.read(step)
        whole = end + tail.rfind(b"\n") + 1
        if whole < size:
            file.truncate(whole)


def _git_state() -> tuple[str | None, bool | None]:
    here = Path(__file__).resolve()

    def git(*args: str) -> str:
        command = ["git", "-C", str(here.parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # a venv inside another project is not us
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return None, None


@contextlib.contextmanager
def _explain_disk_full(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        folder = next(parent for parent in [path, *path.parents] if parent.is_dir())
        free_mib = shutil.disk_usage(folder).free // 2**20
        if not _is_disk_full(error, free_mib):
            raise
        raise OSError(
            errno.ENOSPC,
            f"the disk is full while writing {path} ({free_mib} MiB free in {folder}); nothing "
            "half-written was left there: free some space and run the same command again",
        ) from error


def _is_disk_full(error: Exception, free_mib: int) -> bool:
    """safetensors has an error of its own for it, torch.save says "unexpected pos 576 vs 534"."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "No space left on device" in str(error) or (
        free_mib == 0 and isinstance(error, RuntimeError)
    )


def _sync(path: Path) -> None:
    """Flush a file, or every file and folder of a folder, to the disk."""
    for item in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if item.is_symlink():
            continue
        handle = os.open(item, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _replace(temporary: Path, path: Path) -> None:
    if path.is_dir():
        old = path.with_name(f".tmp-{os.getpid()}-{secrets.token_hex(4)}-old-{path.name}")
        os.rename(path, old)
        os.rename(temporary, path)
        _remove(old)
    else:
        os.replace(temporary, path)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)  # the new name itself
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
