"""recipes/demo.py: how recordings become a training and a test set. All of it runs in CI."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from higgs_lab.audio import write_wav
from higgs_lab.manifest import Utterance, read_manifest, write_manifest
from recipes import demo
from recipes.demo import main, make_recordings, take_recordings
from tests.tiny import voice_like

NEARER = {"a": 0.5886, "b": 0.6697, "verdict": "B is better"}


def source(folder, speakers: dict[str, int]) -> str:
    rows = []
    for name, count in speakers.items():
        for n in range(count):
            path = folder / f"{name}{n}.wav"
            write_wav(path, voice_like(1.2, len(rows)), 24000)
            text = f"{name} says {n}."
            rows.append(Utterance(path, text, path.stem, speaker=name, language="en"))
    write_manifest(folder / "all.jsonl", rows)
    return str(folder / "all.jsonl")


def split(tmp_path, speakers, tests=4, clips=200):
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    take_recordings(source(tmp_path, speakers), train, test, tests, clips)
    return read_manifest(train), read_manifest(test)


def judged(command: list[str], nearer: dict | None = NEARER) -> None:
    """In place of demo.run: of all commands only what eval.compare leaves, and B's summary."""
    if "eval.compare" not in command:
        return
    nothing, worse = {"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.0197, "verdict": "B is worse"}
    found = {
        "B": {"error": worse} | ({"sim_target": nearer} if nearer else {}),
        "C": {"error": nothing},
        "D": {"error": nothing} | ({"sim_target": {"a": 0.5886, "b": 0.9516}} if nearer else {}),
    }
    comparisons = [
        {"name": name, "metrics": {metric: {"overall": entry} for metric, entry in one.items()}}
        for name, one in found.items()
    ]
    file = Path(command[command.index("--json") + 1])
    (file.parent / "after").mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"comparisons": comparisons}))
    (file.parent / "after" / "summary.json").write_text('{"overall": {"unit": "word"}}')


def test_every_speaker_is_learnt_tested_and_cloned_from_another_clip(tmp_path):
    train, test = split(tmp_path, {"a": 5, "b": 4, "c": 3})
    assert {row.speaker for row in train} == {row.speaker for row in test} == {"a", "b", "c"}
    assert len(train) + len(test) == 12 and len(test) == 4
    assert not {row.text for row in train} & {row.text for row in test}
    of = {row.audio: row for row in train}
    for row in test:
        assert of[row.ref_audio].speaker == row.speaker
        assert row.ref_text == of[row.ref_audio].text != row.text


def test_a_text_of_several_speakers_is_not_on_both_sides(tmp_path):
    path = source(tmp_path, {"a": 4, "b": 4})
    rows = read_manifest(path)
    said = [replace(r, text=r.text[-2:]) for r in rows]
    write_manifest(path, said)
    take_recordings(path, tmp_path / "train.jsonl", tmp_path / "test.jsonl", 1, 200)
    train, test = (read_manifest(tmp_path / f"{n}.jsonl") for n in ("train", "test"))
    assert {row.text for row in test} == {"3."} and len(test) == 2 and len(train) == 6


def test_speakers_of_one_clip_are_learnt_from_and_the_last_texts_tested(tmp_path):
    train, test = split(tmp_path, {name: 1 for name in "abcdef"}, tests=2)
    assert len(train) == 4 and len(test) == 2 and all(row.ref_audio is None for row in test)


def test_a_large_set_is_sampled(tmp_path):
    train, test = split(tmp_path, {"a": 12}, tests=2, clips=5)
    assert len(train) == 5 and len(test) == 2


def test_an_unreadable_clip_is_left_to_prepare(tmp_path):
    path = source(tmp_path, {"a": 5})
    (tmp_path / "a0.wav").write_text("not audio")
    take_recordings(path, tmp_path / "train.jsonl", tmp_path / "test.jsonl", 1, 200)
    (test,) = read_manifest(tmp_path / "test.jsonl")
    assert test.ref_audio.name == "a1.wav"


