"""eval.run end to end on real tiny judges: spoken, heard, scored; killed, resumed, refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from eval import hear, stages, voices
from eval.pace import Pace
from eval.systems import Spoken, System
from higgs_lab.audio import read_audio, write_wav
from higgs_lab.manifest import Utterance
from higgs_lab.nano.judges import random_whisper
from tests.tiny_eval import go, stage

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("speech", "transcripts", "speakers", "scores")


def without_times(summary):
    return {k: v for k, v in summary.items() if k != "provenance"}


def test_a_run_leaves_everything_it_promised(finished):
    out, summary = finished
    assert [len(stage(out, name)) for name in STAGES] == [6, 6, 6, 6]
    assert json.loads((out / "summary.json").read_text())["overall"]["clips"] == 6
    block = summary["languages"]["en"]
    assert block["judged"] == 6 and block["failed"] == 0
    assert block["error"]["value"] > 0.5  # the recogniser knows nothing
    assert block["sim_ref"]["n"] == block["sim_target"]["n"] == 6
    assert summary["references"] == {"speaker": 6}
    scale = summary["similarity_scale"]["sim_ref"]
    assert scale["pairs"] == [6, 9] and scale["same"] > scale["different"]
    assert (out / "report.html").stat().st_size > 10_000
    assert summary["provenance"]["versions"] and (out / "config.yaml").is_file()


def test_the_score_is_what_the_parts_give_by_hand(finished, judges, test_set):
    from eval.asr import load_recognizer
    from eval.metrics import word_errors
    from eval.normalize import fair
    from eval.speaker import cosine, load_encoder

    score = stage(finished[0], "scores")[2]
    wav = read_audio(score["audio"], 16000)
    heard = load_recognizer(judges[1], "cpu").transcribe(wav, "en").text
    counts = word_errors("sentence c of the set", fair(heard, "en"))
    assert (score["errors"], score["units"]) == (counts.errors, 5)
    encoder = load_encoder(judges[3], "cpu")
    cosines = [
        cosine(encoder.embed(wav), encoder.embed(read_audio(test_set.parent / f"{c}.wav", 16000)))
        for c in ("c0", "c4")  # the other clips of the speaker
    ]
    assert any(score["sim_ref"] == pytest.approx(c, abs=1e-4) for c in cosines)


def test_started_again_nothing_is_done_twice(finished, judges, test_set, monkeypatch):
    out, summary = finished
    before = {p: p.read_bytes() for p in out.glob("*.jsonl")}
    monkeypatch.setattr(hear, "load_recognizer", None)  # calling either would raise
    monkeypatch.setattr(voices, "load_encoder", None)
    again = go(judges, test_set, out)
    assert {p: p.read_bytes() for p in out.glob("*.jsonl")} == before
    assert without_times(again) == without_times(summary)


def test_what_was_heard_once_is_not_heard_again_in_another_run(
    judges, test_set, tmp_path, monkeypatch
):
    more = ["--cache", str(tmp_path / "cache")]
    first = go(judges, test_set, tmp_path / "a", *more)
    monkeypatch.setattr(hear, "load_recognizer", None)  # calling either would raise
    monkeypatch.setattr(voices, "load_encoder", None)
    again = go(judges, test_set, tmp_path / "b", *more, "--normalizer", "whisper-english")
    assert stage(tmp_path / "a", "transcripts") == stage(tmp_path / "b", "transcripts")
    assert again["languages"]["en"]["sim_ref"] == first["languages"]["en"]["sim_ref"]


@pytest.mark.parametrize(
    ("more", "field"),
    [
        (["--seed", "1"], "seed: was 0, now 1"),
        (["--limit", "2"], "set.rows: was 6, now 2"),
        (["--refs", "none"], "set.references"),
        (["--normalizer", "whisper-english"], "normalizer: was 'fair-"),
        (["--speaker", "none"], "encoder: was"),
    ],
)
def test_a_changed_setting_is_refused_by_name(finished, judges, test_set, more, field, capsys):
    out = finished[0]
    before = {p: p.read_bytes() for p in out.iterdir() if p.is_file()}
    with pytest.raises(SystemExit, match="other settings") as refusal:
        go(judges, test_set, out, *more)
    assert field in str(refusal.value) and "another --out" in str(refusal.value)
    assert {p: p.read_bytes() for p in out.iterdir() if p.is_file()} == before


def test_other_weights_under_the_same_name_are_refused(finished, judges, test_set, tmp_path):
    other = random_whisper(tmp_path / "other.pt", seed=9)
    with pytest.raises(SystemExit, match="asr.revision: was"):
        go(["--asr", str(other), *judges[2:]], test_set, finished[0])


def test_the_same_judges_in_another_place_are_the_same(finished, judges, test_set, tmp_path):
    moved = shutil.copy(judges[1], tmp_path / "moved.pt")
    go(["--asr", str(moved), *judges[2:]], test_set, finished[0])


def test_killed_at_any_moment_a_run_goes_on_where_it_stopped(finished, judges, test_set, tmp_path):
    """Each stage is cut after some lines, the last of them in the middle, as a kill leaves it."""
    out, summary = finished
    for number, name in enumerate(STAGES):
        copy = tmp_path / name
        shutil.copytree(out, copy)
        for later in STAGES[number + 1 :]:
            (copy / f"{later}.jsonl").unlink()
        for file in ("summary.json", "report.html"):
            (copy / file).unlink()
        path = copy / f"{name}.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:2]) + lines[2][:20])
        again = go(judges, test_set, copy)
        assert path.read_bytes() == b"".join(lines)
        assert without_times(again) == without_times(summary)


def start(judges, test_set, out, *more, model="human", **environment):
    command = [sys.executable, "-m", "eval.run", "--model", model, "--set", str(test_set)]
    return subprocess.Popen(
        [*command, "--out", str(out), *judges, *more],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_kill_dash_nine_while_hearing(finished, judges, test_set, tmp_path):
    out = tmp_path / "killed"
    process = start(judges, test_set, out)
    transcripts = out / "transcripts.jsonl"
    while process.poll() is None:
        if transcripts.is_file() and transcripts.read_bytes().count(b"\n") >= 2:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    kept = transcripts.read_bytes().splitlines(keepends=True)[:2]
    again = go(judges, test_set, out)
    assert transcripts.read_bytes().startswith(b"".join(kept))
    assert len(stage(out, "transcripts")) == 6
    assert without_times(again) == without_times(finished[1])


def test_two_processes_share_the_work_and_give_the_result_of_one(
    finished, judges, test_set, tmp_path
):
    out = tmp_path / "two"
    both = [
        start(judges, test_set, out, RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2")
        for number in range(2)
    ]
    for process in both:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    for name in STAGES:
        assert len(stage(out, name)) == 6
    assert stage(out, "scores") == stage(finished[0], "scores")
    written = json.loads((out / "summary.json").read_text())
    alone = json.loads(json.dumps(finished[1]))
    assert without_times(written) == without_times(alone)


def test_no_process_is_left_without_texts_to_speak(tmp_path, monkeypatch):
    """Where a system takes more at once than there are. Of four processes one runs here."""
    given = []

    def say(requests):
        given.append(len(requests))
        return [Spoken(wav=np.zeros(2400, np.float32), sample_rate_hz=24000) for _ in requests]

    rows = [Utterance(None, "One word.", f"r{n}", language="en") for n in range(10)]
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    pace = Pace(None, "speak", "any", "cpu")
    stages.speak(System("any", {}, lambda: say, batch=64), rows, tmp_path, 0, 1, pace)
    assert given == [3, 3, 3, 1]


def test_every_failure_is_counted(judges, test_set, tmp_path):
    """Another tool's output with a silent clip, an empty one, a text file and one missing."""
    folder = tmp_path / "wavs"
    folder.mkdir()
    for name in ("c0", "c1"):
        shutil.copy(test_set.parent / f"{name}.wav", folder)
    write_wav(folder / "c2.wav", np.zeros(24000), 24000)
    write_wav(folder / "c3.wav", 0.1 * np.ones(1000), 24000)
    (folder / "c4.wav").write_text("this is no sound")
    summary = go(judges, test_set, tmp_path / "out", model=f"wavs:{folder}")
    block = summary["languages"]["en"]
    counts = {name: n for name, n in block["failures"].items() if n}
    assert counts == {"missing": 2, "empty": 1, "silent": 1}
    assert block["judged"] == 6
    scores = {row["id"]: row for row in stage(tmp_path / "out", "scores")}
    assert all(scores[f"c{n}"]["errors"] == scores[f"c{n}"]["units"] == 5 for n in (2, 3, 4, 5))
    assert "cannot be read as audio" in scores["c4"]["error"]
    assert sorted(count for _, count in summary["reasons"]) == [1, 1]
    assert block["sim_ref"]["n"] == 2
    assert block["duration_ratio_median"] == pytest.approx(1.0, abs=0.01)


