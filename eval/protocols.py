"""Published benchmarks' own way with text and averages, step for step, for figures beside theirs.

`fair` (eval.normalize) is what to trust; a protocol is what to quote when a paper's number is to be
met. Each gives the strings that its script compares, in words or in characters, and says how the
script averages. Odd steps are kept on purpose and named here:

- `seed`: seed-tts-eval's run_wer.py and average_wer.py at 95003fe. English in words, Chinese in
  characters, mean over utterances. Punctuation is deleted, not spaced ("well-known" is one word),
  no compatibility folding, and only what was heard is brought to simplified characters.
- `cv3`: CV3-Eval's utils/run_wer.py at f3b7ed5. The same list; Chinese, Japanese and Korean in
  characters and not lower-cased.
- `minimax`: the MiniMax multilingual set as OmniVoice 0.2.1 runs it (eval/wer/minimax.py), with
  omnilingual-asr's text_normalize at 81f51e2. Characters for zh yue ja (spaces dropped) and
  ko th ar vi hi el (spaces count); corpus rate per language, mean over languages.
- `omnivoice-fleurs`: OmniVoice 0.2.1's fleurs.py. Characters with spaces for every language, except
  beside Chinese and Japanese characters; corpus rate per language, mean over languages.

The scripts leave clips out that are missing or that the recogniser failed on; `published_rate` does
too and says how many, while our headline counts them as all wrong.

zhconv and Unidecode are under the GPL, so they come with the extra `protocols`, not with the core.
"""

from __future__ import annotations

import importlib
import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from eval.languages import language

# zhon.hanzi.punctuation of zhon 2.1.1, after which string.punctuation without the apostrophe.
_ZHON = (
    "＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､\u3000、〃〈〉《》「」『』【】"
    "〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏﹑﹔·．！？｡。"
)
_DELETED = str.maketrans("", "", _ZHON + string.punctuation.replace("'", ""))

# What text_normalize turns into spaces, of the characters that NFKC leaves as they are. The last
# three lines are codes of broken encodings that its list of counted punctuation has picked up.
_SPACED = (
    '!"$%&()*+,./:;<=>?@[]^_{|}~¡£©«¬°¶·»¿×ˇ՚՛՜՝՞՟։־،؛؞؟ـ۔।॥৷ๆໆ༄༅།༎༌၊။၌၍၎၏႟፡።፣፤፥፦᙭᙮។៕៖ៗ៚'
    "―‘’‚‛“”„‟†‡•‧‰‸‹›※⁄€→−≪≫⋯⌊⌋⌞⌟─⵰、。々〈〉《》「」『』【】〔〕・ー꓾꓿꤮꤯﴾﴿\ufffd\u2060\u206f"
    "\x08\x1a\x81\x8d\x8f\x90\x92\x93\x94\x9d\ue003\ue013\ue01d\ue040\ue041\ue043\ue06b\ue06d\ue070"
    "\ue203\ue231\ue232\ue233\ue234\ue236\ue290\ue291\ue292\ue293\ue294\ue295\ue296\ue2d9\ue2db\ue2de"
    "\ue2f9\ue2fa\ue2fb\ue2fc\ue2fe\ue313\ue328\ue329\ue32a\ue32b\ue32c\ue32d\ue32e\ue492\ue493\ue514"
    "\ue516\ue517\ue518\uea01\uea7b\uf171\uf172\uf173\uf218\uf21d\uf50e\uf50f\uf511\uf513\uf518\uf519"
    "\uf521\uf522\uf523\uf529\uf52d\uf62d\uf7d0\uf7e8"
)
_DROPPED = "\u064b-\u0652\u0656\u0657\u200b\u200c\u200e\u200f\u202a\u202c"
_DROPPED_TOO = {"heb": "\u05b0-\u05cf", "mon": "\u00ad", "khk": "\u00ad"}
_BESIDE_CJK = "[\u4e00-\u9fff\u3040-\u309f\u30a0-\u30ff\u3000-\u303f]"


@dataclass(frozen=True)
class Protocol:
    """How one benchmark compares and averages."""

    version: str  # goes into every result
    text: Callable[[str, str, bool], str]  # text, language code, whether it was heard
    in_characters: frozenset[str] | None  # languages counted in characters; None: all
    average: str  # "utterances": mean of rates; "corpus": errors over units
    languages: frozenset[str] | None = None  # None: any
    recognizers: str = ""  # what the benchmark prescribes, for messages


def _seed(text: str, code: str, heard: bool) -> str:
    if heard and code == "zh":
        text = _to_mainland(text)
    text = text.translate(_DELETED).replace("  ", " ")
    return _no_whitespace(text) if code == "zh" else text.lower()


def _cv3(text: str, code: str, heard: bool) -> str:
    if heard and code == "zh":
        text = _to_mainland(text)
    text = text.translate(_DELETED).replace("  ", " ")
    return _no_whitespace(text) if code in ("zh", "ja", "ko") else text.lower()


