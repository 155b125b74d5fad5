"""eval.public_sets: small look-alikes in the exact layout of what others publish."""

from __future__ import annotations

import sys
import tarfile
from collections import Counter

import huggingface_hub
import numpy as np
import pytest

from eval.languages import LANGUAGES
from eval.normalize import fair, has_digits
from eval.public_sets import PUBLIC_SETS, public_set
from eval.run import main
from eval.sets import load_set
from higgs_lab.audio import read_audio, write_wav


def tone(path, number=0, seconds=0.5):
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = 0.1 * np.sin(np.arange(int(16000 * seconds)) * (0.05 + 0.01 * number))
    if path.suffix == ".mp3":
        import soundfile

        soundfile.write(path, wave, 16000)
    else:
        write_wav(path, wave.astype(np.float32), 16000)
    return path


def lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def test_smoke_needs_nothing_and_speaks_every_language():
    rows = load_set("smoke", langs=["all", "stretch"]).rows
    counts = Counter(row.language for row in rows)
    assert set(counts) == set(LANGUAGES) and min(counts.values()) >= 4
    assert len({row.id for row in rows}) == len(rows)
    assert len({(row.language, row.text) for row in rows}) == len(rows)
    assert not any(has_digits(fair(row.text, row.language)) for row in rows)
    assert max(len(row.text) for row in rows) < 250
    assert {row.language for row in load_set("smoke", langs=["tier1", "zu", "cy"]).rows} == {
        code for code, row in LANGUAGES.items() if row.tier == 1
    } | {"cy"}
    assert len(load_set("smoke", langs=["de", "yue"], limit=2).rows) == 4
    default = {row.language for row in load_set("smoke").rows}
    assert default == set(LANGUAGES)


def make_fleurs(folder, archive):
    """data/de_de/test.tsv without a header and audio/test.tar.gz, as google/fleurs has them."""
    rows, base = [], folder / "data" / "de_de"
    for number, sentence in enumerate(["Eins.", "Eins.", "Zwei 21.", "Drei.", "Vier."]):
        name = f"10{number}.wav"
        tone(base / "audio" / "test" / name, number)
        id = {0: 7, 1: 7}.get(number, number + 10)  # a sentence may be read several times
        rows.append(f'{id}\t{name}\t{sentence}\t{sentence.lower()}\te i n s |\t8000\tFEMALE"')
    lines(base / "test.tsv", *rows)
    if archive:
        with tarfile.open(base / "audio" / "test.tar.gz", "w:gz") as tar:
            tar.add(base / "audio" / "test", "test")
        for path in (base / "audio" / "test").iterdir():
            path.unlink()
        (base / "audio" / "test").rmdir()
    return folder


@pytest.mark.parametrize("archive", [True, False])
def test_fleurs_gives_each_sentence_once_with_another_recording_as_prompt(tmp_path, archive):
    folder = make_fleurs(tmp_path, archive)
    for _ in range(2):  # unpacked once
        rows = load_set("fleurs", folder=folder).rows
    assert [row.text for row in rows] == ["Eins.", "Zwei 21.", "Drei.", "Vier."]
    assert [row.id for row in rows] == ["de-7", "de-12", "de-13", "de-14"]
    for row in rows:
        assert row.language == "de" and row.ref_audio != row.audio and row.ref_text != row.text
        assert len(read_audio(row.audio, 16000)) == 8000
    with pytest.raises(ValueError, match=r"no rows of the chosen languages .* data/<language>"):
        load_set("fleurs", folder=folder, langs=["fr"])


def test_fleurs_from_the_hub_fetches_the_chosen_languages_only(tmp_path, monkeypatch):
    asked = {}

    def fetched(repo, repo_type, revision, allow_patterns):
        asked.update(repo=repo, type=repo_type, revision=revision, patterns=allow_patterns)
        return str(make_fleurs(tmp_path, archive=True))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    assert len(load_set("fleurs@abc", langs=["de"]).rows) == 4
    assert asked == {
        "repo": "google/fleurs",
        "type": "dataset",
        "revision": "abc",
        "patterns": ["data/de_de/test.tsv", "data/de_de/audio/test.tar.gz"],
    }


_CV = "client_id\tpath\tsentence_id\tsentence\tsentence_domain\tup_votes\tdown_votes\tage\tgender"
_CV += "\taccents\tvariant\tlocale\tsegment"


def make_common_voice(folder, locale, sentences):
    rows = [_CV]
    for number, (client, sentence) in enumerate(sentences):
        name = f"common_voice_{locale}_{number}.mp3"
        tone(folder / "clips" / name, number)
        rows.append(f"{client}\t{name}\tx{number}\t{sentence}\t\t2\t0\t\t\t\t\t{locale}\t")
    lines(folder / "test.tsv", *rows)


