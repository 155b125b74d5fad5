"""The languages: one row of data each. `python -m eval.languages` prints the table.

Columns: the code used in manifests (ISO 639-1 where there is one), ISO 639-3, name, script (ISO
15924), tier of the model card (1: published error below 5 %, 2: 5-10 %, 0: a stretch row that the
model does not claim), unit of the headline error, Whisper's token, the FLEURS configuration, the
espeak-ng voice; `-` where there is none.

The unit is `char` only where spaces do not separate words (zh yue ja th lo km my bo): a word error
rate there would measure the recogniser's spacing. Everywhere else it is `word`; both rates are
always computed for those.
"""

from __future__ import annotations

from dataclasses import dataclass

TABLE = """
af  | afr | Afrikaans         | Latn | 1 | word | af  | af_za       | af
ar  | arb | Arabic            | Arab | 1 | word | ar  | ar_eg       | ar
as  | asm | Assamese          | Beng | 1 | word | as  | as_in       | as
ast | ast | Asturian          | Latn | 1 | word | -   | ast_es      | -
az  | azj | Azerbaijani       | Latn | 1 | word | az  | az_az       | az
ba  | bak | Bashkir           | Cyrl | 1 | word | ba  | -           | ba
be  | bel | Belarusian        | Cyrl | 1 | word | be  | be_by       | be
bg  | bul | Bulgarian         | Cyrl | 1 | word | bg  | bg_bg       | bg
bn  | ben | Bengali           | Beng | 1 | word | bn  | bn_in       | bn
bs  | bos | Bosnian           | Latn | 1 | word | bs  | bs_ba       | bs
ca  | cat | Catalan           | Latn | 1 | word | ca  | ca_es       | ca
ceb | ceb | Cebuano           | Latn | 1 | word | -   | ceb_ph      | -
ckb | ckb | Central Kurdish   | Arab | 1 | word | -   | ckb_iq      | -
cs  | ces | Czech             | Latn | 1 | word | cs  | cs_cz       | cs
da  | dan | Danish            | Latn | 1 | word | da  | da_dk       | da
de  | deu | German            | Latn | 1 | word | de  | de_de       | de
el  | ell | Greek             | Grek | 1 | word | el  | el_gr       | el
en  | eng | English           | Latn | 1 | word | en  | en_us       | en-us
eo  | epo | Esperanto         | Latn | 1 | word | -   | -           | eo
es  | spa | Spanish           | Latn | 1 | word | es  | es_419      | es
et  | ekk | Estonian          | Latn | 1 | word | et  | et_ee       | et
eu  | eus | Basque            | Latn | 1 | word | eu  | -           | eu
fa  | pes | Persian           | Arab | 1 | word | fa  | fa_ir       | fa
fi  | fin | Finnish           | Latn | 1 | word | fi  | fi_fi       | fi
fr  | fra | French            | Latn | 1 | word | fr  | fr_fr       | fr
gl  | glg | Galician          | Latn | 1 | word | gl  | gl_es       | -
gu  | guj | Gujarati          | Gujr | 1 | word | gu  | gu_in       | gu
ha  | hau | Hausa             | Latn | 1 | word | ha  | ha_ng       | -
he  | heb | Hebrew            | Hebr | 1 | word | he  | he_il       | he
hi  | hin | Hindi             | Deva | 1 | word | hi  | hi_in       | hi
hr  | hrv | Croatian          | Latn | 1 | word | hr  | hr_hr       | hr
ht  | hat | Haitian Creole    | Latn | 1 | word | ht  | -           | ht
hu  | hun | Hungarian         | Latn | 1 | word | hu  | hu_hu       | hu
hy  | hye | Armenian          | Armn | 1 | word | hy  | hy_am       | hy
id  | ind | Indonesian        | Latn | 1 | word | id  | id_id       | id
it  | ita | Italian           | Latn | 1 | word | it  | it_it       | it
ja  | jpn | Japanese          | Jpan | 1 | char | ja  | ja_jp       | ja
jv  | jav | Javanese          | Latn | 1 | word | jw  | jv_id       | -
ka  | kat | Georgian          | Geor | 1 | word | ka  | ka_ge       | ka
kk  | kaz | Kazakh            | Cyrl | 1 | word | kk  | kk_kz       | kk
kn  | kan | Kannada           | Knda | 1 | word | kn  | kn_in       | kn
ko  | kor | Korean            | Kore | 1 | word | ko  | ko_kr       | ko
ky  | kir | Kyrgyz            | Cyrl | 1 | word | -   | ky_kg       | ky
ln  | lin | Lingala           | Latn | 1 | word | ln  | ln_cd       | -
lt  | lit | Lithuanian        | Latn | 1 | word | lt  | lt_lt       | lt
luo | luo | Luo               | Latn | 1 | word | -   | luo_ke      | -
lv  | lvs | Latvian           | Latn | 1 | word | lv  | lv_lv       | lv
mhr | mhr | Meadow Mari       | Cyrl | 1 | word | -   | -           | -
mi  | mri | Maori             | Latn | 1 | word | mi  | mi_nz       | mi
mk  | mkd | Macedonian        | Cyrl | 1 | word | mk  | mk_mk       | mk
ml  | mal | Malayalam         | Mlym | 1 | word | ml  | ml_in       | ml
mn  | khk | Mongolian         | Cyrl | 1 | word | mn  | mn_mn       | -
mr  | mar | Marathi           | Deva | 1 | word | mr  | mr_in       | mr
ms  | zsm | Malay             | Latn | 1 | word | ms  | ms_my       | ms
mt  | mlt | Maltese           | Latn | 1 | word | mt  | mt_mt       | mt
ne  | npi | Nepali            | Deva | 1 | word | ne  | ne_np       | ne
nl  | nld | Dutch             | Latn | 1 | word | nl  | nl_nl       | nl
no  | nob | Norwegian         | Latn | 1 | word | no  | nb_no       | nb
nso | nso | Northern Sotho    | Latn | 1 | word | -   | nso_za      | -
oc  | oci | Occitan           | Latn | 1 | word | oc  | oc_fr       | -
pl  | pol | Polish            | Latn | 1 | word | pl  | pl_pl       | pl
pt  | por | Portuguese        | Latn | 1 | word | pt  | pt_br       | pt-br
ro  | ron | Romanian          | Latn | 1 | word | ro  | ro_ro       | ro
ru  | rus | Russian           | Cyrl | 1 | word | ru  | ru_ru       | ru
rw  | kin | Kinyarwanda       | Latn | 1 | word | -   | -           | -
sk  | slk | Slovak            | Latn | 1 | word | sk  | sk_sk       | sk
sl  | slv | Slovenian         | Latn | 1 | word | sl  | sl_si       | sl
sn  | sna | Shona             | Latn | 1 | word | sn  | sn_zw       | -
sr  | srp | Serbian           | Cyrl | 1 | word | sr  | sr_rs       | sr
sv  | swe | Swedish           | Latn | 1 | word | sv  | sv_se       | sv
sw  | swh | Swahili           | Latn | 1 | word | sw  | sw_ke       | sw
ta  | tam | Tamil             | Taml | 1 | word | ta  | ta_in       | ta
te  | tel | Telugu            | Telu | 1 | word | te  | te_in       | te
tg  | tgk | Tajik             | Cyrl | 1 | word | tg  | tg_tj       | -
th  | tha | Thai              | Thai | 1 | char | th  | th_th       | th
tl  | fil | Tagalog           | Latn | 1 | word | tl  | fil_ph      | -
tr  | tur | Turkish           | Latn | 1 | word | tr  | tr_tr       | tr
ug  | uig | Uyghur            | Arab | 1 | word | -   | -           | ug
uk  | ukr | Ukrainian         | Cyrl | 1 | word | uk  | uk_ua       | uk
ur  | urd | Urdu              | Arab | 1 | word | ur  | ur_pk       | ur
uz  | uzn | Uzbek             | Latn | 1 | word | uz  | uz_uz       | uz
vi  | vie | Vietnamese        | Latn | 1 | word | vi  | vi_vn       | vi
xh  | xho | Xhosa             | Latn | 1 | word | -   | xh_za       | -
zh  | cmn | Chinese           | Hans | 1 | char | zh  | cmn_hans_cn | cmn
zu  | zul | Zulu              | Latn | 1 | word | -   | zu_za       | -
cy  | cym | Welsh             | Latn | 2 | word | cy  | cy_gb       | cy
ga  | gle | Irish             | Latn | 2 | word | -   | ga_ie       | ga
is  | isl | Icelandic         | Latn | 2 | word | is  | is_is       | is
kab | kab | Kabyle            | Latn | 2 | word | -   | -           | -
kam | kam | Kamba             | Latn | 2 | word | -   | kam_ke      | -
kea | kea | Kabuverdianu      | Latn | 2 | word | -   | kea_cv      | -
la  | lat | Latin             | Latn | 2 | word | la  | -           | la
lb  | ltz | Luxembourgish     | Latn | 2 | word | lb  | lb_lu       | lb
lg  | lug | Ganda             | Latn | 2 | word | -   | lg_ug       | -
ny  | nya | Chichewa          | Latn | 2 | word | -   | ny_mw       | -
om  | gaz | Oromo             | Latn | 2 | word | -   | om_et       | om
pa  | pan | Punjabi           | Guru | 2 | word | pa  | pa_in       | pa
ps  | pbt | Pashto            | Arab | 2 | word | ps  | ps_af       | -
sd  | snd | Sindhi            | Arab | 2 | word | sd  | sd_in       | sd
so  | som | Somali            | Latn | 2 | word | so  | so_so       | -
sq  | als | Albanian          | Latn | 2 | word | sq  | -           | sq
umb | umb | Umbundu           | Latn | 2 | word | -   | umb_ao      | -
am  | amh | Amharic           | Ethi | 0 | word | am  | am_et       | am
bo  | bod | Tibetan           | Tibt | 0 | char | bo  | -           | -
ig  | ibo | Igbo              | Latn | 0 | word | -   | ig_ng       | -
km  | khm | Khmer             | Khmr | 0 | char | km  | km_kh       | -
lo  | lao | Lao               | Laoo | 0 | char | lo  | lo_la       | -
my  | mya | Burmese           | Mymr | 0 | char | my  | my_mm       | my
or  | ory | Odia              | Orya | 0 | word | -   | or_in       | or
si  | sin | Sinhala           | Sinh | 0 | word | si  | -           | si
wo  | wol | Wolof             | Latn | 0 | word | -   | wo_sn       | -
yo  | yor | Yoruba            | Latn | 0 | word | yo  | yo_ng       | -
yue | yue | Cantonese         | Hant | 0 | char | yue | yue_hant_hk | yue
"""