def test_a_language_without_recogniser_is_shown_not_dropped(judges, test_set, tmp_path):
    text = test_set.read_text().replace('"en"', '"zu"', 2)
    path = test_set.parent / "mixed.jsonl"
    path.write_text(text)
    summary = go(judges, path, tmp_path / "out")
    zulu = summary["languages"]["zu"]
    assert zulu["clips"] == 2 and zulu["judged"] == 0 and zulu["error"] is None
    assert zulu["sim_target"]["n"] > 0
    assert summary["overall"]["judged"] == 4


def test_nano_speaks_takes_differ_and_clips_do_not_depend_on_the_batch(
    nano, judges, test_set, tmp_path
):
    more = ["--sampling", "max_frames=15", "--limit", "2"]
    summary = go(judges, test_set, tmp_path / "a", *more, "--takes", "2", model="nano")
    speech = {(row["id"], row["take"]): row for row in stage(tmp_path / "a", "speech")}
    assert len(speech) == 4 and len({row["sha256"] for row in speech.values()}) == 4
    assert all((tmp_path / "a" / row["audio"]).is_file() for row in speech.values())
    assert summary["overall"]["clips"] == 4 and summary["overall"]["texts"] == 2
    assert summary["overall"]["rtf_median"] > 0
    go(judges, test_set, tmp_path / "b", *more, "--batch", "1", model="nano")
    for row in stage(tmp_path / "b", "speech"):  # equal but for rounding in the batch
        one, other = (read_audio(tmp_path / run / path, 24000) for run, path in
                      (("a", speech[row["id"], 0]["audio"]), ("b", row["audio"])))  # fmt: skip
        assert len(one) == len(other) and np.allclose(one, other, atol=2e-3)


