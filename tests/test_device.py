"""Which device a process computes on, and in what precision it may."""

from __future__ import annotations

import pytest
import torch

from eval import run
from eval.asr import load_recognizer
from eval.sets import load_set
from eval.speaker import load_encoder
from eval.systems import open_system
from higgs_lab.device import chosen_device
from higgs_lab.precision import check_precision


@pytest.fixture
def four_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_cuda_where_there_is_one(four_gpus, monkeypatch):
    assert (
        str(chosen_device()) == str(chosen_device("auto")) == str(chosen_device("cuda")) == "cuda"
    )
    assert str(chosen_device("cuda:3")) == "cuda:3" and str(chosen_device("cpu")) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(chosen_device()) == "cpu"


def test_a_launcher_gives_each_process_its_own(four_gpus, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert str(chosen_device("cuda")) == "cuda"  # no launcher says which: torch's current one
    monkeypatch.setenv("LOCAL_RANK", "5")  # two processes a GPU
    assert str(chosen_device()) == str(chosen_device("cuda")) == "cuda:1"
    assert str(chosen_device("cuda:3")) == "cuda:3" and str(chosen_device("cpu")) == "cpu"
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert str(chosen_device("cuda")) == "cuda"


def test_what_is_no_device_is_said(four_gpus, monkeypatch):
    for wrong in ("gpu", "", 3.5):
        with pytest.raises(ValueError, match=f"device={wrong}: choose cpu, cuda, cuda:N or auto"):
            chosen_device(wrong)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for absent in ("mps", "xpu", "meta", "cpu:5"):
        with pytest.raises(ValueError, match=f"device={absent}: there is none here"):
            chosen_device(absent)
    with pytest.raises(ValueError, match="device=cuda:4: torch sees 4 CUDA GPUs here"):
        chosen_device("cuda:4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="device=cuda: torch sees 0 CUDA GPUs"):
        chosen_device("cuda")


@pytest.mark.parametrize(("device", "on"), [("cpu", "a CPU"), ("mps", "mps")])
def test_what_only_cuda_computes_in_good_time(device, on):
    for precision in ("fp16", "tf32"):
        with pytest.raises(ValueError, match=f"is for a CUDA GPU: choose fp32 or bf16 on {on}"):
            check_precision(precision, torch.device(device))
        check_precision(precision, torch.device("cuda"))
    check_precision("bf16", torch.device(device))


@pytest.mark.parametrize(
    ("load", "spec"),
    [(load_recognizer, "nano"), (load_recognizer, "mms:any"), (load_encoder, "nano")],
    ids=["whisper", "mms", "voices"],
)
def test_a_judge_asks_for_its_device(four_gpus, nano, load, spec):
    with pytest.raises(ValueError, match="device=cuda:4: torch sees 4 CUDA GPUs"):
        load(spec, device="cuda:4")


@pytest.fixture
def one_text(tmp_path):
    (tmp_path / "set.jsonl").write_text('{"text": "One.", "language": "en", "id": "a"}\n')
    return tmp_path / "set.jsonl"


def test_an_evaluation_refuses_what_is_no_device_before_it_begins(one_text, tmp_path):
    command = ["--model", "espeak", "--set", str(one_text), "--asr", "none", "--speaker", "none"]
    with pytest.raises(SystemExit, match="eval.run: device=gpu: choose cpu, cuda"):
        run.main([*command, "--device", "gpu", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_process_of_an_evaluation_judges_on_its_own_gpu(
    four_gpus, one_text, tmp_path, monkeypatch
):
    """`evaluate` from Python, under a launcher: every process would take the first GPU."""

    class Told(Exception):
        pass

    def told(folder, stage, who, device):
        raise Told(device)

    monkeypatch.setattr(run, "Pace", told)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    system, test_set = open_system("espeak"), load_set(str(one_text))
    with pytest.raises(Told, match="cuda:3"):
        run.evaluate(system, test_set, tmp_path / "out", asr="none", speaker="none")
