"""eval.compare on runs that eval.run made: paired, named, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from eval.compare import advice_lines, compare, verdict
from eval.compare import main as compare_main
from tests.tiny_eval import go, stage


def rewritten(source: Path, out: Path, change) -> Path:
    """A copy of a run whose scores went through `change`: a run made worse on purpose."""
    shutil.copytree(source, out)
    rows = [change(dict(row)) for row in stage(source, "scores")]
    lines = (json.dumps(row) + "\n" for row in rows)
    (out / "scores.jsonl").write_text("".join(lines))
    return out


def differences_in(a, b) -> dict:
    [comparison] = compare(a, b)["comparisons"]
    return comparison["metrics"]


def test_compare_pairs_by_text_and_names_the_better(finished, tmp_path, capsys):
    good = rewritten(finished[0], tmp_path / "good", lambda r: r | {"errors": 1})
    bad = rewritten(good, tmp_path / "bad", lambda r: r | {"errors": 2 + (r["id"] == "c0")})
    result = differences_in(good, bad)
    difference = result["error"]["languages"]["en"]
    assert difference["value"] == pytest.approx((13 - 6) / 30) and difference["low"] > 0
    assert difference["texts"] == 6 and difference["p"] < 0.05
    assert differences_in(bad, good)["error"]["overall"]["value"] == -difference["value"]
    assert (difference["a"], difference["b"]) == pytest.approx((6 / 30, 13 / 30))
    assert result["sim_ref"]["languages"]["en"]["value"] == 0
    compare_main([str(good), str(bad), "--json", str(tmp_path / "d.json")])
    assert "B is worse" in capsys.readouterr().out
    [written] = json.loads((tmp_path / "d.json").read_text())["comparisons"]
    assert written["metrics"]["error"]["overall"]["verdict"] == f"{written['name']} is worse"


def test_compare_says_when_the_set_is_too_small(finished, tmp_path):
    noisy = rewritten(
        finished[0], tmp_path / "noisy", lambda r: r | {"errors": 9 * (r["id"] < "c3")}
    )
    [comparison] = compare(finished[0], noisy)["comparisons"]
    [line] = advice_lines(comparison)
    assert "6 texts" in line and "are needed" in line and advice_lines(comparison, 10.0) == []


def test_several_runs_are_compared_with_the_first_and_corrected_together(
    finished, tmp_path, capsys
):
    good = rewritten(finished[0], tmp_path / "good", lambda r: r | {"errors": 1})
    bad = rewritten(good, tmp_path / "bad", lambda r: r | {"errors": 2})
    one = differences_in(good, bad)["error"]["languages"]["en"]
    result = compare(good, bad, good)
    names = [comparison["name"] for comparison in result["comparisons"]]
    first, second = (c["metrics"]["error"]["languages"]["en"] for c in result["comparisons"])
    assert names == ["B", "C"] and second["value"] == 0
    assert first["p"] == one["p"] and first["p_holm"] == min(1, 2 * one["p_holm"])
    compare_main([str(good), str(bad), str(good)])
    assert "C − A" in capsys.readouterr().out
    # Six texts that all differ: p can be 2/64, which three runs' correction makes 4/64.
    assert verdict("error", one) == "B is worse" and verdict("error", first) == "too few texts"
    for runs in ([str(good)], [str(good), str(bad), "--difference", "0"]):
        with pytest.raises(SystemExit, match="two are needed|above 0 points"):
            compare_main(runs)


@pytest.mark.parametrize(
    ("section", "key"),
    [("set", "revision"), ("asr", "revision"), ("encoder", "revision"), ("asr", "precision")],
)
def test_compare_refuses_runs_that_were_measured_differently(finished, tmp_path, section, key):
    other = tmp_path / "other"
    shutil.copytree(finished[0], other)
    summary = json.loads((other / "summary.json").read_text())
    summary["config"][section][key] = "another"
    (other / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ValueError, match=f"cannot be compared: {section}.{key} is"):
        compare(finished[0], other)


def test_compare_leaves_similarity_to_different_references_out(finished, judges, test_set,
                                                               tmp_path):  # fmt: skip
    go(judges, test_set, tmp_path / "b", "--refs", "none")
    result = compare(finished[0], tmp_path / "b")
    [comparison] = result["comparisons"]
    assert "sim_ref" not in comparison["metrics"] and "references" in result["notes"][0]
    assert comparison["metrics"]["sim_target"]["overall"]["value"] == pytest.approx(0)


def test_compare_of_an_unfinished_run_says_to_finish_it(finished, tmp_path):
    with pytest.raises(SystemExit, match="has no summary.json: finish that run"):
        compare_main([str(finished[0]), str(tmp_path)])
