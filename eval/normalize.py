"""Text as it is compared: what a reader would call the same words must become the same string.

`fair` is ours and serves all languages. It keeps every letter, combining mark and digit (category
L, M, N) and turns punctuation and symbols into spaces. Whisper's own basic normaliser turns marks
into spaces too, which deletes the vowels of Hindi, Tamil, Thai, Burmese and their word boundaries
with them; it is not offered. What only some orthographies allow (dropping Arabic points, reading
ё as е) is in `RULES`, per language, never global.

Decisions that a reader of the numbers should know:

- Numbers. A recogniser writes "21" or "twenty-one" as it likes, so whole numbers are spelled out on
  both sides by num2words, in the languages of `SPELLED`; "3.5" becomes "three five". Elsewhere, and
  where letters touch the digits ("21st"), digits stay, and the scores flag such rows. A number that
  has several readings ("1984") costs a clip nothing if the recogniser writes digits, as most do.
- Chinese and Cantonese are brought to simplified characters by OpenCC, phrase by phrase: which set
  a recogniser writes says nothing about the speech.

Beside `fair` stand `whisper-english` and the protocols of published benchmarks (eval.protocols).
Every normaliser has a version; it goes into each result, and runs of different versions are not
compared.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
import unicodedata
from dataclasses import dataclass, field

from eval.languages import language
from eval.protocols import PROTOCOLS, protocol_text, protocol_unit

NORMALIZERS = ("fair", "whisper-english", *PROTOCOLS)
FAIR_VERSION = "2"

# Languages whose numbers num2words spells as they are read, and its name for them. It has am, cy,
# kn, te and tr too, but not so that they can be compared: wrong words, the old Welsh twenties,
# Turkish numbers written as one word.
SPELLED = {
    code: code
    for code in (
        "ar az be bn ca cs da de en eo es fa fi fr he hu id is it ja ko lt lv nl no pl ro ru sk sl "
        "sr sv tg th uk vi"
    ).split()
} | {"kk": "kz", "pt": "pt_BR"}
_NUMBER = re.compile(r"(?<!\S)[0-9]+(?!\S)")
_NUMBER_IN_RUNNING_SCRIPT = re.compile(r"(?<![0-9a-z])[0-9]+(?![0-9a-z])")  # no spaces around it
_MAX_DIGITS = 12  # longer ones are read digit by digit, as are those that begin with 0

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
    "kab": Rule(replace={"ε": "ɛ", "γ": "ɣ"}),  # Greek keys for the Latin letters
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
    text = "".join(_ascii_digit(c) for c in text)
    text = _THOUSANDS.sub("", text)
    text = "".join(_kept_or_space(text, i) for i in range(len(text)))
    text = " ".join(word for word in map(_without_leading_marks, text.split()) if word)
    if code in ("zh", "yue"):
        text = _simplifier().convert(text)
    if code in SPELLED:
        pattern = _NUMBER_IN_RUNNING_SCRIPT if language(code).unit == "char" else _NUMBER
        text = pattern.sub(lambda found: _spelled(found[0], code), text)
    return text


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


def normalize(text: str, lang: str, name: str = "fair", *, heard: bool = False) -> str:
    """`text` as it is compared in language `lang`, by the normaliser called `name`.

    heard: the text is a recogniser's; two of the protocols treat that differently, `fair` does not.
    Raises ValueError for an unknown name or a language that the normaliser is not for.
    """
    if name == "fair":
        return fair(text, lang)
    if name == "whisper-english":
        return whisper_english(text, lang)
    if name in PROTOCOLS:
        return protocol_text(text, lang, name, heard)
    raise ValueError(f"unknown normaliser {name!r}; known: {', '.join(NORMALIZERS)}")


def error_unit(lang: str, name: str = "fair") -> str:
    """ "word" or "char": what an error rate counts in a language under a normaliser."""
    return protocol_unit(lang, name) if name in PROTOCOLS else language(lang).unit


def normalizer_version(name: str = "fair") -> str:
    """Name and version, as recorded in every result."""
    if name == "fair":
        packages = ("num2words", "opencc")
        versions = "".join(f"+{p}{importlib.metadata.version(p)}" for p in packages)
        return f"fair-{FAIR_VERSION}{versions}"
    if name == "whisper-english":
        return f"whisper-english-{importlib.metadata.version('openai-whisper')}"
    if name in PROTOCOLS:
        return PROTOCOLS[name].version
    raise ValueError(f"unknown normaliser {name!r}; known: {', '.join(NORMALIZERS)}")


def has_digits(text: str) -> bool:
    """Whether digits are left in a text: "nine" is no match for "9" then."""
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


@functools.lru_cache(maxsize=10_000)
def _spelled(digits: str, code: str) -> str:
    """A whole number in words, normalised like any text of the language."""
    from num2words import num2words

    parts = list(digits) if digits[0] == "0" or len(digits) > _MAX_DIGITS else [digits]
    words = " ".join(num2words(int(part), lang=SPELLED[code]) for part in parts)
    if code == "ar":
        words = words.replace(" و ", " و")  # the conjunction is written with the word after it
    return fair(words, code)


@functools.cache
def _simplifier():
    from opencc import OpenCC

    return OpenCC("t2s")


@functools.cache
def _whisper_english():
    from whisper.normalizers import EnglishTextNormalizer

    return EnglishTextNormalizer()
