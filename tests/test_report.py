"""eval.report: the page stands alone, is safe to open, and shows what failed first."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from eval import report
from eval.metrics import AudioFacts, score_clip, summarise
from higgs_lab.audio import write_wav

FINE = AudioFacts(2.0, 1.8, 0.1, 0.1, -25.0, 0.0)


def scored(id, text, heard, lang="en", audio=FINE, **more):
    row = {"id": id, "take": 0, "language": lang, "audio": None, "error": "", "sim_ref": None}
    return row | score_clip(text, heard, lang, audio=audio) | more


def finish(scores):
    config = {
        "system": {"name": "a <b> system", "kind": "human"},
        "set": {"name": "set.jsonl", "revision": "1"},
        "asr": {"name": "large-v3", "revision": "2"},
        "encoder": {"name": "org/ecapa", "revision": "0123456789"},
        "normalizer": "fair-1",
        "metrics": "1",
    }
    reasons = [["no voice for it", 1]] if any(s["audio"] is None for s in scores) else []
    rest = {
        "reasons": reasons,
        "references": {"none": len(scores)},
        "similarity_pairs": None,
        "floor": None,
    }
    return summarise(scores) | rest | {"config": config, "provenance": {"time": "now"}}


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
    report.write_html(tmp_path / "report.html", finish(scores), scores, tmp_path)
    return (tmp_path / "report.html").read_text()


def test_the_page_is_well_formed_and_needs_nothing_else(page):
    tags = Page(page).tags
    addresses = [a for _, attrs in tags for k, a in attrs.items() if k in ("src", "href")]
    assert addresses and all(a.startswith("data:audio/flac;base64,") for a in addresses)
    assert "http" not in page.replace("https://", "http") or "://" not in page


def test_what_was_heard_cannot_run_as_code(page):
    assert "<script>alert" not in page and page.count("<script>") == 1
    assert "a &lt;b&gt; system" in page and "it &amp; broke" in page


def test_worst_first_failures_before_errors(page):
    order = [page.index(f">{id},") for id in ("gone", "worse", "zh", "good")]
    assert order == sorted(order)


def test_the_diff_shows_what_was_not_heard_and_what_was_instead(page):
    assert "<del>eins zwei</del>" in page
    assert "今天天<del>气</del><ins>汽</ins>" in re.sub(r"\s", "", page)


def test_every_language_has_a_row_and_the_columns_name_the_encoder(page):
    for name in ("mean of languages", "English (en)", "German (de)", "Chinese (zh)"):
        assert name in page
    assert "SIM to reference (ecapa@01234567)" in page


def test_embedded_sound_is_the_clip(tmp_path):
    import base64
    import io

    import soundfile

    wav = 0.1 * np.sin(np.arange(24000) * 0.1)
    write_wav(tmp_path / "a.wav", wav, 24000)
    address = report._sound(tmp_path, "a.wav")
    data, rate = soundfile.read(io.BytesIO(base64.b64decode(address.partition(",")[2])))
    assert rate == 24000 and np.allclose(data, wav, atol=1e-4)
    assert report._sound(tmp_path, "none.wav") is None
    (tmp_path / "bad.wav").write_text("no sound")
    assert report._sound(tmp_path, "bad.wav") is None


def test_diff_pieces():
    assert report.diff("a b c", "a x c d", "word") == [
        ("equal", "a"), ("delete", "b"), ("insert", "x"), ("equal", "c"), ("insert", "d"),
    ]  # fmt: skip
    assert report.diff("a b", "", "word") == [("delete", "a b")]
    assert report.diff("a b", None, "word") == [("equal", "a b")]


def test_notes_tell_what_the_numbers_hide():
    scores = [
        scored("a", "the 9th", "the ninth"),
        scored("b", "one two", "", audio=None),
        scored("c", "kunye", None, "zu"),
    ]
    notes = " | ".join(report.notes(finish(scores)))
    assert "all words wrong in 'error': 1 missing" in notes
    assert "1 not spoken: no voice for it" in notes
    assert "no recogniser for zu" in notes and "1 clips have digits" in notes


def test_a_recogniser_that_may_be_deaf_is_not_passed_over():
    """Judges with random weights give 100 %: the page must not leave that to the voice."""
    wrong, right = scored("a", "one two", "x y"), scored("a", "one two", "one two")
    assert any("--floor" in note for note in report.notes(finish([wrong])))
    assert not any("--floor" in note for note in report.notes(finish([right])))


def test_differences_name_the_setting_and_look_past_file_names():
    before = {"asr": {"name": "a.pt", "revision": "1"}, "seed": 0}
    now = {"asr": {"name": "b.pt", "revision": "2"}, "seed": 0, "takes": 1}
    assert report.differences(before, now) == [("asr.revision", "1", "2"), ("takes", None, 1)]
    assert report.differences({"encoder": None}, {"encoder": {"revision": "1"}}) == [
        ("encoder", None, {"revision": "1"})
    ]


@pytest.mark.parametrize("languages", [("en",), ("en", "de", "fr", "es")])
def test_the_printed_table_has_every_figure(languages, capsys, monkeypatch):
    scores = [scored(f"{c}{i}", f"text {i}", "text", c) for c in languages for i in "xy"]
    summary = finish(scores)
    columns, rows = report.table(summary)
    report.print_table(summary)
    printed = capsys.readouterr().out
    assert all(len(row) == len(columns) for row in rows)
    assert "50.00 WER" in printed and "SIM to reference" in printed
    assert Console().width >= 40