def test_too_little_data_ends_with_one_line_and_nothing_written(tmp_path):
    path, out = source(tmp_path, {"a": 3}), tmp_path / "demo"
    with pytest.raises(SystemExit, match="demo: .*3 different texts; at least 4"):
        main(["--out", str(out), "--data", path])
    assert not out.exists()


def test_other_recordings_are_not_taken_for_those_already_there(tmp_path, monkeypatch):
    """`make demo`, then `make demo DATA=...`: the first voice must not be trained again instead."""
    monkeypatch.setattr(demo, "run", judged)
    data = source(tmp_path, {"a": 6})
    main(["--data", data, "--out", str(tmp_path / "out")])
    main(["--data", data, "--out", str(tmp_path / "out")])
    with pytest.raises(
        SystemExit, match="a demo of .*all.jsonl, not of a new espeak-ng voice: name"
    ):
        main(["--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("nearer", "said"),
    [
        (
            NEARER,
            "The fine-tuned voice is nearer to the speaker than the base: similarity 0.59 -> 0.67 "
            "(recordings 0.95), WER 0.0 % -> 2.0 % (recordings 0.0 %): worse; hear both in ",
        ),
        (NEARER | {"verdict": "B is worse"}, "is farther from the speaker than the base: "),
        (NEARER | {"verdict": "too few texts"}, "not shown that fine-tuning made the voice "),
        (None, "could not be measured, WER 0.0 % -> 2.0 % (recordings 0.0 %): worse; hear both "),
    ],
    ids=["nearer", "farther", "not shown", "no speaker"],
)
def test_the_last_line_says_what_was_achieved_and_where_to_hear_it(
    tmp_path, monkeypatch, capsys, nearer, said
):
    monkeypatch.setattr(demo, "run", lambda command: judged(command, nearer))
    out = ["--out", str(tmp_path / "out")]
    main(["--data", source(tmp_path, {"a": 6}), "--asr", "base", *out])
    last = capsys.readouterr().out.splitlines()[-1]
    assert said in last
    # of other judges than nano's: runs of one folder are measured alike
    assert last.endswith(str(tmp_path / "out" / "eval-base" / "before_after.html"))


def test_words_that_the_recogniser_does_not_know_are_not_counted(tmp_path, monkeypatch, capsys):
    """nano's knows the sentences it was made for, not the user's."""
    monkeypatch.setattr(demo, "run", judged)
    main(["--data", source(tmp_path, {"a": 6}), "--out", str(tmp_path / "out")])
    last = capsys.readouterr().out.splitlines()[-1]
    assert "WER" not in last and "(recordings 0.95), words not judged (the same command" in last
    assert last.endswith(str(tmp_path / "out" / "eval" / "before_after.html"))


def test_recordings_of_no_language_are_refused_before_any_work(tmp_path, monkeypatch, capsys):
    """A folder of wavs with texts names neither language nor speaker."""
    folder = tmp_path / "clips"
    for n in range(6):
        write_wav(folder / f"{n}.wav", voice_like(1.2, n), 24000)
        (folder / f"{n}.txt").write_text(f"The number {n}.")
    monkeypatch.setattr(demo, "run", judged)
    command = ["--data", str(folder), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="demo: 6 of 6 clips of .* no language: .*--language en"):
        main(command)
    assert not (tmp_path / "out").exists()
    main([*command, "--language", "en"])
    assert "6 of 6 clips name no speaker: they are taken for one voice" in capsys.readouterr().out
    train, test = (read_manifest(tmp_path / "out" / f"{n}.jsonl") for n in ("train", "test"))
    assert {(row.language, row.speaker) for row in [*train, *test]} == {("en", "voice")}
    assert all(row.ref_audio for row in test)


def test_the_demo_makes_the_same_recordings_again(tmp_path):
    pytest.importorskip("espeakng_loader")
    for name in ("a", "b"):
        folder = tmp_path / name
        make_recordings(folder, folder / "train.jsonl", folder / "test.jsonl", 3)
    wavs = sorted(path.name for path in (tmp_path / "a").glob("*.wav"))
    assert len(wavs) == demo.NUM_TRAIN + 3
    for name in wavs:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
