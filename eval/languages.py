"""The languages: one row of data each in `languages.tsv`. `python -m eval.languages` prints it.

Columns, `-` where there is none:

- code: as manifests write it (ISO 639-1 where there is one); iso3: ISO 639-3; script: ISO 15924
- tier of the model card (1: published error below 5 %, 2: 5-10 %, 0: a stretch row that the model
  does not claim)
- unit of the headline error, `word` or `char`; `unit_reason` says why. Both rates are computed.
- whisper: its token (Javanese is `jw` there); whisper_grade: what OpenAI's chart of large-v3 on
  FLEURS says of it. A: at most 15 % error, B: 15-30 %, C: above 30 %, D: a token without a figure
- fleurs: configuration of google/fleurs; common_voice: locale of Common Voice 17
- omniasr: code of omnilingual-asr 0.2.0's `lang_ids.py`. Its traps: `azj`, `lvs`, `npi`, `pes`,
  `est` and `fil_Latn`/`tgl_Latn` twins; of two codes the one with the lower published error is
  taken (pbt_Arab, nep_Deva, mon_Cyrl, fil_Latn)
- mms: adapter of facebook/mms-1b-all, which writes some languages by macrolanguage (ara, fas, lav,
  mon, orm, pus) and names the script of those with several
- espeak: voice of espeak-ng
- recognizer: who judges by default. Whisper where it is good enough to (grades A and B), omniASR
  elsewhere: there Whisper errs several times as much as what is to be measured. Measure the human
  row before believing either.
- normalizer: a name in eval.normalize
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

_NO_SPACES = "no spaces between words: a word rate would measure the recogniser's spacing"
UNIT_REASONS = {
    "zh": _NO_SPACES,
    "yue": _NO_SPACES,
    "ja": _NO_SPACES,
    "th": _NO_SPACES,
    "lo": _NO_SPACES,
    "km": _NO_SPACES,
    "my": "spaces part phrases, not words, and writers differ",
    "bo": "marks part syllables, not words, and spaces part clauses",
    "ko": "spaces part words, though writers differ: read the character rate beside it",
    "vi": "spaces part syllables, so that a 'word' is a syllable: see the character rate, too",
}


@dataclass(frozen=True)
class Language:
    code: str
    iso3: str
    name: str
    script: str  # ISO 15924
    tier: int  # 1, 2, or 0 for a language that the model does not claim
    unit: str  # "word" or "char": what the headline error counts
    whisper: str | None
    whisper_grade: str | None
    fleurs: str | None
    common_voice: str | None
    omniasr: str | None
    mms: str | None
    espeak: str | None
    recognizer: str
    normalizer: str

    @property
    def unit_reason(self) -> str:
        return UNIT_REASONS.get(self.code, "spaces part words")


def _rows() -> dict[str, Language]:
    rows = {}
    with (Path(__file__).parent / "languages.tsv").open(encoding="utf-8", newline="") as file:
        for cells in csv.DictReader(file, delimiter="\t"):
            cells = {name: None if cell == "-" else cell for name, cell in cells.items()}
            rows[cells["code"]] = Language(**cells | {"tier": int(cells["tier"])})
    return rows


LANGUAGES: dict[str, Language] = _rows()
# What other tables call the same languages. Region and script subtags (pt-BR, zh_CN) are cut off.
# Common Voice's zh-HK is Cantonese.
ALIASES = {"zh-hk": "yue"}
ALIASES |= {"iw": "he", "in": "id", "msa": "ms", "swa": "sw", "zho": "zh", "nor": "no", "ori": "or"}
for _row in LANGUAGES.values():
    _others = (_row.iso3, _row.fleurs, _row.omniasr, _row.mms, _row.whisper)
    ALIASES |= {_other.replace("_", "-").split("-")[0]: _row.code for _other in _others if _other}
    ALIASES[_row.name.lower()] = _row.code
GROUPS = {"tier1": 1, "tier2": 2, "stretch": 0}


def language(code: str) -> Language:
    """The row of a code (ISO 639-1 or -3), a code with a region ("pt-BR") or an English name.

    Raises ValueError for a language without a row; an evaluation must know what a word is there.
    """
    key = code.strip().lower().replace("_", "-")
    for name in (key, key.split("-")[0]):
        name = ALIASES.get(name, name)
        if name in LANGUAGES:
            return LANGUAGES[name]
    raise ValueError(
        f"language {code!r} has no row in eval/languages.py; "
        "use a code listed by `python -m eval.languages`, or add a row"
    )


def select_languages(names: list[str]) -> set[str]:
    """Codes chosen by a list such as ["tier1", "de", "yue"]; "all" is the 102 of the card."""
    chosen: set[str] = set()
    for name in names:
        if name == "all":
            chosen |= {row.code for row in LANGUAGES.values() if row.tier}
        elif name in GROUPS:
            chosen |= {row.code for row in LANGUAGES.values() if row.tier == GROUPS[name]}
        else:
            chosen.add(language(name).code)
    return chosen


def coverage(rows: list[Language] | None = None) -> dict[str, int]:
    """How many of the card's languages each column covers."""
    rows = [row for row in LANGUAGES.values() if row.tier] if rows is None else rows
    columns = ("fleurs", "common_voice", "whisper", "omniasr", "mms", "espeak")
    counts = {name: sum(getattr(row, name) is not None for row in rows) for name in columns}
    for grade in "ABCD":
        counts[f"whisper {grade}"] = sum(row.whisper_grade == grade for row in rows)
    return {"languages": len(rows)} | counts


def main() -> None:
    from dataclasses import fields

    from rich.console import Console
    from rich.table import Table

    names = [field.name for field in fields(Language)]
    table = Table(*names, title="Languages (tier 0: not claimed by the model)")
    for row in LANGUAGES.values():
        table.add_row(*(str("-" if getattr(row, n) is None else getattr(row, n)) for n in names))
    console = Console()
    Console(width=max(console.width, 170)).print(table)
    for reason in sorted(set(UNIT_REASONS.values())):
        codes = [code for code, text in UNIT_REASONS.items() if text == reason]
        console.print(f"{', '.join(codes)}: {reason}", highlight=False)
    counts = ", ".join(f"{name} {count}" for name, count in coverage().items())
    console.print(f"of the model's languages: {counts}", highlight=False)


if __name__ == "__main__":
    main()
