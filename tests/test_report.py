"""eval.report, eval.page, eval.clips: the page stands alone, is safe to open, shows what failed."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from tiny_runs import FINE, finish, scored, write_run

from eval import report
from eval.clips import Sounds, diff, letters, worst
from eval.compare import compare, main
from eval.compare_page import write_comparison
from eval.languages import LANGUAGES
from eval.page import SCRIPTS, error_kinds, shade, write_report
from eval.paired import pairs_of
from eval.runs import differences
from higgs_lab.audio import write_wav


class Page(HTMLParser):
    """Tags with attributes, and a check that every tag that opens also closes."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def page(tmp_path):
    write_wav(tmp_path / "a.wav", 0.1 * np.sin(np.arange(24000) * 0.1), 24000)
    scores = [
        scored("good", "one two", "one two", sim_ref=0.9),
        scored("worse", "one two three", "one <script>alert(1)</script>", audio=FINE),
        scored("gone", "eins zwei", "", "de", audio=None, error="it & broke"),
        scored("zh", "今天天气", "今天 天汽", "zh"),
    ]
    scores[1]["audio"] = "a.wav"
    write_report(tmp_path / "report.html", finish(scores), scores, tmp_path)
    return (tmp_path / "report.html").read_text()


def test_the_page_is_well_formed_and_needs_nothing_else(page):
    tags = Page(page).tags
    addresses = [a for _, attrs in tags for k, a in attrs.items() if k in ("src", "href")]
    sounds = [a for a in addresses if a.startswith("data:audio/mpeg;base64,")]
    assert len(sounds) == 1 and all(a[0] == "#" for a in addresses if a not in sounds)
    assert "://" not in page


def test_every_row_of_every_table_has_a_cell_for_each_head(page):
    for table in re.findall(r"<table.*?</table>", page, re.DOTALL):
        rows = re.findall(r"<tr.*?</tr>", table, re.DOTALL)
        assert len(rows) >= 3  # heads, the mean, and languages with figures
        assert len({len(re.findall(r"<t[hd][ >]", row)) for row in rows}) == 1


