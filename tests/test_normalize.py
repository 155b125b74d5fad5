"""eval.normalize, specified by pairs: what must become equal, what must stay apart."""

from __future__ import annotations

import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.languages import LANGUAGES
from eval.normalize import (
    NORMALIZERS,
    SPELLED,
    fair,
    has_digits,
    normalize,
    normalizer_version,
)

# language, as written, as compared
PAIRS = [
    ("en", "Hello,  World!", "hello world"),
    ("en", "Don’t — it's John`s.", "don't it's john's"),
    ("en", "'quoted' rock 'n' roll dogs'", "quoted rock n roll dogs"),
    ("en", "well-known, 3.5 % of $1,000,000", "well known three five of one million"),
    (
        "en",
        "in 1984, room 007",
        "in one thousand nine hundred and eighty four room zero zero seven",
    ),
    ("en", "on the 21st", "on the 21st"),
    ("de", "21 Fälle", "einundzwanzig fälle"),
    ("pt", "mil e 21", "mil e vinte e um"),
    ("ja", "２５人", "二十五人"),
    ("th", "๒๑คน", "ยี่สิบเอ็ดคน"),
    ("ar", "٢١ كتاب", "واحد وعشرون كتاب"),
    ("en", "ＦＵＬＬ ｗｉｄｔｈ １２", "full width twelve"),
    ("en", "I ❤️ it 👍🏽", "i it"),
    ("en", "co\u00adoperate\u200b", "cooperate"),
    ("de", "Straße, GROẞ", "strasse gross"),
    ("tr", "İstanbul ILICA ışık", "istanbul ılıca ışık"),
    ("az", "İLK QIZ", "ilk qız"),
    ("tr", "i\u0307stanbul", "istanbul"),  # what str.lower() makes of İstanbul
    ("hi", "हिन्दी में, नमस्ते।", "हिन्दी में नमस्ते"),
    ("hi", "१२", "12"),
    ("ta", "தமிழ் மொழி!", "தமிழ் மொழி"),
    ("bn", "বাংলা ভাষা।", "বাংলা ভাষা"),
    ("ml", "അവന്\u200d", "അവൻ"),
    ("my", "မြန်မာ။", "မြန်မာ"),
    ("km", "ភាសា\u200bខ្មែរ។", "ភាសាខ្មែរ"),
    ("ar", "مُحَمَّدٌ، كتـــاب", "محمد كتاب"),
    ("ar", "أإآى", "اااي"),
    ("fa", "می\u200cخواهم", "می خواهم"),
    ("fa", "كتابي", "کتابی"),
    ("ug", "ئۇيغۇر", "ئۇيغۇر"),
    ("he", "שָׁלוֹם", "שלום"),
    ("he", 'צה״ל צה"ל', "צהל צהל"),
    ("hy", "Ինչպե՞ս ես։", "ինչպես ես"),
    ("ca", "col·laborar, l'hora", "collaborar l'hora"),
    ("fr", "L’œuvre d'art", "l'oeuvre d'art"),
    ("uk", "п’ять сам\u0301е", "п'ять саме"),
    ("ru", "ещё за\u0301мок й", "еще замок й"),
    ("mk", "ѓавол ќе", "ѓавол ќе"),
    ("sr", "Љубав и џеп", "ljubav i džep"),
    ("ro", "Ştiinţă știință", "știință știință"),
    ("el", "ΣΊΣΥΦΟΣ", fair("σίσυφος", "el")),
    ("kab", "Ad ruḥeγ γer uεekkaz", "ad ruḥeɣ ɣer uɛekkaz"),
    ("uz", "o‘zbek oʻzbek o'zbek", "o'zbek o'zbek o'zbek"),
    ("yo", "ọjọ́ dára", "ọjọ́ dára"),
    ("vi", "Tiếng Việt?", "tiếng việt"),
    ("zh", "今天，天气很好！", "今天 天气很好"),
    ("zh", "計程車後來很貴，乾隆", "计程车后来很贵 乾隆"),
    ("ja", "計程車", "計程車"),
    ("ja", "カタカナ・ﾃﾞｽ。", "カタカナ デス"),
    ("ko", "안녕, 세상!", "안녕 세상"),
    ("am", "ሰላም፡ዓለም።", "ሰላም ዓለም"),
]


