"""Test sets that others publish, in their own layout, from the hub or from a folder on disk.

`--set NAME` or `--set NAME:PART`, `--set-path FOLDER` where it is not to be fetched:

- smoke: four or five sentences in each language of eval.languages, in this repository; no
  recordings. `--langs all` keeps the 102 of the model card
- fleurs: google/fleurs, one recording of each sentence of the test split; the prompt is another
  recording of the language. FLEURS names no speakers.
- common-voice: a folder of the Mozilla Data Collective (it left the hub in 2025): one language's,
  or one that holds several
- seed-tts-eval:en, :zh, :zh-hard (default: en and zh): a mirror of the authors' archive on the hub
- cv3-eval:PART, a folder of its data/ (default zero_shot), in a clone of FunAudioLLM/CV3-Eval
- minimax: MiniMaxAI/TTS-Multilingual-Test-Set, 24 languages

Each has the protocol that published figures on it follow (eval.protocols); `fair` for the others.
"""

from __future__ import annotations

import contextlib
import csv
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from eval.languages import LANGUAGES, language
from eval.work import Locks
from higgs_lab.manifest import Utterance
from higgs_lab.runlog import atomic_path


@dataclass(frozen=True)
class PublicSet:
    read: Callable[[Path, str, set[str], str], list[Utterance]]  # folder, part, languages, split
    protocol: str = ""  # a name of eval.protocols, or "" for `fair`
    asr: str = "large-v3"  # default recogniser
    hub: str = ""  # data set on the hub, or "" if it is not there
    wanted: Callable[[str, set[str], str], list[str]] | None = None  # its files: part, ...
    parts: tuple[str, ...] = ()  # the first is the default; () takes none
    other_parts: bool = False  # whether there may be more than these
    how_to_get: str = ""


def public_set(source: str) -> tuple[PublicSet, str, str | None] | None:
    """(set, part, revision) of a name such as "seed-tts-eval:zh@main"; None for other names.

    Raises ValueError for a part that the set does not have.
    """
    spec, _, revision = source.partition("@")
    name, _, part = spec.partition(":")
    if name not in PUBLIC_SETS or Path(source).exists():
        return None
    found = PUBLIC_SETS[name]
    if part and not found.parts:
        raise ValueError(f"the set {name} has no parts: write --set {name}")
    if part and part not in found.parts and not found.other_parts:
        raise ValueError(f"the set {name} has no part {part!r}: it has {', '.join(found.parts)}")
    return found, part or (found.parts[0] if found.parts else ""), revision or None


def read_public(
    source: str, folder: str | Path | None = None, langs: set[str] | None = None, split: str = ""
) -> list[Utterance]:
    """Rows of a public set in the languages `langs` (None: all that it has).

    folder: where it lies; None fetches from the hub what the languages need. Raises ValueError or
    FileNotFoundError that name the file and line, or say how the set is to be had.
    """
    found, part, revision = public_set(source)
    codes = set(LANGUAGES) if langs is None else langs
    if folder is None and found.hub:
        from huggingface_hub import snapshot_download

        patterns = found.wanted(part, codes, split or "test")
        folder = snapshot_download(
            found.hub, repo_type="dataset", revision=revision, allow_patterns=patterns
        )
    if folder is None and found.how_to_get:
        raise ValueError(f"{source} cannot be fetched by name: {found.how_to_get}")
    if folder is not None and not Path(folder).is_dir():
        raise FileNotFoundError(f"--set-path {folder}: no such folder")
    return _numbered(found.read(Path(folder or "."), part, codes, split or "test"))


def _read_smoke(folder: Path, part: str, codes: set[str], split: str) -> list[Utterance]:
    rows: list[Utterance] = []
    path = Path(__file__).parent / "smoke.tsv"
    for number, (code, text) in _tab_separated(path)[1:]:
        count = sum(row.language == code for row in rows)
        rows.append(
            Utterance(None, text, f"{code}-{count + 1}", language=code, where=f"{path}:{number}")
        )
    return [row for row in rows if row.language in codes]


def _read_fleurs(folder: Path, part: str, codes: set[str], split: str) -> list[Utterance]:
    rows = []
    for row in LANGUAGES.values():
        table = folder / "data" / (row.fleurs or "") / f"{split}.tsv"
        if row.code in codes and row.fleurs and table.is_file():
            rows += _fleurs_language(table, row.code, split)
    return _some(rows, folder, "data/<language>/test.tsv of google/fleurs")


