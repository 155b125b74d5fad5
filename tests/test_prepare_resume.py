"""Preparing data: the same result from any number of processes and after any kill."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from higgs_lab.audio import read_audio
from higgs_lab.manifest import read_manifest, write_manifest
from higgs_lab.prepared import load_prepared
from recipes import prepare
from recipes.prepare import PrepareConfig, main
from recipes.prepare_parts import encode_parts
from tests.tiny_prepare import assert_same_data, tone, write_source

ROOT = Path(__file__).parent.parent


def test_running_again_does_nothing_and_other_settings_are_refused(
    prepared_clips, eight_clips, nano, capsys, monkeypatch
):
    config = PrepareConfig(eight_clips, str(nano), str(prepared_clips), split_valid=0.25)
    monkeypatch.setattr(prepare, "encode_parts", lambda *a, **k: pytest.fail("encoded again"))
    before = (prepared_clips / "prepared.json").stat().st_mtime_ns
    assert main(config) == prepared_clips
    assert "nothing to do" in capsys.readouterr().out
    assert (prepared_clips / "prepared.json").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="was prepared with other settings or files: remove"):
        main(replace(config, max_sec=1.3))
    with pytest.raises(FileExistsError, match="is no prepared data: remove it or choose another"):
        main(replace(config, out=str(Path(eight_clips).parent)))


def test_several_processes_share_the_work_and_give_the_same_result(
    eight_clips, nano, prepared_clips, tmp_path, monkeypatch
):
    """Ranks run one after the other here; the last (rank 0) writes the result."""
    from higgs_lab.codec import Codec

    counts, encode = [], Codec.encode_batch
    monkeypatch.setattr(
        Codec,
        "encode_batch",
        lambda self, wavs, **how: counts.append(len(wavs)) or encode(self, wavs, **how),
    )
    config = PrepareConfig(
        eight_clips, str(nano), str(tmp_path / "out"), split_valid=0.25, part_sec=2.0
    )
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = []
    for rank in (2, 1, 0):
        monkeypatch.setenv("RANK", str(rank))
        counts.clear()
        assert (tmp_path / "out").exists() is False
        main(config)
        shares.append(sum(counts))
    assert sum(shares) == 8 and min(shares) >= 2
    assert_same_data(tmp_path / "out", prepared_clips)


def _launch(config, tmp_path):
    options = [f"{k}={v}" for k, v in config.items()]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, ROOT / "recipes" / "prepare.py", *options], env=env, cwd=tmp_path
    )


def test_killed_and_started_again_gives_the_same_result(nano, tmp_path, monkeypatch):
    from higgs_lab.codec import Codec

    rows = [{"audio": f"{n}.wav", "text": f"Text {n}."} for n in range(16)]
    for n in range(16):
        tone(tmp_path / f"{n}.wav", n, 1.2 + n % 3 / 10)
    rows += [{"audio": "3.wav", "text": "Twice.", "id": "twice"}]
    config = {"source": write_source(tmp_path, rows), "model": str(nano), "part_sec": "2.8"}
    work = tmp_path / "killed.parts"
    process = _launch(config | {"out": str(tmp_path / "killed")}, tmp_path)
    deadline = time.monotonic() + 120
    while len(list(work.glob("[!.]*.npz"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = sorted(work.glob("[!.]*.npz"))
    assert 2 <= len(done) < 8 and not (tmp_path / "killed").exists()

    encoded, encode = [], Codec.encode_batch
    monkeypatch.setattr(
        Codec,
        "encode_batch",
        lambda self, wavs, **how: encoded.append(len(wavs)) or encode(self, wavs, **how),
    )
    for out in ("killed", "whole"):
        encoded.clear()
        main(PrepareConfig(config["source"], str(nano), str(tmp_path / out), part_sec=2.8))
        if out == "killed":  # what was done was not done again
            assert 0 < sum(encoded) == 16 - 2 * len(done)  # two clips a part
    assert sum(encoded) == 16
    assert len(load_prepared(tmp_path / "whole")) == 16
    assert_same_data(tmp_path / "killed", tmp_path / "whole")
    assert not work.exists()


def test_a_full_disk_stops_cleanly_and_can_be_resumed(
    eight_clips, nano, prepared_clips, tmp_path, monkeypatch
):
    save = np.savez
    calls = []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            Path(args[0]).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(*args, **kwargs)

    monkeypatch.setattr(np, "savez", full)
    config = PrepareConfig(
        eight_clips, str(nano), str(tmp_path / "out"), split_valid=0.25, part_sec=2.0
    )
    with pytest.raises(
        OSError, match="disk is full while writing .*out.parts.*run the same command"
    ):
        main(config)
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / "out.parts").iterdir())) == 1
    main(config)
    assert_same_data(tmp_path / "out", prepared_clips)


def test_a_faster_precision_is_asked_for_by_name_and_not_mixed_with_the_reference(nano, tmp_path):
    from higgs_lab.codec import Codec

    tone(tmp_path / "a.wav", 1)
    source = write_source(tmp_path, [{"audio": "a.wav", "text": "A."}])
    fast = PrepareConfig(source, str(nano), str(tmp_path / "fast"), precision="bf16")
    with pytest.raises(ValueError, match="choose fp32, tf32, fp16, bf16"):
        main(replace(fast, precision="int8"))
    with pytest.raises(ValueError, match="precision=fp16 is for a CUDA GPU: choose fp32 or bf16"):
        main(replace(fast, precision="fp16", device="cpu"))
    main(replace(fast, out=str(tmp_path / "one"), precision="fp32"))
    with pytest.raises(FileExistsError, match="other settings"):
        main(replace(fast, out=str(tmp_path / "one")))
    main(fast)
    made = load_prepared(tmp_path / "fast")[0]["codes"]
    codes = Codec.from_pretrained(nano).encode_batch([read_audio(tmp_path / "a.wav")], 120, "bf16")
    np.testing.assert_array_equal(made, codes[0].numpy())


def test_a_changed_recording_is_encoded_again(nano, tmp_path):
    tone(tmp_path / "a.wav", 1)
    tone(tmp_path / "b.wav", 2)
    rows = [{"audio": "a.wav", "text": "A."}, {"audio": "b.wav", "text": "B."}]
    source = write_source(tmp_path, rows)
    main(PrepareConfig(source, str(nano), str(tmp_path / "one")))
    tone(tmp_path / "b.wav", 3)
    with pytest.raises(FileExistsError, match="other settings or files"):
        main(PrepareConfig(source, str(nano), str(tmp_path / "one")))
    main(PrepareConfig(source, str(nano), str(tmp_path / "two")))
    one, two = load_prepared(tmp_path / "one"), load_prepared(tmp_path / "two")
    np.testing.assert_array_equal(one[0]["codes"], two[0]["codes"])
    assert (one[1]["codes"] != two[1]["codes"]).any()


def test_what_an_older_version_may_have_encoded_wrongly_is_not_kept(
    prepared_clips, eight_clips, nano, tmp_path
):
    """On a GPU clips of equal length could get each other's codes; what a CPU made is good."""
    out = tmp_path / "out"
    shutil.copytree(prepared_clips, out)
    info = json.loads((out / "prepared.json").read_text())
    assert info.pop("encoder") == 2
    config = PrepareConfig(eight_clips, str(nano), str(out), split_valid=0.25)

    def write(**changes):
        changed = info | {"provenance": info["provenance"] | {"device": "H100"}} | changes
        (out / "prepared.json").write_text(json.dumps(changed))

    write()
    with pytest.raises(FileExistsError, match="before 320ef59, .*: remove it or choose"):
        main(config)
    with pytest.warns(UserWarning, match="could encode clips of equal length wrongly"):
        load_prepared(out)
    for good in (
        {"encoder": 2},
        {"provenance": info["provenance"]},
        {"config": info["config"] | {"device": "cpu"}},
        {"config": info["config"] | {"precision": "bf16"}},
    ):
        write(**good)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_prepared(out)
        assert main(config) == out


