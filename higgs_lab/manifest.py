"""One utterance per line: the manifest. `corpora.py` brings other data sets to the same rows.

A manifest is a JSONL file; paths in it are relative to its folder:

    {"audio": "wavs/a.wav", "text": "Hello there.", "speaker": "ann", "language": "en"}

Fields: `audio`, `text`, and optional `id`, `speaker`, `language`, `ref_audio`, `ref_text`, `split`,
`info` (an object with anything else, kept and not looked at).
"""

import difflib
import io
import json
import os
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import BinaryIO

from higgs_lab.runlog import atomic_path

AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus")


@dataclass(frozen=True)
class EmbeddedAudio:
    """A clip inside a Hugging Face data set: opens like a Path, decoded by soundfile."""

    dataset: object = field(repr=False, compare=False)
    column: str = field(repr=False)
    row: int
    name: str  # for messages

    def open(self, mode: str = "rb") -> BinaryIO:
        cell = self.dataset[self.row][self.column]
        if cell and cell.get("bytes"):
            return io.BytesIO(cell["bytes"])
        if cell and cell.get("path"):
            return Path(cell["path"]).open("rb")
        raise ValueError(f"{self.name} holds no audio")

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Utterance:
    """A row of a manifest. Paths are absolute; `where` is "file:line" for messages."""

    audio: Path | EmbeddedAudio | None
    text: str
    id: str
    speaker: str | None = None
    language: str | None = None
    ref_audio: Path | EmbeddedAudio | None = None
    ref_text: str | None = None
    split: str | None = None
    info: dict = field(default_factory=dict, hash=False)
    where: str = field(default="", compare=False)


FIELDS = tuple(f.name for f in fields(Utterance) if f.name != "where")


def read_manifest(
    path: str | Path, check_files: bool = True, need_audio: bool = False
) -> list[Utterance]:
    """Read a JSONL manifest.

    check_files: every audio file named must exist.
    need_audio: a row without `audio` is an error (training needs it, synthesis does not).

    A row without `id` gets its audio path without suffix, or its line number when it has no audio.
    Raises FileNotFoundError for a missing file; ValueError with file:line, field and fix for lines
    that are no JSON object, unknown fields (with near matches), wrong types, empty text, duplicate
    ids, a `ref_text` without `ref_audio`, and a `ref_audio` that is the `audio` itself.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"manifest {path} does not exist (working folder {Path.cwd()})")
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON ({error}): one object per line") from error
        if not isinstance(row, dict):
            raise ValueError(f'{where}: expected an object like {{"audio": ..., "text": ...}}')
        rows.append((where, str(number).zfill(6), row))
    return make_utterances(rows, path.parent, str(path), check_files, need_audio)


def write_manifest(path: str | Path, rows: Iterable[Utterance]) -> None:
    """Write rows as a JSONL manifest; files in its folder or below get relative paths. Atomic.

    Raises ValueError for a row whose audio is inside a data set: it has no path to write.
    """
    folder = Path(path).resolve().parent
    lines = []
    for row in rows:
        record = {}
        for name in FIELDS:
            value = getattr(row, name)
            if isinstance(value, EmbeddedAudio):
                raise ValueError(
                    f"{value}: {name} lies inside a data set; write it to a file first"
                )
            if isinstance(value, Path):
                value = Path(value).resolve()
                inside = value.is_relative_to(folder)
                value = value.relative_to(folder).as_posix() if inside else str(value)
            if value not in (None, {}):
                record[name] = value
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    with atomic_path(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


def file_stem(id: str) -> str:
    """A file name made of an utterance's id: unchanged if safe, else cleaned and told apart."""
    clean = re.sub(r"[^\w.-]", "_", id).strip(".")[:100]
    return clean if clean == id else f"{clean}-{zlib.crc32(id.encode()):08x}"


def make_utterances(
    rows: list[tuple[str, str, dict]],
    folder: Path,
    source: str,
    check_files: bool,
    need_audio: bool,
) -> list[Utterance]:
    """Check raw rows (where, id if there is no better, fields) and make utterances of them.

    Raises as `read_manifest` says; source: what to call them all.
    """
    if not rows:
        raise ValueError(f"{source} holds no utterances")
    result, seen = [], {}
    for where, fallback_id, row in rows:
        _check_fields(where, row)
        row = {name: value for name, value in row.items() if value is not None}
        for name in ("audio", "ref_audio"):
            if isinstance(row.get(name), str):
                row[name] = Path(os.path.normpath(folder.absolute() / row[name]))
                if check_files and not row[name].is_file():
                    raise FileNotFoundError(
                        f"{where}, field {name}: {row[name]} does not exist; paths are relative to "
                        f"{folder.absolute()}"
                    )
        if need_audio and "audio" not in row:
            raise ValueError(f"{where}, field audio: missing; name the recording of the text")
        if not row.get("text", "").strip():
            raise ValueError(f"{where}, field text: missing or empty; write what is spoken")
        if "ref_text" in row and "ref_audio" not in row:
            raise ValueError(f"{where}, field ref_text: needs ref_audio, the clip it transcribes")
        if "ref_audio" in row and row["ref_audio"] == row.get("audio"):
            raise ValueError(
                f"{where}, field ref_audio: is the audio itself, so the voice could be copied from "
                "the answer; name another clip of the speaker"
            )
        id, made = row.pop("id", None), ""
        if id is None:
            audio = row.get("audio")
            inside = isinstance(audio, Path) and audio.is_relative_to(folder.absolute())
            id = audio.relative_to(folder.absolute()).with_suffix("").as_posix() if inside else None
            id, made = id or fallback_id, " (made from the file name, as the row has no id)"
        if id in seen:
            raise ValueError(
                f"{where}, field id: {id!r}{made} is already used at {seen[id]}; ids must differ"
            )
        seen[id] = where
        result.append(Utterance(**{"audio": None, "id": id, "where": where, **row}))
    return result


def _check_fields(where: str, row: dict) -> None:
    for name, value in row.items():
        if name not in FIELDS:
            near = difflib.get_close_matches(str(name).lower(), FIELDS, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(FIELDS)};"
            raise ValueError(
                f"{where}: unknown field {name!r}; {hint} Anything else belongs into info: {{...}}"
            )
        if name in ("id", "speaker") and isinstance(value, int) and not isinstance(value, bool):
            row[name] = value = str(value)
        if name == "info":
            wanted = dict
        elif name in ("audio", "ref_audio"):
            wanted = (str, EmbeddedAudio)
        else:
            wanted = str
        if value is not None and not isinstance(value, wanted):
            kind = "an object" if name == "info" else "text"
            raise ValueError(f"{where}, field {name}: {value!r} should be {kind}")
        if value == "" and name != "text":
            raise ValueError(f"{where}, field {name}: empty; give a value or leave the field out")


def read_text(path: Path) -> str:
    """UTF-8, with or without a byte order mark; \\r\\n and \\r read as \\n."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}:{line}: not UTF-8 (byte {error.object[error.start]:#04x}); save it as UTF-8, "
            f"for example: iconv -f latin1 -t utf-8 {path} > fixed"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")