@pytest.mark.parametrize(("lang", "written", "compared"), PAIRS)
def test_fair_pairs(lang, written, compared):
    assert fair(written, lang) == unicodedata.normalize("NFKC", compared)


def read_pairs() -> list[list[str]]:
    lines = (Path(__file__).parent / "data/normalize_pairs.tsv").read_text(encoding="utf-8")
    return [line.split("\t") for line in lines.splitlines()[1:]]


def test_every_language_has_three_sentences_that_its_orthography_must_pass():
    """As written (quoted, in capitals, decomposed, with its own marks and digits), as compared."""
    pairs = read_pairs()
    assert {code: n for code, n in Counter(code for code, *_ in pairs).items() if n < 3} == {}
    assert {code for code, *_ in pairs} == set(LANGUAGES)
    for code, written, compared in pairs:
        assert fair(written, code) == compared, (code, written)
        assert fair(compared, code) == compared


def test_every_sentence_is_in_the_script_of_its_language():
    names = {"Latn": "LATIN", "Cyrl": "CYRILLIC", "Arab": "ARABIC", "Deva": "DEVANAGARI",
             "Beng": "BENGALI", "Hans": "CJK", "Hant": "CJK", "Kore": "HANGUL", "Ethi": "ETHIOPIC",
             "Tibt": "TIBETAN", "Grek": "GREEK", "Hebr": "HEBREW", "Armn": "ARMENIAN",
             "Geor": "GEORGIAN", "Taml": "TAMIL", "Telu": "TELUGU", "Knda": "KANNADA",
             "Mlym": "MALAYALAM", "Gujr": "GUJARATI", "Guru": "GURMUKHI", "Orya": "ORIYA",
             "Sinh": "SINHALA", "Thai": "THAI", "Laoo": "LAO", "Khmr": "KHMER",
             "Mymr": "MYANMAR"}  # fmt: skip
    for code, written, _ in read_pairs():
        script = LANGUAGES[code].script
        letters = [unicodedata.name(c) for c in written if unicodedata.category(c)[0] == "L"]
        known = ("HIRAGANA", "KATAKANA", "HALFWIDTH", "CJK") if script == "Jpan" else names[script]
        own = [name for name in letters if name.startswith(known)]
        assert len(own) > 0.9 * len(letters), (code, written)


# Script as Unicode names it: a consonant, languages.
_SCRIPTS = {
    "DEVANAGARI": "क hi mr ne", "BENGALI": "ক bn as", "TAMIL": "க ta", "TELUGU": "క te",
    "KANNADA": "ಕ kn", "MALAYALAM": "ക ml", "GUJARATI": "ક gu", "GURMUKHI": "ਕ pa",
    "ORIYA": "କ or", "SINHALA": "ක si", "KHMER": "ក km", "LAO": "ກ lo", "THAI": "ก th",
    "MYANMAR": "က my", "TIBETAN": "ཀ bo",
}  # fmt: skip


@pytest.mark.parametrize("script", _SCRIPTS)
def test_no_language_loses_a_vowel_sign(script):
    """Every vowel sign of the script, between consonants: kept, and no word divided."""
    chars = [chr(code) for code in range(0x900, 0x1800) if unicodedata.name(chr(code), "")
             .startswith((f"{script} VOWEL SIGN", f"{script} CHARACTER SARA"))]  # fmt: skip
    consonant, *codes = _SCRIPTS[script].split()
    assert len(chars) >= 5
    for code in codes:
        for sign in chars:
            word = unicodedata.normalize("NFKC", consonant + sign + consonant)
            assert fair(f"({word})", code) == word, (code, unicodedata.name(sign))


@pytest.mark.parametrize("code", sorted(SPELLED))
def test_numbers_are_spelled_in_the_script_of_the_language_and_stay(code):
    for number in (0, 1, 7, 10, 15, 21, 99, 100, 105, 999, 1000, 1984, 20500, 10**6, 10**11):
        words = fair(str(number), code)
        assert words and not has_digits(words)
        assert fair(words, code) == words
        # The writing of the language itself, or Serbian's, which is compared in Latin letters.
        script = {"sr": "LATIN", "ja": "CJK", "ko": "HANGUL"}.get(code)
        sample = next(c for c in fair(read_pairs_of(code), code) if c.isalpha())
        expected = script or unicodedata.name(sample).split()[0]
        assert all(unicodedata.name(c).startswith(expected) for c in words if c.isalpha()), words


