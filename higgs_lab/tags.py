"""The 43 control tags of Higgs TTS 3: their grammar, their placement, and what is refused.

A tag is one added token of the tokenizer, written `<|category:value|>`. The tokenizer turns *any*
added token found in a text into its control id, wherever the text came from, and neither serving
engine escapes user text: a literal `<|audio|>` in a sentence would end the prompt there. So every
text goes through `check_text` before it is tokenised; the 43 tags below pass, nothing else does.

Source of the table: the model's PROMPTING.md and the added tokens of its tokenizer.
"""

import difflib
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Tag:
    """One control tag.

    placement: "sentence" tags stand at the start of a sentence and colour all of it;
        "here" tags act at the exact spot.
    group: tags of one group exclude each other in a sentence ("" : no such rule).
    sounds: what is written right after an sfx tag, without a space, for the voice to act out.
    """

    category: str
    value: str
    placement: str
    group: str = ""
    sounds: tuple[str, ...] = ()

    @property
    def literal(self) -> str:
        return f"<|{self.category}:{self.value}|>"


@dataclass(frozen=True)
class TagAt:
    """A tag found in a text, as text[start:end]."""

    tag: Tag
    start: int
    end: int


_EMOTIONS = (
    "elation amusement enthusiasm determination pride contentment affection relief contemplation "
    "confusion surprise awe longing arousal anger fear disgust bitterness sadness shame "
    "helplessness"
)

TAGS: tuple[Tag, ...] = (
    *(Tag("emotion", value, "sentence") for value in _EMOTIONS.split()),
    *(Tag("style", value, "sentence", "style") for value in ("singing", "shouting", "whispering")),
    Tag("sfx", "cough", "here", sounds=("Ahem",)),
    Tag("sfx", "laughter", "here", sounds=("Haha", "Hehe")),
    Tag("sfx", "crying", "here", sounds=("Boohoo", "Sob")),
    Tag("sfx", "screaming", "here", sounds=("Ahh", "Aaah")),
    Tag("sfx", "burping", "here", sounds=("Burp",)),
    Tag("sfx", "humming", "here", sounds=("Hmm", "Mmm")),
    Tag("sfx", "sigh", "here", sounds=("Uh", "Ahh")),
    Tag("sfx", "sniff", "here", sounds=("Sff",)),
    Tag("sfx", "sneeze", "here", sounds=("Achoo",)),
    Tag("prosody", "speed_very_slow", "sentence", "speed"),  # about 0.65 x
    Tag("prosody", "speed_slow", "sentence", "speed"),  # about 0.85 x
    Tag("prosody", "speed_fast", "sentence", "speed"),  # about 1.2 x
    Tag("prosody", "speed_very_fast", "sentence", "speed"),  # about 1.4 x
    Tag("prosody", "pitch_low", "sentence", "pitch"),  # about -3 semitones
    Tag("prosody", "pitch_high", "sentence", "pitch"),  # about +2.5 semitones
    Tag("prosody", "pause", "here"),  # 0.4 to 0.7 s
    Tag("prosody", "long_pause", "here"),  # 0.7 to 1.5 s
    Tag("prosody", "expressive_high", "sentence", "expressive"),
    Tag("prosody", "expressive_low", "sentence", "expressive"),
)

BY_LITERAL: dict[str, Tag] = {tag.literal: tag for tag in TAGS}

# Added tokens that do not look like `<|...|>`. The rest is caught by its shape; a caller who has
# the tokenizer passes its whole list as `added_tokens`.
PLAIN_CONTROL_TOKENS = ("<tool_call>", "</tool_call>")

_TAG = re.compile("|".join(re.escape(literal) for literal in BY_LITERAL))
_CLOSED = re.compile(r"<\|([^<>|]*)\|>")
_SENTENCE_END = ".!?…。！？｡।॥؟۔։።"
_CLOSERS = "\"'”’»)]}」』】》〉）"


