"""eval.languages: the table against the model card and against the installed packages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from eval.languages import LANGUAGES, coverage, language, main, select_languages
from eval.normalize import NORMALIZERS

ROWS = list(LANGUAGES.values())
CARD = [row for row in ROWS if row.tier]


def test_the_table_matches_the_model_card():
    assert sum(row.tier == 1 for row in ROWS) == 85
    assert sum(row.tier == 2 for row in ROWS) == 17
    stretch = {row.code for row in ROWS if row.tier == 0}
    assert stretch == set("am bo ig km lo my or si wo yo yue".split())
    assert len({row.iso3 for row in ROWS}) == len(ROWS) == 113
    without_fleurs = {row.code for row in CARD if not row.fleurs}
    assert without_fleurs == set("ba eu mhr eo ht rw ug sq kab la".split())
    assert len({row.fleurs for row in ROWS if row.fleurs}) == 92 + 9


def test_every_row_says_why_its_errors_are_counted_as_they_are():
    chars = {row.code for row in ROWS if row.unit == "char"}
    assert chars == {"zh", "yue", "ja", "th", "lo", "km", "my", "bo"}
    for row in ROWS:
        plain = row.unit_reason == "spaces part words"
        assert row.unit in ("word", "char") and plain == (row.code not in chars | {"ko", "vi"})


def test_whisper_codes_exist_in_the_installed_package():
    from whisper.tokenizer import LANGUAGES as WHISPER

    assert {row.whisper for row in ROWS if row.whisper} <= set(WHISPER)
    # The other way round: no language of ours has a token that the table does not know.
    assert {row.code for row in ROWS if row.code in WHISPER and not row.whisper} == set()
    without = {row.code for row in CARD if not row.whisper}
    assert without == set(
        "ast ceb ckb mhr eo rw ky luo nso ug xh zu ny lg ga kab kea kam om umb".split()
    )
    assert {row.whisper for row in ROWS if row.whisper and row.code != row.whisper} == {"jw"}


def test_whisper_grades_are_those_of_the_chart():
    grades = {g: {row.code for row in CARD if row.whisper_grade == g} for g in "ABCD"}
    assert [len(grades[g]) for g in "ABCD"] == [36, 11, 14, 21]
    assert {"en", "zh", "ja", "mk"} <= grades["A"] and {"hi", "cy"} <= grades["B"]
    assert {"bn", "is"} <= grades["C"] and {"uz", "la"} <= grades["D"]
    for row in ROWS:
        assert (row.whisper is None) == (row.whisper_grade is None)
        assert (row.recognizer == "whisper") == (row.whisper_grade in ("A", "B"))


def test_espeak_voices_exist_in_the_installed_package_and_none_is_missed():
    loader = pytest.importorskip("espeakng_loader")
    folder = Path(loader.get_data_path()) / "lang"
    voices = {path.name.lower() for path in folder.rglob("*") if path.is_file()}
    assert {row.espeak for row in ROWS if row.espeak} <= voices
    assert {row.code for row in ROWS if row.code in voices and not row.espeak} == set()
    assert coverage()["espeak"] == 76


def test_omniasr_codes_avoid_the_traps_of_its_list():
    """Codes looked up in omnilingual-asr 0.2.0, whose list mixes macrolanguages and languages."""
    expected = {
        "az": "aze_Latn", "lv": "lav_Latn", "ne": "nep_Deva", "fa": "fas_Arab", "et": "ekk_Latn",
        "ms": "zsm_Latn", "sw": "swh_Latn", "ar": "arb_Arab", "tl": "fil_Latn", "mn": "mon_Cyrl",
        "zh": "cmn_Hans", "no": "nob_Latn", "sq": "als_Latn", "ps": "pbt_Arab", "pa": "pan_Guru",
        "om": "orm_Latn", "yue": "yue_Hant", "uz": "uzb_Latn",
    }  # fmt: skip
    assert {code: LANGUAGES[code].omniasr for code in expected} == expected
    for row in ROWS:
        iso3, script = row.omniasr.split("_")
        assert re.fullmatch("[a-z]{3}", iso3)
        assert script == {"Kore": "Hang"}.get(row.script, row.script), row


# What omnilingual-asr 0.2.0 has for our languages and their macrolanguages, of the 1,668 codes of
# its lang_ids.py. The package itself needs fairseq2, which the core environment cannot have.
OMNIASR = """
afr_Latn als_Latn amh_Ethi arb_Arab asm_Beng ast_Latn aze_Arab aze_Cyrl aze_Latn bak_Cyrl
bel_Cyrl ben_Beng bod_Tibt bos_Latn bul_Cyrl cat_Latn ceb_Latn ces_Latn ckb_Arab cmn_Hans
cmn_Hant cym_Latn dan_Latn deu_Latn ekk_Latn ell_Grek eng_Latn epo_Latn eus_Latn fas_Arab
fil_Latn fin_Latn fra_Latn gle_Latn glg_Latn guj_Gujr hat_Latn hau_Latn heb_Hebr hin_Deva
hrv_Latn hun_Latn hye_Armn ibo_Latn ind_Latn isl_Latn ita_Latn jav_Latn jpn_Jpan kab_Latn
kam_Latn kan_Knda kat_Geor kaz_Cyrl kea_Latn khk_Cyrl khm_Khmr kin_Latn kir_Cyrl kor_Hang
kur_Arab lao_Laoo lat_Latn lav_Latn lin_Latn lit_Latn ltz_Latn lug_Latn luo_Latn mal_Mlym
mar_Deva mhr_Cyrl mkd_Cyrl mlt_Latn mon_Cyrl mri_Latn mya_Mymr nep_Deva nld_Latn nob_Latn
nso_Latn nya_Latn oci_Latn orm_Latn ory_Orya pan_Guru pbt_Arab pbu_Arab pol_Latn por_Latn
pus_Arab ron_Latn rus_Cyrl sin_Sinh slk_Latn slv_Latn sna_Latn snd_Arab som_Latn spa_Latn
srp_Cyrl swe_Latn swh_Latn tam_Taml tel_Telu tgk_Cyrl tgl_Latn tha_Thai tur_Latn uig_Arab
uig_Cyrl ukr_Cyrl umb_Latn urd_Arab urd_Deva urd_Latn uzb_Cyrl uzb_Latn uzn_Latn vie_Latn
wol_Latn xho_Latn yor_Latn yue_Hans yue_Hant zsm_Latn zul_Latn
""".split()


def test_every_omniasr_code_is_one_that_the_package_knows_and_every_twin_is_decided():
    assert {row.omniasr for row in ROWS} <= set(OMNIASR) and len(OMNIASR) == 127
    # Same language and script, two codes: the one with the lower published error is taken.
    twins = {
        "fil_Latn": "tgl_Latn", "mon_Cyrl": "khk_Cyrl", "pbt_Arab": "pus_Arab pbu_Arab",
        "uzb_Latn": "uzn_Latn", "ckb_Arab": "kur_Arab",
    }  # fmt: skip
    taken = {row.omniasr for row in ROWS}
    assert set(twins) <= taken and taken.isdisjoint(" ".join(twins.values()).split())
    other_scripts = {code for code in OMNIASR if code not in taken}
    other_scripts -= set(" ".join(twins.values()).split())
    assert all(any(code[:3] == other[:3] for other in taken) for code in other_scripts)


def test_mms_codes_name_the_script_where_the_adapters_do():
    scripts = {row.code: row.mms for row in ROWS if row.mms and "-script_" in row.mms}
    assert scripts == {
        "az": "azj-script_latin", "sr": "srp-script_cyrillic", "ug": "uig-script_arabic",
        "ur": "urd-script_arabic", "uz": "uzb-script_latin", "zh": "cmn-script_simplified",
        "yue": "yue-script_traditional",
    }  # fmt: skip
    macro = {"ar": "ara", "et": "est", "fa": "fas", "lv": "lav", "mn": "mon", "ms": "zlm",
             "om": "orm", "ps": "pus", "sq": "sqi", "tl": "tgl"}  # fmt: skip
    assert {code: LANGUAGES[code].mms for code in macro} == macro
    assert {row.code for row in ROWS if row.mms is None} == {"si"}
    plain = [row for row in ROWS if row.mms and row.code not in scripts | macro]
    assert all(row.mms == row.iso3 for row in plain)


def test_every_language_of_the_card_has_a_recogniser_and_a_normaliser():
    for row in CARD:
        assert getattr(row, "whisper" if row.recognizer == "whisper" else "omniasr"), row
    assert {row.normalizer for row in ROWS} <= set(NORMALIZERS)


def test_common_voice_names_locales_with_their_region():
    regions = {row.code: row.common_voice for row in ROWS if "-" in (row.common_voice or "")}
    assert regions == {
        "ga": "ga-IE", "hy": "hy-AM", "ne": "ne-NP", "pa": "pa-IN", "sv": "sv-SE", "zh": "zh-CN",
    }  # fmt: skip
    # FLEURS lacks ten of the card's languages; Common Voice has all of them but Latin.
    assert {r.code for r in CARD if not r.fleurs and not r.common_voice} == {"la"}


def test_languages_are_found_by_codes_aliases_regions_and_names():
    assert [language(c).code for c in ("pt-BR", "zh_CN", "deu", "nb", "fil", "jw", "German")] == [
        "pt", "zh", "de", "no", "tl", "jv", "de",
    ]  # fmt: skip
    assert language("zh-TW").code == "zh" and language("zh-HK").code == "yue"  # Common Voice's
    for row in ROWS:  # codes of the other tables lead back to the row
        for other in (row.iso3, row.fleurs, row.omniasr, row.mms, row.common_voice, row.whisper):
            assert other is None or language(other) is row, (row.code, other)
    with pytest.raises(ValueError, match="'tlh' has no row"):
        language("tlh")


def test_groups_and_codes_choose_languages():
    assert len(select_languages(["all"])) == 102
    assert select_languages(["tier2", "de"]) >= {"cy", "de"}
    assert select_languages(["stretch"]).isdisjoint(select_languages(["all"]))


def test_the_printed_table_shows_every_row_and_the_coverage(capsys):
    main()
    printed = capsys.readouterr().out
    assert all(f"│ {row.code} " in printed for row in ROWS)
    assert "languages 102, fleurs 92" in printed.replace("\n", " ")


def test_the_readme_shows_the_coverage_as_it_is():
    readme = " ".join((Path(__file__).parent.parent / "README.md").read_text().split())
    n = coverage()
    assert (
        f"FLEURS {n['fleurs']}, Common Voice {n['common_voice']}, omniASR {n['omniasr']}, "
        f"MMS {n['mms']}, Whisper {n['whisper']} (large-v3 errs at most 15 % on "
        f"{n['whisper A']} of them, 15-30 % on {n['whisper B']}, more on {n['whisper C']}, "
        f"unknown on {n['whisper D']}), espeak-ng {n['espeak']}." in readme
    )
