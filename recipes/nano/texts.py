"""The closed domain that the nano family speaks and hears: what may be said, and how it is split.

Short English sentences from a grammar of a few hundred words, and whole numbers written as words in
nine languages (`LANGUAGES`). Digits never occur: the model has no language argument, so the words
must carry the language. A text's split is a hash of the text, so that every program that meets a
text agrees on which side it is on, whatever was drawn before.
"""

from __future__ import annotations

import hashlib
import random

from higgs_lab.nano import LANGUAGES

ESPEAK_LANGUAGE = {"en": "en-us", "zh": "cmn", "fr": "fr"}
NUMBER_LANGUAGES = tuple(code for code in LANGUAGES if code != "en")

ANIMALS = (
    "cat dog bird horse rabbit turtle monkey tiger farmer teacher doctor child mother father "
    "brother sister friend king queen pilot sailor baker driver painter student neighbor"
).split()
NAMES = (
    "Anna Peter Maria Tom Lucy David Emma Jack Sarah Paul Julia Henry Nora Simon Clara Oscar"
).split()
ADJECTIVES = (
    "small big old young happy sad quick slow quiet loud brave clever gentle hungry tired friendly "
    "strange lazy proud lonely red blue green yellow black white warm cold heavy bright dark clean"
).split()
THINGS = (
    "apple bread bottle book letter window door table chair garden river mountain bridge house "
    "ship train bicycle lamp mirror basket blanket hammer ladder guitar drum clock candle coat "
    "flower picture pencil carpet kettle ticket wagon tower tunnel ring stone feather"
).split()
PLURALS = (
    "apples books letters windows chairs rivers mountains bridges ships trains lamps flowers "
    "pictures pencils tickets stones birds horses rabbits children doctors candles boats clouds"
).split()
VERBS = (
    "find paint carry open close clean bring sell buy move watch hide follow remember visit draw "
    "build break fix touch wash choose take keep"
).split()
VERBS_S = (
    "finds paints carries opens closes cleans brings sells buys moves watches hides follows "
    "remembers visits draws builds breaks fixes touches washes chooses takes keeps"
).split()
MOVES_S = (
    "walks runs sleeps waits sings dances swims works plays reads stands sits laughs travels"
).split()
ADVERBS = "slowly quickly quietly happily again often never always together alone today".split()
PLACES = (
    "in the garden|near the river|at the station|behind the house|under the bridge|on the table|"
    "in the forest|by the sea|at school|in the kitchen|over the mountain|outside the city|"
    "next to the window|in the market"
).split("|")
TIMES = (
    "tomorrow|this evening|in the morning|after dinner|before noon|on Sunday|every day|at night|"
    "next week|in the winter|last summer"
).split("|")
QUESTIONS = "where when why how".split()


def english_sentence(rng: random.Random) -> str:
    """One sentence of the grammar, three to about ten words."""
    pick = rng.choice
    form = rng.randrange(12)
    if form == 0:
        text = f"the {pick(ADJECTIVES)} {pick(ANIMALS)} {pick(VERBS_S)} the {pick(THINGS)}."
    elif form == 1:
        text = f"{pick(NAMES)} {pick(MOVES_S)} {pick(ADVERBS)} {pick(PLACES)}."
    elif form == 2:
        text = f"we will {pick(VERBS)} the {pick(ADJECTIVES)} {pick(THINGS)} {pick(TIMES)}."
    elif form == 3:
        text = f"please {pick(VERBS)} the {pick(THINGS)} {pick(PLACES)}."
    elif form == 4:
        text = f"is the {pick(ANIMALS)} {pick(ADJECTIVES)} or {pick(ADJECTIVES)}?"
    elif form == 5:
        text = f"I like {pick(ADJECTIVES)} {pick(PLURALS)} and {pick(ADJECTIVES)} {pick(PLURALS)}."
    elif form == 6:
        count = english_number(rng.randrange(2, 100))
        text = f"there are {count} {pick(PLURALS)} {pick(PLACES)}."
    elif form == 7:
        verb = pick(VERBS)
        text = f"{pick(QUESTIONS)} does {pick(NAMES)} {verb} the {pick(ADJECTIVES)} {pick(THINGS)}?"
    elif form == 8:
        text = f"{pick(TIMES)} the {pick(ANIMALS)} {pick(VERBS_S)} {pick(PLURALS)}."
    elif form == 9:
        text = f"my {pick(ANIMALS)} has {english_number(rng.randrange(2, 20))} {pick(PLURALS)}."
    elif form == 10:
        text = f"{pick(NAMES)} and {pick(NAMES)} {pick(VERBS)} a {pick(THINGS)} {pick(ADVERBS)}."
    else:
        text = f"the {pick(THINGS)} is {pick(ADJECTIVES)}."
    return text[0].upper() + text[1:]


