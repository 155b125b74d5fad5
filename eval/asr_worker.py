"""A recogniser in an environment of its own: a command that reads and writes JSON lines.

The contract stands in eval/workers/worker.py, with examples beside it. This side believes nothing:
a line that is no answer, an answer to nothing that was asked, silence and death are errors that
quote what the worker said.
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
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.asr import SAMPLE_RATE_HZ, Recognizer, Transcript, compression_ratio
from eval.languages import language

HELLO_SEC = 120  # to import what it needs and say its name
ANSWER_SEC = 1800  # without any answer; the first one waits for the model to load
AT_ONCE = 32  # requests sent before their answers are awaited


class WorkerRecognizer(Recognizer):
    """A running worker. Ends with `close`, or when this process does and its input closes."""

    def __init__(
        self,
        command: str,
        name: str,
        hello_sec: float = HELLO_SEC,
        answer_sec: float = ANSWER_SEC,
    ):
        self.command, self.name, self._answer_sec = command, name, answer_sec
        parts = shlex.split(command)
        if not parts:
            raise ValueError(f"recogniser {name!r}: write worker:COMMAND")
        self._folder = tempfile.TemporaryDirectory(prefix="higgs-lab-worker-")
        self._stderr = (Path(self._folder.name) / "stderr").open("w+b")
        try:
            self._process = subprocess.Popen(
                parts,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                start_new_session=True,  # so that what a wrapper script starts ends with it
            )
        except OSError as error:
            raise ValueError(f"worker {command!r} cannot be started: {error}") from error
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.hello = self._next(hello_sec, "to say its name")
            if not all(isinstance(self.hello.get(key), str) for key in ("name", "revision")):
                raise ValueError(
                    f"worker {command!r}: its first line {self.hello} must name it: "
                    '{"name": "...", "revision": "...", "languages": [...] or null}'
                )
            self._languages = _known(self.hello.get("languages"))
        except BaseException:
            self.close()
            raise

    def hears(self, lang: str) -> bool:
        return self._languages is None or language(lang).code in self._languages

    def transcribe_all(
        self, wavs: Sequence[np.ndarray], langs: Sequence[str]
    ) -> list[Transcript | None]:
        found: list[Transcript | None] = [None] * len(wavs)
        heard = [i for i, lang in enumerate(langs) if self.hears(lang)]
        for begin in range(0, len(heard), AT_ONCE):
            members = heard[begin : begin + AT_ONCE]
            answers = self._ask([wavs[i] for i in members], [langs[i] for i in members])
            for i, answer in zip(members, answers, strict=True):
                found[i] = answer
        return found

    def close(self) -> None:
        """Let it end by itself, then make it."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            pass
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._stderr.close()
        self._folder.cleanup()

    def _ask(self, wavs: Sequence[np.ndarray], langs: Sequence[str]) -> list[Transcript]:
        import soundfile

        answers: dict[str, Transcript] = {}
        with tempfile.TemporaryDirectory(dir=self._folder.name) as folder:
            asked = [str(number) for number in range(len(wavs))]
            for id, wav, lang in zip(asked, wavs, langs, strict=True):
                path = Path(folder) / f"{id}.wav"
                soundfile.write(path, np.clip(wav, -1, 1), SAMPLE_RATE_HZ, subtype="PCM_16")
                row = language(lang)
                request = {"id": id, "audio": str(path), "language": row.code, "iso3": row.iso3}
                request |= {"script": row.script, "omniasr": row.omniasr, "mms": row.mms}
                if not self._send(request):
                    break  # what it wrote before it died says why
            while len(answers) < len(asked):
                answer = self._next(self._answer_sec, "to answer")
                id = answer.get("id")
                if id not in asked or id in answers:
                    state = "answered twice" if id in answers else "never asked"
                    raise self._error(f"wrote {answer}, whose id was {state}")
                answers[id] = self._transcript(answer)
        failed = [answer.error for answer in answers.values() if answer.error]
        if len(failed) == len(asked) > 1:
            raise self._error(f"could hear none of {len(asked)} clips, one because: {failed[0]}")
        return [answers[id] for id in asked]

    def _transcript(self, answer: dict) -> Transcript:
        text, error = answer.get("text"), answer.get("error")
        if error:
            return Transcript(text="", error=str(error))
        if not isinstance(text, str):
            raise self._error(f"wrote {answer}, which has neither a text nor an error")
        try:
            figures = {
                key: float(answer[key])
                for key in ("avg_logprob", "no_speech_prob", "guessed_prob", "expected_prob")
                if answer.get(key) is not None
            }
        except (TypeError, ValueError):
            raise self._error(f"wrote {answer}, whose figures are no numbers") from None
        return Transcript(
            text=text.strip(),
            compression_ratio=compression_ratio(text.strip()),
            cut=answer.get("cut") is True,
            guessed=None if answer.get("guessed") is None else str(answer["guessed"]),
            **figures,
        )

    def _send(self, request: dict) -> bool:
        try:
            self._process.stdin.write(json.dumps(request, ensure_ascii=False).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            return False
        return True

    def _next(self, limit_sec: float, what: str) -> dict:
        try:
            line = self._lines.get(timeout=limit_sec)
        except queue.Empty:
            raise self._error(f"took more than {limit_sec:g} s {what}") from None
        if line is None:
            raise self._error(f"ended before it was {what.replace('to ', 'able to ', 1)}")
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            shown = line[:200].decode(errors="replace").rstrip()
            raise self._error(
                f"printed {shown!r}, which is no JSON object; logs belong on standard error"
            )
        return answer

    def _error(self, what: str) -> ValueError:
        """An error that tells how the worker ended and what it said on standard error."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.5)
        code = self._process.poll()
        state = "" if code is None else f" (exit status {code})"
        self._stderr.flush()
        said = Path(self._stderr.name).read_bytes().decode(errors="replace").strip()
        tail = "".join(f"\n  {line}" for line in said.splitlines()[-8:])
        return ValueError(f"worker {self.command!r} {what}{state}{tail and '; it said:' + tail}")

    def _read(self) -> None:
        for line in self._process.stdout:
            if line.strip():
                self._lines.put(line)
        self._lines.put(None)


def _known(codes: Sequence[str] | None) -> set[str] | None:
    """Those of a worker's languages that have a row here; None is all."""
    if codes is None:
        return None
    known = set()
    for code in codes:
        with contextlib.suppress(ValueError):
            known.add(language(code).code)
    return known


def worker_details(command: str, spec: str) -> dict:
    """What a worker says of itself, before it loads its model."""
    worker = WorkerRecognizer(command, spec)
    worker.close()
    return {
        "name": spec,
        "revision": worker.hello["revision"],
        "package": worker.hello["name"],
        "precision": "its own",
        "options": "its own",
    }
