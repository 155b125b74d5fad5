"""One utterance per line: the manifest, and readers that bring other data sets to the same rows.

A manifest is a JSONL file; paths in it are relative to its folder:

    {"audio": "wavs/a.wav", "text": "Hello there.", "speaker": "ann", "language": "en"}

Fields: `audio`, `text`, and optional `id`, `speaker`, `language`, `ref_audio`, `ref_text`, `split`,
`info` (an object with anything else, kept and not looked at). `open_data` reads manifests, LJSpeech
folders, folders of wav+txt, CSV files with a header and Hugging Face data sets.
"""

import csv
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
# LibriTTS and Montreal-aligner corpora name their transcripts so.
TEXT_SUFFIXES = (".txt", ".normalized.txt", ".lab")
# What well-known data sets call their transcript, best first.
TEXT_COLUMNS = ("text", "transcription", "sentence", "transcript", "text_normalized")
TEXT_COLUMNS += ("normalized_text", "raw_transcription", "normalised_text")


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
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
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
    return _utterances(rows, path.parent, str(path), check_files, need_audio)


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


def open_data(
    source: str | Path,
    split: str | None = None,
    text_column: str | None = None,
    audio_column: str | None = None,
    check_files: bool = True,
) -> list[Utterance]:
    """Utterances with audio from whatever `source` is.

    - a `.jsonl` file: a manifest; a `.csv` or `.tsv` file: a header with manifest fields
    - a folder with `metadata.csv`: LJSpeech (id|text|normalised text, audio in `wavs/`)
    - a folder with audio and equally named `.txt` files; a file in sub-folders gets the first
      sub-folder's name as speaker
    - a folder that `datasets` saved, or of parquet files; or a hub name
      `org/name[:config][@revision]`: Hugging Face data. `split` chooses one (default: the only one,
      or "train"); `text_column` and `audio_column` are found by type and common names.

    Raises FileNotFoundError or ValueError that say what was looked for.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix.lower() in (".csv", ".tsv"):
            return read_csv(path, check_files)
        if path.suffix.lower() in (".jsonl", ".json"):
            return read_manifest(path, check_files, need_audio=True)
        raise ValueError(f"{path}: a data file must be a .jsonl manifest, or .csv/.tsv with header")
    if path.is_dir():
        if (path / "metadata.csv").is_file() and _first_line(path / "metadata.csv").count("|"):
            return read_ljspeech(path, check_files)
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            return read_hf(source, split, text_column, audio_column)
        if any(path.glob("**/*.parquet")) or any(path.glob("**/*.arrow")):
            return read_hf(source, split, text_column, audio_column)
        if (path / "manifest.jsonl").is_file():
            return read_manifest(path / "manifest.jsonl", check_files, need_audio=True)
        return read_wav_txt(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?(@[\w./-]+)?", str(source)):
        return read_hf(source, split, text_column, audio_column)
    raise FileNotFoundError(
        f"data {source} does not exist (working folder {Path.cwd()}): give a manifest, a folder, "
        "a CSV file, or a hub name like org/name"
    )


def read_ljspeech(folder: str | Path, check_files: bool = True) -> list[Utterance]:
    """LJSpeech layout: `metadata.csv` of id|text|normalised text, audio in `wavs/<id>.wav`.

    The normalised text is used where given. Quotes are ordinary characters in this format.
    """
    folder, rows = Path(folder), []
    for number, line in enumerate(_read_text(folder / "metadata.csv").split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{folder / 'metadata.csv'}:{number}"
        cells = [cell.strip() for cell in line.rstrip("\r").split("|")]
        if len(cells) not in (2, 3):
            raise ValueError(f"{where}: expected id|text or id|text|normalised, got {line!r}")
        name = cells[0].removesuffix(".wav")
        found = [f"wavs/{name}{suffix}" for suffix in AUDIO_SUFFIXES]
        audio = next((a for a in found if (folder / a).is_file()), found[0])
        row = {"id": name, "audio": audio, "text": cells[-1] or cells[1]}
        rows.append((where, name, row))
    return _utterances(rows, folder, str(folder), check_files, need_audio=True)


def read_wav_txt(folder: str | Path) -> list[Utterance]:
    """Audio files with a transcript of the same name beside each, in sub-folders too."""
    folder, rows, lonely = Path(folder), [], []
    for audio in sorted(p for p in folder.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES):
        texts = [audio.with_name(audio.stem + suffix) for suffix in TEXT_SUFFIXES]
        text = next((t for t in texts if t.is_file()), None)
        if text is None:
            lonely.append(audio)
            continue
        parts = audio.relative_to(folder).parts
        row = {"audio": "/".join(parts), "text": " ".join(_read_text(text).split())}
        if len(parts) > 1:
            row["speaker"] = parts[0]
        rows.append((str(text), "", row))
    if lonely:
        raise ValueError(
            f"{len(lonely)} audio files in {folder} have no transcript beside them, the first is "
            f"{lonely[0]}: write {lonely[0].stem}.txt there, or use a manifest"
        )
    return _utterances(rows, folder, f"folder {folder}", check_files=False, need_audio=True)


def read_csv(path: str | Path, check_files: bool = True) -> list[Utterance]:
    """A CSV file (comma, semicolon, tab or |) whose header has the manifest's field names."""
    path = Path(path)
    text = _read_text(path)
    header = text.split("\n", 1)[0]
    delimiter = max(",;\t|", key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows = []
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise ValueError(
                    f"{where}: the header has {len(reader.fieldnames)} columns, this line not: "
                    f"quote cells that contain {delimiter!r}"
                )
            rows.append(
                (where, str(reader.line_num).zfill(6), {k: v or None for k, v in row.items()})
            )
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: {error}") from error
    return _utterances(rows, path.parent, str(path), check_files, need_audio=True)


def read_hf(
    source: str | Path,
    split: str | None = None,
    text_column: str | None = None,
    audio_column: str | None = None,
) -> list[Utterance]:
    """A Hugging Face data set, from disk or hub; audio stays there and is opened when read.

    Audio is never decoded by `datasets` (that needs torchcodec and ffmpeg).
    """
    import datasets

    name, data = str(source), _load_hf(source)
    if isinstance(data, datasets.DatasetDict | dict):
        splits = list(data)
        chosen = split or (splits[0] if len(splits) == 1 else "train")
        if chosen not in splits:
            raise ValueError(f"{name}: no split {chosen!r}; give split=... one of {splits}")
        name, data = f"{name}[{chosen}]", data[chosen]
    audio_columns = [c for c, f in data.features.items() if isinstance(f, datasets.Audio)]
    audio_column = _pick(name, "audio_column", audio_column, ["audio", *audio_columns], data)
    text_column = _pick(name, "text_column", text_column, TEXT_COLUMNS, data)
    for column in audio_columns:
        data = data.cast_column(column, datasets.Audio(decode=False))
    columns = _hf_fields(data, text_column)
    plain = data.select_columns(list(dict.fromkeys(columns.values())))
    clips = data.select_columns(audio_columns)
    repeated = "id" in columns and len(set(plain[columns["id"]])) < len(plain)
    rows = []
    for number, cells in enumerate(plain):
        where = f"{name} row {number}"
        row = {field: cells[column] or None for field, column in columns.items()}
        if repeated:  # FLEURS numbers sentences, not recordings: the row number tells them apart
            row.pop("id")
        row["audio"] = EmbeddedAudio(clips, audio_column, number, where)
        if "ref_audio" in audio_columns and clips[number]["ref_audio"]:
            row["ref_audio"] = EmbeddedAudio(clips, "ref_audio", number, f"{where} (ref_audio)")
        rows.append((where, str(number).zfill(6), row))
    return _utterances(rows, Path(), name, check_files=False, need_audio=True)


def file_stem(id: str) -> str:
    """A file name made of an utterance's id: unchanged if safe, else cleaned and told apart."""
    clean = re.sub(r"[^\w.-]", "_", id).strip(".")[:100]
    return clean if clean == id else f"{clean}-{zlib.crc32(id.encode()):08x}"


def _utterances(
    rows: list[tuple[str, str, dict]],
    folder: Path,
    source: str,
    check_files: bool,
    need_audio: bool,
) -> list[Utterance]:
    """Check raw rows (where, id if there is no better, fields) and make utterances of them."""
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


def _load_hf(source: str | Path):
    import datasets

    path = Path(source)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return datasets.load_from_disk(path)
    if path.is_dir():
        return datasets.load_dataset(str(path))
    name, _, revision = str(source).partition("@")
    name, _, config = name.partition(":")
    return datasets.load_dataset(name, config or None, revision=revision or None)


def _hf_fields(data, text_column: str) -> dict[str, str]:
    """Which column feeds which manifest field; labels stored as numbers are not names."""
    columns = {"text": text_column}
    for name, candidates in (
        ("id", ("id",)),
        ("speaker", ("speaker", "speaker_id")),
        ("language", ("language", "lang", "locale")),
        ("ref_text", ("ref_text",)),
        ("split", ("split",)),
    ):
        kinds = ("string", "large_string") + ("int32", "int64") * (name in ("id", "speaker"))
        usable = (c for c in candidates if getattr(data.features.get(c), "dtype", "") in kinds)
        if column := next(usable, None):
            columns[name] = column
    return columns


def _pick(name: str, option: str, given: str | None, candidates: Iterable[str], data) -> str:
    columns = list(data.features)
    if given is None:
        given = next((c for c in candidates if c in columns), None)
    if given not in columns:
        problem = f"has no column {given!r}" if given else "has no column of a usual name"
        raise ValueError(f"{name} {problem}; give {option}=... one of {columns}")
    return given


def _read_text(path: Path) -> str:
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


def _first_line(path: Path) -> str:
    return _read_text(path).split("\n", 1)[0]