def _minimax(text: str, code: str, heard: bool) -> str:
    row = language(code)
    text = text_normalize(text, row.iso3)
    if code in ("zh", "yue"):
        text = _to_mainland(text)
    if code in ("zh", "yue", "ja"):
        text = text.replace(" ", "")
    return text.lower().strip()


def _omnivoice_fleurs(text: str, code: str, heard: bool) -> str:
    row = language(code)
    text = text_normalize(text, (row.omniasr or row.iso3)[:3])
    # Spaces beside a Chinese or Japanese character go, one pair of neighbours after the other.
    text = re.sub(rf"({_BESIDE_CJK})\s+({_BESIDE_CJK})", r"\1\2", text)
    text = re.sub(rf"({_BESIDE_CJK})\s+", r"\1", text)
    return re.sub(rf"\s+({_BESIDE_CJK})", r"\1", text).strip()


def text_normalize(text: str, iso3: str) -> str:
    """omnilingual-asr's normaliser with numbers and brackets kept, as OmniVoice calls it.

    Raises ImportError without Unidecode for Javanese, whose diacritics it drops.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub(r"\([^)]*\d[^)]*\)", " ", text)  # brackets with numbers in them, such as (3:16)
    text = text.replace("&lt;", "").replace("&gt;", "").replace("&nbsp", "")
    text = re.sub(r"(\S+)[‛’‘](\S+)", r"\1'\2", text)
    text = text.replace("ٱ", "ا")  # meant for Arabic; their tables share it with all
    spaced = _SPACED + "\u200d" if iso3 == "tha" else _SPACED
    text = text.translate(dict.fromkeys(map(ord, spaced), " "))
    text = re.sub(f"[{_DROPPED}{_DROPPED_TOO.get(iso3, '')}]", "", text)
    if iso3 == "jav":
        text = _extra("unidecode").unidecode(text)
    return re.sub(r"\s+", " ", text).strip()


PROTOCOLS = {
    "seed": Protocol(
        "seed-1",
        _seed,
        frozenset({"zh"}),
        "utterances",
        frozenset({"en", "zh"}),
        "Whisper large-v3 for English, Paraformer-zh for Chinese",
    ),
    "cv3": Protocol(
        "cv3-1",
        _cv3,
        frozenset({"zh", "ja", "ko"}),
        "utterances",
        recognizers="Paraformer-zh for Chinese, Whisper large-v3 otherwise",
    ),
    "minimax": Protocol(
        "minimax-1",
        _minimax,
        frozenset("zh yue ja ko th ar vi hi el".split()),
        "corpus",
        recognizers="Paraformer-zh for Chinese, Whisper large-v3 otherwise",
    ),
    "omnivoice-fleurs": Protocol(
        "omnivoice-fleurs-1",
        _omnivoice_fleurs,
        None,
        "corpus",
        recognizers="omniASR_LLM_Unlimited_7B_v2",
    ),
}


def protocol_text(text: str, lang: str, name: str, heard: bool) -> str:
    """What protocol `name` compares of `text`. Where it counts characters, a space is one.

    heard: whether the text is a recogniser's; two protocols treat that differently.
    Raises ValueError for a language that the protocol does not have, ImportError with the extra to
    install.
    """
    protocol, code = PROTOCOLS[name], language(lang).code
    if protocol.languages is not None and code not in protocol.languages:
        raise ValueError(
            f"the protocol {name} is for {', '.join(sorted(protocol.languages))}, not {lang!r}: "
            "use --normalizer fair, or --langs"
        )
    return protocol.text(text, code, heard)


def protocol_unit(lang: str, name: str) -> str:
    """ "word" or "char": what the protocol counts in this language."""
    counted = PROTOCOLS[name].in_characters
    return "char" if counted is None or language(lang).code in counted else "word"


def published_rate(rows: Sequence[dict], name: str) -> dict | None:
    """The rate of one language as the protocol's script would print it, from scored clips.

    rows: `score_clip` dicts. Clips without a file or a transcript are left out, as there; their
    number is `left_out`. None if no clip is left. Unlike the headline, a failed clip counts as it
    was heard, and a rate may exceed 1.
    """
    kept = [
        row
        for row in rows
        if row["units"] and row["failure"] != "missing" and row["seconds"]
        if "recogniser_error" not in row["flags"]
    ]
    if not kept:
        return None
    wrong = [row["substitutions"] + row["deletions"] + row["insertions"] for row in kept]
    units = [row["units"] for row in kept]
    if PROTOCOLS[name].average == "utterances":
        value = fmean(errors / count for errors, count in zip(wrong, units, strict=True))
    else:
        value = sum(wrong) / sum(units)
    return {
        "value": value,
        "average": PROTOCOLS[name].average,
        "clips": len(kept),
        "left_out": len(rows) - len(kept),
    }


def _no_whitespace(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _to_mainland(text: str) -> str:
    return _extra("zhconv").convert(text, "zh-cn")


def _extra(package: str):
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"this protocol needs {package}: pip install 'higgs_lab[protocols]'"
        ) from error