def test_languages_that_nobody_judged_are_listed_and_not_averaged(tmp_path):
    scores = [scored("a", "one two", "one"), scored("b", "un deux", "un deux", "fr")]
    scores += [scored("c", "kunye", None, "zu")]
    write_report(tmp_path / "report.html", finish(scores), scores, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "mean of 2 languages" in page and 'class="none"' in page
    errors = re.search(r'id="errors".*?</table>', page, re.DOTALL)[0]
    assert errors.index("English") < errors.index("French") < errors.index("no recogniser")
    kinds = re.search(r'id="kinds-table".*?</table>', page, re.DOTALL)[0]
    assert "French" in kinds and "Zulu" in errors and "Zulu" not in kinds


def test_what_was_heard_cannot_run_as_code(page):
    assert "<script>alert" not in page and page.count("<script>") == 1
    assert "a &lt;b&gt; system" in page and "it &amp; broke" in page


def test_worst_first_failures_before_errors(page):
    order = [page.index(f'mono">{id}<') for id in ("gone", "worse", "zh", "good")]
    assert order == sorted(order)
    assert page.index("Least like the speaker") < order[-1]  # it has no error


def test_the_diff_shows_what_was_not_heard_and_what_was_instead(page):
    assert "<del>eins zwei</del>" in page
    assert "今天天<del>气</del><ins>汽</ins>" in re.sub(r"\s", "", page)


def test_every_language_has_a_row_and_the_columns_name_the_encoder(page):
    for name in ("mean of languages", "English <span", "German <span", "Chinese <span"):
        assert name in page
    assert "SIM to reference (ecapa@01234567)" in page


def test_embedded_sound_is_the_clip_and_what_does_not_fit_is_linked(tmp_path):
    import base64
    import io

    import soundfile

    run = tmp_path / "my run"
    run.mkdir()
    wav = 0.1 * np.sin(np.arange(48000) * 0.1)
    write_wav(run / "a.wav", wav, 24000)
    sounds = Sounds(run / "report.html", 100_000)
    found = sounds.clip(run, "a.wav")
    assert found["link"] == "a.wav"
    data, rate = soundfile.read(io.BytesIO(base64.b64decode(found["data"].partition(",")[2])))
    assert rate == 24000 and abs(len(data) - len(wav)) < 2500
    spectrum = np.abs(np.fft.rfft(data[8000:32000]))
    assert spectrum.argmax() == pytest.approx(0.1 * 24000 / (2 * np.pi), abs=2)
    assert sounds.left == 100_000 - len(found["data"])
    small = Sounds(tmp_path / "compare.html", 100)
    assert small.clip(run, "a.wav") == {"data": None, "link": "my%20run/a.wav"}
    nothing = {"data": None, "link": None}
    assert sounds.clip(run, "none.wav") == sounds.clip(run, None) == nothing
    (run / "bad.wav").write_text("no sound")
    assert sounds.clip(run, "bad.wav")["data"] is None


def test_diff_pieces():
    assert diff("a b c", "a x c d", "word") == [
        ("equal", "a"), ("delete", "b"), ("insert", "x"), ("equal", "c"), ("insert", "d"),
    ]  # fmt: skip
    assert diff("a b", "", "word") == [("delete", "a b")]
    assert diff("a b", None, "word") == [("equal", "a b")]


def test_a_letter_keeps_its_marks_so_that_a_piece_can_be_drawn():
    assert diff("ที่นี่", "ที่นั่", "char") == [
        ("equal", "ที่"), ("delete", "นี่"), ("insert", "นั่"),
    ]  # fmt: skip
    assert letters("ខ្មែរ") == ["ខ្មែ", "រ"]  # a subscript is no letter of its own


def test_kinds_of_error_add_up_to_the_error_over_all_clips():
    scores = [
        scored("a", "one two three", "one x three four"),
        scored("b", "one two", "", audio=None),
        scored("c", "one two", "one"),
    ]
    found = error_kinds(scores)
    rate = sum(s["errors"] for s in scores) / sum(s["units"] for s in scores)
    assert sum(found["shares"].values()) == pytest.approx(rate)
    assert found["shares"]["failed"] == pytest.approx(2 / 7)
    assert found["failures"] == "1 missing"


def test_the_map_knows_every_script_and_shows_one_point():
    assert {row.script for row in LANGUAGES.values()} == set(SCRIPTS)
    assert shade(0) == shade(None) == 0 and shade(0.01) == 20 == -shade(-0.01)
    assert shade(0.25) == shade(2.0) == 100


def test_notes_tell_what_the_numbers_hide():
    scores = [
        scored("a", "the 9th", "the ninth"),
        scored("b", "one two", "", audio=None),
        scored("c", "kunye", None, "zu"),
    ]
    notes = " | ".join(report.notes(finish(scores)))
    assert "all words wrong in 'error': 1 missing" in notes
    assert "1 not spoken: no voice for it" in notes
    assert (
        "no recogniser for 1 languages, so no error rates there: zu" in notes
        and "1 clips have digits" in notes
    )


def test_a_recogniser_that_may_be_deaf_is_not_passed_over():
    """Judges with random weights give 100 %: the page must not leave that to the voice."""
    wrong, right = scored("a", "one two", "x y"), scored("a", "one two", "one two")

    def advised(score: dict, kind: str) -> str:
        notes = report.notes(finish([score], kind=kind))
        return " | ".join(n for n in notes if "--floor" in n or "--asr" in n)

    assert "give that run as --floor" in advised(wrong, "checkpoint")
    # The human run is the floor: what it can be told is to look elsewhere.
    assert "15 % on these recordings in en" in advised(wrong, "human")
    assert "--floor" not in advised(wrong, "human")
    assert advised(right, "checkpoint") == advised(right, "human") == ""


def test_differences_name_the_setting_and_look_past_file_names():
    before = {"asr": {"name": "a.pt", "revision": "1"}, "seed": 0}
    now = {"asr": {"name": "b.pt", "revision": "2"}, "seed": 0, "takes": 1}
    assert differences(before, now) == [("asr.revision", "1", "2"), ("takes", None, 1)]
    assert differences({"encoder": None}, {"encoder": {"revision": "1"}}) == [
        ("encoder", None, {"revision": "1"})
    ]


@pytest.mark.parametrize("languages", [("en",), ("en", "de", "fr", "es")])
def test_the_printed_table_has_every_figure(languages, capsys):
    scores = [
        scored(f"{c}{i}", f"text {i}", "text", c, sim_ref=-0.25) for c in languages for i in "xy"
    ]
    report.print_table(finish(scores))
    printed = capsys.readouterr().out
    assert "50.00" in printed and "SIM to reference" in printed and "ecapa@01234567" in printed
    assert "−0.250" in printed and ("mean of languages" in printed) == (len(languages) > 1)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_narrow_terminal_keeps_the_error_and_every_language(width, capsys, monkeypatch):
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    monkeypatch.setenv("COLUMNS", str(width))
    codes = list(LANGUAGES)
    report.print_table(finish([scored(c, "one two", "one", c, sim_ref=0.5) for c in codes]))
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("│")]
    assert len(rows) == len(codes) + 1 and "mean of languages" in rows[-1]
    assert all(len(line) <= width for line in rows)
    assert all(any(f"{c} {LANGUAGES[c].name}"[:12] in row for row in rows) for c in codes)
    assert ("SIM" in "".join(lines[:8])) == (width >= 80)