def test_a_system_of_one_way_gives_one_take(judges, test_set, tmp_path):
    with pytest.raises(SystemExit, match="human says a text in one way"):
        go(judges, test_set, tmp_path / "out", "--takes", "2")
    assert not (tmp_path / "out").exists()


def test_dry_run_says_what_would_be_done_and_writes_nothing(
    finished, judges, test_set, tmp_path, capsys
):
    out = tmp_path / "out"
    go(judges, test_set, out, "--dry-run")
    told = capsys.readouterr().out
    assert "6 texts in 1 languages" in told and "references  6 from speaker" in told
    assert "tiny.pt@" in told and "ecapa@" in told and "x real time (assumed)" in told
    assert "nothing was run or written" in told and not out.exists()
    # Half done, it says so; with other settings, it refuses as the run would.
    part = tmp_path / "part"
    shutil.copytree(finished[0], part)
    path = part / "speech.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    go(judges, test_set, part, "--dry-run")
    assert re.search(r"speak .* 3 of 6 done", capsys.readouterr().out)
    with pytest.raises(SystemExit, match="other settings"):
        go(judges, test_set, part, "--dry-run", "--seed", "1")


def test_floor_stands_beside_the_error_and_must_be_measured_alike(
    finished, judges, test_set, tmp_path, capsys
):
    wavs = f"wavs:{test_set.parent}"
    summary = go(judges, test_set, tmp_path / "a", "--floor", str(finished[0]), model=wavs)
    human = finished[1]["languages"]["en"]["error"]["value"]
    floor = summary["floor"]["en"]
    assert floor["error"]["value"] == human
    # The same sound, so nothing differs; but six texts prove only so much.
    assert floor["excess"]["value"] == 0 and floor["excess"]["high"] == -floor["excess"]["low"] > 0
    assert "recogniser-limited" in capsys.readouterr().out
    assert "over codec" not in (tmp_path / "a" / "report.html").read_text()
    with pytest.raises(SystemExit, match="--floor .*: set.revision is"):
        more = ["--limit", "2", "--floor", str(finished[0])]
        go(judges, test_set, tmp_path / "b", *more, model=wavs)
    with pytest.raises(SystemExit, match="that run is of wavs"):
        go(judges, test_set, tmp_path / "c", "--floor", str(tmp_path / "a"))


def test_the_codec_is_the_ceiling(finished, judges, test_set, tmp_path):
    codec = go(judges, test_set, tmp_path / "codec", model="codec:nano")
    assert codec["config"]["system"]["name"] == "codec:nano"
    more = ["--ceiling", str(tmp_path / "codec")]
    summary = go(judges, test_set, tmp_path / "a", *more, model=f"wavs:{test_set.parent}")
    block = summary["ceiling"]["en"]
    assert block["error"] == codec["languages"]["en"]["error"]
    added = summary["languages"]["en"]["error"]["value"] - block["error"]["value"]
    assert block["excess"]["value"] == pytest.approx(added)
    page = (tmp_path / "a" / "report.html").read_text()
    assert "excess over codec" in page and "codec %" in page
    with pytest.raises(SystemExit, match="that run is of human, not of codec"):
        go(judges, test_set, tmp_path / "b", "--ceiling", str(finished[0]))


def test_bad_requests_say_what_to_give(judges, test_set, tmp_path):
    for more, message in [
        (["--asr", "nope"], "recogniser 'nope' is no checkpoint file"),
        (["--speaker", "/nope"], "encoder '/nope' is neither a folder"),
        (["--sampling", "x"], "write key=value"),
        (["--langs", "tlh"], "'tlh' has no row"),
    ]:
        with pytest.raises(SystemExit, match=message):
            go(judges, test_set, tmp_path / "out", *more)
    with pytest.raises(SystemExit, match="does not exist"):
        go(judges, tmp_path / "none.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_real_recordings_end_to_end(speech_dir, judges, tmp_path):
    summary = go(judges, speech_dir / "manifest.jsonl", tmp_path / "out", "--limit", "3")
    assert summary["overall"]["clips"] == 3 and summary["overall"]["failed"] == 0
