"""Long texts: cut at sentence bounds, capped in length, joined again as sound. No torch.

The model speaks about 20 s at a time reliably and stops for good at 81 s (2048 rows), so longer
texts are spoken piece by piece. `speak`, the recipes and the serving client all use these.
"""

import re
import unicodedata
from collections.abc import Iterable

import numpy as np

from higgs_lab.tags import Tag, parse_tags

_SPACES, _WORD = re.compile(r"\s*"), re.compile(r"\w*")

# How long a character takes to say, in units of one Latin letter (about 1/15 s in plain reading).
# A Han character is a syllable, a digit a whole word.
_WIDE = (
    (0x1100, 0x11FF, 1.5),  # Hangul parts: two or three make a syllable
    (0x1200, 0x139F, 2.0),  # Ethiopic syllables
    (0x13A0, 0x13FF, 2.0),  # Cherokee syllables
    (0x3040, 0x30FF, 2.0),  # kana: one mora each
    (0x3100, 0x312F, 2.0),  # bopomofo
    (0x3400, 0x4DBF, 3.0),  # Han, extension A
    (0x4E00, 0x9FFF, 3.0),  # Han
    (0xA000, 0xA4CF, 3.0),  # Yi syllables
    (0xAC00, 0xD7A3, 3.0),  # Hangul syllables
    (0xF900, 0xFAFF, 3.0),  # Han, compatibility
    (0xFF66, 0xFF9F, 2.0),  # half-width kana
    (0x20000, 0x3FFFF, 3.0),  # Han, further extensions
)
_DIGIT_UNITS = 6.0
_SYMBOL_UNITS = 8.0  # % & + € and emoji are read as words

# A cap must never cut good speech, only runaways: three times the plain reading time of a unit
# (slow tags, singing and careful speakers take up to twice), and room to begin and to end.
CAP_SEC_PER_UNIT = 0.2
CAP_BASE_SEC = 4.0
CAP_SEC_PER_TAG = 3.0  # a pause lasts up to 1.5 s, a laugh or a sneeze longer

# Default size of a chunk: about 20 s of plain reading, the length the model speaks stably.
MAX_CHARS = 300

_SENTENCE_END_TIGHT = "。！？｡．…‥।॥؟۔։።፧፨။།។៕‼⁇⁈⁉"  # end a sentence even without a space behind
_SENTENCE_END_SPACED = ".!?\u037e"  # only before a space: 3.14, example.org (U+037E asks in Greek)
_CLAUSE_END_TIGHT = "，、；：،؛፣፤፥—၊"
_CLAUSE_END_SPACED = ",;:–"
_CLOSERS = "\"'”’»›)]}」』】》〉）＂"
# Words that keep their full stop inside a sentence, in the languages where it matters most.
_ABBREVIATIONS = frozenset(
    "dr mr mrs ms mx prof st rev hon gov pres gen col lt sgt capt cmdr maj adm jr sr vs etc vol "
    "fig pp approx dept inc ltd co corp bros ave blvd rd mt jan feb mar apr jun jul aug sep oct "
    "sept nov dec bzw ca usw nr hr fr str evtl ggf inkl vgl bd abb tel mme mlle sra srta ud uds "
    "pág núm dra ul tzn np tj např resp св стр им см".split()
)


def speech_units(text: str) -> float:
    """Length of a text in Latin-letter units: what it costs to say, tags not counted."""
    spoken, position = 0.0, 0
    for at in [*parse_tags(text), None]:
        end = at.start if at else len(text)
        spoken += sum(map(_units, text[position:end]))
        position = at.end if at else end
    return spoken


def max_frames_for(text: str, frame_rate_hz: float = 25.0) -> int:
    """Most codec frames that speaking a text can sensibly take: a generous cap against runaways.

    4 s plus 0.2 s per Latin letter (three times plain reading), a Han character or Hangul syllable
    counting 3 letters, a kana 2, a digit 6, a symbol 8; plus 3 s per tag. "Yes." may take 4.8 s.
    """
    seconds = CAP_BASE_SEC + CAP_SEC_PER_UNIT * speech_units(text)
    return round((seconds + CAP_SEC_PER_TAG * len(parse_tags(text))) * frame_rate_hz)


