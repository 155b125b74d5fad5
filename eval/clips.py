"""Clips to listen to: which ones, what was heard instead, and their sound inside the page."""

from __future__ import annotations

import base64
import io
import os
import unicodedata
from collections import Counter
from pathlib import Path
from urllib.parse import quote

import numpy as np

PLAYER_SEC = 30.0  # of each clip in the page
PAGE_SOUND_BYTES = 8_000_000  # of all clips in a page; what does not fit is linked
_JOINERS = "\u200d\u17d2\u1039"  # what follows these belongs to the same letter


def rate(score: dict) -> float | None:
    """Errors over units of one clip; None if nobody judged it."""
    return score["errors"] / score["units"] if score.get("units") else None


def similarity(score: dict) -> float | None:
    found = score.get("sim_target")
    return score.get("sim_ref") if found is None else found


def worst(scores: list[dict], count: int) -> list[dict]:
    """Clips with errors that most need a listener.

    Failures first, of each kind in turn, but at most half of all while others have errors; then by
    error rate.
    """
    seen: Counter = Counter()
    failures, faulty = [], []
    for score in sorted(scores, key=lambda score: rate(score) or 0.0, reverse=True):
        if score["failure"]:
            failures.append((seen[score["failure"]], score))
            seen[score["failure"]] += 1
        elif rate(score):
            faulty.append(score)
    in_turn = [score for _, score in sorted(failures, key=lambda pair: pair[0])]
    kept = in_turn[: max(count // 2, count - len(faulty))]
    return kept + faulty[: count - len(kept)]


def least_similar(scores: list[dict], count: int) -> list[dict]:
    """Clips whose voice is furthest from the speaker's."""
    having = [score for score in scores if similarity(score) is not None]
    return sorted(having, key=similarity)[:count]


def diff(reference: str, hypothesis: str | None, unit: str) -> list[tuple[str, str]]:
    """Pieces (kind, text), kind in equal, delete, insert: what was to be said and what was heard.

    A substitution is a delete followed by an insert. Where characters are counted, a letter and
    its combining marks stay together, so that each piece can be drawn by itself.
    """
    import jiwer

    if hypothesis is None:
        return [("equal", reference)]
    if unit == "word":
        joint = " "
    else:
        reference, hypothesis, joint = (
            " ".join(letters(reference)),
            " ".join(letters(hypothesis)),
            "",
        )
    out = jiwer.process_words(reference, hypothesis)
    said, heard = out.references[0], out.hypotheses[0]
    pieces = []
    for chunk in out.alignments[0]:
        old = joint.join(said[chunk.ref_start_idx : chunk.ref_end_idx])
        new = joint.join(heard[chunk.hyp_start_idx : chunk.hyp_end_idx])
        if chunk.type == "equal":
            pieces.append(("equal", old))
        else:
            pieces += [(kind, text) for kind, text in (("delete", old), ("insert", new)) if text]
    return pieces


def letters(text: str) -> list[str]:
    """Letters with the marks that belong to them; spaces are left out."""
    found: list[str] = []
    for char in text.replace(" ", ""):
        joined = found and (unicodedata.category(char)[0] == "M" or char in _JOINERS)
        if joined or (found and found[-1][-1] in _JOINERS):
            found[-1] += char
        else:
            found.append(char)
    return found


class Sounds:
    """Sounds for one page: embedded as MP3 until the budget is spent, then linked.

    MP3 because every browser plays it, at about 65 kbit/s for speech at 24 kHz, a third of FLAC.
    The files that were judged are the ones linked.
    """

    def __init__(self, page: Path, budget_bytes: int = PAGE_SOUND_BYTES):
        self.folder, self.left = page.absolute().parent, budget_bytes

    def clip(self, run: Path, audio: str | None) -> dict:
        """{"data": address to play or None, "link": address of the file or None}."""
        if audio is None or not (path := run.absolute() / audio).is_file():
            return {"data": None, "link": None}
        link = quote(os.path.relpath(path, self.folder).replace(os.sep, "/"))
        if self.left <= 0:
            return {"data": None, "link": link}
        data = _mp3(path)
        if data is None or len(data) > self.left:
            return {"data": None, "link": link}
        self.left -= len(data)
        return {"data": data, "link": link}


def _mp3(path: Path) -> str | None:
    """The first half minute of a clip as a data address, None if it cannot be read."""
    import soundfile

    from higgs_lab.audio import read_audio

    try:
        wav = read_audio(path, 24000, max_sec=None)[: int(PLAYER_SEC * 24000)]
    except ValueError:
        return None
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(wav, -1, 1), 24000, format="MP3", subtype="MPEG_LAYER_III",
                    bitrate_mode="VARIABLE", compression_level=0.5)  # fmt: skip
    return "data:audio/mpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
