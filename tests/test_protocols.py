"""eval.protocols against what the published scripts answered on the same pairs.

The fixture's first line says how its figures were made: by the scripts themselves.
"""

from __future__ import annotations

import json
from pathlib import Path

import jiwer
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval import protocols
from eval.acoustics import AudioFacts
from eval.languages import LANGUAGES
from eval.metrics import char_errors, score_clip, summarise, word_errors
from eval.normalize import error_unit, normalize, normalizer_version
from eval.protocols import PROTOCOLS, published_rate

_LINES = (Path(__file__).parent / "data/protocol_pairs.jsonl").read_text().splitlines()
HEAD, *PAIRS = map(json.loads, _LINES)
SPOKEN = AudioFacts(3.0, 3.0, 0.0, 0.0, -20.0, 0.0)


def scored(pair, name):
    score = score_clip(
        pair["reference"], pair["heard"], pair["language"], normalizer=name, audio=SPOKEN
    )
    return score | {"language": pair["language"]}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_pair_is_scored_as_the_published_script_does(name):
    pairs = [pair for pair in PAIRS if name in pair]
    assert len(pairs) >= 200
    for pair in pairs:
        score = scored(pair, name)
        wrong = [score[kind] for kind in ("substitutions", "deletions", "insertions")]
        rate = sum(wrong) / score["units"]
        expected = pair[name]
        # Several alignments may be equally short; their sum is what both agree on.
        assert rate == pytest.approx(expected[0], abs=1e-12), (name, pair, score)
        assert sum(wrong) == sum(expected[1:])


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_published_average_is_the_scripts_own(name):
    averages = {key.split()[1]: value for key, value in HEAD["averages"].items()
                if key.split()[0] == name}  # fmt: skip
    assert len(averages) >= (2 if name == "seed" else 20)
    for code, expected in averages.items():
        rows = [scored(pair, name) for pair in PAIRS if name in pair and pair["language"] == code]
        rate = published_rate(rows, name)
        assert round(100 * rate["value"], 3) == pytest.approx(expected, abs=0.0011)
        assert rate["clips"] == len(rows) and rate["left_out"] == 0


def test_the_summary_of_a_protocol_run_has_its_average_beside_the_headline():
    pairs = [pair for pair in PAIRS if "seed" in pair]
    rows = [scored(pair, "seed") for pair in pairs]
    options = {"normalizer": "seed", "audio": SPOKEN}
    lost = [
        score_clip("Hello there.", None, "en", **options | {"audio": None}),
        score_clip("Hello there.", "", "en", **options, transcript={"error": "out of memory"}),
    ]
    lost = [row | {"language": "en"} for row in lost]
    summary = summarise([*rows, *lost], normalizer="seed")
    english = summary["languages"]["en"]["published"]
    assert round(100 * english["value"], 3) == HEAD["averages"]["seed en"]
    assert english["left_out"] == 2 and english["average"] == "utterances"
    both = [summary["languages"][code]["published"]["value"] for code in ("en", "zh")]
    assert summary["overall"]["published"]["value"] == pytest.approx(sum(both) / 2)
    assert summarise(rows)["overall"]["published"] is None


def test_only_what_was_heard_is_simplified_by_seed_and_cv3():
    for name in ("seed", "cv3"):
        assert normalize("計程車", "zh", name, heard=True) == "计程车"
        assert normalize("計程車", "zh", name) == "計程車"
    assert normalize("計程車", "zh", "minimax") == normalize("計程車", "zh", "minimax", heard=True)


def test_a_protocol_says_what_it_counts_and_what_it_is_for():
    assert {code for code in LANGUAGES if error_unit(code, "cv3") == "char"} == {"zh", "ja", "ko"}
    assert error_unit("en", "omnivoice-fleurs") == "char" and error_unit("th", "seed") == "word"
    with pytest.raises(ValueError, match="seed is for en, zh, not 'de'.*--normalizer fair"):
        normalize("Guten Tag", "de", "seed")
    assert normalizer_version("cv3") == "cv3-1"
    assert len({protocol.version for protocol in PROTOCOLS.values()}) == len(PROTOCOLS)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    def missing(package):
        raise ImportError(package)

    monkeypatch.setattr(protocols.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"needs zhconv: pip install 'higgs_lab\[protocols\]'"):
        normalize("你好", "zh", "seed", heard=True)
    assert normalize("Hello", "en", "seed", heard=True) == "hello"


_WORDS = st.lists(st.text("abcé ", min_size=1, max_size=4), min_size=1, max_size=8).map(" ".join)


@settings(max_examples=200, deadline=None)
@given(_WORDS.filter(str.strip), _WORDS)
def test_error_rates_equal_jiwers_on_the_same_strings(reference, hypothesis):
    words, chars = word_errors(reference, hypothesis), char_errors(reference, hypothesis)
    assert words.errors / words.units == pytest.approx(jiwer.wer(reference, hypothesis))
    assert chars.errors / chars.units == pytest.approx(jiwer.cer(reference, hypothesis))


def test_a_corpus_rate_equals_jiwers_on_the_same_strings():
    pairs = [pair for pair in PAIRS if pair["language"] == "de"]
    rows = [score_clip(p["reference"], p["heard"], "de", audio=SPOKEN) | {"language": "de"}
            for p in pairs]  # fmt: skip
    rows = [row for row in rows if not row["failure"]]
    expected = jiwer.wer([r["reference"] for r in rows], [r["hypothesis"] for r in rows])
    assert summarise(rows)["overall"]["error"]["value"] == pytest.approx(expected)
