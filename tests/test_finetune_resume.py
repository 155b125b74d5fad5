"""recipes/finetune.py: whole runs, kills and resumes, any number of processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from higgs_lab.checkpoint import NativeFiles
from higgs_lab.runlog import read_jsonl, write_json_atomic
from recipes import finetune, train_run
from tests.tiny import same
from tests.tiny_finetune import (
    adapter,
    curve,
    launch,
    loss_before,
    run,
)


@pytest.fixture(scope="module")
def straight(prepared, tmp_path_factory) -> Path:
    """Ten steps without a break, the yardstick of the others."""
    out = tmp_path_factory.mktemp("straight") / "run"
    run(prepared, out, steps=10, save_every=5, dropout=0.1, valid_every=5)
    return out


def test_training_lowers_the_loss_and_leaves_a_whole_run_directory(straight, nano):
    metrics = read_jsonl(straight / "metrics.jsonl")
    loss = curve(metrics, "loss")
    assert abs(loss[0] - loss_before(nano)) < 0.1 and loss[-1] < loss[0] - 0.05
    assert [m["step"] for m in metrics if "valid/loss" in m] == [0, 5, 10]
    assert {f"valid/loss_code/{k}" for k in range(8)} <= metrics[0].keys()
    assert {"config.yaml", "provenance.json", "metrics.jsonl", "adapter"} <= {
        p.name for p in straight.iterdir()
    }
    facts = json.loads((straight / "provenance.json").read_text())
    assert facts["codec_hash"] and facts["base"]["name"] == "nano"
    assert not [p for p in straight.rglob(".tmp-*")]


def test_a_finished_run_started_again_leaves_its_result_alone(prepared, straight, capsys):
    """What was spoken, judged and exported with it would otherwise count as made with another."""
    files = sorted((straight / "adapter").iterdir())
    before = [(file.read_bytes(), file.stat().st_mtime_ns) for file in files]
    run(prepared, straight, steps=10, save_every=5, dropout=0.1, valid_every=5)
    assert [(file.read_bytes(), file.stat().st_mtime_ns) for file in files] == before
    assert f"done: {straight / 'adapter'}" in capsys.readouterr().out


def test_five_steps_then_resume_equals_ten_straight_bit_for_bit(
    prepared, straight, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    changes = dict(steps=10, save_every=5, dropout=0.1, valid_every=5)

    # the schedule is a function of `steps`, so the break is a SIGTERM, not a shorter run
    class Stopped(finetune.Run):
        def step(self, step, packs):
            if step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().step(step, packs)

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "Run", Stopped)
        metrics = run(prepared, out, **changes)
    assert metrics[-1]["step"] == 5
    assert not (out / "adapter").exists()
    metrics = run(prepared, out, **changes)
    assert same(adapter(out), adapter(straight))
    yardstick = read_jsonl(straight / "metrics.jsonl")
    for name in ("loss", "valid/loss", "lr", "grad_norm"):
        assert curve(metrics, name) == curve(yardstick, name)


@pytest.mark.slow
def test_kill_dash_nine_and_resume_is_identical(prepared, straight, tmp_path):
    out = tmp_path / "run"
    changes = dict(steps=10, save_every=2, dropout=0.1, valid_every=5)
    process = launch(prepared, out, 0, **changes)
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / "step-4").is_dir():
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    assert not (out / "adapter").exists()
    run(prepared, out, **changes)
    assert same(adapter(out), adapter(straight))
    steps = [m["step"] for m in read_jsonl(out / "metrics.jsonl") if "loss" in m]
    assert steps == list(range(1, 11))


@pytest.mark.slow
def test_a_sigterm_to_the_launcher_saves_too(prepared, straight, tmp_path):
    """As schedulers and containers send it. accelerate dies of it; the training must not go on
    alone, nor stop without a checkpoint; and resumed it ends where the straight run did."""
    out = tmp_path / "run"
    changes = dict(steps=10, save_every=5, dropout=0.1, valid_every=5)
    process = launch(prepared, out, 1, **changes)
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").is_file() or '"step": 1' not in (
        (out / "metrics.jsonl").read_text()
    ):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)  # the pipe stays open as long as anybody lives
    assert "stopped by SIGTERM" in output and not (out / "adapter").exists(), output
    assert len(list((out / "checkpoints").iterdir())) == 1
    run(prepared, out, **changes)
    assert same(adapter(out), adapter(straight))


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp_8_gpus", "ddp_2_nodes"])
def test_two_processes_give_the_one_process_curves(prepared, tmp_path, config):
    """Of one machine, and of two with a launcher each."""
    changes = dict(steps=4, valid_every=2)
    one = run(prepared, tmp_path / "one", **changes)
    machines = range(2 if config == "ddp_2_nodes" else 1)
    launched = [launch(prepared, tmp_path / "two", 2, config, m, **changes) for m in machines]
    for process in launched:
        output, _ = process.communicate(timeout=280)
        assert process.returncode == 0, output
    assert json.loads((tmp_path / "two" / "provenance.json").read_text())["processes"] == 2
    two = read_jsonl(tmp_path / "two" / "metrics.jsonl")
    assert curve(one, "lr") == curve(two, "lr")
    for name in ("loss", "valid/loss", "loss_eoc", "grad_norm"):
        np.testing.assert_allclose(curve(one, name), curve(two, name), rtol=2e-4)
    theirs = adapter(tmp_path / "two")
    for key, value in adapter(tmp_path / "one").items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-2, atol=2e-4)


def test_an_eight_bit_optimizer_learns_the_same_and_resumes_exactly(prepared, tmp_path):
    pytest.importorskip("bitsandbytes", reason="pip install -e .[qlora]; .ci/run does")
    options = dict(method="full", steps=6, valid_every=0, save_every=3, keep_checkpoints=2)
    losses = {}
    for name in ("adamw", "adamw8bit"):
        losses[name] = curve(run(prepared, tmp_path / name, optimizer=name, **options), "loss")
    eight, usual = losses["adamw8bit"], losses["adamw"]
    assert eight[0] == usual[0] and eight[-1] < eight[0] - 0.5 * (usual[0] - usual[-1])
    files = {n: tmp_path / n / "checkpoints" / "step-6" / "state.pt" for n in losses}
    assert files["adamw8bit"].stat().st_size < 0.6 * files["adamw"].stat().st_size  # 6 of 12 bytes
    shutil.rmtree(files["adamw8bit"].parent)
    shutil.rmtree(tmp_path / "adamw8bit" / "model")
    again = run(prepared, tmp_path / "adamw8bit", optimizer="adamw8bit", **options)
    assert curve(again, "loss") == eight


def test_machines_that_do_not_share_the_run_directory_are_told(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(train_run, "gather_object", lambda mine: [*mine, 40])
    with pytest.raises(ValueError, match="different checkpoints .*storage that all machines share"):
        run(prepared, tmp_path / "run", steps=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 12, "lr": 1e-5}, "holds a run with lr=0.002, now lr=1e-05"),
        ({"steps": 5}, "has 10 steps already, more than steps=5"),
    ],
)
def test_a_run_directory_is_not_continued_with_other_settings(prepared, straight, changes, message):
    with pytest.raises(ValueError, match=message):
        run(prepared, straight, save_every=5, dropout=0.1, valid_every=5, **changes)


def test_a_run_is_not_continued_on_another_base_or_other_data(prepared, nano, tmp_path):
    """The names in the config say the same, what stands there does not."""
    base, data, out = (tmp_path / name for name in ("base", "data", "run"))
    shutil.copytree(nano, base)
    shutil.copytree(prepared, data)
    changes = dict(model=str(base), steps=1, valid_every=0)
    run(data, out, **changes)
    info = json.loads((data / "prepared.json").read_text())
    write_json_atomic(data / "prepared.json", info | {"fingerprint": "another"})
    with pytest.raises(ValueError, match="holds a run on other prepared data than now"):
        run(data, out, **changes)
    write_json_atomic(data / "prepared.json", info)
    tensors = {key: value.clone() for key, value in NativeFiles(base).items()}
    tensors["body.norm.weight"] += 1
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(ValueError, match="holds a run on another base than now"):
        run(data, out, **changes)
