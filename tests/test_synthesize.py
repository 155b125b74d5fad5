"""Synthesis: the sound of `speak`, whole files, and the same result after any kill."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import higgs_lab
from higgs_lab.adapter import attach_lora, base_fingerprint, save_adapter
from higgs_lab.checkpoint import load_talker
from higgs_lab.config import load_config
from higgs_lab.generate import Sampling
from higgs_lab.manifest import read_manifest
from higgs_lab.runlog import read_jsonl
from recipes import synthesize
from recipes.synthesize import SynthesizeConfig, main

ROOT = Path(__file__).parent.parent
SHORT = {"max_frames": 12, "device": "cpu"}


def _voice(path, seed=0, sec=1.5):
    rng = np.random.default_rng(seed)
    t = np.arange(round(sec * 24000)) / 24000
    wav = 0.1 * np.sin(2 * np.pi * rng.uniform(100, 900) * t) + 0.01 * rng.standard_normal(len(t))
    soundfile.write(path, wav.astype(np.float32), 24000)
    return path


def _lines(tmp_path, *texts):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return str(path)


def _wav(row):
    return soundfile.read(row.audio, dtype="float32")[0]


def _config(nano, out, **options):
    return SynthesizeConfig(str(nano), str(out), **(SHORT | options))


def test_a_text_file_becomes_wavs_and_a_manifest(nano, tmp_path):
    source = _lines(tmp_path, "One.", "", "  Zwei, drei.  ", "四。")
    out = tmp_path / "out"
    manifest = main(_config(nano, out, source=source))
    rows = read_manifest(manifest)
    assert [row.id for row in rows] == ["000001", "000003", "000004"]
    assert [row.text for row in rows] == ["One.", "Zwei, drei.", "四。"]
    for row in rows:
        assert row.audio.parent == out / "wavs"
        assert len(_wav(row)) == row.info["frames"] * 960 <= 12 * 960
        assert row.info["seconds"] == pytest.approx(len(_wav(row)) / 24000, abs=1e-3)
        assert row.info["stop_reason"] in ("eoc", "max_frames") and row.info["seed"] == 42
    saved = load_config(SynthesizeConfig, out / "config.yaml", [])
    assert saved.source == source and saved.max_frames == 12
    assert json.loads((out / "provenance.json").read_text())["model"] == str(nano)
    lines = (out / "manifest.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["audio"] == "wavs/000001.wav"  # the folder may be moved


def test_the_sound_is_that_of_speak_with_the_same_seed_and_reference(nano, tmp_path):
    voice = _voice(tmp_path / "voice.wav")
    manifest = main(
        _config(nano, tmp_path / "out", text="Hello there.", ref_audio=str(voice), ref_text="Hi.",
                seed=5, temperature=0.7, top_k=20, top_p=0.9, mode="sglang")
    )  # fmt: skip
    (row,) = read_manifest(manifest)
    sampling = Sampling(0.7, 20, 0.9, 5, 12, "sglang")
    higgs = higgs_lab.load(nano, device="cpu")
    wav, info = higgs.speak("Hello there.", str(voice), "Hi.", sampling)
    assert row.info["frames"] == info.frames and row.info["seed"] == 5
    np.testing.assert_allclose(_wav(row), np.clip(wav, -1, 1), atol=2 / 32767)
    assert row.ref_audio == voice and row.ref_text == "Hi."


def test_rows_keep_their_own_voice_and_their_recording_is_not_touched(nano, tmp_path):
    for name in ("human", "mine", "default"):
        _voice(tmp_path / f"{name}.wav", len(name))
    before = (tmp_path / "human.wav").read_bytes()
    rows = [
        {"audio": "human.wav", "text": "One.", "ref_audio": "mine.wav", "ref_text": "Mine."}
        | {"speaker": "ann", "language": "en", "id": "a/1", "info": {"set": "x"}},
        {"text": "Two.", "id": "b"},
    ]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = main(
        _config(nano, tmp_path / "out", source=str(tmp_path / "set.jsonl"),
                ref_audio=str(tmp_path / "default.wav"))
    )  # fmt: skip
    first, second = read_manifest(manifest)
    assert first.ref_audio == tmp_path / "mine.wav" and first.ref_text == "Mine."
    assert second.ref_audio == tmp_path / "default.wav" and second.ref_text is None
    assert first.speaker == "ann" and first.info["set"] == "x"
    assert (
        first.info["recording"] == str(tmp_path / "human.wav") and first.audio.name != "human.wav"
    )
    assert (tmp_path / "human.wav").read_bytes() == before


def test_trap23_takes_differ_and_the_same_seed_repeats(nano, tmp_path):
    config = _config(nano, tmp_path / "a", text="Hello there.", takes=3)
    first = read_manifest(main(config))
    assert [row.info["seed"] for row in first] == [42, 43, 44]
    assert [row.audio.name for row in first] == [f"text-take{n}.wav" for n in (1, 2, 3)]
    waves = [_wav(row) for row in first]
    for one, two in ((0, 1), (0, 2), (1, 2)):
        assert len(waves[one]) != len(waves[two]) or (waves[one] != waves[two]).any()
    again = read_manifest(main(replace(config, out=str(tmp_path / "b"))))
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(_wav(one), _wav(two))


def test_long_texts_are_split_and_joined(nano, tmp_path):
    text = "<|emotion:awe|>This is one sentence. This is another one. And a third comes here."
    (row,) = read_manifest(main(_config(nano, tmp_path / "out", text=text, max_chars=40)))
    assert row.info["chunks"] == 3 and row.text == text
    joints = 2 * 480  # cross-fades
    assert len(_wav(row)) == row.info["frames"] * 960 - joints


def test_more_takes_are_added_and_nothing_is_spoken_twice(nano, tmp_path, monkeypatch):
    config = _config(nano, tmp_path / "out", source=_lines(tmp_path, "One.", "Two."))
    main(config)
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out" / "wavs").iterdir()}
    monkeypatch.setattr(
        higgs_lab, "load", lambda *a: pytest.fail("loaded the model"), raising=False
    )
    main(config)
    monkeypatch.undo()
    rows = read_manifest(main(replace(config, source=_lines(tmp_path, "One.", "Two.", "Three."),
                                      batch_size=1)))  # fmt: skip
    assert [row.text for row in rows] == ["One.", "Two.", "Three."]
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out" / "wavs").iterdir()}
    assert times.items() <= after.items() and len(after) == 3


def test_a_lost_wav_is_spoken_again(nano, tmp_path):
    config = _config(nano, tmp_path / "out", text="One.")
    (row,) = read_manifest(main(config))
    before = row.audio.read_bytes()
    row.audio.unlink()
    main(config)
    assert row.audio.read_bytes() == before


def test_other_settings_or_weights_are_refused(nano, tmp_path):
    config = _config(nano, tmp_path / "out", text="One.")
    main(config)
    with pytest.raises(FileExistsError, match="temperature: None there, 0.5 here.: give"):
        main(replace(config, temperature=0.5))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is no folder of synthesize"):
        main(replace(config, out=str(tmp_path / "mine")))


def test_an_adapter_changes_the_sound_and_a_retrained_one_is_noticed(nano, tmp_path):
    def train(value):
        """A LoRA as training leaves it: its second matrices are no longer zero."""
        model = attach_lora(load_talker(nano, dtype=torch.float32), "attention_mlp", rank=4)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(value)
        meta = {"base": str(nano), "revision": None, "fingerprint": base_fingerprint(nano)}
        save_adapter(model, tmp_path / "run" / "adapter", meta)

    train(0.02)
    plain = _config(nano, tmp_path / "plain", text="Hello there.")
    tuned = replace(plain, out=str(tmp_path / "tuned"), adapter=str(tmp_path / "run"))
    (one,), (two,) = (read_manifest(main(config)) for config in (plain, tuned))
    assert one.info["frames"] != two.info["frames"] or (_wav(one) != _wav(two)).any()
    train(0.02)
    main(tuned)  # the same weights, saved again
    train(0.03)
    with pytest.raises(FileExistsError, match="other settings .adapter_files.: give"):
        main(tuned)
    with pytest.raises(FileNotFoundError, match="no adapter_config.json|no folder"):
        main(replace(tuned, out=str(tmp_path / "x"), adapter=str(tmp_path / "nowhere")))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["Fine.", "Not <|audio|> fine."], r"texts.txt:2, field text: control token <\|audio\|>"),
        (["A <|emotion:hapiness|>b."], r"texts.txt:1, field text: unknown control tag"),
        ([""], "holds no texts"),
    ],
)
def test_bad_texts_are_refused_before_anything_is_spoken(nano, tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        main(_config(nano, tmp_path / "out", source=_lines(tmp_path, *lines)))
    assert not (tmp_path / "out").exists()


def test_bad_references_are_refused_before_anything_is_spoken(nano, tmp_path):
    config = _config(nano, tmp_path / "out", text="One.")
    (tmp_path / "text.wav").write_text("no audio")
    for name, message in (
        ("gone.wav", "gone.wav does not exist"),
        ("text.wav", "cannot be read as audio"),
        (_voice(tmp_path / "short.wav", sec=0.5).name, "text, field ref_audio: .*lasts 0.5 s; the"),
        (_voice(tmp_path / "long.wav", sec=31).name, "lasts 31.0 s; the servers take 1 to 30 s"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            main(replace(config, ref_audio=str(tmp_path / name)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either source=FILE or text="),
        ({"text": "a", "source": "b"}, "give either source=FILE or text="),
        ({"text": "a", "ref_text": "b"}, "give ref_audio too"),
        ({"text": "a", "takes": 0}, "^takes=0 must be at least 1"),
        ({"text": "a", "batch_size": 0}, "^batch_size=0 must be at least 1"),
    ],
)
def test_senseless_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SynthesizeConfig("m", "o", **options)


def test_a_take_without_sound_is_counted_not_written(nano, tmp_path, monkeypatch, capsys):
    """The model may stop at its first row; an empty wav would crash whoever reads it."""
    speak_each = higgs_lab.Higgs.speak_each

    def stop_at_once(self, texts, **options):
        for i, wav, info in speak_each(self, texts, **options):
            if texts[i] == "One.":
                wav = wav[:0]
                info = replace(info, codes=info.codes[:0], frames=0, seconds=0.0, stop_reason="eoc")
            yield i, wav, info

    monkeypatch.setattr(higgs_lab.Higgs, "speak_each", stop_at_once)
    config = _config(nano, tmp_path / "out", source=_lines(tmp_path, "One.", "Longer text."))
    rows = read_manifest(main(config))
    assert [row.text for row in rows] == ["Longer text."]
    assert "1 of 2 takes have no sound" in capsys.readouterr().out
    logged = read_jsonl(tmp_path / "out" / "speech.jsonl")
    assert [r["audio"] for r in sorted(logged, key=lambda r: r["id"])][0] is None


def test_the_codecs_precision_is_the_folders(nano, tmp_path, monkeypatch):
    load, made = higgs_lab.load, []
    monkeypatch.setattr(higgs_lab, "load", lambda *a: made.append(load(*a)) or made[-1])
    source, out = _lines(tmp_path, "One.", "Two."), tmp_path / "out"
    main(_config(nano, out, source=source, decode_precision="bf16"))
    assert made[0].decode_precision == "bf16"
    wavs = sorted((out / "wavs").iterdir())
    wavs[0].unlink()
    main(_config(nano, out, source=source))  # goes on as it began
    assert made[1].decode_precision == "bf16" and wavs[0].is_file()
    with pytest.raises(FileExistsError, match="decode_precision: bf16 there, fp32 here"):
        main(_config(nano, out, source=source, decode_precision="fp32"))
    # what was made before there was a choice is of fp32
    settings = out / "settings.json"
    before = json.loads(settings.read_text())
    assert before.pop("decode_precision") == "bf16"
    settings.write_text(json.dumps(before))
    main(_config(nano, out, source=source))
    wavs[0].unlink()
    main(_config(nano, out, source=source, decode_precision="fp32"))
    assert made[2].decode_precision == "fp32"
    with pytest.raises(FileExistsError, match="decode_precision"):
        main(_config(nano, out, source=source, decode_precision="bf16"))


def test_killed_and_started_again_gives_the_same_result(nano, tmp_path):
    texts = [f"This is text number {n}." for n in range(10, 50)]
    options = {"model": str(nano), "source": _lines(tmp_path, *texts), "batch_size": 4}
    options |= SHORT | {"max_frames": 6}
    killed = tmp_path / "killed"
    command = [sys.executable, ROOT / "recipes" / "synthesize.py", f"out={killed}"]
    command += [f"{name}={value}" for name, value in options.items()]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env)
    log, deadline = killed / "speech.jsonl", time.monotonic() + 120
    while not (log.is_file() and log.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = log.read_bytes().count(b"\n")
    assert before in (16, 32) and not (killed / "manifest.jsonl").exists()
    with log.open("a") as file:
        file.write('{"key": "cut he')
    (killed / "wavs" / ".tmp-1-ff-000001.wav").write_text("half")

    spoken, speak = [], synthesize.speak

    def counted(higgs, takes, *rest):
        spoken.extend(take.stem for take in takes)
        return speak(higgs, takes, *rest)

    config = SynthesizeConfig(out=str(killed), **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthesize, "speak", counted)
        main(config)
    assert len(spoken) == 40 - before  # what was under way comes again, what was logged does not
    main(replace(config, out=str(tmp_path / "whole")))
    for name in ("manifest.jsonl", *(f"wavs/{n:06d}.wav" for n in range(1, 41))):
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert len(list((killed / "wavs").iterdir())) == 40


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes" / "configs").glob("synthesize*.yaml")), ids=lambda p: p.stem
)
def test_shipped_configs_are_valid(path):
    config = load_config(SynthesizeConfig, path, ["source=a", "out=b"])
    assert config.model == "bosonai/higgs-tts-3-4b"
    assert f"--config recipes/configs/{path.name}" in path.read_text()


def test_real_voices_are_cloned(speech_dir, nano, tmp_path):
    """Real recordings at 16, 22.05, 24 and 44.1 kHz pass as references."""
    rows = read_manifest(speech_dir / "manifest.jsonl")
    picked = {row.speaker: row for row in rows}.values()
    lines = [
        {"text": "Hello.", "id": row.speaker, "ref_audio": str(row.audio), "ref_text": row.text}
        for row in picked
    ]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest = main(_config(nano, tmp_path / "out", source=str(tmp_path / "set.jsonl")))
    assert len(read_manifest(manifest)) == len(lines) >= 5