def split_text(text: str, max_chars: int = MAX_CHARS) -> list[str]:
    """Cut a text into chunks of at most `max_chars` Latin-letter units, at sentence bounds.

    Units are those of `speech_units`: 300 Latin letters or 100 Han characters. A sentence that is
    too long is cut at clauses, then at spaces, then anywhere between two characters, but never
    inside a tag, between a tag and what it acts on, or before a combining mark. Chunks come out of
    similar size, so that no single word is left over. Only white space at the cuts is dropped.

    Sentence tags (emotion, style, speed, pitch, expressive) that begin the *text* hold for all of
    it, so they are put in front of every chunk, except where the chunk begins with a tag of the
    same category of its own. Tags further in stay where they are.

    Raises ValueError for max_chars < 20. An empty text gives no chunks.
    """
    if max_chars < 20:
        raise ValueError(f"max_chars must be at least 20, not {max_chars}: a word must fit in")
    pieces = _pieces(text, max_chars, [_sentence_cuts, _clause_cuts, _space_cuts, _character_cuts])
    sizes = [speech_units(piece) for piece in pieces]
    low, high = max(sizes, default=0.0), float(max_chars)
    chunks = _pack(pieces, sizes, high)
    fewest = len(chunks)
    while high - low > 1:  # the smallest limit that needs no further chunk gives even chunks
        middle = (low + high) / 2
        trial = _pack(pieces, sizes, middle)
        if len(trial) == fewest:
            chunks, high = trial, middle
        else:
            low = middle
    chunks = [chunk for chunk in map(str.strip, chunks) if chunk]
    held = _leading_sentence_tags(text)
    return [_carry(held, chunk) for chunk in chunks]