def _fleurs_language(table: Path, code: str, split: str) -> list[Utterance]:
    """One recording of each sentence; id, file, raw text, text, letters, samples, gender."""
    audio = _unpacked(table.parent / "audio", split)
    sentences: dict[str, Utterance] = {}
    for number, cells in _tab_separated(table):
        if len(cells) < 4:
            raise ValueError(f"{table}:{number}: expected FLEURS' 7 columns, got {len(cells)}")
        path = audio / cells[1]
        if cells[0] not in sentences and path.is_file():
            sentences[cells[0]] = Utterance(
                path, cells[2], f"{code}-{cells[0]}", language=code, where=f"{table}:{number}"
            )
    rows = list(sentences.values())
    # The prompt: the recording of the sentence half the set away, mostly another speaker's.
    far = [rows[(i + len(rows) // 2) % len(rows)] for i in range(len(rows))]
    return [
        replace(row, ref_audio=other.audio, ref_text=other.text) if other is not row else row
        for row, other in zip(rows, far, strict=True)
    ]


def _unpacked(folder: Path, split: str) -> Path:
    """FLEURS' recordings of a split, which come as a .tar.gz with one folder in it."""
    archive = folder / f"{split}.tar.gz"
    if (folder / split).is_dir():
        return folder / split
    if not archive.is_file():
        raise FileNotFoundError(f"{archive} is missing: FLEURS keeps its recordings there")
    real = archive.resolve()  # in the hub's cache the name is a link to a blob named by its hash
    target = real.with_name(f"{real.name}.unpacked")
    with contextlib.closing(Locks(real.with_name(f"{real.name}.lock"))) as locks, locks.held(0):
        if not target.is_dir():  # else another process has done it
            with atomic_path(target) as temporary, tarfile.open(real) as tar:
                tar.extractall(temporary, filter="data")
    return target / split


def _read_common_voice(folder: Path, part: str, codes: set[str], split: str) -> list[Utterance]:
    tables = [folder / f"{split}.tsv"] if (folder / f"{split}.tsv").is_file() else []
    tables = tables or sorted(folder.glob(f"*/{split}.tsv"))
    rows, unknown = [], []
    for table in tables:
        (_, header), *lines = _tab_separated(table) or [(1, [])]
        missing = {"client_id", "path", "sentence", "locale"} - set(header)
        if missing:
            raise ValueError(f"{table}:1: no column {', '.join(sorted(missing))}")
        for number, cells in lines:
            row = dict(zip(header, cells, strict=False))
            if "locale" not in row:
                raise ValueError(
                    f"{table}:{number}: {len(cells)} cells under {len(header)} heads, so no "
                    "locale: is the file whole?"
                )
            try:
                code = language(row["locale"]).code
            except ValueError:
                unknown.append(row["locale"])
                break
            if code not in codes:
                break
            path, where = table.parent / "clips" / row["path"], f"{table}:{number}"
            id = f"{code}-{Path(row['path']).stem}"
            rows.append(Utterance(path, row["sentence"], id, row["client_id"], code, where=where))
    if unknown:
        print(
            f"common-voice: left out {', '.join(unknown)}, which eval/languages.tsv does not have",
            file=sys.stderr,
        )
    return _some(rows, folder, f"{split}.tsv and clips/, or folders of languages that hold these")


def _read_seed(folder: Path, part: str, codes: set[str], split: str) -> list[Utterance]:
    rows = []
    for name in ("en", "zh") if part == "en+zh" else (part,):
        code = name[:2]
        table = folder / code / ("hardcase.lst" if name == "zh-hard" else "meta.lst")
        if code not in codes:
            continue
        for number, line in _lines(table):
            where = f"{table}:{number}"
            cells = line.split("|")
            if len(cells) not in (4, 5):
                raise ValueError(f"{where}: expected id|prompt text|prompt wav|text, got {line!r}")
            id, ref_text, ref, text = cells[:4]
            human = table.parent / (cells[4] if len(cells) == 5 else f"wavs/{id}.wav")
            rows.append(
                Utterance(
                    human if human.is_file() else None,
                    text,
                    f"{name}-{id}",
                    Path(ref).stem,
                    code,
                    table.parent / ref,
                    ref_text,
                    where=where,
                )
            )
    return _some(rows, folder, "en/meta.lst and zh/meta.lst")


def _read_cv3(folder: Path, part: str, codes: set[str], split: str) -> list[Utterance]:
    rows = []
    for group in sorted((folder / "data" / part).glob("*/text")):
        code = language(group.parent.name.split("_")[-1]).code  # "zh", "hard_zh", "to_zh"
        if code not in codes:
            continue
        prompts = _kaldi(group.with_name("prompt_wav.scp"))
        prompt_texts = _kaldi(group.with_name("prompt_text"))
        for id, (text, where) in _kaldi(group).items():
            if id not in prompts or id not in prompt_texts:
                raise ValueError(f"{where}: {id} is not in prompt_wav.scp and prompt_text")
            ref = folder / prompts[id][0]
            name = f"{group.parent.name}-{id}"
            rows.append(
                Utterance(None, text, name, ref.stem, code, ref, prompt_texts[id][0], where=where)
            )
    return _some(rows, folder, f"data/{part}/<language>/text, prompt_text, prompt_wav.scp")


def _read_minimax(folder: Path, part: str, codes: set[str], split: str) -> list[Utterance]:
    prompts = folder / "speaker" / "prompt_text.txt"
    said = dict(line.split("|", 1) for _, line in _lines(prompts) if "|" in line)
    rows = []
    for table in sorted((folder / "text").glob("*.txt")):
        code = language(table.stem).code
        for number, line in _lines(table) if code in codes else ():
            where = f"{table}:{number}"
            label, bar, text = line.partition("|")
            voice = folder / "speaker" / table.stem / label
            clips = sorted(voice.glob("*.mp3"))
            if not bar or len(clips) != 1 or clips[0].name not in said:
                raise ValueError(
                    f"{where}: expected voice|text with one .mp3 in {voice} and its words in "
                    f"{prompts}, got {line[:60]!r}"
                )
            rows.append(
                Utterance(
                    None,
                    text.strip(),
                    f"{code}-{number:03d}",
                    label,
                    code,
                    clips[0],
                    said[clips[0].name].strip(),
                    where=where,
                )
            )
    return _some(rows, folder, "text/<language>.txt and speaker/ of the MiniMax set")


def _numbered(rows: list[Utterance]) -> list[Utterance]:
    """Ids that a set uses twice get a number: results are kept by id."""
    seen: Counter = Counter()
    numbered = []
    for row in rows:
        seen[row.id] += 1
        again = seen[row.id]
        numbered.append(replace(row, id=f"{row.id}#{again}") if again > 1 else row)
    return numbered


def _some(rows: list[Utterance], folder: Path, expected: str) -> list[Utterance]:
    if not rows:
        raise ValueError(f"no rows of the chosen languages in {folder}: expected {expected}")
    return rows


def _lines(path: Path) -> list[tuple[int, str]]:
    """Numbered lines that hold anything. Raises FileNotFoundError with the name."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: is this the set's own folder?")
    text = path.read_text(encoding="utf-8-sig")
    return [(i, line.strip("\r")) for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def _tab_separated(path: Path) -> list[tuple[int, Sequence[str]]]:
    """Numbered rows of a table without quoting, as all these sets write theirs."""
    lines = _lines(path)
    cells = csv.reader((line for _, line in lines), delimiter="\t", quoting=csv.QUOTE_NONE)
    return [(number, row) for (number, _), row in zip(lines, cells, strict=True)]


def _kaldi(path: Path) -> dict[str, tuple[str, str]]:
    """id -> (the rest of the line, where) of a Kaldi table."""
    rows = {}
    for number, line in _lines(path):
        id, *rest = line.split(maxsplit=1)
        if id in rows:
            raise ValueError(f"{path}:{number}: {id} stands at {rows[id][1]} already")
        rows[id] = (rest[0].strip() if rest else "", f"{path}:{number}")
    return rows


def _fleurs_files(part: str, codes: set[str], split: str) -> list[str]:
    configs = [LANGUAGES[code].fleurs for code in sorted(codes) if LANGUAGES[code].fleurs]
    files = (f"{split}.tsv", f"audio/{split}.tar.gz")
    return [f"data/{config}/{file}" for config in configs for file in files]


def _minimax_files(part: str, codes: set[str], split: str) -> list[str]:
    names = [LANGUAGES[code].name.lower() for code in sorted(codes)]
    files = [f"text/{name}.txt" for name in names] + [f"speaker/{name}/*" for name in names]
    return ["speaker/prompt_text.txt", *files]


PUBLIC_SETS = {
    "smoke": PublicSet(_read_smoke),
    "fleurs": PublicSet(
        _read_fleurs, "omnivoice-fleurs", "auto", hub="google/fleurs", wanted=_fleurs_files
    ),
    "common-voice": PublicSet(
        _read_common_voice,
        asr="auto",
        how_to_get="download it from the Mozilla Data Collective, unpack it and give --set-path",
    ),
    "seed-tts-eval": PublicSet(
        _read_seed,
        "seed",
        hub="zhaochenyang20/seed-tts-eval",
        wanted=lambda part, codes, split: [f"{code}/*" for code in ("en", "zh") if code in part],
        parts=("en+zh", "en", "zh", "zh-hard"),
    ),
    "cv3-eval": PublicSet(
        _read_cv3,
        "cv3",
        parts=("zero_shot",),
        other_parts=True,
        how_to_get="git clone https://github.com/FunAudioLLM/CV3-Eval and give --set-path CV3-Eval",
    ),
    "minimax": PublicSet(
        _read_minimax,
        "minimax",
        hub="MiniMaxAI/TTS-Multilingual-Test-Set",
        wanted=_minimax_files,
    ),
}