def test_medians_of_a_run_and_means_of_a_comparison_are_told_apart_by_name(tmp_path, capsys):
    """One odd clip of three: 1 semitone is the median of the spreads, 4 is their mean."""
    spreads = {"a": 1.0, "b": 1.0, "c": 10.0}
    scores = [scored(c, f"text {c}", f"text {c}", f0_spread_st=st) for c, st in spreads.items()]
    report.print_table(finish(scores))
    printed = capsys.readouterr().out
    assert re.search(r"median F0 spread st +│ +1\.0 ", printed), printed
    main([str(write_run(tmp_path / run, scores, run)) for run in ("one", "two")])
    printed = capsys.readouterr().out
    assert re.search(r"mean F0 spread st +│ +3 │ +4\.00 │ +4\.00 ", printed), printed


def test_worst_clips_show_every_kind_of_failure_and_leave_room_for_errors():
    silent = replace(FINE, active_sec=0.0)
    scores = [scored(f"m{i}", "one two", "", audio=None) for i in range(9)]
    scores += [scored("s", "one two", "", audio=silent)]
    scores += [scored(f"e{i}", "one two", "one") for i in range(9)] + [scored("ok", "one", "one")]
    shown = worst(scores, 6)
    assert [score["id"] for score in shown] == ["m0", "s", "m1", "e0", "e1", "e2"]
    assert len(worst(scores[:11], 6)) == 6 and worst(scores[-1:], 6) == []


def test_a_comparison_of_three_runs_shows_where_they_differ_most(tmp_path):
    heard = {"a": ("one two", "one two", "one"), "b": ("eins zwei", "eins", "eins zwei"),
             "c": ("same", "same", "same")}  # fmt: skip
    runs = []
    for number in range(3):
        folder = tmp_path / f"run{number}"
        write_wav(folder / "a.wav", 0.1 * np.sin(np.arange(9600) * 0.1), 24000)
        scores = [
            scored(id, texts[0], texts[number], "de" if id == "b" else "en", sim_target=0.5)
            for id, texts in heard.items()
        ]
        scores[0]["audio"] = "a.wav"
        runs.append(write_run(folder, scores, f"system {number}"))
    write_comparison(tmp_path / "compare.html", compare(*runs))
    page = (tmp_path / "compare.html").read_text()
    tags = Page(page).tags
    assert "://" not in page and page.count("data:audio/mpeg") == 3
    assert [attrs["data-kind"] for tag, attrs in tags if tag == "article"] == [
        "A and B better", "A and C better",
    ]  # fmt: skip
    assert page.count("<del>two</del>") == page.count("<del>zwei</del>") == 1
    assert 'id="B-error"' in page and 'id="C-sim_target"' in page
    assert "system 0 → system 2" in page  # what was set differently
    for table in re.findall(r"<table.*?</table>", page, re.DOTALL):
        rows = re.findall(r"<tr.*?</tr>", table, re.DOTALL)
        assert len({len(re.findall(r"<t[hd][ >]", row)) for row in rows}) == 1


@pytest.mark.parametrize("width", [60, 90, 200])
def test_a_comparison_of_many_languages_fits_the_terminal(width, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    monkeypatch.setenv("COLUMNS", str(width))
    codes = list(LANGUAGES)[:9]
    runs = []
    for name, cut in (("first", 9), ("second", 4)):
        scores = [
            scored(f"{c}{i}", f"one two {i}", f"one two {i}"[: cut + (i == "c")], c)
            for c in codes
            for i in "abc"
        ]
        runs.append(str(write_run(tmp_path / name, scores, name)))
    main([*runs, "--difference", "0.1"])
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("│")]
    assert max(map(len, rows)) <= width and all(any(f"│ {c} " in r for r in rows) for c in codes)
    assert printed.count("mean") >= 2 and "B − A" in printed
    assert ("p (Holm)" in printed) == (width > 60)


def test_a_single_take_stands_beside_every_take_of_the_other_run(tmp_path):
    text = "one two three four"
    takes = [
        scored("a", text, f"one two {word}", take=n) for n, word in enumerate("three x".split())
    ]
    single = [scored("a", text, text)]
    for a, b in ((takes, single), (single, takes)):
        runs = [write_run(tmp_path / name, rows, name) for name, rows in (("a", a), ("b", b))]
        entry = compare(*runs)["comparisons"][0]["metrics"]["error"]["languages"]["en"]
        assert {entry["a"], entry["b"]} == {0.0, 0.375}
    assert [(one["take"], two["take"]) for one, two in pairs_of(takes, takes)] == [(0, 0), (1, 1)]
