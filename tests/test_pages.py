"""report.html and compare.html in a real browser: they sort, play, and ask nobody for anything."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import finish, scored, write_run

from eval.compare import compare
from eval.compare_page import write_comparison
from eval.page import write_report
from higgs_lab.audio import write_wav

pytestmark = pytest.mark.browser
TEXTS = {
    "en": "the small cat sleeps",
    "de": "die kleine katze schläft",
    "ar": "القطة الصغيرة نائمة",
    "he": "החתולה הקטנה ישנה",
    "hi": "छोटी बिल्ली सो रही है",
    "th": "แมวตัวเล็กนอนหลับ",
    "zh": "小猫在睡觉",
    "ka": "პატარა კატა",
}
SECONDS = 1.5
PLAY = """player => player.play().then(() => new Promise(
    heard => { player.ontimeupdate = () => player.currentTime > 0.1 && heard() }))"""


@pytest.fixture(scope="module")
def browser():
    """Chromium of the system, or the one that `playwright install chromium` brings."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses one to root
    with playwright.sync_playwright() as running:
        if path is None and not Path(running.chromium.executable_path).exists():
            pytest.skip("no Chromium: apt-get install chromium, or playwright install chromium")
        found = running.chromium.launch(executable_path=path, args=sandbox)
        yield found
        found.close()


@pytest.fixture
def visit(browser):
    """Opens a page; at the end no error may have been logged and nothing asked for."""
    complaints, asked, contexts = [], [], []

    def go(path: Path, width: int = 1200, **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        return page

    yield go
    for context in contexts:
        context.close()
    assert complaints == []
    assert all(url.startswith(("file:", "data:")) for url in asked)
    assert len([url for url in asked if url.startswith("file:")]) == len(contexts)


def scores_in(folder: Path, worse: int = 0) -> list[dict]:
    """Two clips per language, the second less well heard, with sound; one clip is missing."""
    scores = []
    for number, (code, text) in enumerate(TEXTS.items()):
        for half in range(2):
            name = f"{code}{half}.wav"
            tone = 0.2 * np.sin(np.arange(int(SECONDS * 24000)) * (0.05 + 0.01 * number))
            write_wav(folder / name, tone, 24000)
            units = text.split() if " " in text else list(text)
            gap = " " if " " in text else ""
            heard = gap.join(units[: len(units) - half * (1 + number % 2) - worse])
            voice = 0.3 + 0.05 * number - 0.1 * worse
            row = scored(f"{code}{half}", text + f"{gap}{'ab'[half]}", heard, code,
                         sim_ref=voice, sim_target=voice)  # fmt: skip
            scores.append(row | {"audio": name})
    return [*scores, scored("gone", "nothing at all", "", audio=None, error="the server is gone")]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    scores = scores_in(folder)
    write_report(folder / "report.html", finish(scores), scores, folder)
    return folder / "report.html"


@pytest.fixture(scope="module")
def comparison(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    runs = []
    for worse, name in enumerate(("first", "second")):
        runs.append(write_run(folder / name, scores_in(folder / name, worse), name))
    write_comparison(folder / "compare.html", compare(*runs))
    return folder / "compare.html"


def column(page, table: str, number: int) -> list[str]:
    rows = page.locator(f"#{table} tbody:last-of-type tr")
    return [rows.nth(i).locator("th, td").nth(number).inner_text() for i in range(rows.count())]


def test_a_column_sorts_both_ways_and_by_keyboard(report, visit):
    page = visit(report)
    before = column(page, "errors", 0)
    head = page.locator("#errors thead th").nth(1)
    assert head.get_attribute("aria-sort") is None
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    rates = [float(text) for text in column(page, "errors", 1)]
    assert rates == sorted(rates, reverse=True) and rates[0] > rates[-1]
    head.locator("button").press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert [float(text) for text in column(page, "errors", 1)] == sorted(rates)
    page.locator("#errors thead th").nth(0).locator("button").press("Space")
    assert head.get_attribute("aria-sort") is None
    assert sorted(before) == column(page, "errors", 0) != before
    # The mean stays where it is.
    assert page.locator("#errors tbody").first.inner_text().startswith("mean of languages")


def test_a_clip_plays_and_another_stops_it(report, visit):
    page = visit(report)
    players = page.locator("#worst-clips audio")
    assert players.count() > 5
    for number in (0, 1):
        players.nth(number).evaluate(PLAY)
    found = players.evaluate_all("all => all.map(p => [p.paused, p.error, p.duration])")
    assert found[0][0] and not found[1][0] and found[0][1] is found[1][1] is None
    assert found[1][2] == pytest.approx(SECONDS, abs=0.1)
    assert players.nth(1).get_attribute("aria-label")


def test_rows_and_clips_can_be_narrowed_down(report, visit):
    page = visit(report)
    page.locator("select[name=kind]").select_option("missing")
    assert page.locator("#worst-clips .clip:visible").count() == 1
    assert page.locator("output").inner_text() == "1 shown"
    page.locator("select[name=kind]").select_option("")
    page.locator("select[name=language]").select_option("ar")
    shown = page.locator("#worst-clips .clip:visible")
    assert set(shown.evaluate_all("all => all.map(c => c.dataset.language)")) == {"ar"}
    page.locator('.tiles a[href="#row-hi"]').press("Enter")
    assert page.evaluate("document.querySelector(':target').id") == "row-hi"


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_scripts_run_their_own_way(name, request, visit):
    page = visit(request.getfixturevalue(name))
    for code, direction in {"ar": "rtl", "he": "rtl", "hi": "ltr", "zh": "ltr"}.items():
        said = page.locator(f".said[lang={code}]").first
        assert said.evaluate("p => getComputedStyle(p).direction") == direction


@pytest.mark.parametrize("name", ["report", "comparison"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_and_dark_pages_hold_together(name, scheme, request, visit):
    page = visit(request.getfixturevalue(name), width=360, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    ink, ground = page.evaluate(
        "['color', 'backgroundColor'].map(k => getComputedStyle(document.body)[k].match(/\\d+/g))"
    )
    light = [sum(map(int, rgb[:3])) / 765 for rgb in (ink, ground)]
    assert (
        (light[0] < 0.2 and light[1] > 0.9)
        if scheme == "light"
        else light[0] > 0.8 > 0.2 > light[1]
    )


def test_the_comparison_sorts_and_plays_both_sides(comparison, visit):
    page = visit(comparison)
    page.locator("#B-error thead th").nth(1).locator("button").click()
    differences = [float(text.replace("−", "-")) for text in column(page, "B-error", 1)]
    assert differences == sorted(differences, reverse=True)
    card = page.locator("#pairs .clip").first
    assert card.locator("audio").count() == 2
    card.locator("audio").nth(1).evaluate(PLAY)
    assert card.locator("section").evaluate_all("all => all.map(s => s.ariaLabel)") == [
        "run A", "run B",
    ]  # fmt: skip
