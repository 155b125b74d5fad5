"""eval.voices: what a similarity means is read off the set's own recordings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from eval.sets import EvalSet
from eval.speaker import centroid, cosine
from eval.voices import Voices, calibrated, equal_error_rate
from higgs_lab.manifest import Utterance


@pytest.fixture
def voices(tmp_path):
    """Three clips of each of two speakers, whose vectors lie about two axes."""
    rng, found, recordings = np.random.default_rng(0), Voices(tmp_path, "x", "cpu"), {}
    for number, speaker in enumerate(("ann", "bob")):
        for clip in range(3):
            path = tmp_path / f"{speaker}{clip}.wav"
            path.write_bytes(path.name.encode())
            vector = rng.normal(0, 0.2, 8)
            vector[number] += 1
            found.vectors[found.hash(path)] = np.float32(vector / np.linalg.norm(vector))
            row = Utterance(audio=path, text="A.", id=path.stem, speaker=speaker, language="en")
            recordings.setdefault(speaker, []).append(row)
    rows = tuple(row for rows in recordings.values() for row in rows)
    return found, EvalSet("set", rows, {s: tuple(r) for s, r in recordings.items()}, {})


def test_the_scale_is_the_mean_of_all_pairs_by_hand(voices):
    found, test_set = voices
    scale = found.calibration(test_set)
    vectors = {row.id: found.vectors[found.hash(row.audio)] for row in test_set.rows}
    ids = sorted(vectors)
    pairs = [(a, b) for i, a in enumerate(ids) for b in ids[i + 1 :]]
    same = [cosine(vectors[a], vectors[b]) for a, b in pairs if a[:3] == b[:3]]
    different = [cosine(vectors[a], vectors[b]) for a, b in pairs if a[:3] != b[:3]]
    assert scale["sim_ref"]["pairs"] == [6, 9] and scale["sim_ref"]["eer"] == 0
    assert scale["sim_ref"]["same"] == pytest.approx(np.mean(same), abs=1e-6)
    assert scale["sim_ref"]["different"] == pytest.approx(np.mean(different), abs=1e-6)
    # A clip is compared with its speaker's other clips, and with all of the other speaker's.
    voices = {s: [i for i in ids if i[:3] == s] for s in ("ann", "bob")}
    own, strange = [], []
    for i in ids:
        for speaker, members in voices.items():
            of = centroid([vectors[j] for j in members if j != i])
            (own if speaker == i[:3] else strange).append(cosine(vectors[i], of))
    assert scale["sim_target"]["pairs"] == [len(own), len(strange)] == [6, 6]
    assert scale["sim_target"]["same"] == pytest.approx(np.mean(own), abs=1e-6)
    assert scale["sim_target"]["different"] == pytest.approx(np.mean(strange), abs=1e-6)
    assert scale["sim_target"]["same"] > scale["sim_ref"]["same"]  # a mean of clips is steadier


def test_a_large_set_is_measured_on_a_part_of_every_speaker(voices, monkeypatch):
    monkeypatch.setattr("eval.voices.SCALE_CLIPS", 4)
    found, test_set = voices
    assert found.calibration(test_set)["sim_ref"]["pairs"] == [2, 4]
    monkeypatch.setattr("eval.voices.SCALE_CLIPS", 2)
    assert found.calibration(test_set)["sim_ref"]["pairs"] == [1, 0]


def test_a_human_clip_scores_one_and_a_stranger_zero_on_that_scale(voices):
    found, test_set = voices
    scale = found.calibration(test_set)
    sums = []
    for row in test_set.rows:
        clip = {"sha256": found.hash(row.audio), "audio": str(row.audio)}
        sums.append(found.similarities(clip, row, test_set)["sim_target"])
    block = {"sim_ref": None, "sim_target": {"value": float(np.mean(sums))}}
    result = calibrated(block, scale)
    assert result == {"sim_ref_calibrated": None, "sim_target_calibrated": pytest.approx(1)}
    block["sim_target"]["value"] = scale["sim_target"]["different"]
    assert calibrated(block, scale)["sim_target_calibrated"] == pytest.approx(0)


def test_a_set_of_one_speaker_has_no_scale(voices):
    found, test_set = voices
    alone = EvalSet("set", test_set.rows[:3], {"ann": test_set.voices["ann"]}, {})
    scale = found.calibration(alone)
    assert scale["sim_ref"] | {"same": None} == {
        "same": None, "different": None, "pairs": [3, 0], "eer": None
    }  # fmt: skip
    block = {"sim_ref": {"value": 0.5}, "sim_target": None}
    assert calibrated(block, scale)["sim_ref_calibrated"] is None
    assert found.calibration(EvalSet("set", (), {}, {})) is None
    assert calibrated(block, None)["sim_ref_calibrated"] is None


def test_equal_error_rate():
    assert equal_error_rate(np.array([0.8, 0.9]), np.array([0.1, 0.2])) == 0
    assert equal_error_rate(np.array([0.1, 0.2]), np.array([0.8, 0.9])) == 1
    rng = np.random.default_rng(0)  # two normals two deviations apart cross at 15.9 %
    found = equal_error_rate(rng.normal(2, 1, 20000), rng.normal(0, 1, 20000))
    assert found == pytest.approx(0.159, abs=0.01)
    assert equal_error_rate(np.array([]), np.array([1.0])) is None


def test_unreadable_and_too_short_clips_have_no_voice(tmp_path):
    class Encoder:
        min_samples = 8000

    bad = tmp_path / "bad.wav"
    bad.write_text("no sound")
    assert Voices(tmp_path, "x", "cpu")._embed_one(Encoder(), Path(bad), []) is None
