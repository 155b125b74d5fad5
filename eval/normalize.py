"""Text as it is compared: what a reader would call the same words must become the same string.

`fair` is ours and serves all languages. It keeps every letter, combining mark and digit (category
L, M, N) and turns punctuation and symbols into spaces. Whisper's own basic normaliser turns marks
into spaces too, which deletes the vowels of Hindi, Tamil, Thai, Burmese and their word boundaries
with them; it is not offered. What only some orthographies allow (dropping Arabic points, reading
ё as е) is in `RULES`, per language, never global.

Two decisions that a reader of the numbers should know: digits are not spelled out (rows with
digits are flagged in the scores), and Chinese is brought to simplified characters only where the
package `opencc` is installed (the version string then says so).

Every normaliser has a version; it goes into each result, and runs of different versions are not
compared.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
import unicodedata
from dataclasses import dataclass, field

from eval.languages import language

NORMALIZERS = ("fair", "whisper-english")
FAIR_VERSION = "1"

# Typographic variants of the apostrophe, including the letters that Uzbek, Hawaiian and Hebrew
# texts use for it. The acute accent must be caught before NFKC makes a combining mark of it.
_APOSTROPHES = "’‘‛`´′ʼʻʽʹʾʿˈꞌ՚׳＇"
_TO_APOSTROPHE = str.maketrans(dict.fromkeys(_APOSTROPHES, "'"))
# Invisible: variation selectors, keycap; format characters (category Cf) go with them.
_INVISIBLE = re.compile("[\ufe00-\ufe0f\u20e3\u180b-\u180d\U000e0100-\U000e01ef]")
_THOUSANDS = re.compile(r"(?<=\d)[.,'٬](?=\d{3}(?!\d))")

_HARAKAT = "\u064b-\u0652\u0656-\u065f\u0670\u06d6-\u06dc\u06df-\u06e4\u06e7\u06e8\u06ea-\u06ed"
_PERSIAN_LETTERS = {"ك": "ک", "ي": "ی", "ى": "ی"}
_STRESS = "\u0301"  # dictionary stress; Cyrillic has no letter with it outside Macedonian
_SERBIAN_LATIN = dict(
    zip(
        "абвгдђежзијклљмнњопрстћуфхцчџш",
        "a b v g d đ e ž z i j k l lj m n nj o p r s t ć u f h c č dž š".split(),
        strict=True,
    )
)


@dataclass(frozen=True)
class Rule:
    """What one orthography allows beyond the common steps."""

    drop: str = ""  # class body of optional signs, matched in decomposed (NFKD) text
    join: str = ""  # class body of marks inside a word that do not divide it, also NFKD
    replace: dict[str, str] = field(default_factory=dict)  # on composed, folded text
    joiner_is_space: bool = False  # the zero-width non-joiner divides words (Persian and kin)


_ARABIC_KIN = Rule(drop=_HARAKAT, replace=_PERSIAN_LETTERS, joiner_is_space=True)
RULES: dict[str, Rule] = {
    "ar": Rule(drop=_HARAKAT, replace={"أ": "ا", "إ": "ا", "آ": "ا", "ٱ": "ا", "ى": "ي"}),
    "fa": _ARABIC_KIN,
    "ur": _ARABIC_KIN,
    "ps": Rule(drop=_HARAKAT),  # Pashto tells several forms of ye apart
    "sd": Rule(drop=_HARAKAT),
    "ckb": Rule(replace={"ك": "ک", "ي": "ی", "ى": "ی"}, joiner_is_space=True),
    "he": Rule(drop="\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7", join='"״'),
    "hy": Rule(join="՛՜՞"),  # stress, exclamation, question: written over a vowel inside the word
    "ca": Rule(join="·"),
    "oc": Rule(join="·"),
    "la": Rule(drop="\u0304\u0306"),  # length marks of teaching texts
    "ru": Rule(drop=_STRESS, replace={"ё": "е"}),
    "uk": Rule(drop=_STRESS),
    "be": Rule(drop=_STRESS),
    "bg": Rule(drop=_STRESS),
    "sr": Rule(replace=_SERBIAN_LATIN),  # two official scripts, one language; recognisers mix them
    "bs": Rule(replace=_SERBIAN_LATIN),
    "ro": Rule(replace={"ş": "ș", "ţ": "ț"}),  # cedilla: the old encoding of the comma
    "fr": Rule(replace={"œ": "oe", "æ": "ae"}),
}
_NO_RULE = Rule()
# Malayalam final consonants, written before Unicode 5.1 as consonant + virama + joiner.
_CHILLU = {"ണ്\u200d": "ൺ", "ന്\u200d": "ൻ", "ര്\u200d": "ർ", "ല്\u200d": "ൽ", "ള്\u200d": "ൾ"}


def fair(text: str, lang: str) -> str:
    """Our normaliser. `lang` is the manifest's language, never what a recogniser guessed."""
    code = language(lang).code
    rule = RULES.get(code, _NO_RULE)
    for old, new in _CHILLU.items() if code == "ml" else ():
        text = text.replace(old, new)
    text = unicodedata.normalize("NFKC", text.translate(_TO_APOSTROPHE))
    text = text.translate(_TO_APOSTROPHE)  # those that NFKC unfolded
    if code in ("tr", "az"):  # dotted and dotless i are two letters
        text = text.replace("İ", "i").replace("I", "ı")
    # Unicode's compatibility caseless matching (D146): fold, decompose, fold again.
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFD", text).casefold()).casefold()
    if code in ("tr", "az"):
        text = text.replace("i\u0307", "i")  # what a language-blind lower() leaves of İ
    if rule.joiner_is_space:
        text = text.replace("\u200c", " ")
    text = _INVISIBLE.sub("", text)
    text = "".join(c for c in text if unicodedata.category(c) != "Cf" and c != "\u0640")
    if rule.drop:
        text = re.sub(f"[{rule.drop}]", "", text)
    if rule.join:
        text = re.sub(rf"(?<=\w)[{rule.join}](?=\w)", "", text)
    text = unicodedata.normalize("NFKC", text)
    for old, new in rule.replace.items():
        text = text.replace(old, new)
    if code == "zh" and (simplify := _simplifier()):
        text = simplify(text)
    text = "".join(_ascii_digit(c) for c in text)
    text = _THOUSANDS.sub("", text)
    text = "".join(_kept_or_space(text, i) for i in range(len(text)))
    return " ".join(word for word in map(_without_leading_marks, text.split()) if word)


