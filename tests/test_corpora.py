"""Other data sets as manifest rows: what each layout gives, and what is said when it is none."""

import numpy as np
import pytest

from higgs_lab.audio import read_audio
from higgs_lab.corpora import open_data
from higgs_lab.manifest import write_manifest
from tests.tiny import noise_file


def test_ljspeech_folder(tmp_path):
    for name in ("LJ1", "LJ2"):
        noise_file(tmp_path / "wavs" / f"{name}.wav")
    noise_file(tmp_path / "wavs" / "LJ3.flac")
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
    noise_file(tmp_path / "ann" / "one.wav")
    noise_file(tmp_path / "ann" / "book" / "two.flac")
    noise_file(tmp_path / "zero.wav")
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
def test_csv_with_a_header(tmp_path, delimiter):
    lines = [["audio", "text", "speaker"], ["wavs/a.wav", '"Yes, and; no | so"', ""]]
    noise_file(tmp_path / "wavs" / "a.wav")
    path = tmp_path / "data.csv"
    path.write_text("\n".join(delimiter.join(cells) for cells in lines) + "\n")
    (row,) = open_data(path)
    assert (row.text, row.speaker, row.audio) == (
        "Yes, and; no | so",
        None,
        tmp_path / "wavs/a.wav",
    )


def test_bad_csv_is_refused(tmp_path):
    noise_file(tmp_path / "wavs" / "a.wav")
    path = tmp_path / "data.csv"
    path.write_text("audio,text\nwavs/a.wav,Yes, and\n")
    with pytest.raises(ValueError, match="data.csv:2: the header has 2 columns.*quote"):
        open_data(path)
    path.write_text("audio,sentence\nwavs/a.wav,Yes\n")
    with pytest.raises(ValueError, match="data.csv:2: unknown field 'sentence'"):
        open_data(path)


def _hf(tmp_path, **columns):
    import datasets

    paths = [str(noise_file(tmp_path / "in" / f"{n}.wav", n)) for n in range(3)]
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
             (noise_file(tmp_path / "in" / f"{n}.wav", n) for n in range(2))]  # fmt: skip
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


def test_real_speech_manifest(speech_dir):
    rows = open_data(speech_dir / "manifest.jsonl")
    assert len(rows) == 14 and {row.speaker for row in rows} >= {"spk1", "spk2", "jfk"}