def test_common_voice_of_one_language_or_several(tmp_path, capsys):
    make_common_voice(
        tmp_path / "sv-SE", "sv-SE", [("ann", 'Hej "du'), ("ann", "Två"), ("bo", "A")]
    )
    make_common_voice(tmp_path / "eu", "eu", [("zoe", "Kaixo")])
    make_common_voice(tmp_path / "ab", "ab", [("x", "Бзиа")])
    several = load_set("common-voice", folder=tmp_path)
    assert [row.id for row in several.rows][:2] == [
        "eu-common_voice_eu_0",
        "sv-common_voice_sv-SE_0",
    ]
    assert "left out ab" in capsys.readouterr().err
    one = load_set("common-voice", folder=tmp_path / "sv-SE", langs=["sv"])
    assert [row.text for row in one.rows] == ['Hej "du', "Två", "A"]
    # Another clip of the same speaker is the prompt; who has none gets none.
    assert one.references == {"speaker": 2, "none": 1}
    assert len(read_audio(one.rows[0].ref_audio, 16000)) > 4000
    with pytest.raises(ValueError, match="Mozilla Data Collective.*--set-path"):
        load_set("common-voice")
    table = tmp_path / "eu" / "test.tsv"
    table.write_text(table.read_text() + "zoe\tclip.mp3\tx\tBai")
    with pytest.raises(ValueError, match=r"test.tsv:3: 4 cells under .* no locale"):
        load_set("common-voice", folder=tmp_path / "eu")
    (tmp_path / "eu" / "test.tsv").write_text("path\tsentence\na.mp3\tKaixo\n")
    with pytest.raises(ValueError, match=r"test.tsv:1: no column client_id, locale"):
        load_set("common-voice", folder=tmp_path / "eu")


def make_seed(folder):
    for name, text in (("en", "Get the trust fund."), ("zh", "你好，世界。")):
        for number in (1, 2):
            tone(folder / name / "prompt-wavs" / f"p{number}.wav", number)
        tone(folder / name / "wavs" / "p1-a.wav", 5)
        lines(
            folder / name / "meta.lst",
            f"p1-a|We asked over twenty people.|prompt-wavs/p1.wav|{text}",
            f"p2-b|No wonder.|prompt-wavs/p2.wav|{text} two",
        )
    hard = "p1-h|提示。|prompt-wavs/p1.wav|绕口令绕口令。"
    lines(folder / "zh" / "hardcase.lst", hard, hard)  # a published set may repeat itself
    return folder


def test_seed_tts_eval(tmp_path):
    folder = make_seed(tmp_path)
    both = load_set("seed-tts-eval", folder=folder)
    assert [row.id for row in both.rows] == ["en-p1-a", "en-p2-b", "zh-p1-a", "zh-p2-b"]
    first = both.rows[0]
    assert first.audio.name == "p1-a.wav" and first.ref_audio.name == "p1.wav"
    assert first.ref_text == "We asked over twenty people." and both.rows[1].audio is None
    assert both.references == {"manifest": 4}
    hard, again = load_set("seed-tts-eval:zh-hard", folder=folder).rows
    assert hard.text == again.text == "绕口令绕口令。" and hard.language == "zh"
    assert again.id == f"{hard.id}#2"
    assert {row.language for row in load_set("seed-tts-eval:en", folder=folder).rows} == {"en"}
    with pytest.raises(ValueError, match="no part 'de': it has en"):
        load_set("seed-tts-eval:de", folder=folder)
    lines(folder / "en" / "meta.lst", "only|three|cells")
    with pytest.raises(ValueError, match=r"meta.lst:1: expected id\|prompt text"):
        load_set("seed-tts-eval:en", folder=folder)
    with pytest.raises(FileNotFoundError, match="hardcase.lst is missing"):
        (folder / "zh" / "hardcase.lst").unlink()
        load_set("seed-tts-eval:zh-hard", folder=folder)


def make_cv3(folder):
    for part, name in (("zero_shot", "ja"), ("zero_shot", "hard_zh"), ("cross", "to_en")):
        base = folder / "data" / part / name
        tone(base / "waveform" / "prompt_audio_1.wav")
        lines(base / "text", "uttid_1 The wide road shimmered.")
        lines(base / "prompt_text", "uttid_1 加菲迪曾经代表巴西国家足球队。")
        wav = f"data/{part}//{name}/waveform/prompt_audio_1.wav"
        lines(base / "prompt_wav.scp", f"uttid_1 {wav}")
    return folder


