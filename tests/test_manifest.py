"""Manifests: every mistake names file, line, field and fix."""

import json

import pytest

from higgs_lab.manifest import Utterance, file_stem, read_manifest, write_manifest
from tests.tiny import noise_file


def _manifest(tmp_path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def wavs(tmp_path):
    for name in ("a", "b", "c"):
        noise_file(tmp_path / "wavs" / f"{name}.wav", ord(name))
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


def test_file_stems_are_safe_and_differ():
    assert file_stem("LJ050-0131") == "LJ050-0131"
    ids = ["a/b", "a_b", "a b", "../x", "", "ä" * 300, "ä" * 301]
    stems = [file_stem(id) for id in ids]
    assert len(set(stems)) == len(ids)
    assert all("/" not in s and not s.startswith(".") and len(s.encode()) < 250 for s in stems)
