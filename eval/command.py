"""Any command line as a system under test: `--model "cmd:COMMAND"`.

If COMMAND names `{out}`, it is run once for each clip, and must write audio (.wav) there:

    cmd:piper --model de.onnx --output_file {out} -- {text}

These are replaced, each within one argument (no shell sees them): {out}, {text} (control tags left
out), {tagged_text} (with them), {language}, {speaker}, {ref_audio}, {ref_text}, {seed}, {id}. What
a row does not have is empty. An exit status other than 0, or no file, is that clip's failure.

Else COMMAND is started once and loads its model once. It reads a JSON line for each clip on
standard input, writes the audio, and answers on standard output, in any order, flushing each line:

    {"id": "7", "out": "/tmp/x/7.wav", "text": "Hallo.", "tagged_text": "Hallo.", "language": "de",
     "speaker": "ann", "ref_audio": "/data/ann.wav", "ref_text": "Hm.", "seed": 1234}
    {"id": "7"}

or `{"id": "7", "error": "why not"}`, optionally with "hit_cap": true if it ran into a length limit.
Logs belong on standard error. It ends when its input does.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from eval.lines import ANSWER_SEC, LineProcess
from higgs_lab.tags import strip_tags

if TYPE_CHECKING:
    from eval.systems import Request, Spoken

FIELDS = (
    "out", "text", "tagged_text", "language", "speaker", "ref_audio", "ref_text", "seed", "id"
)  # fmt: skip
AT_ONCE = 8  # clips asked for before their answers are awaited
RATE_HZ = 24000


def is_per_clip(command: str) -> bool:
    """Whether the command is run for each clip. Raises ValueError for an unknown {name} in it."""
    if "{out}" not in command:
        return False
    for name in re.findall(r"\{(\w+)\}", command):
        if name not in FIELDS:
            known = ", ".join(f"{{{field}}}" for field in FIELDS)
            raise ValueError(f"cmd: unknown {{{name}}} in {command!r}; known: {known}")
    return True


def start(command: str, at_once: int) -> Callable[[Sequence[Request]], list[Spoken]]:
    """A way to speak batches. at_once: commands in parallel, where each clip has its own."""
    if is_per_clip(command):
        pool = ThreadPoolExecutor(at_once)

        def say(requests: Sequence[dict]) -> list[dict]:
            return list(pool.map(lambda request: _run(command, request), requests))

    else:
        process = LineProcess(command, "command")

        def say(requests: Sequence[dict]) -> list[dict]:
            begin = time.monotonic()
            answers = dict(process.ask(requests))
            took_sec = (time.monotonic() - begin) / len(requests)
            return [answers[request["id"]] | {"took_sec": took_sec} for request in requests]

    def speak(requests: Sequence[Request]) -> list[Spoken]:
        with tempfile.TemporaryDirectory(prefix="higgs-lab-cmd-") as folder:
            asked = [_fields(r, number, Path(folder)) for number, r in enumerate(requests)]
            clips = [_clip(*pair) for pair in zip(asked, say(asked), strict=True)]
        if len(clips) > 1 and all(clip.error for clip in clips):
            # The command, not the texts: nothing is kept, so that it can be mended and resumed.
            raise ValueError(f"{command!r} spoke none of {len(clips)} clips: {clips[0].error}")
        return clips

    return speak


def _fields(request: Request, number: int, folder: Path) -> dict:
    row, reference = request.row, request.row.ref_audio
    if reference is not None and not isinstance(reference, Path):  # inside a data set
        with reference.open("rb") as file:
            data = file.read()
        reference = folder / f"reference{number}{Path(reference.name).suffix or '.wav'}"
        reference.write_bytes(data)
    return {
        "id": str(number),
        "out": str(folder / f"{number}.wav"),
        "text": strip_tags(row.text),
        "tagged_text": row.text,
        "language": row.language,
        "speaker": row.speaker,
        "ref_audio": None if reference is None else str(reference.absolute()),
        "ref_text": row.ref_text,
        "seed": request.seed,
    }


def _run(command: str, fields: dict) -> dict:
    """Run a command for one clip; a failure is an answer, a command that is not there an error."""

    def filled(argument: str) -> str:
        values = {name: "" if fields[name] is None else str(fields[name]) for name in FIELDS}
        return re.sub(r"\{(\w+)\}", lambda found: values[found[1]], argument)

    begin = time.monotonic()
    try:
        done = subprocess.run(
            [filled(part) for part in shlex.split(command)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=ANSWER_SEC,
        )
    except OSError as error:
        raise ValueError(f"command {command!r} cannot be started: {error}") from error
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {ANSWER_SEC} s"}
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()[-300:]
        return {"error": f"exit status {done.returncode}: {said or 'nothing said'}"}
    return {"took_sec": time.monotonic() - begin}


def _clip(fields: dict, answer: dict) -> Spoken:
    from eval.systems import Spoken
    from higgs_lab.audio import read_audio

    if answer.get("error"):
        return Spoken(error=str(answer["error"]))
    path = Path(fields["out"])
    if not path.is_file():
        return Spoken(error="the command wrote no audio")
    try:
        wav = read_audio(path, RATE_HZ, max_sec=None)
    except ValueError as error:
        return Spoken(error=str(error).replace(f"{path.parent}/", ""))
    hit_cap = answer.get("hit_cap") is True
    return Spoken(wav, RATE_HZ, took_sec=answer["took_sec"], hit_cap=hit_cap)
