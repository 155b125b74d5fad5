"""eval.normalize, specified by pairs: what must become equal, what must stay apart."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.languages import LANGUAGES
from eval.normalize import (
    NORMALIZERS,
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
    ("en", "well-known, 3.5 % of $1,000,000", "well known 3 5 of 1000000"),
    ("en", "ＦＵＬＬ ｗｉｄｔｈ １２", "full width 12"),
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
    ("uz", "o‘zbek oʻzbek o'zbek", "o'zbek o'zbek o'zbek"),
    ("yo", "ọjọ́ dára", "ọjọ́ dára"),
    ("vi", "Tiếng Việt?", "tiếng việt"),
    ("zh", "今天，天气很好！", "今天 天气很好"),
    ("ja", "カタカナ・ﾃﾞｽ。", "カタカナ デス"),
    ("ko", "안녕, 세상!", "안녕 세상"),
    ("am", "ሰላም፡ዓለም።", "ሰላም ዓለም"),
]


@pytest.mark.parametrize(("lang", "written", "compared"), PAIRS)
def test_fair_pairs(lang, written, compared):
    assert fair(written, lang) == unicodedata.normalize("NFKC", compared)


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


def test_digits_are_noticed_in_any_script():
    assert has_digits("room 9") and has_digits("१") and not has_digits("nine")
