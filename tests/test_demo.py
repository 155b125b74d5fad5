"""recipes/demo.py: how recordings become a training and a test set. All of it runs in CI."""

from __future__ import annotations

import pytest

from higgs_lab.audio import write_wav
from higgs_lab.manifest import Utterance, read_manifest, write_manifest
from recipes import demo
from recipes.demo import main, make_recordings, take_recordings
from tests.tiny import voice_like


def source(folder, speakers: dict[str, int]) -> str:
    rows = []
    for name, count in speakers.items():
        for n in range(count):
            path = folder / f"{name}{n}.wav"
            write_wav(path, voice_like(1.2, len(rows)), 24000)
            rows.append(Utterance(path, f"{name} says {n}.", path.stem, speaker=name))
    write_manifest(folder / "all.jsonl", rows)
    return str(folder / "all.jsonl")


def split(tmp_path, speakers, tests=4, clips=200):
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    take_recordings(source(tmp_path, speakers), train, test, tests, clips)
    return read_manifest(train), read_manifest(test)


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
    said = [Utterance(r.audio, r.text[-2:], r.id, speaker=r.speaker) for r in rows]
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
    monkeypatch.setattr(demo, "run", lambda command: None)
    data = source(tmp_path, {"a": 6})
    main(["--data", data, "--out", str(tmp_path / "out")])
    main(["--data", data, "--out", str(tmp_path / "out")])
    with pytest.raises(
        SystemExit, match="a demo of .*all.jsonl, not of a new espeak-ng voice: name"
    ):
        main(["--out", str(tmp_path / "out")])


def test_the_demo_makes_the_same_recordings_again(tmp_path):
    pytest.importorskip("espeakng_loader")
    for name in ("a", "b"):
        folder = tmp_path / name
        make_recordings(folder, folder / "train.jsonl", folder / "test.jsonl", 3)
    wavs = sorted(path.name for path in (tmp_path / "a").glob("*.wav"))
    assert len(wavs) == demo.NUM_TRAIN + 3
    for name in wavs:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
