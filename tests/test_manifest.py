"""Manifests and readers: every mistake names file, line, field and fix."""

import json

import numpy as np
import pytest
import soundfile

from higgs_lab.audio import read_audio
from higgs_lab.manifest import (
    Utterance,
    file_stem,
    open_data,
    read_manifest,
    write_manifest,
)


def _wav(path, seed=0, sec=1.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(seed).uniform(-0.1, 0.1, int(sec * 24000))
    soundfile.write(path, samples.astype(np.float32), 24000, format=path.suffix[1:].upper())
    return path


def _manifest(tmp_path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def wavs(tmp_path):
    for name in ("a", "b", "c"):
        _wav(tmp_path / "wavs" / f"{name}.wav", ord(name))
    return tmp_path


def test_paths_are_relative_to_the_manifest_and_ids_are_made(wavs, monkeypatch):
    path = _manifest(
        wavs,
        {"audio": "wavs/a.wav", "text": "Žluťoučký kůň.", "speaker": 7, "ref_audio": "wavs/b.wav"}
        | {"ref_text": "B.", "language": "cs", "split": "valid", "info": {"mood": 3}},
        "",
        {"audio": str(wavs / "wavs" / "b.wav"), "text": "B.", "id": "mine", "speaker": None},
        {"text": "No audio."},
    )
    monkeypatch.chdir("/")
    first, second, third = read_manifest(path)
    assert first == Utterance(
        wavs / "wavs/a.wav", "Žluťoučký kůň.", "wavs/a", "7", "cs", wavs / "wavs/b.wav", "B.",
        "valid", {"mood": 3},
    )  # fmt: skip
    assert (second.id, second.audio, second.speaker) == ("mine", wavs / "wavs/b.wav", None)
    assert (third.id, third.audio, third.where) == ("000004", None, f"{path}:4")


def test_write_and_read_give_the_same_rows_even_after_moving_the_folder(wavs):
    path = _manifest(
        wavs,
        {"audio": "wavs/a.wav", "text": "A – ä.", "ref_audio": "wavs/b.wav", "info": {"x": [1]}},
        {"audio": "wavs/c.wav", "text": "C.", "split": "valid"},
    )
    rows = read_manifest(path)
    write_manifest(wavs / "copy.jsonl", rows)
    assert read_manifest(wavs / "copy.jsonl") == rows
    moved = wavs.rename(wavs.with_name("moved"))
    assert read_manifest(moved / "copy.jsonl")[0].audio == moved / "wavs/a.wav"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"audio": "wavs/b.wav", "txt": "B."},
            r"data.jsonl:2: unknown field 'txt'; did you .*text",
        ),
        ({"audio": "wavs/b.wav", "Text": "B."}, "did you mean 'text'"),
        ({"audio": "wavs/b.wav", "text": "B.", "mood": "sad"}, "unknown field 'mood'.*info"),
        ({"audio": "wavs/b.wav"}, "data.jsonl:2, field text: missing or empty"),
        ({"audio": "wavs/b.wav", "text": " \n"}, "data.jsonl:2, field text: missing or empty"),
        ({"audio": "wavs/b.wav", "text": 5}, "data.jsonl:2, field text: 5 should be text"),
        ({"audio": ["x"], "text": "B."}, "field audio: .* should be text"),
        ({"audio": "", "text": "B."}, "field audio: empty"),
        ({"audio": "wavs/b.wav", "text": "B.", "info": "x"}, "field info: 'x' should be an object"),
        ({"audio": "wavs/b.wav", "text": "B.", "id": "wavs/a"}, r"data.jsonl:2.*already .*jsonl:1"),
        ({"audio": "wavs/a.wav", "text": "A."}, "'wavs/a' .made from the file name.* ids must"),
        (
            {"audio": "wavs/b.wav", "text": "B.", "ref_text": "A."},
            "field ref_text: needs ref_audio",
        ),
        ("{'audio': 1}", "data.jsonl:2: not JSON"),
        ('["a"]', "data.jsonl:2: expected an object"),
    ],
)
def test_bad_rows_are_refused_with_line_field_and_fix(wavs, row, message):
    path = _manifest(wavs, {"audio": "wavs/a.wav", "text": "A."}, row)
    with pytest.raises(ValueError, match=message):
        read_manifest(path)