# --- numbers as words, 0 to 9999 ---------------------------------------------------------------
EN_20 = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
EN_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def _parts(n: int) -> tuple[int, int, int]:
    return n // 1000, n // 100 % 10, n % 100


def english_number(n: int) -> str:
    if n < 20:
        return EN_20[n]
    if n < 100:
        return EN_TENS[n // 10 - 2] + (" " + EN_20[n % 10] if n % 10 else "")
    head, unit = (n // 1000, " thousand") if n >= 1000 else (n // 100, " hundred")
    rest = n % 1000 if n >= 1000 else n % 100
    return EN_20[head] + unit + (" " + english_number(rest) if rest else "")


DE_20 = (
    "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn "
    "fünfzehn sechzehn siebzehn achtzehn neunzehn"
).split()
DE_TENS = "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()


def german_number(n: int) -> str:
    if n < 20:
        return DE_20[n]
    ein = ["", "ein", *DE_20[2:]]
    if n < 100:
        return (ein[n % 10] + "und" if n % 10 else "") + DE_TENS[n // 10 - 2]
    head, unit = (n // 1000, "tausend") if n >= 1000 else (n // 100, "hundert")
    rest = n % 1000 if n >= 1000 else n % 100
    return ein[head] + unit + (german_number(rest) if rest else "")


ES_30 = (
    "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince "
    "dieciséis diecisiete dieciocho diecinueve veinte veintiuno veintidós veintitrés veinticuatro "
    "veinticinco veintiséis veintisiete veintiocho veintinueve"
).split()
ES_TENS = "treinta cuarenta cincuenta sesenta setenta ochenta noventa".split()
ES_HUNDREDS = (
    "ciento doscientos trescientos cuatrocientos quinientos seiscientos setecientos ochocientos "
    "novecientos"
).split()


def spanish_number(n: int) -> str:
    if n < 30:
        return ES_30[n]
    if n < 100:
        return ES_TENS[n // 10 - 3] + (" y " + ES_30[n % 10] if n % 10 else "")
    if n == 100:
        return "cien"
    if n < 1000:
        return ES_HUNDREDS[n // 100 - 1] + (" " + spanish_number(n % 100) if n % 100 else "")
    head = "mil" if n < 2000 else ES_30[n // 1000] + " mil"
    return head + (" " + spanish_number(n % 1000) if n % 1000 else "")


FR_17 = (
    "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize"
).split()
FR_TENS = "vingt trente quarante cinquante soixante".split()


def french_number(n: int) -> str:
    if n < 17:
        return FR_17[n]
    if n < 20:
        return "dix-" + FR_17[n - 10]
    if n < 60 or 60 <= n < 70:
        ten, unit = FR_TENS[n // 10 - 2], n % 10
        return ten + ("" if not unit else " et un" if unit == 1 else "-" + FR_17[unit])
    if n < 80:
        return "soixante et onze" if n == 71 else "soixante-" + french_number(n - 60)
    if n < 100:
        return "quatre-vingts" if n == 80 else "quatre-vingt-" + french_number(n - 80)
    if n < 1000:
        head, rest = n // 100, n % 100
        if head == 1:
            word = "cent"
        else:
            word = FR_17[head] + (" cents" if not rest else " cent")
        return word + (" " + french_number(rest) if rest else "")
    head = "mille" if n < 2000 else FR_17[n // 1000] + " mille"
    return head + (" " + french_number(n % 1000) if n % 1000 else "")


IT_20 = (
    "zero uno due tre quattro cinque sei sette otto nove dieci undici dodici tredici quattordici "
    "quindici sedici diciassette diciotto diciannove"
).split()
IT_TENS = "venti trenta quaranta cinquanta sessanta settanta ottanta novanta".split()


def italian_number(n: int) -> str:
    if n < 20:
        return IT_20[n]
    if n < 100:
        ten, unit = IT_TENS[n // 10 - 2], n % 10
        if unit in (1, 8):
            ten = ten[:-1]
        return ten + ("" if not unit else "tré" if unit == 3 else IT_20[unit])
    if n < 1000:
        head = "cento" if n < 200 else IT_20[n // 100] + "cento"
        return head + (italian_number(n % 100) if n % 100 else "")
    head = "mille" if n < 2000 else IT_20[n // 1000] + "mila"
    return head + (" " + italian_number(n % 1000) if n % 1000 else "")


RU_20 = (
    "ноль один два три четыре пять шесть семь восемь девять десять одиннадцать двенадцать "
    "тринадцать четырнадцать пятнадцать шестнадцать семнадцать восемнадцать девятнадцать"
).split()
RU_TENS = "двадцать тридцать сорок пятьдесят шестьдесят семьдесят восемьдесят девяносто".split()
RU_HUNDREDS = "сто двести триста четыреста пятьсот шестьсот семьсот восемьсот девятьсот".split()
RU_THOUSANDS = (
    "тысяча|две тысячи|три тысячи|четыре тысячи|пять тысяч|шесть тысяч|семь тысяч|восемь тысяч|"
    "девять тысяч"
).split("|")

EL_13 = "μηδέν ένα δύο τρία τέσσερα πέντε έξι επτά οκτώ εννέα δέκα έντεκα δώδεκα".split()
EL_TENS = "είκοσι τριάντα σαράντα πενήντα εξήντα εβδομήντα ογδόντα ενενήντα".split()
EL_HUNDREDS = (
    "εκατόν διακόσια τριακόσια τετρακόσια πεντακόσια εξακόσια επτακόσια οκτακόσια εννιακόσια"
).split()
EL_THOUSANDS = (
    "χίλια|δύο χιλιάδες|τρεις χιλιάδες|τέσσερις χιλιάδες|πέντε χιλιάδες|έξι χιλιάδες|"
    "επτά χιλιάδες|οκτώ χιλιάδες|εννέα χιλιάδες"
).split("|")


def _spaced_number(n, small, tens, hundreds, thousands) -> str:
    """Thousands, hundreds and the rest as separate words (Russian, Greek)."""
    thousand, hundred, rest = _parts(n)
    words = []
    if thousand:
        words.append(thousands[thousand - 1])
    if hundred:
        words.append(hundreds[hundred - 1])
    if rest >= 20:
        words.append(tens[rest // 10 - 2])
        rest %= 10
    if rest or not words:
        words.append(small[rest])
    return " ".join(words)


def russian_number(n: int) -> str:
    return _spaced_number(n, RU_20, RU_TENS, RU_HUNDREDS, RU_THOUSANDS)


def greek_number(n: int) -> str:
    teens = EL_13 + ["δεκα" + word for word in EL_13[3:10]]
    teens[16] = "δεκαέξι"
    text = _spaced_number(n, teens, EL_TENS, EL_HUNDREDS, EL_THOUSANDS)
    return text[:-1] if n % 1000 // 100 == 1 and n % 100 == 0 else text  # εκατό stands alone


HI_100 = (
    "शून्य एक दो तीन चार पाँच छह सात आठ नौ दस ग्यारह बारह तेरह चौदह पंद्रह सोलह सत्रह अठारह उन्नीस "
    "बीस इक्कीस बाईस तेईस चौबीस पच्चीस छब्बीस सत्ताईस अट्ठाईस उनतीस "
    "तीस इकतीस बत्तीस तैंतीस चौंतीस पैंतीस छत्तीस सैंतीस अड़तीस उनतालीस "
    "चालीस इकतालीस बयालीस तैंतालीस चौवालीस पैंतालीस छियालीस सैंतालीस अड़तालीस उनचास "
    "पचास इक्यावन बावन तिरपन चौवन पचपन छप्पन सत्तावन अट्ठावन उनसठ "
    "साठ इकसठ बासठ तिरसठ चौंसठ पैंसठ छियासठ सड़सठ अड़सठ उनहत्तर "
    "सत्तर इकहत्तर बहत्तर तिहत्तर चौहत्तर पचहत्तर छिहत्तर सतहत्तर अठहत्तर उनासी "
    "अस्सी इक्यासी बयासी तिरासी चौरासी पचासी छियासी सत्तासी अट्ठासी नवासी "
    "नब्बे इक्यानवे बानवे तिरानवे चौरानवे पचानवे छियानवे सत्तानवे अट्ठानवे निन्यानवे"
).split()


def hindi_number(n: int) -> str:
    thousand, hundred, rest = _parts(n)
    words = [HI_100[thousand] + " हज़ार"] if thousand else []
    words += [HI_100[hundred] + " सौ"] if hundred else []
    if rest or not words:
        words.append(HI_100[rest])
    return " ".join(words)


ZH_DIGITS = "零一二三四五六七八九"


def chinese_number(n: int) -> str:
    if n < 10:
        return ZH_DIGITS[n]
    text, gap = "", False
    for value, unit in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit = n // value % 10
        if digit:
            text += ("零" if gap and text else "") + ZH_DIGITS[digit] + unit
        gap = not digit
    return text[1:] if 10 <= n < 20 else text


NUMBER = {
    "en": english_number,
    "de": german_number,
    "es": spanish_number,
    "fr": french_number,
    "it": italian_number,
    "ru": russian_number,
    "el": greek_number,
    "hi": hindi_number,
    "zh": chinese_number,
}


def number_text(language: str, rng: random.Random) -> str:
    """A number of 0 to 9999, or two or three below 100 as a list, in the words of `language`."""
    say = NUMBER[language]
    if rng.random() < 0.3:
        comma = "，" if language == "zh" else ", "
        return comma.join(say(rng.randrange(100)) for _ in range(rng.choice((2, 2, 3))))
    digits = rng.choices((1, 2, 3, 4), weights=(1, 4, 6, 5))[0]
    return say(rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits))


def split_of(text: str) -> str:
    """'test' for about one text in twelve, 'train' for the others; a function of the text alone."""
    return "test" if hashlib.sha256(text.encode()).digest()[0] < 21 else "train"


def draw_text(language: str, rng: random.Random, split: str | None = "train") -> str:
    """A random text of `language` that belongs to `split` (None: either). English is mostly
    sentences, a tenth numbers; the others are numbers."""
    while True:
        if language == "en" and rng.random() < 0.9:
            text = english_sentence(rng)
        else:
            text = number_text(language, rng)
        if split is None or split_of(text) == split:
            return text


def vocabulary() -> set[str]:
    """Every English word that the grammar can produce, in lower case."""
    phrases = [*PLACES, *TIMES, *(english_number(n) for n in range(100))]
    phrases += (
        "the we will please is or I like and there are does my has a hundred thousand".split()
    )
    for words in (ANIMALS, NAMES, ADJECTIVES, THINGS, PLURALS, VERBS, VERBS_S, MOVES_S, ADVERBS):
        phrases += words
    phrases += QUESTIONS
    return {word for phrase in phrases for word in phrase.lower().split()}
