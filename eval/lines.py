"""A command that is given JSON lines and answers in JSON lines: recognisers and speakers elsewhere.

This side believes nothing: a line that is no answer, an answer to nothing that was asked, silence
and death are errors that quote what the command said.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

ANSWER_SEC = 1800  # without any answer; the first one waits for the model to load


class LineProcess:
    """A running command. Ends with `close`, or when this process does and its input closes.

    what: what it is called in errors, such as "worker". folder: a scratch folder of its own.
    """

    def __init__(self, command: str, what: str):
        self.command, self.what = command, what
        parts = shlex.split(command)
        if not parts:
            raise ValueError(f"{what}: no command is given")
        self._folder = tempfile.TemporaryDirectory(prefix="higgs-lab-lines-")
        self.folder = Path(self._folder.name)
        self._stderr = (self.folder / "stderr").open("w+b")
        try:
            self._process = subprocess.Popen(
                parts,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                start_new_session=True,  # so that what a wrapper script starts ends with it
            )
        except OSError as error:
            raise ValueError(f"{what} {command!r} cannot be started: {error}") from error
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def ask(
        self, requests: Sequence[dict], limit_sec: float = ANSWER_SEC
    ) -> Iterator[tuple[str, dict]]:
        """Send requests, each with an "id" of its own; yields (id, answer) as they come, all."""
        waiting = [request["id"] for request in requests]
        asked = set(waiting)
        for request in requests:
            if not self._send(request):
                break  # what it wrote before it died says why
        while waiting:
            answer = self.next(limit_sec, "to answer")
            id = answer.get("id")
            if id not in waiting:
                state = "answered twice" if str(id) in asked else "never asked"
                raise self.error(f"wrote {answer}, whose id was {state}")
            waiting.remove(id)
            yield id, answer

    def next(self, limit_sec: float, purpose: str) -> dict:
        """Its next line. purpose: "to ...", for the error when none comes."""
        try:
            line = self._lines.get(timeout=limit_sec)
        except queue.Empty:
            raise self.error(f"took more than {limit_sec:g} s {purpose}") from None
        if line is None:
            raise self.error(f"ended before it was {purpose.replace('to ', 'able to ', 1)}")
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            shown = line[:200].decode(errors="replace").rstrip()
            raise self.error(
                f"printed {shown!r}, which is no JSON object; logs belong on standard error"
            )
        return answer

    def error(self, problem: str) -> ValueError:
        """An error that tells how the command ended and what it said on standard error."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.5)
        code = self._process.poll()
        state = "" if code is None else f" (exit status {code})"
        self._stderr.flush()
        said = Path(self._stderr.name).read_bytes().decode(errors="replace").strip()
        tail = "".join(f"\n  {line}" for line in said.splitlines()[-8:])
        said = tail and "; it said:" + tail
        return ValueError(f"{self.what} {self.command!r} {problem}{state}{said}")

    def close(self) -> None:
        """Let it end by itself, then make it."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._stderr.close()
        self._folder.cleanup()

    def _send(self, request: dict) -> bool:
        try:
            self._process.stdin.write(json.dumps(request, ensure_ascii=False).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            return False
        return True

    def _read(self) -> None:
        for line in self._process.stdout:
            if line.strip():
                self._lines.put(line)
        self._lines.put(None)