def test_trap27_a_reference_that_is_the_target_is_refused(wavs):
    row = {"audio": "wavs/a.wav", "text": "A.", "ref_audio": "wavs/../wavs/a.wav"}
    with pytest.raises(ValueError, match="field ref_audio: is the audio itself"):
        read_manifest(_manifest(wavs, row))


def test_missing_files_are_named(wavs):
    path = _manifest(wavs, {"audio": "wavs/x.wav", "text": "X."})
    with pytest.raises(
        FileNotFoundError, match=r"data.jsonl:1, field audio: .*wavs/x.wav does not"
    ):
        read_manifest(path)
    assert read_manifest(path, check_files=False)[0].audio == wavs / "wavs/x.wav"
    with pytest.raises(FileNotFoundError, match="manifest .*none.jsonl does not exist"):
        read_manifest(wavs / "none.jsonl")
    with pytest.raises(ValueError, match="field audio: missing"):
        read_manifest(_manifest(wavs, {"text": "X."}), need_audio=True)
    with pytest.raises(ValueError, match="holds no utterances"):
        read_manifest(_manifest(wavs, ""))


def test_wrong_encoding_names_the_line_and_bom_is_fine(wavs):
    path = wavs / "data.jsonl"
    path.write_bytes(b'{"text": "ok"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(ValueError, match="data.jsonl:2: not UTF-8 .byte 0xe9.*iconv"):
        read_manifest(path)
    path.write_bytes(b'\xef\xbb\xbf{"text": "ok"}\r\n')
    assert read_manifest(path)[0].text == "ok"


def test_line_separators_inside_a_text_do_not_cut_the_line(wavs):
    path = _manifest(wavs, {"text": "one\u2028two"}, {"text": "three\x85four"})
    assert [row.text for row in read_manifest(path)] == ["one\u2028two", "three\x85four"]


def test_ljspeech_folder(tmp_path):
    for name in ("LJ1", "LJ2"):
        _wav(tmp_path / "wavs" / f"{name}.wav")
    _wav(tmp_path / "wavs" / "LJ3.flac")
    (tmp_path / "metadata.csv").write_text(
        'LJ1|He said "1455."|He said "fourteen fifty-five."\nLJ2|It, is.|\nLJ3|Two columns\n'
    )
    rows = open_data(tmp_path)
    assert [row.id for row in rows] == ["LJ1", "LJ2", "LJ3"]
    assert [row.text for row in rows] == [
        'He said "fourteen fifty-five."',
        "It, is.",
        "Two columns",
    ]
    assert rows[2].audio == tmp_path / "wavs" / "LJ3.flac"
    with (tmp_path / "metadata.csv").open("a") as file:
        file.write("LJ4|a|b|c\n")
    with pytest.raises(ValueError, match="metadata.csv:4: expected id.text"):
        open_data(tmp_path)


def test_wav_txt_folder_takes_speakers_from_subfolders(tmp_path):
    _wav(tmp_path / "ann" / "one.wav")
    _wav(tmp_path / "ann" / "book" / "two.flac")
    _wav(tmp_path / "zero.wav")
    (tmp_path / "ann" / "one.txt").write_text("One,\nin two lines.\n")
    (tmp_path / "ann" / "book" / "two.normalized.txt").write_text("Two.")
    (tmp_path / "zero.txt").write_text("\ufeffZero.", encoding="utf-8")
    rows = open_data(tmp_path)
    assert [(r.id, r.text, r.speaker) for r in rows] == [
        ("ann/book/two", "Two.", "ann"),
        ("ann/one", "One, in two lines.", "ann"),
        ("zero", "Zero.", None),
    ]
    (tmp_path / "zero.txt").unlink()
    with pytest.raises(
        ValueError, match="1 audio files .* no transcript .*zero.wav: write zero.txt"
    ):
        open_data(tmp_path)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_csv_with_a_header(wavs, delimiter):
    lines = [["audio", "text", "speaker"], ["wavs/a.wav", '"Yes, and; no | so"', ""]]
    path = wavs / "data.csv"
    path.write_text("\n".join(delimiter.join(cells) for cells in lines) + "\n")
    (row,) = open_data(path)
    assert (row.text, row.speaker, row.audio) == ("Yes, and; no | so", None, wavs / "wavs/a.wav")


def test_bad_csv_is_refused(wavs):
    path = wavs / "data.csv"
    path.write_text("audio,text\nwavs/a.wav,Yes, and\n")
    with pytest.raises(ValueError, match="data.csv:2: the header has 2 columns.*quote"):
        open_data(path)
    path.write_text("audio,sentence\nwavs/a.wav,Yes\n")
    with pytest.raises(ValueError, match="data.csv:2: unknown field 'sentence'"):
        open_data(path)


def _hf(tmp_path, **columns):
    import datasets

    paths = [str(_wav(tmp_path / "in" / f"{n}.wav", n)) for n in range(3)]
    data = datasets.Dataset.from_dict({"audio": paths, **columns})
    return data.cast_column("audio", datasets.Audio(decode=False))


def test_hugging_face_data_is_read_without_decoding_by_datasets(tmp_path):
    import datasets

    data = _hf(tmp_path, sentence=["A.", "B.", "C."], speaker_id=[1, 1, 2], id=[5, 5, 6])
    data.cast_column("audio", datasets.Audio()).save_to_disk(tmp_path / "saved")
    rows = open_data(tmp_path / "saved")
    assert [(r.id, r.text, r.speaker) for r in rows] == [
        ("000000", "A.", "1"),  # the column id repeats, so it cannot be the utterance's
        ("000001", "B.", "1"),
        ("000002", "C.", "2"),
    ]
    for number, row in enumerate(rows):
        np.testing.assert_array_equal(
            read_audio(row.audio), read_audio(tmp_path / "in" / f"{number}.wav")
        )
    with pytest.raises(ValueError, match="lies inside a data set"):
        write_manifest(tmp_path / "out.jsonl", rows)


def test_hugging_face_parquet_with_embedded_bytes_and_splits(tmp_path):
    import datasets

    cells = [{"bytes": p.read_bytes(), "path": None} for p in
             (_wav(tmp_path / "in" / f"{n}.wav", n) for n in range(2))]  # fmt: skip
    data = datasets.Dataset.from_dict({"clip": cells, "text": ["A.", "B."], "id": ["x", "y"]})
    data = data.cast_column("clip", datasets.Audio(decode=False))
    (tmp_path / "pq").mkdir()
    for split in ("train", "test"):
        data.to_parquet(tmp_path / "pq" / f"{split}-00000-of-00001.parquet")
    rows = open_data(tmp_path / "pq", split="test")
    assert [(row.id, row.text) for row in rows] == [("x", "A."), ("y", "B.")]
    assert read_audio(rows[0].audio).shape == (24000,)
    with pytest.raises(ValueError, match=r"no split 'dev'; give split=... one of .*train"):
        open_data(tmp_path / "pq", split="dev")
    with pytest.raises(ValueError, match="no column 'words'; give text_column=... one of"):
        open_data(tmp_path / "pq", text_column="words")


def test_hugging_face_column_names_are_asked_for_when_unusual(tmp_path):
    import datasets

    data = _hf(tmp_path, words=["A.", "B.", "C."]).cast_column("audio", datasets.Audio())
    data.save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="give text_column=... one of .*'words'"):
        open_data(tmp_path / "saved")
    assert len(open_data(tmp_path / "saved", text_column="words")) == 3


def test_open_data_says_what_it_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="data .*nope does not exist"):
        open_data(tmp_path / "nope")
    (tmp_path / "data.xls").write_text("x")
    with pytest.raises(ValueError, match="must be a .jsonl manifest"):
        open_data(tmp_path / "data.xls")
    with pytest.raises(ValueError, match="holds no utterances"):
        (tmp_path / "empty").mkdir()
        open_data(tmp_path / "empty")


def test_file_stems_are_safe_and_differ():
    assert file_stem("LJ050-0131") == "LJ050-0131"
    ids = ["a/b", "a_b", "a b", "../x", "", "ä" * 300, "ä" * 301]
    stems = [file_stem(id) for id in ids]
    assert len(set(stems)) == len(ids)
    assert all("/" not in s and not s.startswith(".") and len(s.encode()) < 250 for s in stems)


def test_real_speech_manifest(speech_dir):
    rows = open_data(speech_dir / "manifest.jsonl")
    assert len(rows) == 14 and {row.speaker for row in rows} >= {"spk1", "spk2", "jfk"}