def whisper_english(text: str, lang: str) -> str:
    """openai-whisper's EnglishTextNormalizer: spells out contractions, unifies numbers, spelling.

    Comparable to published English figures. Raises ValueError for any other language.
    """
    if language(lang).code != "en":
        raise ValueError(
            f"the normaliser whisper-english is for English, not {lang!r}: "
            "use --normalizer fair, or --langs en"
        )
    return _whisper_english()(text).strip()


def normalize(text: str, lang: str, name: str = "fair") -> str:
    """`text` as it is compared in language `lang`, by the normaliser called `name`."""
    if name == "fair":
        return fair(text, lang)
    if name == "whisper-english":
        return whisper_english(text, lang)
    raise ValueError(f"unknown normaliser {name!r}; known: {', '.join(NORMALIZERS)}")


def normalizer_version(name: str = "fair") -> str:
    """Name and version, as recorded in every result."""
    if name == "fair":
        simplified = f"+opencc{importlib.metadata.version('opencc')}" if _has_opencc() else ""
        return f"fair-{FAIR_VERSION}{simplified}"
    if name == "whisper-english":
        return f"whisper-english-{importlib.metadata.version('openai-whisper')}"
    raise ValueError(f"unknown normaliser {name!r}; known: {', '.join(NORMALIZERS)}")


def has_digits(text: str) -> bool:
    """Whether a text holds digits, which are not spelled out: 'nine' is then no match for '9'."""
    return any(unicodedata.category(c) == "Nd" for c in text)


def _kept_or_space(text: str, i: int) -> str:
    """Letters, marks, numbers; and an apostrophe between two of them."""
    if unicodedata.category(text[i])[0] in "LMN":
        return text[i]
    if text[i] == "'" and 0 < i < len(text) - 1:
        around = (unicodedata.category(text[i - 1])[0], unicodedata.category(text[i + 1])[0])
        if all(category in "LMN" for category in around):
            return "'"
    return " "


def _without_leading_marks(word: str) -> str:
    """A mark without a letter before it is debris (an emoji's, a broken transcript's)."""
    while word and (unicodedata.category(word[0])[0] == "M" or word[0] == "'"):
        word = word[1:]
    return word


def _ascii_digit(char: str) -> str:
    return str(unicodedata.digit(char)) if unicodedata.category(char) == "Nd" else char


def _has_opencc() -> bool:
    return importlib.util.find_spec("opencc") is not None


@functools.cache
def _simplifier():
    if not _has_opencc():
        return None
    from opencc import OpenCC

    return OpenCC("t2s").convert


@functools.cache
def _whisper_english():
    from whisper.normalizers import EnglishTextNormalizer

    return EnglishTextNormalizer()
