"""Prepared rows to examples: the mix of prompt modes, references, lengths foretold."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from higgs_lab.delay import delay
from higgs_lab.prepared import load_prepared, save_prepared
from higgs_lab.training_set import OWN, Choice, Modes, TrainingSet
from tests.tiny import prepared_rows, random_codes, tiny_vocab

CLONE, MIXED = Modes(0.5, 0.5), Modes(0.3, 0.4)


def training_set(rows, modes: Modes = MIXED, **options) -> TrainingSet:
    return TrainingSet(rows, tiny_vocab(), modes, **options)


def with_own_reference(rows: list[dict], frames: int = 12) -> list[dict]:
    for i, row in enumerate(rows):
        row["ref_codes"] = random_codes(frames + i, 100 + i).numpy()
        row["ref_text"] = f"Reference {i}." if i % 2 else None
    return rows


def test_trap26_all_three_prompt_modes_are_in_an_epoch():
    data = training_set(prepared_rows(60), seed=1)
    shares = data.mode_shares()
    assert min(shares.values()) > 0.15 and abs(sum(shares.values()) - 1) < 1e-9
    assert data.choices(0) != data.choices(1)


def test_trap26_the_transcript_of_a_reference_reaches_the_prompt():
    """Its own clip's, word for word; a row whose reference has none is cloned without."""
    vocab, data = tiny_vocab(), training_set(with_own_reference(prepared_rows(4)), Modes(0, 1))
    for i, row in enumerate(data.rows):
        assert data.choices(0)[i] == Choice(OWN, bool(row["ref_text"]))
        example = data.build(i, 0)
        said = vocab.tokenizer.decode(example.ids[~example.is_audio][: example.prompt_length])
        assert (f"<|ref_text|>{row['ref_text']}<|ref_audio|>" in said) == bool(row["ref_text"])
        assert ("<|ref_text|>" in said) == bool(row["ref_text"])
        rows = example.rows[: example.prompt_length][example.is_audio[: example.prompt_length]]
        assert torch.equal(rows, delay(torch.as_tensor(row["ref_codes"]).long()))


def test_trap27_a_reference_is_another_clip_of_the_speaker_with_another_text():
    made = prepared_rows(20)
    made[3]["text"] = made[1]["text"]  # the same speaker says the same thing twice
    made[5]["text"] = made[1]["text"].upper() + " <|prosody:pause|>"  # and again, with a tag
    data = training_set(made, CLONE)
    for epoch in range(20):
        for i, choice in enumerate(data.choices(epoch)):
            other = made[choice.reference]
            assert other["speaker"] == made[i]["speaker"]
            assert data.keys[choice.reference] != data.keys[i]


def test_every_other_clip_of_the_speaker_is_drawn_alike():
    data = training_set(prepared_rows(8), CLONE)
    drawn = Counter(data.choices(epoch)[4].reference for epoch in range(600))
    assert drawn.keys() == {0, 2, 6}  # the other speaker has the odd rows
    assert all(abs(n - 200) < 45 for n in drawn.values())


def test_clips_too_long_for_a_reference_still_get_one():
    made = prepared_rows(6)
    for row in made:
        row["frames"] = 1000 if row["id"] == "train2" else row["frames"]
    made[2]["codes"] = random_codes(1000).numpy()
    drawn = {c.reference for e in range(30) for c in training_set(made, CLONE).choices(e)}
    assert drawn == {0, 1, 3, 4, 5}


def test_without_another_clip_there_is_no_reference():
    alone = prepared_rows(1)
    nameless = [row | {"speaker": None} for row in prepared_rows(6)]
    one_text = [row | {"text": "The same."} for row in prepared_rows(6)]
    for rows in (alone, nameless, one_text):
        assert training_set(rows, CLONE).mode_shares()["zero_shot"] == 1


def test_a_reference_that_would_burst_the_pack_is_left_out():
    made = prepared_rows(10)
    free = training_set(made, CLONE)
    tight = training_set(made, CLONE, budget_positions=max(free.lengths(0)) - 1)
    assert max(free.lengths(0)) > max(tight.lengths(0))
    assert 0 < tight.mode_shares()["zero_shot"] < 1


@pytest.mark.parametrize("own", [False, True])
def test_lengths_foretell_what_is_built(own):
    rows = prepared_rows(12)
    data = training_set(with_own_reference(rows) if own else rows)
    for epoch in range(2):
        assert data.lengths(epoch) == [len(data.build(i, epoch)) for i in range(len(data))]


def test_rows_on_disk_give_what_rows_in_memory_give(tmp_path):
    """Selected ones too, whose order on disk is another."""
    rows = with_own_reference(prepared_rows(9))
    for i in (2, 5):
        rows[i]["ref_codes"] = rows[i]["ref_codes"][:0]
    info = {"codec_hash": "0", "splits": {}, "model": {}}
    save_prepared(tmp_path / "data", rows, 8, info, [])
    picked = [5, 7, 0, 2]
    disk = training_set(load_prepared(tmp_path / "data").select(picked))
    memory = training_set([rows[i] for i in picked])
    assert disk.own == memory.own and disk.own[0] == disk.own[3] == 0 < disk.own[1]
    for epoch in range(3):
        assert disk.lengths(epoch) == memory.lengths(epoch)
        for i in range(4):
            one, other = disk.build(i, epoch), memory.build(i, epoch)
            assert all(torch.equal(vars(one)[n], vars(other)[n]) for n in ("ids", "rows", "labels"))


@pytest.mark.parametrize(("clone", "clone_text"), [(0.8, 0.5), (-0.1, 0.5)])
def test_shares_that_are_none_are_refused(clone, clone_text):
    with pytest.raises(ValueError, match="add up to at most 1"):
        Modes(clone, clone_text)
