"""eval.plan and eval.pace: a dry run tells what follows from set, judges and measured work."""

from __future__ import annotations

import json
import time

import pytest

from eval import pace
from eval.asr import recognizer_details
from eval.plan import plan
from eval.sets import EvalSet
from eval.systems import System, open_system
from higgs_lab.manifest import Utterance


def small_set(*codes: str, each: int = 4) -> EvalSet:
    rows = [
        Utterance(audio=None, text=f"Sentence {n} of it.", id=f"{code}{n}", language=code)
        for code in codes
        for n in range(each)
    ]
    return EvalSet("small", tuple(rows), {}, {"none": len(rows)})


def lines(system, test_set, tmp_path, asr="nano", takes=1, cache=None) -> str:
    languages = {row.language for row in test_set.rows}
    config = {
        "system": {"name": system.name} | system.details,
        "takes": takes,
        "asr": None if asr == "none" else recognizer_details(asr, False, languages),
        "encoder": None,
        "normalizer": "fair-1",
    }
    told = plan(system, test_set, config, tmp_path / "out", asr=asr, device="cpu", cache=cache)
    return "\n".join(told)


HUMAN = System("human", {"kind": "human"}, None)


def test_who_hears_which_language_is_said_before_anything_is_loaded(tmp_path):
    told = lines(HUMAN, small_set("de", "pl", "zu"), tmp_path)
    assert "(openai-whisper" in told and "fp32): 1 languages: de" in told
    assert "no recogniser: 2 languages: pl zu" in told
    told = lines(HUMAN, small_set("de", "zu"), tmp_path, asr="de=nano")
    assert "no recogniser: 1 languages: zu" in told
    assert "clips       24 (3 a text)" in lines(HUMAN, small_set("de", "zu"), tmp_path, takes=3)


def test_a_baseline_says_what_it_cannot_speak(tmp_path):
    pytest.importorskip("espeakng_loader")
    told = lines(open_system("espeak"), small_set("de", "zu"), tmp_path)
    assert "no baseline 1 languages: zu" in told and "clips       4 (1 a text)" in told


def test_what_is_done_is_counted_of_what_can_be_spoken(tmp_path):
    pytest.importorskip("espeakng_loader")
    test_set, out = small_set("de", "zu"), tmp_path / "out"
    out.mkdir()
    done = [{"id": id, "take": 0} for id in ("de0", "zu0", "zu1")]
    (out / "speech.jsonl").write_text("".join(json.dumps(row) + "\n" for row in done))
    told = lines(open_system("espeak"), test_set, tmp_path)
    assert "speak       1 of 4 done" in told


def test_precision_to_expect_goes_with_the_root_of_the_texts(tmp_path):
    """100 texts of ten words at 5 % and a design effect of 2: 2 points."""
    assert "±2.0 points; ±1 takes about 400" in lines(HUMAN, small_set("de", each=100), tmp_path)
    assert "±4.0 points" in lines(HUMAN, small_set("de", each=25), tmp_path)


def test_times_come_from_what_was_measured_here(tmp_path):
    told = lines(HUMAN, small_set("de"), tmp_path, cache=tmp_path)
    assert "(assumed)" in told and "(measured here)" not in told
    for who, took in (("human", 5.0), ("other", 1.0)):
        row = {"stage": "speak", "who": who, "device": "CPU", "sound_sec": 50.0, "took_sec": took}
        with (tmp_path / pace.FILE).open("a") as file:
            file.write(json.dumps(row) + "\n")
    with (tmp_path / pace.FILE).open("a") as file:
        file.write('{"stage": "sp')  # killed while writing
    told = lines(HUMAN, small_set("de"), tmp_path, cache=tmp_path)
    assert "at 10 x real time (measured here)" in told
    assert pace.known_pace(tmp_path, "hear", "human", "cpu") is None
    assert pace.known_pace(None, "speak", "human", "cpu") is None


def test_pace_counts_the_work_and_not_the_rest(tmp_path, monkeypatch):
    clock = iter([0.0, 4.0, 100.0, 101.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with pace.Pace(tmp_path, "hear", "nano", "cpu") as kept:
        for seconds in ([10.0, 20.0], [20.0]):
            with kept.measured() as sounds:
                sounds += seconds
    assert pace.known_pace(tmp_path, "hear", "nano", "cpu") == pytest.approx(50 / 5)
    with pytest.raises(KeyError), pace.Pace(tmp_path, "voices", "nano", "cpu"):
        raise KeyError  # of a run that failed nothing is kept
    assert pace.known_pace(tmp_path, "voices", "nano", "cpu") is None
