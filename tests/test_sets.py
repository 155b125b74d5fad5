"""eval.sets: which rows are spoken, with which reference, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from eval.sets import load_set, same_audio
from higgs_lab.audio import write_wav


def make_set(folder, rows):
    """A manifest of (id, text, speaker, extra); a tone of its own pitch for each row."""
    lines = []
    for number, (id, text, speaker, extra) in enumerate(rows):
        wav = 0.1 * np.sin(np.arange(12000) * (0.02 + 0.003 * number)).astype(np.float32)
        write_wav(folder / f"{id}.wav", wav, 24000)
        row = {"id": id, "audio": f"{id}.wav", "text": text, "speaker": speaker, "language": "en"}
        lines.append(json.dumps({k: v for k, v in (row | extra).items() if v is not None}))
    path = folder / "set.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def two_speakers(tmp_path):
    rows = [(f"{s}{i}", f"sentence number {s} {i}", s, {}) for s in ("ann", "bob") for i in "wxyz"]
    return make_set(tmp_path, rows)


def test_references_are_of_the_same_speaker_and_never_the_clip_itself(two_speakers):
    test_set = load_set(two_speakers, refs="speaker")
    for row in test_set.rows:
        assert row.ref_audio.stem[:3] == row.speaker and row.ref_audio != row.audio
        assert row.ref_text == f"sentence number {row.speaker} {row.ref_audio.stem[3]}"
    assert test_set.references == {"speaker": 8}
    assert test_set == load_set(two_speakers, refs="speaker")


def test_a_reference_does_not_depend_on_which_other_rows_are_chosen(two_speakers):
    whole = {row.id: row.ref_audio for row in load_set(two_speakers).rows}
    few = {row.id: row.ref_audio for row in load_set(two_speakers, limit=3).rows}
    assert few == {id: whole[id] for id in few}


def test_a_larger_limit_contains_a_smaller_one(two_speakers):
    small, large = ({r.id for r in load_set(two_speakers, limit=n).rows} for n in (2, 5))
    assert len(small) == 2 and len(large) == 5 and small < large
    assert {r.id for r in load_set(two_speakers, limit=2, seed=7).rows} != small


def test_limit_counts_per_language_and_langs_choose(tmp_path):
    rows = [(f"{lang}{i}", f"text {i}", None, {"language": lang}) for lang in ("de", "en", "pt-BR")
            for i in range(3)]  # fmt: skip
    path = make_set(tmp_path, rows)
    assert len(load_set(path, limit=2).rows) == 6
    assert {r.language for r in load_set(path, langs=["tier1"]).rows} == {"de", "en", "pt"}
    assert [r.language for r in load_set(path, langs=["pt"], limit=1).rows] == ["pt"]
    with pytest.raises(ValueError, match="no rows in fr"):
        load_set(path, langs=["fr"])


def test_the_rows_own_reference_comes_first_and_none_means_none(tmp_path):
    rows = [("a", "one", "s", {"ref_audio": "c.wav", "ref_text": "three"}), ("b", "two", "s", {}),
            ("c", "three", "s", {})]  # fmt: skip
    path = make_set(tmp_path, rows)
    auto = load_set(path, refs="auto")
    assert auto.rows[0].ref_audio.name == "c.wav" and auto.rows[0].ref_text == "three"
    assert auto.references == {"manifest": 1, "speaker": 2}
    assert load_set(path, refs="manifest").references == {"manifest": 1, "none": 2}
    none = load_set(path, refs="none")
    assert all(row.ref_audio is None and row.ref_text is None for row in none.rows)
    assert none.revision == auto.revision
    assert none.reference_revision != auto.reference_revision


def test_a_copy_of_the_clip_under_another_name_is_no_reference(tmp_path):
    path = make_set(tmp_path, [("a", "one", "s", {}), ("b", "two", "s", {})])
    (tmp_path / "b.wav").write_bytes((tmp_path / "a.wav").read_bytes())
    assert same_audio(tmp_path / "a.wav", tmp_path / "b.wav")
    assert load_set(path).references == {"none": 2}
    with pytest.raises(ValueError, match="no other recording of speaker 's'"):
        load_set(path, refs="speaker")
    make_set(tmp_path, [("a", "one", "s", {"ref_audio": "b.wav"}), ("b", "two", "s", {})])
    (tmp_path / "b.wav").write_bytes((tmp_path / "a.wav").read_bytes())
    with pytest.raises(ValueError, match=r"set.jsonl:1, field ref_audio: .* same sound"):
        load_set(path)


def test_a_clip_of_the_same_text_is_no_reference(tmp_path):
    path = make_set(tmp_path, [("a", "One, two.", "s", {}), ("b", "one two", "s", {})])
    assert load_set(path).references == {"none": 2}


def test_the_voice_of_a_speaker_comes_from_the_whole_set(two_speakers):
    whole, few = load_set(two_speakers), load_set(two_speakers, limit=3)
    for speaker in {row.speaker for row in few.rows}:
        assert few.voices[speaker] == whole.voices[speaker] and len(few.voices[speaker]) == 4
    assert len(load_set(two_speakers, centroid_clips=2).voices["ann"]) == 2


def test_rows_that_cannot_be_judged_are_named_with_the_fix(tmp_path):
    with pytest.raises(ValueError, match=r":1, field language: missing.*--language"):
        load_set(make_set(tmp_path, [("a", "one", None, {"language": None})]))
    path = make_set(tmp_path, [("a", "one", None, {"language": None})])
    assert load_set(path, default_language="de").rows[0].language == "de"
    with pytest.raises(ValueError, match=r":1, field language: language 'tlh' has no row"):
        load_set(make_set(tmp_path, [("a", "one", None, {"language": "tlh"})]))
    with pytest.raises(ValueError, match=r":2, field text: '\?!' has no words"):
        load_set(make_set(tmp_path, [("a", "one", None, {}), ("b", "?!", None, {})]))
    with pytest.raises(ValueError, match=r"unknown control tag .*emotion:angry"):
        load_set(make_set(tmp_path, [("a", "<|emotion:angry|>one", None, {})]))
    with pytest.raises(ValueError, match="refs='any'"):
        load_set(path, refs="any")
    with pytest.raises(ValueError, match="limit=0"):
        load_set(path, limit=0)


def test_a_text_twice_with_nothing_to_tell_the_rows_apart_is_refused(tmp_path):
    path = tmp_path / "texts.jsonl"
    row = json.dumps({"text": "one", "language": "en"})
    path.write_text(f"{row}\n{row}\n")
    with pytest.raises(ValueError, match=r"texts.jsonl:2: the same text.*texts.jsonl:1"):
        load_set(str(path))


def test_a_set_of_texts_alone_will_do(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "one", "language": "en"}\n{"text": "two", "language": "en"}\n')
    test_set = load_set(str(path))
    assert [row.audio for row in test_set.rows] == [None, None] and not test_set.voices


def test_split_chooses_rows(tmp_path):
    path = make_set(tmp_path, [("a", "one", None, {"split": "test"}), ("b", "two", None, {})])
    assert [row.id for row in load_set(path, split="test").rows] == ["a"]


def test_a_recording_made_anew_under_its_old_name_is_another_one(tmp_path):
    rows = [
        ("a", "one", "s", {"ref_audio": "c.wav"}),
        ("b", "two", "s", {}),
        ("c", "three", "s", {}),
    ]
    path = make_set(tmp_path, rows)

    def hashes() -> tuple[str, str, str]:
        found = load_set(path)
        return found.revision, found.reference_revision, found.recording_revision

    before = hashes()
    assert before == hashes()
    write_wav(tmp_path / "c.wav", np.zeros(12000, dtype=np.float32) + 0.01, 24000)  # of one size
    assert [old == new for old, new in zip(before, hashes(), strict=True)] == [True, False, False]
