"""serve.validate: every step says what it found, none stops another, and a run resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from higgs_lab.audio import write_wav
from higgs_lab.manifest import Utterance, write_manifest
from higgs_lab.tags import check_text
from serve import validate_speech
from serve.validate import Run, main, steps, validate
from serve.validate_speech import available_bytes
from serve.validation import FAIL, OK, SKIP, WARN

CHEAP = ["files", "config", "tokenizer", "keys", "tied heads"]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    """Three clips; the shortest is too short for a reference."""
    folder = tmp_path_factory.mktemp("recordings")
    rows = []
    for i, seconds in enumerate((0.5, 1.2, 1.4)):
        t = torch.arange(int(seconds * 24000)) / 24000
        wav = 0.2 * torch.sin(2 * torch.pi * (150 + 40 * i) * t) * (1 + torch.sin(9 * t)) / 2
        write_wav(folder / f"{i}.wav", wav.numpy(), 24000)
        rows.append(Utterance(audio=folder / f"{i}.wav", text=f"Clip {i}.", id=str(i)))
    write_manifest(folder / "manifest.jsonl", rows)
    return folder / "manifest.jsonl"


def verdicts(report: dict) -> dict[str, str]:
    return {name: step["verdict"] for name, step in report["steps"].items()}


def test_nano_is_what_is_assumed_of_its_format(tmp_path):
    report = validate(Run("nano", tmp_path / "v", "cpu"), CHEAP)
    assert verdicts(report) == dict.fromkeys(CHEAP, OK)
    inventory = report["steps"]["keys"]["figures"]
    assert inventory["keys"] == inventory["indexed"] + 2 and inventory["talker keys missing"] == []
    text = (tmp_path / "v" / "report.md").read_text()
    assert "# Validation of nano" in text and "| tied heads | ok |" in text
    assert json.loads((tmp_path / "v" / "report.json").read_text()) == report


def test_what_is_otherwise_is_found_and_the_rest_goes_on(nano, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(nano, bad)
    tensors = load_file(bad / "model.safetensors")
    tensors["tied.head.text_head.weight"][5] += 1
    del tensors["body.norm.weight"]
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    index = json.loads((bad / "model.safetensors.index.json").read_text())
    del index["weight_map"]["body.norm.weight"]
    (bad / "model.safetensors.index.json").write_text(json.dumps(index))
    report = validate(Run(str(bad), tmp_path / "v", "cpu"), [*CHEAP, "endings"])
    found = verdicts(report)
    assert found["tied heads"] == found["keys"] == found["endings"] == FAIL
    assert found["files"] == found["config"] == found["tokenizer"] == OK
    assert "body.norm.weight" in report["steps"]["keys"]["lines"][0]
    assert "body.norm.weight" in report["steps"]["endings"]["lines"][0]  # an exception, told
    assert str(tmp_path) not in (tmp_path / "v" / "report.md").read_text()


def test_a_run_resumes_what_failed_and_repeats_what_it_is_told_to(nano, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(nano, base)
    weights = base / "model.safetensors"
    weights.rename(tmp_path / "away")
    run = Run(str(base), tmp_path / "v", "cpu")
    assert verdicts(validate(run, ["config", "keys"])) == {"config": OK, "keys": FAIL}
    (tmp_path / "away").rename(weights)
    capsys.readouterr()
    assert verdicts(validate(run, ["config", "keys"])) == {"config": OK, "keys": OK}
    assert "config: ok (done before)" in capsys.readouterr().out
    validate(run, ["config"], again=["config"])
    assert "done before" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="other settings.*texts: was 50, now 7"):
        validate(Run(str(base), tmp_path / "v", "cpu", texts=7))
    with pytest.raises(ValueError, match="no step 'kyes'"):
        validate(run, ["kyes"])


def test_without_recordings_or_network_steps_are_skipped_and_say_why(tmp_path):
    run = Run("nano", tmp_path / "v", "cpu", api_key="secret-of-the-server")
    names = ["engine's codec", "v2 tokenizer", "alignment", "SGLang-Omni server", "words compared"]
    report = validate(run, names)
    assert verdicts(report) == dict.fromkeys(names, SKIP)
    assert "--recordings" in report["steps"]["alignment"]["lines"][0]
    assert "sgl-omni serve" in report["steps"]["SGLang-Omni server"]["lines"][0]
    assert not any("secret" in file.read_text() for file in (tmp_path / "v").rglob("*.*"))


def test_recordings_can_come_later(tmp_path, recordings):
    validate(Run("nano", tmp_path / "v", "cpu"), ["alignment"])
    run = Run("nano", tmp_path / "v", "cpu", str(recordings))
    assert [row.id for row in run.clips()] == ["1", "2"]
    report = validate(run, ["alignment", "talker precision"])
    figures = report["steps"]["alignment"]["figures"]
    assert set(figures) == {"zero-shot", "clone", "clone with transcript"}
    assert report["steps"]["alignment"]["verdict"] in (OK, WARN)
    assert report["steps"]["talker precision"]["figures"]["mean"] < 0.1  # of codes it never met


def test_what_the_cache_of_files_holds_is_not_taken(tmp_path):
    file = tmp_path / "meminfo"
    file.write_text("MemTotal: 9999 kB\nMemFree: 200 kB\nMemAvailable: 9000 kB\n")
    assert available_bytes(file) == 9000 * 1024
    assert available_bytes(tmp_path / "none") > 1 << 30


def test_codec_steps_measure_every_codebook(tmp_path, recordings):
    run = Run("nano", tmp_path / "v", "cpu", str(recordings), other_codec=str(tmp_path / "other"))
    from higgs_lab.codec import Codec

    Codec.from_pretrained(run.path).save_tokenizer_folder(tmp_path / "other")
    report = validate(run, ["bundled codec", "codec precision", "engine's codec"])
    same = report["steps"]["engine's codec"]
    assert same["verdict"] == OK and same["figures"]["codes equal, by codebook"] == [1.0] * 8
    assert same["figures"]["hashes"]["bundled"] == same["figures"]["hashes"]["other"]
    shares = report["steps"]["codec precision"]["figures"]["codes equal in bf16, by codebook"]
    assert len(shares) == 8 and shares[0] > 0.5


def summary(low: float, high: float) -> dict:
    error = {"value": (low + high) / 2, "low": low, "high": high}
    return {"overall": {"error": error, "sim_ref": None}}


@pytest.mark.parametrize("span, verdict", [((0.02, 0.05), OK), ((0.2, 0.3), FAIL)])
def test_engines_are_compared_by_their_intervals(tmp_path, span, verdict):
    run = Run("nano", tmp_path / "v", "cpu")
    for name, found in (("toolkit", summary(0.01, 0.03)), ("vllm", summary(*span))):
        folder = run.out / "eval" / name
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps(found))
    assert verdicts(validate(run, ["words compared"]))["words compared"] == verdict


def test_words_are_judged_by_eval_as_a_command(tmp_path, recordings):
    run = Run("nano", tmp_path / "v", "cpu", str(recordings), asr="none", speaker="none")
    step = validate(run, ["words: human"])["steps"]["words: human"]
    assert step["verdict"] in (OK, WARN) and step["figures"]["clips"] == 3
    run.asr = str(tmp_path / "nowhere.pt")
    run.out = tmp_path / "w"  # other settings, another folder
    broken = validate(run, ["words: human"])["steps"]["words: human"]
    assert broken["verdict"] == FAIL and "nowhere.pt" in broken["lines"][0]


def test_the_sentences_are_spoken_in_the_first_voice(tmp_path, recordings):
    run = Run("nano", tmp_path, "cpu", str(recordings), texts=2)
    file = validate_speech.texts_manifest(run)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["ref_text"] for row in rows] == ["Clip 1."] * 2
    assert all(Path(row["ref_audio"]).name == "1.wav" for row in rows)


def test_the_sentences_are_fifty_and_speakable():
    lines = validate_speech.TEXTS.read_text(encoding="utf-8").splitlines()
    assert len(set(lines)) == 50
    for line in lines:
        check_text(line)
        assert not any(c.isdigit() for c in line)  # read as spoken, not as written


def test_command_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--model", "nano", "--out", str(tmp_path / "v"), "--only", "config", "alignment"])
    assert ended.value.code == 0
    assert "1 ok, 1 skip; the report to attach" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no hub name"):
        main(["--model", str(tmp_path / "x" / "y"), "--out", str(tmp_path / "v2")])
    assert len(steps()) == 20
