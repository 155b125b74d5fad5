"""End to end on real, small judges: each defect is shown by the measure meant for it, none dropped.

The nano recogniser and encoder hear espeak-ng speaking the texts they know. A set of two voices is
recorded once as "human" and once more as a system; the system is then spoilt in one way at a time.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from eval import run
from eval.compare import compare
from higgs_lab.audio import read_audio, write_wav
from higgs_lab.runlog import read_jsonl

pytest.importorskip("espeakng_loader")

VOICES = {"ann": "f2", "bob": "m3"}  # held out of the judges' training
RATE = 24000
ENGLISH, OTHERS = 4, ("de", "zh")


def recorded(text: str, language: str, voice: str, take: int) -> np.ndarray:
    from recipes.nano.data import NOISE_FLOOR, speak_tagged

    wav = speak_tagged(text, language, voice, random.Random(f"{text} {take}"))
    noise = np.random.default_rng(take).normal(0, NOISE_FLOOR, len(wav))
    return (wav + noise).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """human/ and set.jsonl, good/: the same texts by the same voices, recorded again."""
    from recipes.nano.texts import draw_text

    folder, rng, lines, texts = tmp_path_factory.mktemp("proof"), random.Random(5), [], set()
    for language in ("en", *OTHERS):
        for number in range(ENGLISH if language == "en" else 1):
            for speaker, voice in VOICES.items():
                text = draw_text(language, rng, "test")
                while text in texts:
                    text = draw_text(language, rng, "test")
                texts.add(text)
                id = f"{language}-{speaker}-{number}"
                for name, take in (("human", 1), ("good", 2)):
                    wav = recorded(text, language, voice, take)
                    write_wav(folder / name / f"{id}.wav", wav, RATE)
                row = {"id": id, "audio": f"human/{id}.wav", "text": text}
                lines.append(json.dumps(row | {"speaker": speaker, "language": language}))
    (folder / "set.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def judged(folder):
    """Run a system on the set; sounds that were heard before are not heard again."""
    runs = {}

    def judge(name: str, model: str | None = None, *more: str) -> tuple[Path, dict]:
        if name not in runs:
            out = folder / "runs" / name
            summary = run.main(
                ["--model", model or f"wavs:{folder / name}", "--set", str(folder / "set.jsonl"),
                 "--asr", "nano", "--speaker", "nano", "--device", "cpu", "--out", str(out),
                 "--cache", str(folder / "cache"), *more]
            )  # fmt: skip
            runs[name] = out, summary
        return runs[name]

    return judge


def spoil(folder: Path, name: str, change, language: str = "en") -> None:
    """good/ under another name, with `change(id, wav)` done to the clips of a language."""
    shutil.copytree(folder / "good", folder / name)
    for path in sorted((folder / name).glob(f"{language}-*.wav")):
        wav = change(path.stem, read_audio(path, RATE))
        if wav is None:
            path.unlink()
        else:
            write_wav(path, np.clip(wav, -1, 1).astype(np.float32), RATE)


def differences(a: Path, b: Path) -> dict:
    """{measure: entry} of B - A in English."""
    (comparison,) = compare(a, b)["comparisons"]
    found = {m: f["languages"].get("en") for m, f in comparison["metrics"].items()}
    return {m: entry for m, entry in found.items() if entry}  # silence has no pitch and no voice


def scores(out: Path, language: str = "en") -> list[dict]:
    return [row for row in read_jsonl(out / "scores.jsonl") if row["language"] == language]


def test_the_human_row_is_the_floor_and_a_good_system_is_near_it(folder, judged):
    human, floor = judged("human", "human")
    out, summary = judged("good", None, "--floor", str(human))
    for code in ("en", *OTHERS):
        assert floor["languages"][code]["error"]["value"] < 0.1
        assert summary["languages"][code]["error"]["value"] < 0.15
        assert summary["languages"][code]["failed"] == 0
    block = summary["languages"]["en"]
    assert block["sim_target_calibrated"] > 0.8 and block["sim_ref_calibrated"] > 0.8
    assert 0.8 < block["duration_ratio_median"] < 1.25
    scale = summary["similarity_scale"]["sim_target"]
    assert scale["same"] - scale["different"] > 0.3 and scale["eer"] < 0.1
    found = differences(human, out)
    for measure in ("error", "cer", "failed", "sim_target"):  # nothing is wrong, nothing is claimed
        assert found[measure]["low"] <= 0 <= found[measure]["high"]


def noise(id, wav):
    rng = np.random.default_rng(len(wav))
    return wav + rng.normal(0, 2 * np.sqrt((wav**2).mean()), len(wav))


def truncated(id, wav):
    return wav[: len(wav) // 2]


def silence(id, wav):
    return 1e-4 * np.random.default_rng(0).normal(size=len(wav))


def late_and_loud(id, wav):
    return np.concatenate([np.zeros(RATE), np.clip(12 * wav, -0.999, 0.999) * 1.01])


def slow(id, wav):
    from higgs_lab.audio import resample

    return resample(wav, RATE, int(1.6 * RATE))


def repeated(id, wav):
    return np.tile(wav[len(wav) // 3 :], 12)


@pytest.mark.parametrize(
    ("change", "measure", "sign"),
    [
        (noise, "error", 1),
        (truncated, "error", 1),
        (truncated, "duration_ratio", -1),
        (silence, "failed", 1),
        (silence, "error", 1),
        (late_and_loud, "leading_sec", 1),
        (late_and_loud, "loudness_lufs", 1),
        (slow, "f0_hz", -1),
        (slow, "letters_per_sec", -1),
        (repeated, "failed", 1),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_defect_is_shown_by_the_measure_meant_for_it(folder, judged, change, measure, sign):
    name = change.__name__
    if not (folder / name).exists():
        spoil(folder, name, change)
    (good, _), (bad, summary) = judged("good"), judged(name)
    entry = differences(good, bad)[measure]
    assert sign * entry["value"] > 0 and not entry["low"] <= 0 <= entry["high"], entry
    # No silent drop: every clip of the set is there, and counted in the headline.
    block = summary["languages"]["en"]
    assert block["clips"] == block["judged"] == 2 * ENGLISH == entry["texts"]
    assert all(row["units"] for row in scores(bad))
    # The other languages were left alone.
    for code in OTHERS:
        assert summary["languages"][code] == judged("good")[1]["languages"][code]


def test_what_was_left_out_is_told_from_what_was_misheard(folder, judged):
    for change in (truncated, noise):
        if not (folder / change.__name__).exists():
            spoil(folder, change.__name__, change)
    cut = judged("truncated")[1]["languages"]["en"]
    noisy = judged("noise")[1]["languages"]["en"]
    assert cut["deletions"] > 2 * cut["insertions"]
    assert noisy["substitutions"] > cut["substitutions"] or noisy["failed"]


def test_another_voice_is_shown_by_similarity_and_not_by_the_words(folder, judged):
    other = {"ann": "bob", "bob": "ann"}
    text = {row["id"]: row["text"] for row in read_jsonl(folder / "set.jsonl")}
    if not (folder / "voice").exists():
        spoil(
            folder,
            "voice",
            lambda id, wav: recorded(text[id], "en", VOICES[other[id.split("-")[1]]], 2),
        )
    (good, before), (bad, summary) = judged("good"), judged("voice")
    found = differences(good, bad)
    for measure in ("sim_target", "sim_ref"):
        assert found[measure]["high"] < -0.2 and found[measure]["texts"] == 2 * ENGLISH
    assert found["error"]["low"] <= 0 <= found["error"]["high"]
    # On the set's own scale: from the same speaker to another one.
    assert before["languages"]["en"]["sim_target_calibrated"] > 0.8
    assert summary["languages"]["en"]["sim_target_calibrated"] < 0.3


def test_another_language_fails_as_such(folder, judged):
    """Numbers in Russian where English was asked for: heard in English words, all of them wrong."""
    from recipes.nano.texts import draw_text

    rng = random.Random(0)
    if not (folder / "language").exists():
        spoil(
            folder,
            "language",
            lambda id, wav: recorded(
                draw_text("ru", rng, "test"), "ru", VOICES[id.split("-")[1]], 2
            ),
        )
    (good, _), (bad, summary) = judged("good"), judged("language")
    block = summary["languages"]["en"]
    assert block["failures"]["wrong_language"] >= 2 * ENGLISH - 1
    assert block["error"]["value"] > 0.9 and block["judged"] == 2 * ENGLISH
    assert {row["guessed"] for row in scores(bad)} >= {"ru"}
    assert differences(good, bad)["failed"]["low"] > 0


def test_missing_and_unreadable_clips_count_as_all_wrong(folder, judged):
    if not (folder / "missing").exists():
        spoil(folder, "missing", lambda id, wav: None if id.endswith("0") else wav)
        (folder / "missing" / "en-ann-1.wav").write_text("no sound")
        write_wav(folder / "missing" / "en-bob-1.wav", np.ones(1000, np.float32) * 0.1, RATE)
    (good, before), (bad, summary) = judged("good"), judged("missing")
    block = summary["languages"]["en"]
    assert block["failures"]["missing"] == 3 and block["failures"]["empty"] == 1
    gone = [row for row in scores(bad) if row["failure"]]
    assert len(gone) == 4 and all(row["errors"] == row["units"] for row in gone)
    assert block["error_valid"]["value"] <= before["languages"]["en"]["error"]["value"] + 0.1
    entry = differences(good, bad)
    assert entry["error"]["texts"] == entry["failed"]["texts"] == 2 * ENGLISH
    assert entry["sim_target"]["texts"] == 2 * ENGLISH - 4  # no voice in nothing


def test_the_codec_row_keeps_time_and_counts_every_clip(folder, judged, nano):
    """What it does to words is another question; it may not lose or stretch a clip."""
    _, summary = judged("codec", "codec:nano", "--asr", "none", "--langs", "en")
    assert summary["config"]["system"]["kind"] == "codec"
    assert summary["overall"]["clips"] == 2 * ENGLISH
    assert summary["overall"]["failures"]["missing"] == 0
    assert summary["overall"]["duration_ratio_median"] == pytest.approx(1, abs=0.1)