def join_waves(
    waves: Iterable[np.ndarray],
    sample_rate_hz: int,
    gap_sec: float = 0.0,
    fade_sec: float = 0.02,
) -> np.ndarray:
    """Join mono clips [n_i] into one, float32, without clicks.

    With `gap_sec` = 0 neighbours overlap by `fade_sec` in a linear cross-fade (weights sum to 1, so
    the result is shorter by that much per joint; a shorter clip gives at most half of itself). With
    a gap, ends are faded over `fade_sec` and that much silence is put between. No clips give no
    samples.
    """
    joined = np.zeros(0, dtype=np.float32)
    for number, wave in enumerate(waves):
        wave = np.array(wave, dtype=np.float32).reshape(-1)
        if number == 0:
            joined = wave
            continue
        fade = min(round(fade_sec * sample_rate_hz), len(joined) // 2, len(wave) // 2)
        rise = (np.arange(fade, dtype=np.float32) + 0.5) / max(fade, 1)
        tail, head = joined[len(joined) - fade :] * rise[::-1], wave[:fade] * rise
        body, rest = joined[: len(joined) - fade], wave[fade:]
        if gap_sec > 0:
            silence = np.zeros(round(gap_sec * sample_rate_hz), dtype=np.float32)
            joined = np.concatenate([body, tail, silence, head, rest])
        else:
            joined = np.concatenate([body, tail + head, rest])
    return joined


def _units(char: str) -> float:
    if char.isascii() and (char.isalpha() or char in " ,.!?'\"-;:()\n"):
        return 1.0
    category = unicodedata.category(char)
    if category[0] in "MC":
        return 0.5 if category in ("Mc", "Mn") and "\u0900" <= char <= "\u0dff" else 0.0
    if category[0] == "N":
        return _DIGIT_UNITS
    if category[0] == "S" or char in "%&@#‰":
        return _SYMBOL_UNITS
    for first, last, units in _WIDE:
        if first <= ord(char) <= last:
            return units
    return 1.0


def _pieces(text: str, max_units: float, cutters: list) -> list[str]:
    """Cut with the first cutter; cut what is still too long with the next ones."""
    cuts = sorted(set(cutters[0](text)) & set(_allowed_cuts(text)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True) if a < b]
    result = []
    for part in parts:
        if speech_units(part) > max_units and len(cutters) > 1:
            result += _pieces(part, max_units, cutters[1:])
        else:
            result.append(part)
    return result


def _pack(pieces: list[str], sizes: list[float], limit: float) -> list[str]:
    """Join neighbours as long as they fit."""
    chunks, room = [], 0.0
    for piece, size in zip(pieces, sizes, strict=True):
        if chunks and size <= room:
            chunks[-1] += piece
            room -= size
        else:
            chunks.append(piece)
            room = limit - size
    return chunks


def _allowed_cuts(text: str) -> list[int]:
    """Positions where a cut breaks no tag, no tag from what it acts on, no character."""
    barred = set()
    for at in parse_tags(text):
        barred.update(range(at.start + 1, at.end + 1))
        barred.update(range(at.end, _SPACES.match(text, at.end).end() + 1))
        if at.tag.category == "sfx":  # its sound word
            barred.update(range(at.end, _WORD.match(text, at.end).end()))
    joiners = "\u200d\u034f"
    return [
        i
        for i in range(1, len(text))
        if i not in barred
        and unicodedata.category(text[i])[0] != "M"
        and not 0x1160 <= ord(text[i]) <= 0x11FF  # Hangul vowels and finals
        and text[i] not in joiners
        and text[i - 1] not in joiners
    ]


def _sentence_cuts(text: str) -> list[int]:
    """Positions right after the sentences and paragraphs of a text."""
    cuts = [match.end() for match in re.finditer(r"\n\s*\n", text)]
    ends = re.escape(_SENTENCE_END_TIGHT + _SENTENCE_END_SPACED)
    for match in re.finditer(rf"[{ends}]+[{re.escape(_CLOSERS)}]*", text):
        mark = match.group().rstrip(_CLOSERS)
        if mark[-1] in _SENTENCE_END_SPACED and not _space_at(text, match.end()):
            continue
        if set(mark) <= set(".…‥") and _lower_follows(text, match.end()):
            continue
        if mark == "." and _keeps_its_stop(text, match.start(), match.end()):
            continue
        cuts.append(match.end())
    return cuts


def _clause_cuts(text: str) -> list[int]:
    cuts = [match.end() for match in re.finditer("\n", text)]
    ends = re.escape(_CLAUSE_END_TIGHT + _CLAUSE_END_SPACED)
    for match in re.finditer(rf"[{ends}]+[{re.escape(_CLOSERS)}]*", text):
        tight = match.group().rstrip(_CLOSERS)[-1] in _CLAUSE_END_TIGHT
        if tight or _space_at(text, match.end()):
            cuts.append(match.end())
    return cuts


def _space_cuts(text: str) -> list[int]:
    return [match.end() for match in re.finditer(r"\s+", text)]


def _character_cuts(text: str) -> range:
    return range(1, len(text))


def _space_at(text: str, position: int) -> bool:
    after = text[position : position + 2]
    return not after or after[0].isspace() or after == "<|"


def _lower_follows(text: str, position: int) -> bool:
    word = _SPACES.match(text, position).end()
    return text[word : word + 1].islower()


def _keeps_its_stop(text: str, start: int, end: int) -> bool:
    """Whether the full stop at `start` ends no sentence: abbreviation, initial, ordinal."""
    word = re.search(r"[\w.]*$", text[max(0, start - 16) : start]).group()
    if word.isdigit():
        return len(word) <= 2 and _SPACES.match(text, end).end() < len(text)  # 3. Mai, 1. Point
    initials = all(len(part) == 1 and part.isalpha() for part in word.split("."))  # J. and U.S.
    return (initials and word not in ("I", "a")) or word.lower() in _ABBREVIATIONS | {"ph.d"}


def _leading_sentence_tags(text: str) -> list[Tag]:
    """The sentence tags before the first word."""
    tags, position = [], len(text) - len(text.lstrip())
    for at in parse_tags(text):
        if text[position : at.start].strip():
            break
        position = at.end
        if at.tag.placement == "sentence":
            tags.append(at.tag)
    return tags


def _carry(held: list[Tag], chunk: str) -> str:
    own = {tag.group or tag.category for tag in _leading_sentence_tags(chunk)}
    return "".join(t.literal for t in held if (t.group or t.category) not in own) + chunk
