"""A recogniser in an environment of its own: a command that reads and writes JSON lines.

The contract stands in eval/workers/worker.py, with examples beside it.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.asr import SAMPLE_RATE_HZ, Recognizer, Transcript, compression_ratio
from eval.languages import language
from eval.lines import ANSWER_SEC, LineProcess

HELLO_SEC = 120  # to import what it needs and say its name
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
        self.name, self._answer_sec = name, answer_sec
        if not command.strip():
            raise ValueError(f"recogniser {name!r}: write worker:COMMAND")
        self._worker = LineProcess(command, "worker")
        try:
            self.hello = self._worker.next(hello_sec, "to say its name")
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
        self._worker.close()

    def _ask(self, wavs: Sequence[np.ndarray], langs: Sequence[str]) -> list[Transcript]:
        import soundfile

        requests = []
        with tempfile.TemporaryDirectory(dir=self._worker.folder) as folder:
            for number, (wav, lang) in enumerate(zip(wavs, langs, strict=True)):
                path = Path(folder) / f"{number}.wav"
                soundfile.write(path, np.clip(wav, -1, 1), SAMPLE_RATE_HZ, subtype="PCM_16")
                row = language(lang)
                request = {"id": str(number), "audio": str(path), "language": row.code}
                request |= {"iso3": row.iso3, "script": row.script}
                requests.append(request | {"omniasr": row.omniasr, "mms": row.mms})
            answers = {
                id: self._transcript(answer)
                for id, answer in self._worker.ask(requests, self._answer_sec)
            }
        found = [answers[request["id"]] for request in requests]
        failed = [answer.error for answer in found if answer.error]
        if len(failed) == len(found) > 1:
            raise self._worker.error(
                f"could hear none of {len(found)} clips, one because: {failed[0]}"
            )
        return found

    def _transcript(self, answer: dict) -> Transcript:
        text, error = answer.get("text"), answer.get("error")
        if error:
            return Transcript(text="", error=str(error))
        if not isinstance(text, str):
            raise self._worker.error(f"wrote {answer}, which has neither a text nor an error")
        try:
            figures = {
                key: float(answer[key])
                for key in ("avg_logprob", "no_speech_prob", "guessed_prob", "expected_prob")
                if answer.get(key) is not None
            }
        except (TypeError, ValueError):
            raise self._worker.error(f"wrote {answer}, whose figures are no numbers") from None
        return Transcript(
            text=text.strip(),
            compression_ratio=compression_ratio(text.strip()),
            cut=answer.get("cut") is True,
            guessed=_code(answer.get("guessed")),
            **figures,
        )


def _code(guessed: object) -> str | None:
    """A worker's name for a language as ours, so that it can be held against the one asked for."""
    if guessed is None:
        return None
    try:
        return language(str(guessed)).code
    except ValueError:
        return str(guessed)


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