def test_cv3_eval(tmp_path):
    folder = make_cv3(tmp_path)
    rows = load_set("cv3-eval", folder=folder).rows
    assert [(row.id, row.language) for row in rows] == [
        ("hard_zh-uttid_1", "zh"), ("ja-uttid_1", "ja"),
    ]  # fmt: skip
    assert rows[0].ref_audio.is_file() and rows[0].ref_text.startswith("加菲迪")
    (cross,) = load_set("cv3-eval:cross", folder=folder).rows
    assert cross.language == "en" and cross.text == "The wide road shimmered."
    with pytest.raises(ValueError, match="git clone .*CV3-Eval.*--set-path"):
        load_set("cv3-eval")
    lines(folder / "data" / "cross" / "to_en" / "text", "uttid_1 x", "uttid_1 y")
    with pytest.raises(ValueError, match=r"text:2: uttid_1 stands at .*text:1 already"):
        load_set("cv3-eval:cross", folder=folder)
    lines(folder / "data" / "cross" / "to_en" / "text", "uttid_1 x")
    lines(folder / "data" / "cross" / "to_en" / "prompt_text", "uttid_9 x")
    with pytest.raises(ValueError, match=r"text:1: uttid_1 is not in prompt_wav.scp"):
        load_set("cv3-eval:cross", folder=folder)


def make_minimax(folder):
    said = []
    for language in ("greek", "cantonese"):
        for sex in ("female", "male"):
            clip = f"common_voice_{language}_{sex}.mp3"
            tone(folder / "speaker" / language / f"{language}_{sex}" / clip, len(said))
            said.append(f"{clip}|words of {language} {sex}")
        lines(
            folder / "text" / f"{language}.txt", f"{language}_female|α β", f"{language}_male|γ | δ"
        )
    lines(folder / "speaker" / "prompt_text.txt", *said)
    return folder


def test_minimax(tmp_path):
    folder = make_minimax(tmp_path)
    test_set = load_set("minimax", folder=folder)
    assert Counter(row.language for row in test_set.rows) == {"el": 2, "yue": 2}
    greek = load_set("minimax", folder=folder, langs=["el"]).rows
    assert [(row.id, row.speaker, row.text) for row in greek] == [
        ("el-001", "greek_female", "α β"), ("el-002", "greek_male", "γ | δ"),
    ]  # fmt: skip
    assert greek[1].ref_text == "words of greek male"
    assert len(read_audio(greek[0].ref_audio, 16000)) > 4000
    next((folder / "speaker" / "greek" / "greek_male").iterdir()).unlink()
    with pytest.raises(ValueError, match=r"greek.txt:2: expected voice\|text with one .mp3"):
        load_set("minimax", folder=folder)


def test_a_path_of_that_name_comes_before_the_public_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert public_set("smoke") is not None and public_set("smoke2") is None
    (tmp_path / "smoke").mkdir()
    assert public_set("smoke") is None
    with pytest.raises(ValueError, match="--set-path says where a public set lies"):
        load_set("some.jsonl", folder=tmp_path)
    with pytest.raises(ValueError, match="the set fleurs has no parts"):
        load_set("fleurs:de")
    with pytest.raises(FileNotFoundError, match="--set-path .*: no such folder"):
        load_set("fleurs", folder=tmp_path / "no")


def test_a_run_takes_the_protocol_of_its_set_and_says_so(tmp_path, capsys, monkeypatch):
    folder = make_seed(tmp_path / "seed")
    options = ["--model", "human", "--set", "seed-tts-eval:en", "--set-path", str(folder),
               "--speaker", "none", "--cache", "none", "--device", "cpu"]  # fmt: skip
    summary = main([*options, "--asr", "none", "--out", str(tmp_path / "a")])
    said = capsys.readouterr().out
    assert "seed-tts-eval:en: texts compared by seed, heard by none" in said
    assert "published figures were heard by Whisper large-v3 for English, Paraformer-zh" in said
    assert summary["config"]["normalizer"] == "seed-1"
    summary = main(
        [*options, "--asr", "none", "--normalizer", "fair", "--out", str(tmp_path / "b")]
    )
    assert summary["config"]["normalizer"].startswith("fair-")
    assert "follow --normalizer seed" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is for English, not 'zh'"):
        main([*options[:3], "seed-tts-eval:zh", *options[4:], "--asr", "none",
              "--normalizer", "whisper-english", "--out", str(tmp_path / "c")])  # fmt: skip
    # A package that only a transcript will need is missed before anything is spoken.
    monkeypatch.setitem(sys.modules, "zhconv", None)
    with pytest.raises(SystemExit, match=r"needs zhconv: pip install 'higgs_lab\[protocols\]'"):
        main([*options[:3], "seed-tts-eval:zh", *options[4:], "--asr", "none",
              "--out", str(tmp_path / "c")])  # fmt: skip
    assert not (tmp_path / "c").exists()


def test_every_public_set_is_described_in_the_modules_help():
    import eval.public_sets

    assert all(f"- {name}" in eval.public_sets.__doc__ for name in PUBLIC_SETS)