def parse_tags(text: str) -> list[TagAt]:
    """The control tags of a text, in order. Unknown ones are not listed: see `check_text`."""
    return [TagAt(BY_LITERAL[m.group()], m.start(), m.end()) for m in _TAG.finditer(text)]


def strip_tags(text: str) -> str:
    """The words of a text, for comparing with a transcript: tags out, sound words kept.

    A tag between two words leaves a space, so that they do not grow together.
    """

    def joint(match: re.Match) -> str:
        start, end = match.span()
        before, after = text[max(0, start - 1) : start], text[end : end + 1]
        return " " if before.isalnum() and after.isalnum() else ""

    words = re.sub(f"(?:{_TAG.pattern})+", joint, text)
    return re.sub(r"[ \t]{2,}", " ", words).strip()


def check_text(text: str, where: str = "", added_tokens: Iterable[str] = ()) -> None:
    """Refuse a text that the tokenizer would not read as plain words and known tags.

    where: put in front of the message, such as "data.jsonl:12, field text".
    added_tokens: all added tokens of the tokenizer in use (`tokenizer.get_added_vocab()`), so that
        none can be smuggled in whatever it looks like.

    Raises ValueError, with the position and the fix, for: empty text; an unknown tag (with near
    matches); any other control token; an opened `<|` that is no tag; a lone surrogate.
    """
    prefix = f"{where}: " if where else ""
    if not isinstance(text, str):
        raise ValueError(f"{prefix}the text is {type(text).__name__} {text!r}, not a string")
    if all(unicodedata.category(char)[0] in "ZC" for char in text):
        raise ValueError(f"{prefix}the text is empty ({text!r}): give words to speak")
    for position, char in enumerate(text):
        if "\ud800" <= char <= "\udfff":
            raise ValueError(
                f"{prefix}character {position} is a lone surrogate ({char!r}), which is no text: "
                "the file was decoded wrongly; save it as UTF-8"
            )
    for position, literal in _forbidden(text, added_tokens):
        raise ValueError(prefix + _refusal(text, position, literal))


def escape_control(text: str, keep_tags: bool = True, added_tokens: Iterable[str] = ()) -> str:
    """Make control tokens in a text harmless: their delimiters become spaces, their words stay.

    `a<|audio|>b` becomes `a audio b`, `<tool_call>` becomes ` tool_call `: what is left is read
    aloud as ordinary words and can form no control id. The 43 tags stay unless `keep_tags` is
    False. For text from people you do not know; text you write yourself is better refused
    (`check_text`), since a mistyped tag would be spoken.
    """
    added_tokens = tuple(added_tokens)
    while forbidden := next(_forbidden(text, added_tokens, keep_tags), None):
        position, literal = forbidden
        harmless = re.sub(r"[^\w]+", " ", literal)
        if harmless == literal:  # an added token that is itself a plain word: break it up
            harmless = " ".join(literal)
        text = text[:position] + harmless + text[position + len(literal) :]
    return text


def lint_tags(text: str) -> list[str]:
    """Warnings on tags that are legal but misplaced, as a user would want to read them.

    Unknown tags are not warnings but errors: `check_text`.
    """
    warnings = []
    found = parse_tags(text)
    for at in found:
        tag, name, after = at.tag, at.tag.literal, text[at.end :]
        if tag.placement == "sentence" and not _at_sentence_start(text, at.start, found):
            warnings.append(f"character {at.start}: {name} belongs at the start of a sentence")
        if tag.category == "sfx":
            sound = tag.sounds[0]
            if after[:1].isspace():
                warnings.append(
                    f"character {at.end}: no space after {name}; write {name}{sound}, the sound "
                    "word right behind the tag"
                )
            elif not after[:1].isalpha() or (
                after[0].isascii() and not _starts_with_sound(after, tag.sounds)
            ):
                warnings.append(
                    f"character {at.end}: {name} wants its sound word right behind it: "
                    + " or ".join(name + s for s in tag.sounds)
                )
    for group in ("style", "speed", "pitch", "expressive"):
        for first, second in zip(found, found[1:], strict=False):
            same = first.tag.group == second.tag.group == group
            if same and not text[first.end : second.start].strip():
                warnings.append(
                    f"character {second.start}: {second.tag.literal} contradicts "
                    f"{first.tag.literal} on the same sentence"
                )
    for match in re.finditer(r"[<\[(*]\s*/?(?:\w+:)?(\w+)\s*[>\])*]", _TAG.sub(_blank, text)):
        near = [tag.literal for tag in TAGS if tag.value == match.group(1).lower()]
        if near:
            warnings.append(
                f"character {match.start()}: {match.group()!r} is no tag and would be spoken; "
                f"write {near[0]}"
            )
    if found and not any(char.isalnum() for char in strip_tags(text)):
        warnings.append("the text has tags but no words: the voice has nothing to say")
    return warnings