@dataclass(frozen=True)
class Language:
    code: str
    iso3: str
    name: str
    script: str  # ISO 15924
    tier: int  # 1, 2, or 0 for a language that the model does not claim
    unit: str  # "word" or "char": what the headline error counts
    whisper: str | None
    fleurs: str | None
    espeak: str | None


def _rows() -> dict[str, Language]:
    rows = {}
    for line in TABLE.strip().splitlines():
        code, iso3, name, script, tier, unit, *rest = (cell.strip() for cell in line.split("|"))
        rows[code] = Language(
            code, iso3, name, script, int(tier), unit, *(None if c == "-" else c for c in rest)
        )
    return rows


LANGUAGES: dict[str, Language] = _rows()
# What other tables call the same languages. Region and script subtags (pt-BR, zh_CN) are cut off.
ALIASES = {"jw": "jv", "fil": "tl", "nb": "no", "cmn": "zh", "iw": "he", "in": "id"}
ALIASES |= {row.iso3: row.code for row in LANGUAGES.values() if row.iso3 != row.code}
ALIASES |= {row.name.lower(): row.code for row in LANGUAGES.values()}
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


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("code", "iso3", "name", "script", "tier", "unit", "whisper", "fleurs", "espeak")
    for row in LANGUAGES.values():
        cells = (row.code, row.iso3, row.name, row.script, str(row.tier or "-"), row.unit)
        table.add_row(*cells, row.whisper or "-", row.fleurs or "-", row.espeak or "-")
    Console().print(table)


if __name__ == "__main__":
    main()