def test_parts_of_an_older_encoder_are_made_again(eight_clips, nano, tmp_path, monkeypatch):
    config = PrepareConfig(eight_clips, str(nano), str(tmp_path / "out"), part_sec=2.0)
    monkeypatch.setattr(prepare, "wait_for", lambda files: pytest.fail("stopped"))
    plans = []
    for version in (1, 2):
        monkeypatch.setattr(prepare, "ENCODER", version)
        with pytest.raises(pytest.fail.Exception):
            main(config)
        plans.append({file.name for file in (tmp_path / "out.parts").iterdir()})
    assert len(plans[1]) == 2 * len(plans[0])


@pytest.mark.parametrize(
    ("device", "precision", "takes_lengths", "ragged"),
    [("cpu", "bf16", True, False), ("cuda", "fp32", True, True), ("cuda", "fp32", False, False)],
)
def test_on_a_gpu_clips_of_any_length_share_a_pass(
    tmp_path, device, precision, takes_lengths, ragged
):
    asked = []
    tone(tmp_path / "a.wav", 1)
    codec = SimpleNamespace(
        device=torch.device(device),
        takes_lengths=takes_lengths,
        sample_rate_hz=24_000,
        samples_per_frame=960,
        num_codebooks=8,
        encode_batch=lambda wavs, **how: (
            asked.append(how) or [torch.zeros(-(-len(wav) // 960), 8).long() for wav in wavs]
        ),
    )
    encode_parts(codec, {"one": [tmp_path / "a.wav"]}, tmp_path, show=False, precision=precision)
    assert asked == [{"precision": precision, "ragged": ragged}]


def test_a_wrong_device_is_said_in_a_line(eight_clips, nano, tmp_path):
    with pytest.raises(ValueError, match="device=gpu: choose cpu, cuda, cuda:N or auto"):
        main(PrepareConfig(eight_clips, str(nano), str(tmp_path / "out"), device="gpu"))


@pytest.mark.slow
def test_real_speech_under_accelerate_launch(speech_dir, nano, tmp_path):
    """Two real processes on real recordings equal one process."""
    rows = read_manifest(speech_dir / "manifest.jsonl")
    source = tmp_path / "one_each.jsonl"  # a recording of each speaker, at five sample rates
    write_manifest(source, {row.speaker: row for row in rows}.values())
    options = {"source": str(source), "model": str(nano), "part_sec": 5}
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes=2",
    ]
    launch += [ROOT / "recipes" / "prepare.py", *(f"{k}={v}" for k, v in options.items())]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, f"out={tmp_path / 'two'}"],
        env=env,
        check=True,
        timeout=200,
        capture_output=True,
        text=True,
    )
    assert "process 1 of 2" in done.stderr
    main(PrepareConfig(out=str(tmp_path / "one"), **options))
    assert len(load_prepared(tmp_path / "one")) >= 5
    assert_same_data(tmp_path / "one", tmp_path / "two")
