"""Other people's data as manifest rows: LJSpeech, wav+txt folders, CSV, Hugging Face data sets."""

import csv
import io
import re
from collections.abc import Iterable
from pathlib import Path

from higgs_lab.manifest import (
    AUDIO_SUFFIXES,
    EmbeddedAudio,
    Utterance,
    make_utterances,
    read_manifest,
    read_text,
)

# LibriTTS and Montreal-aligner corpora name their transcripts so.
TEXT_SUFFIXES = (".txt", ".normalized.txt", ".lab")
# What well-known data sets call their transcript, best first.
TEXT_COLUMNS = ("text", "transcription", "sentence", "transcript", "text_normalized")
TEXT_COLUMNS += ("normalized_text", "raw_transcription", "normalised_text")


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
    for number, line in enumerate(read_text(folder / "metadata.csv").split("\n"), start=1):
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
    return make_utterances(rows, folder, str(folder), check_files, need_audio=True)


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
        row = {"audio": "/".join(parts), "text": " ".join(read_text(text).split())}
        if len(parts) > 1:
            row["speaker"] = parts[0]
        rows.append((str(text), "", row))
    if lonely:
        raise ValueError(
            f"{len(lonely)} audio files in {folder} have no transcript beside them, the first is "
            f"{lonely[0]}: write {lonely[0].stem}.txt there, or use a manifest"
        )
    return make_utterances(rows, folder, f"folder {folder}", check_files=False, need_audio=True)


def read_csv(path: str | Path, check_files: bool = True) -> list[Utterance]:
    """A CSV file (comma, semicolon, tab or |) whose header has the manifest's field names."""
    path = Path(path)
    text = read_text(path)
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
    return make_utterances(rows, path.parent, str(path), check_files, need_audio=True)


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
    return make_utterances(rows, Path(), name, check_files=False, need_audio=True)


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


def _first_line(path: Path) -> str:
    return read_text(path).split("\n", 1)[0]