def read_pairs_of(code: str) -> str:
    return next(written for lang, written, _ in read_pairs() if lang == code)


def test_numbers_that_num2words_cannot_spell_stay_and_are_flagged():
    assert fair("我有 21 本书", "zh") == "我有 21 本书" and has_digits(fair("21", "zu"))
    assert fair("1" * 14, "en").split() == ["one"] * 14


@pytest.mark.parametrize(
    ("lang", "word"),
    [
        ("hi", "हिन्दी"), ("ta", "தமிழ்"), ("bn", "বাংলা"), ("th", "สวัสดีครับ"), ("my", "မြန်မာ"),
        ("km", "ខ្មែរ"), ("lo", "ພາສາລາວ"), ("te", "తెలుగు"), ("kn", "ಕನ್ನಡ"), ("gu", "ગુજરાતી"),
        ("pa", "ਪੰਜਾਬੀ"), ("si", "සිංහල"), ("or", "ଓଡ଼ିଆ"), ("ne", "नेपाली"), ("as", "অসমীয়া"),
        ("yo", "ọjọ́"), ("bo", "བོད"), ("ml", "മലയാളം"), ("mr", "मराठी"), ("ug", "ئۇيغۇرچە"),
    ],
)  # fmt: skip
def test_combining_marks_survive_every_script(lang, word):
    """Whisper's basic normaliser turns these into spaces, and vowel errors into nothing."""
    compared = fair(f"«{word}»!", lang)
    assert compared == unicodedata.normalize("NFKC", word)
    assert " " not in compared


def test_no_language_drops_a_letter_that_tells_words_apart():
    """Optional signs are dropped by their own language's rule only."""
    assert fair("ещё", "mhr") == "ещё" and fair("ё", "be") == "ё"
    assert fair("ć", "hr") == "ć" and fair("œ", "en") == "œ"
    assert fair("ᾱ", "el") != fair("α", "el")
    assert fair("I", "en") == "i" and fair("I", "tr") == "ı"


_ODD = "".join(
    chr(code)
    for first, last in [(0x20, 0x250), (0x2B0, 0x6F0), (0x900, 0x980), (0xD00, 0xF00),
                        (0x1100, 0x1200), (0x1E00, 0x2070), (0xFB00, 0xFE10)]
    for code in range(first, last)
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.text(st.sampled_from(_ODD), max_size=12) | st.text(max_size=12),
       st.sampled_from(sorted(LANGUAGES)))  # fmt: skip
def test_normalising_twice_is_normalising_once(text, lang):
    once = fair(text, lang)
    assert fair(once, lang) == once
    assert once == once.strip() and "  " not in once


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=20), st.sampled_from(["en", "de", "ru", "hi", "el"]))
def test_nothing_but_letters_marks_numbers_apostrophes_and_spaces_is_left(text, lang):
    left = fair(text, lang)
    assert all(unicodedata.category(c)[0] in "LMN" or c in "' " for c in left)


def test_whisper_english_is_whispers_own_and_only_english():
    from whisper.normalizers import EnglishTextNormalizer

    text = "Mr. Park won't pay $20 million for the colour."
    assert normalize(text, "en", "whisper-english") == EnglishTextNormalizer()(text).strip()
    with pytest.raises(ValueError, match="for English, not 'de'.*--normalizer fair"):
        normalize("Guten Tag", "de", "whisper-english")


def test_every_normaliser_has_a_version_and_an_unknown_one_names_the_known():
    versions = [normalizer_version(name) for name in NORMALIZERS]
    assert len(set(versions)) == len(versions) and versions[0].startswith("fair-")
    with pytest.raises(ValueError, match="unknown normaliser 'basic'; known: fair"):
        normalize("a", "en", "basic")


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF), max_size=8))
def test_simplifying_twice_is_simplifying_once(text):
    assert fair(fair(text, "zh"), "zh") == fair(text, "zh")


def test_digits_are_noticed_in_any_script():
    assert has_digits("room 9") and has_digits("१") and not has_digits("nine")
