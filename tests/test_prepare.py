"""Preparing data: right codes, every reject with its reason, splits without leaks."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from higgs_lab.audio import read_audio
from higgs_lab.config import describe, load_config
from higgs_lab.prepared import assign_splits, load_prepared, prepared_info, text_key
from higgs_lab.runlog import read_jsonl
from recipes.prepare import PrepareConfig, main
from tests.tiny_prepare import rows_of, tone, write_source

ROOT = Path(__file__).parent.parent


def test_rows_hold_what_the_manifest_says(prepared_clips):
    rows = rows_of(load_prepared(prepared_clips))
    assert [row["id"] for row in rows] == ["0", "1", "second", *"34567"]
    assert [row["speaker"] for row in rows] == ["s0", "s1"] * 4
    assert all(row["language"] == "en" and row["text"].startswith("Sentence") for row in rows)
    assert rows[2]["ref_text"] == "Sentence number 0." and rows[0]["ref_text"] is None
    np.testing.assert_array_equal(rows[2]["ref_codes"], rows[0]["codes"])
    assert rows[0]["ref_codes"].shape == (0, 8)
    assert not (prepared_clips.parent / "out.parts").exists()


def test_codes_equal_those_of_each_clip_alone(prepared_clips, nano):
    """Trap 17 included: clip 7 is 44.1 kHz stereo."""
    from higgs_lab.codec import Codec

    codec = Codec.from_pretrained(nano)
    for row in rows_of(load_prepared(prepared_clips)):
        wav = read_audio(row["audio"])
        np.testing.assert_array_equal(row["codes"], codec.encode(wav).numpy())
        assert row["codes"].shape == (row["frames"], 8)
        assert row["codes"].min() >= 0 and row["codes"].max() < 1024
        assert row["seconds"] == pytest.approx(len(wav) / 24000)
        assert row["frames"] in (len(wav) // 960, -(-len(wav) // 960))


def test_splits_are_recorded_and_can_be_chosen(prepared_clips):
    info = prepared_info(prepared_clips)
    valid, train = (load_prepared(prepared_clips, split=name) for name in ("valid", "train"))
    assert len(valid) == 1 + 2 and len(train) == 5  # the manifest's own, and a quarter of seven
    assert "3" in valid["id"]
    assert {k: v["clips"] for k, v in info["splits"].items()} == {"train": 5, "valid": 3}
    with pytest.raises(ValueError, match="no rows of split 'test'; it has .*train"):
        load_prepared(prepared_clips, split="test")


def test_trap16_another_codec_is_refused(prepared_clips, nano):
    from higgs_lab.codec import Codec

    info = prepared_info(prepared_clips)
    assert info["codec_hash"] == Codec.from_pretrained(nano).hash
    assert len(load_prepared(prepared_clips, codec_hash=info["codec_hash"])) == 8
    with pytest.raises(ValueError, match="encoded with codec .* but the model has codec 0000"):
        load_prepared(prepared_clips, codec_hash="0000")
    assert info["model"]["name"] == str(nano) and info["provenance"]["versions"]["torch"]


def test_other_folders_are_not_taken_for_prepared_data(tmp_path, prepared_clips):
    with pytest.raises(FileNotFoundError, match="is no prepared data .prepared.json is missing"):
        load_prepared(tmp_path)
    info = prepared_info(prepared_clips)
    (tmp_path / "prepared.json").write_text(json.dumps(info | {"format": 99}))
    with pytest.raises(ValueError, match="format 99, this version reads 1"):
        load_prepared(tmp_path)


def test_every_unusable_clip_is_listed_with_its_reason(nano, tmp_path):
    bad = tone(tmp_path / "nan.wav", 1)
    wav, _ = soundfile.read(bad)
    wav[100] = np.nan
    soundfile.write(bad, wav, 24000, subtype="FLOAT")
    (tmp_path / "text.wav").write_text("not audio")
    soundfile.write(tmp_path / "zero.wav", np.zeros(0), 24000)
    soundfile.write(tmp_path / "silent.wav", np.zeros(48000), 24000)
    tone(tmp_path / "short.wav", 2, 0.9)
    tone(tmp_path / "long.wav", 3, 2.5)
    tone(tmp_path / "good.wav", 4)
    tone(tmp_path / "copy.wav", 4)
    tone(tmp_path / "tag.wav", 5)
    tone(tmp_path / "smuggle.wav", 6)
    tone(tmp_path / "ref.wav", 7)
    tone(tmp_path / "loud.wav", 8, level=30)
    names = "nan text zero silent short long good copy loud gone".split()
    rows = [{"audio": f"{name}.wav", "text": f"The text of {name}."} for name in names]
    rows.append({"audio": "tag.wav", "text": "Hi <|emotion:hapiness|>there."})
    rows.append({"audio": "smuggle.wav", "text": "Hi <|audio|> there."})
    rows.append({"audio": "ref.wav", "text": "Ref.", "ref_audio": "short.wav"})
    rows.append({"audio": "ref.wav", "text": "Ref.", "ref_audio": "nan.wav", "id": "ref2"})
    rows.append({"audio": "ref.wav", "text": "Ref.", "ref_audio": "long.wav", "id": "fine"})
    out = tmp_path / "out"
    main(
        PrepareConfig(
            write_source(tmp_path, rows), str(nano), str(out), max_sec=2.0, max_clipped_share=0.01,
            speaker="ann", language="de",
        )
    )  # fmt: skip
    data = load_prepared(out)
    assert data["id"][:] == ["good", "fine"]
    assert set(data["speaker"]) == {"ann"} and set(data["language"]) == {"de"}
    rejects = read_jsonl(out / "rejects.jsonl")
    reasons = {reject["id"]: reject["reason"] for reject in rejects}
    ids = [row.get("id", row["audio"][:-4]) for row in rows]
    assert [reject["id"] for reject in rejects] == [i for i in ids if i not in ("good", "fine")]
    expected = {
        "nan": "1 NaN or infinite",
        "text": "cannot be read as audio",
        "zero": "no samples",
        "silent": "the recording is silent",
        "short": "too short: 0.90 s, at least 1 s",
        "long": "too long: 2.5 s, at most 2 s",
        "copy": "the same recording as 'good'",
        "loud": "at full scale (clipped)",
        "gone": "does not exist",
        "tag": "unknown control tag <|emotion:hapiness|>",
        "smuggle": "control token <|audio|>",
        "ref": "ref_audio too short",
        "ref2": "ref_audio: ",
    }
    assert reasons.keys() == expected.keys()
    for id, part in expected.items():
        assert part in reasons[id], reasons[id]
    assert rejects[0]["where"].endswith("manifest.jsonl:1")


def test_no_usable_clip_is_an_error_and_leaves_no_data(nano, tmp_path):
    tone(tmp_path / "a.wav", 1, 0.5)
    with pytest.raises(ValueError, match="no clip can be used .1 x too short: 0.50 s"):
        main(PrepareConfig(write_source(tmp_path, [{"audio": "a.wav", "text": "A."}]), str(nano),
                           str(tmp_path / "out")))  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_sec": 0.2}, "0.32 <= min_sec"),
        ({"min_sec": 5.0, "max_sec": 2.0}, "min_sec < max_sec"),
        ({"split_valid": 2.5}, "a whole number"),
    ],
)
def test_trap20_and_other_senseless_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PrepareConfig("a", "b", "c", **options)


def test_trap21_clips_below_a_second_keep_no_padding(nano, tmp_path):
    """The codec pads them to 1 s; that silence must not become part of the target."""
    tone(tmp_path / "a.wav", 1, 0.5)
    tone(tmp_path / "b.wav", 2, 1.5)
    rows = [{"audio": "a.wav", "text": "A."}, {"audio": "b.wav", "text": "B."}]
    out = tmp_path / "out"
    main(PrepareConfig(write_source(tmp_path, rows), str(nano), str(out), min_sec=0.4))
    assert load_prepared(out)["frames"][:] == [13, 38]


def test_trap26_ref_text_is_kept_and_trap27_a_copied_reference_is_refused(nano, tmp_path):
    tone(tmp_path / "a.wav", 1)
    tone(tmp_path / "b.wav", 2)
    tone(tmp_path / "c.wav", 3)
    tone(tmp_path / "copy_of_c.wav", 3)
    rows = [
        {"audio": "a.wav", "text": "A.", "ref_audio": "b.wav", "ref_text": " B says. "},
        {"audio": "b.wav", "text": "B.", "ref_audio": "a.wav"},
        {"audio": "b.wav", "text": "B.", "ref_audio": "a.wav", "id": "again"},
        {"audio": "c.wav", "text": "C.", "ref_audio": "copy_of_c.wav", "id": "leak"},
    ]
    out = tmp_path / "out"
    main(PrepareConfig(write_source(tmp_path, rows), str(nano), str(out), split_valid=0))
    data = load_prepared(out)
    assert data["ref_text"][:] == ["B says.", None] and len(data[0]["ref_codes"]) == 30
    reasons = {reject["id"]: reject["reason"] for reject in read_jsonl(out / "rejects.jsonl")}
    assert reasons["again"] == "the same recording as 'b'"
    assert reasons["leak"].startswith("ref_audio is the same recording as audio")


def test_trap32_levels_and_warnings_are_reported(nano, tmp_path, capsys):
    quiet = np.zeros(36000)
    for n in range(3):
        wav, _ = soundfile.read(tone(tmp_path / f"{n}.wav", n, 4.0))
        soundfile.write(tmp_path / f"{n}.wav", np.concatenate([quiet, 30 * wav]), 24000)
    rows = [{"audio": f"{n}.wav", "text": "Hi <|sfx:cough|> you." if n else "I"} for n in range(3)]
    out = tmp_path / "out"
    main(PrepareConfig(write_source(tmp_path, rows), str(nano), str(out), split_valid=0))
    checks = prepared_info(out)["checks"]
    assert checks["levels"]["lead_silence_sec"] == [1.5, 1.5, 1.5]
    counts = {key.split(" (")[0]: count for key, count in checks["warnings"].items()}
    assert counts == {
        "misplaced tags": 2,
        "no speaker or ref_audio: trains no cloning": 3,
        "recording far too long for its text": 1,
        "more than 0.1 % of samples at full scale": 3,
        "more than 1 s of silence at an end": 3,
    }
    assert "look at your data: 3 x more than 1 s of silence" in capsys.readouterr().out
    with pytest.raises(ValueError, match="3 x 1.5 s of silence at the start"):
        main(PrepareConfig(write_source(tmp_path, rows), str(nano), str(tmp_path / "out2"),
                           max_edge_silence_sec=1.0))  # fmt: skip


_text = st.sampled_from(["A.", "a. ", "B.", "<|emotion:awe|>B.", "C.", "D.", "E.", "F."])
_drawn = st.lists(st.tuples(_text, st.sampled_from([None, None, None, "train", "dev"])), min_size=1)


@settings(deadline=None)  # a busy machine is no failure
@given(_drawn, st.sampled_from([0, 0.1, 0.5, 3]), st.integers(0, 3))
def test_a_text_is_never_drawn_into_both_sides(pairs, split_valid, seed):
    rows = [{"text": text, "split": split} for text, split in pairs]
    assign_splits(rows, split_valid, seed)
    assert {row["split"] for row in rows} <= {"train", "valid"}
    drawn = [row for row, (_, split) in zip(rows, pairs, strict=True) if split is None]
    sides = {}
    for row in drawn:
        assert sides.setdefault(text_key(row["text"]), row["split"]) == row["split"]
    again = [{"text": text, "split": split} for text, split in pairs]
    assign_splits(again, split_valid, seed)
    assert again == rows


def test_the_validation_draw_has_the_size_asked_for_and_is_stable():
    def rows(n):
        return [{"text": f"Text {i}.", "split": None} for i in range(n)]

    def valid(rows, split_valid, seed=0):
        assign_splits(rows, split_valid, seed)
        return {row["text"] for row in rows if row["split"] == "valid"}

    assert len(valid(rows(100), 0.05)) == 5 and len(valid(rows(100), 7)) == 7
    assert len(valid(rows(3), 0.05)) == 1 and valid(rows(100), 0) == set()
    assert valid(rows(1), 0.5) == set() and len(valid(rows(2), 5)) == 1
    assert valid(rows(100), 0.1) != valid(rows(100), 0.1, seed=1)
    assert len(valid(rows(100), 10) & valid(rows(101), 10)) >= 9


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes" / "configs").glob("prepare*.yaml")), ids=lambda p: p.stem
)
def test_shipped_configs_are_valid(path):
    config = load_config(PrepareConfig, path, ["source=a", "out=b"])
    assert config.model == "bosonai/higgs-tts-3-4b"
    assert f"--config recipes/configs/{path.name}" in path.read_text()


def test_every_option_explains_itself():
    lines = describe(PrepareConfig).splitlines()
    fields = [i for i, line in enumerate(lines) if line.startswith("  ") and line[2] != " "]
    assert len(fields) == 18 and all(lines[i + 1].startswith("      ") for i in fields)
