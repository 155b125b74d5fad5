"""What is to be spoken, in whose voice: rows of a test set, chosen and given references.

A set is a manifest, data that `open_data` reads, or one that others publish (eval.public_sets).

A row's reference is never the recording it is tested on, whatever its file is called, and never
has its text: a model could then copy the answer.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from eval.languages import language, select_languages
from eval.normalize import normalize
from eval.public_sets import PublicSet, public_set, read_public
from higgs_lab.corpora import open_data
from higgs_lab.manifest import Utterance, read_manifest
from higgs_lab.tags import check_text, strip_tags

SAMPLED_BYTES = 1 << 16  # of each recording, to tell it from another of its name
REFERENCE_CHOICES = ("auto", "manifest", "speaker", "none")


@dataclass(frozen=True)
class EvalSet:
    name: str
    rows: tuple[Utterance, ...]  # to be spoken; language is filled in, references are final
    voices: dict[str, tuple[Utterance, ...]]  # speaker -> recordings, for the speaker's centroid
    references: dict[str, int]  # how many rows got their reference from where
    public: PublicSet | None = None  # if others publish it: their protocol and recogniser

    @property
    def revision(self) -> str:
        """Hash of what is spoken and by whom: equal for the same rows on any machine."""
        keys = [(row.id, row.text, row.language, row.speaker) for row in self.rows]
        return _hash(keys)

    @functools.cached_property
    def reference_revision(self) -> str:
        """Hash of the references given to the system."""
        known = self._known_clips
        return _hash([(row.id, known.get(row.ref_audio), row.ref_text) for row in self.rows])

    @functools.cached_property
    def recording_revision(self) -> str:
        """Hash of the set's own recordings: the human row, and what durations and voices are held
        against."""
        known = self._known_clips
        own = [(row.id, known.get(row.audio)) for row in self.rows]
        voices = [[s, *(known[row.audio] for row in rows)] for s, rows in self.voices.items()]
        return _hash([own, voices])

    @functools.cached_property
    def _known_clips(self) -> dict[object, list]:
        """Every clip that the set has, and what tells it from another one of its name."""
        clips = {clip for row in self.rows for clip in (row.audio, row.ref_audio)}
        clips |= {row.audio for rows in self.voices.values() for row in rows}
        clips.discard(None)
        with ThreadPoolExecutor(16) as pool:  # tens of thousands of small reads
            return dict(zip(clips, pool.map(_sampled, clips), strict=True))


def load_set(
    source: str,
    *,
    default_language: str | None = None,
    langs: Sequence[str] = (),
    split: str | None = None,
    limit: int | None = None,
    refs: str = "auto",
    seed: int = 0,
    centroid_clips: int = 20,
    folder: str | Path | None = None,
) -> EvalSet:
    """Read a set: a JSONL manifest (audio optional), the name of a public set such as "fleurs" or
    "seed-tts-eval:zh", or anything that `open_data` reads.

    default_language: for rows that name none. langs: keep these ("tier1", "de", ...; empty: all).
    limit: at most so many rows of each language, drawn by `seed`; a larger limit contains a
        smaller one.
    refs: where a row's reference audio comes from. "manifest": its ref_audio, if it names one;
        "speaker": another recording of the same speaker in the set; "auto": the first, else the
        second, else none; "none": no reference.
    centroid_clips: recordings of each speaker kept for the voice that similarity is measured to;
        taken from the whole set, so that `limit` does not change them.
    folder: where a public set lies; None fetches it from the hub.

    Raises ValueError naming the row and the fix: no language or an unknown one, a text without
    words or with unknown tags, two equal rows, no rows left, no
    reference where refs is "speaker".
    """
    if refs not in REFERENCE_CHOICES:
        raise ValueError(f"refs={refs!r}: choose one of {', '.join(REFERENCE_CHOICES)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: at least one row is needed")
    path, public = Path(source), public_set(source)
    wanted = select_languages(list(langs)) if langs else None
    if public:
        rows = read_public(source, folder, wanted, split or "")
    elif folder is not None:
        raise ValueError(f"--set-path says where a public set lies; {source!r} is none")
    else:
        rows = read_manifest(path) if path.suffix == ".jsonl" else open_data(source, split=split)
        if split and path.suffix == ".jsonl":
            rows = [row for row in rows if row.split == split]
        rows = [_with_language(row, default_language) for row in rows]
        if wanted is not None:
            rows = [row for row in rows if row.language in wanted]
    if not rows:
        chosen = f" in {', '.join(langs)}" * bool(langs) + f" of split {split!r}" * bool(split)
        raise ValueError(f"{source} has no rows{chosen}: nothing to evaluate")
    _check(rows, published=public is not None)
    chosen = _limited(rows, limit, seed)
    by_speaker: dict[tuple, list[Utterance]] = {}
    for row in rows:
        if row.speaker and row.audio is not None:
            by_speaker.setdefault((row.speaker, row.language), []).append(row)
    given, counts = [], Counter()
    for row in chosen:
        row, origin = _with_reference(row, by_speaker, refs, seed)
        given.append(row)
        counts[origin] += 1
    return EvalSet(
        name=path.name if path.exists() else source,
        rows=tuple(given),
        voices=_voices(rows, {row.speaker for row in chosen}, centroid_clips),
        references=dict(counts),
        public=public[0] if public else None,
    )


def draw_order(rows: Sequence[Utterance], *key: object) -> list[Utterance]:
    """Rows in a random order that depends on key and ids only, not on the other rows."""
    return sorted(rows, key=lambda row: hashlib.sha256(repr((*key, row.id)).encode()).digest())


def _with_language(row: Utterance, default: str | None) -> Utterance:
    given = row.language or default
    if not given:
        raise ValueError(
            f"{row.where}, field language: missing, and neither the recogniser nor the normaliser "
            "may guess it; write it into the row or give --language"
        )
    try:
        return replace(row, language=language(given).code)
    except ValueError as error:
        raise ValueError(f"{row.where}, field language: {error}") from error


def _check(rows: Sequence[Utterance], published: bool) -> None:
    """Refuse what would be scored wrongly. A published set keeps rows that it has twice."""
    seen: dict[tuple, str] = {}
    for row in rows:
        check_text(row.text, f"{row.where}, field text")
        if not _words(row.text, row):
            raise ValueError(
                f"{row.where}, field text: {row.text!r} has no words to recognise; take it out"
            )
        key = (row.text, row.language, row.speaker, str(row.audio), str(row.ref_audio))
        if key in seen and not published:
            raise ValueError(
                f"{row.where}: the same text, speaker and audio as {seen[key]}; a repeated row "
                "counts twice, take one out (several takes of a text: --takes)"
            )
        seen[key] = row.where


def _limited(rows: list[Utterance], limit: int | None, seed: int) -> list[Utterance]:
    if limit is None:
        return rows
    kept: set[str] = set()
    for code in {row.language for row in rows}:
        same = [row for row in rows if row.language == code]
        kept |= {row.id for row in draw_order(same, "limit", seed)[:limit]}
    return [row for row in rows if row.id in kept]


def _with_reference(
    row: Utterance, by_speaker: dict[tuple, list[Utterance]], refs: str, seed: int
) -> tuple[Utterance, str]:
    """The row with its final reference, and where that came from."""
    bare = replace(row, ref_audio=None, ref_text=None)
    if refs == "none":
        return bare, "none"
    if refs in ("auto", "manifest") and row.ref_audio is not None:
        if row.audio is not None and same_audio(row.ref_audio, row.audio):
            raise ValueError(
                f"{row.where}, field ref_audio: holds the same sound as the row's audio; the "
                "answer would be given away: name another clip"
            )
        if row.ref_text and _words(row.ref_text, row) == _words(row.text, row):
            raise ValueError(
                f"{row.where}, field ref_text: says the same as the row's text; the answer would "
                "be given away: name another clip"
            )
        return row, "manifest"
    if refs in ("auto", "speaker"):
        candidates = by_speaker.get((row.speaker, row.language), [])
        for other in draw_order(candidates, "reference", seed, row.id):
            if other.id == row.id or _words(other.text, row) == _words(row.text, row):
                continue
            if row.audio is not None and same_audio(other.audio, row.audio):
                continue
            text = strip_tags(other.text)
            return replace(row, ref_audio=other.audio, ref_text=text), "speaker"
        if refs == "speaker":
            raise ValueError(
                f"{row.where}: no other recording of speaker {row.speaker!r} in {row.language} to "
                "take as reference; add one, or use --refs auto"
            )
    return bare, "none"


def _voices(
    rows: Sequence[Utterance], speakers: set[str | None], clips: int
) -> dict[str, tuple[Utterance, ...]]:
    voices: dict[str, list[Utterance]] = {}
    for row in rows:
        if row.speaker in speakers and row.speaker and row.audio is not None:
            voices.setdefault(row.speaker, []).append(row)
    return {s: tuple(draw_order(v, "voice")[:clips]) for s, v in sorted(voices.items())}


def same_audio(a, b) -> bool:
    """Whether two clips are the same file, or files of the same bytes."""
    if a == b:
        return True
    if isinstance(a, Path) and isinstance(b, Path):
        if not (a.is_file() and b.is_file()) or a.stat().st_size != b.stat().st_size:
            return False
    with a.open("rb") as one, b.open("rb") as two:
        return one.read() == two.read()


def _words(text: str, row: Utterance) -> str:
    return normalize(strip_tags(text), row.language)


def _sampled(audio) -> list:
    """Size of a clip and a hash of its middle: what is recorded anew under an old name differs.

    Reading whole sets before anything is said would take minutes.
    """
    try:
        with audio.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size // 2 - SAMPLED_BYTES // 2))
            return [size, hashlib.sha256(file.read(SAMPLED_BYTES)).hexdigest()[:16]]
    except (OSError, ValueError):  # the clip's own failure later
        return [0, ""]


def _hash(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