def _forbidden(text: str, added_tokens: Iterable[str], keep_tags: bool = True):
    """(position, literal) of what may not reach the tokenizer, first in the text first."""
    for match in _control(frozenset(added_tokens)).finditer(text):
        if not (keep_tags and match.group() in BY_LITERAL):
            yield match.start(), match.group()


@lru_cache(maxsize=16)  # one a tokenizer; to write it anew takes longer than to search
def _control(added_tokens: frozenset[str]) -> re.Pattern:
    tokens = {t for t in (*PLAIN_CONTROL_TOKENS, *added_tokens) if t and t not in BY_LITERAL}
    pattern = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))
    return re.compile(f"{_TAG.pattern}|{pattern}|{_CLOSED.pattern}|<\\|")


def _refusal(text: str, position: int, literal: str) -> str:
    spot = f"at character {position}"
    inner = _CLOSED.fullmatch(literal)
    if literal == "<|":
        near = text[position : position + 24]
        return (
            f"'<|' opens a control tag {spot} that is never closed properly: {near!r}. Write "
            "<|category:value|>, or use escape_control() if it is meant as text"
        )
    if inner and (":" in literal or (near := _near(inner.group(1)))):
        near = _near(inner.group(1))
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        return f"unknown control tag {literal} {spot}{hint} (known tags: higgs_lab.tags.TAGS)"
    return (
        f"control token {literal} {spot}: it would change the prompt instead of being spoken. "
        "Remove it, or use escape_control() to have its words read aloud"
    )


def _near(name: str) -> list[str]:
    """Tags close to a mistyped `category:value`, by whole name first, then by value."""
    name = re.sub(r"\s*:\s*", ":", name.strip().lower()).replace("-", "_").replace(" ", "_")
    full = {f"{tag.category}:{tag.value}": tag.literal for tag in TAGS}
    value = name.split(":")[-1]
    same_value = [tag.literal for tag in TAGS if tag.value == value]
    if same_value:
        return same_value
    close = [full[key] for key in difflib.get_close_matches(name, full, n=3, cutoff=0.75)]
    by_value = {tag.value: tag.literal for tag in TAGS}
    close += [by_value[key] for key in difflib.get_close_matches(value, by_value, n=3, cutoff=0.75)]
    return list(dict.fromkeys(close))[:3]


def _at_sentence_start(text: str, position: int, found: list[TagAt]) -> bool:
    """Nothing but tags, spaces and opening quotes between here and the last sentence end."""
    before = text[:position]
    while True:
        before = before.rstrip().rstrip("\"'“‘«([「『（¿¡")
        last = next((at for at in found if at.end == len(before)), None)
        if last is None:
            break
        before = before[: last.start]
    ended = before.rstrip(_CLOSERS)
    newline = "\n" in text[len(before) : position]
    return not before or newline or ended[-1:] in tuple(_SENTENCE_END)


def _starts_with_sound(after: str, sounds: tuple[str, ...]) -> bool:
    # Two letters are enough: people stretch sounds (Haaahaha, Hmmmm, Ahhhh).
    return any(after[:2].lower() == sound[:2].lower() for sound in sounds)


def _blank(match: re.Match) -> str:
    return " " * len(match.group())
