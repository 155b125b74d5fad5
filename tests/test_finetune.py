"""recipes/finetune.py: exact resume and accumulation, any number of processes, refusals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file, save_file

from higgs_lab.audio import audio_info
from higgs_lab.checkpoint import NativeFiles, load_talker
from higgs_lab.codec import Codec
from higgs_lab.config import load_config
from higgs_lab.prepared import save_prepared
from higgs_lab.runlog import read_jsonl, write_json_atomic
from higgs_lab.training_set import Modes, TrainingSet
from higgs_lab.vocab import Vocab
from recipes import train_run
from recipes.finetune import train
from recipes.train_config import TrainConfig, check, learning_rate
from recipes.train_run import Run
from tests.tiny import prepared_rows

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(rank=4, budget_positions=400, lr=2e-3, warmup_steps=2, seed=3, packs_per_step=2)


@pytest.fixture(scope="module")
def prepared(nano, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prepared") / "data"
    made = prepared_rows(14) + prepared_rows(3, "valid", seed=1)
    splits = {"train": {"clips": 14, "hours": 0.01}, "valid": {"clips": 3, "hours": 0.001}}
    info = {"codec_hash": Codec.from_pretrained(nano).hash, "splits": splits}
    info["model"] = {"name": "nano", "revision": nano.name}
    save_prepared(path, made, 8, info, [])
    return path


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps process-wide singletons; each run here is a run of its own."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    yield


def run(prepared: Path, out: Path, **changes) -> list[dict]:
    config = TrainConfig(data=str(prepared), out=str(out), **{**SMALL, **changes})
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    train(config)
    return read_jsonl(out / "metrics.jsonl")


def curve(metrics: list[dict], name: str) -> list[float]:
    return [m[name] for m in metrics if name in m]


def launch(
    prepared: Path, out: Path, processes: int, config: str = "one_gpu", machine: int = 0, **changes
) -> subprocess.Popen:
    """The recipe under `accelerate launch` with a shipped configuration; processes = 0: without it,
    which starts sooner.

    Its multi-GPU kind is how accelerate is told to start several processes, on CPUs too: with --cpu
    it starts one, whatever --num_processes says.
    """
    options = {**SMALL, "data": prepared, "out": out, **changes}
    command = [sys.executable]
    if processes:
        file = ROOT / "recipes" / "configs" / "accelerate" / f"{config}.yaml"
        command += ["-m", "accelerate.commands.launch", "--config_file", str(file)]
        command += ["--num_processes", str(processes), "--machine_rank", str(machine)]
    if processes > 1:
        command += ["--main_process_port", str(20000 + os.getpid() % 20000)]
        command += ["--main_process_ip", "127.0.0.1"]
    command += [str(ROOT / "recipes" / "finetune.py")]
    command += [f"{key}={value}" for key, value in options.items()]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def straight(prepared, tmp_path_factory) -> Path:
    """Ten steps without a break, the yardstick of the others."""
    out = tmp_path_factory.mktemp("straight") / "run"
    run(prepared, out, steps=10, save_every=5, dropout=0.1, valid_every=5)
    return out


def test_training_lowers_the_loss_and_leaves_a_whole_run_directory(straight):
    metrics = read_jsonl(straight / "metrics.jsonl")
    loss = curve(metrics, "loss")
    assert abs(loss[0] - np.log(1026)) < 0.4 and loss[-1] < loss[0] - 0.05
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


def test_five_steps_then_resume_equals_ten_straight_bit_for_bit(prepared, straight, tmp_path):
    out = tmp_path / "run"
    common = dict(save_every=5, dropout=0.1, valid_every=5)
    # the schedule is a function of `steps`, so the break is a SIGTERM, not a shorter run
    config = TrainConfig(data=str(prepared), out=str(out), steps=10, **SMALL, **common)
    import recipes.finetune as finetune

    class Stopped(finetune.Run):
        def step(self, step, packs):
            if step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().step(step, packs)

    original, finetune.Run = finetune.Run, Stopped
    try:
        train(config)
    finally:
        finetune.Run = original
    assert [m["step"] for m in read_jsonl(out / "metrics.jsonl")][-1] == 5
    assert not (out / "adapter").exists()
    metrics = run(prepared, out, steps=10, **common)
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


def test_trackers_get_the_curves_and_the_spoken_samples(prepared, tmp_path, monkeypatch):
    """tensorboard, and wandb as on a machine without network or account."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    out = tmp_path / "run"
    run(prepared, out, steps=2, valid_every=2, sample_every=2, trackers=["tensorboard", "wandb"])
    events = next(out.rglob("events.out.tfevents*")).parent
    seen = EventAccumulator(str(events), {"audio": 0})
    seen.Reload()
    logged = {m["step"]: m["loss"] for m in read_jsonl(out / "metrics.jsonl") if "loss" in m}
    assert {e.step: pytest.approx(e.value) for e in seen.Scalars("loss")} == logged
    wanted = {"valid/loss_eoc", "lr", *(f"valid/loss_code/{k}" for k in range(8))}
    assert wanted <= set(seen.Tags()["scalars"])
    texts = json.loads((out / "samples" / "step-2" / "texts.json").read_text())
    assert [t["text"] for t in texts] == [f"Sentence number {i} of valid." for i in range(3)]
    for i in range(3):
        assert audio_info(out / "samples" / "step-2" / f"{i}.wav").seconds > 0.3
        assert seen.Audio(f"sample/{i}")[0].step == 2
    wandb_run = next(out.glob("wandb/offline-run-*"))
    assert next(wandb_run.glob("run-*.wandb")).stat().st_size > 1000
    assert len(list(wandb_run.glob("files/media/audio/**/*.wav"))) == 3


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


def test_a_step_follows_the_schedule_and_the_clipped_gradient(prepared, tmp_path):
    """AdamW's first step moves a weight by the learning rate, whatever its gradient."""
    changes = dict(steps=1, lr=1e-2, warmup_steps=10, max_grad_norm=0.01, valid_every=0)
    metrics = run(prepared, tmp_path / "run", **changes)
    moved = [v for k, v in adapter(tmp_path / "run").items() if "lora_B" in k]  # zero before
    assert max(float(v.abs().max()) for v in moved) == pytest.approx(1e-3, rel=1e-3)
    file = tmp_path / "run" / "checkpoints" / "step-1" / "state.pt"
    states = torch.load(file, weights_only=False)["optimizer"]["state"].values()
    seen = torch.cat([state["exp_avg"].flatten() for state in states]) / 0.1  # 1 - beta1
    assert float(seen.norm()) == pytest.approx(0.01, rel=1e-3) and curve(metrics, "grad_norm") > [
        0.01
    ]


def test_what_does_not_fit_fails_before_the_first_step(prepared, tmp_path, monkeypatch):
    def full(self, model, pack):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Run, "sums", full)
    with pytest.raises(ValueError, match=r"the largest pack \(\d+ positions\) does not fit"):
        run(prepared, tmp_path / "run", steps=2)
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()


def test_machines_that_do_not_share_the_run_directory_are_told(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(train_run, "gather_object", lambda mine: [*mine, 40])
    with pytest.raises(ValueError, match="different checkpoints .*storage that all machines share"):
        run(prepared, tmp_path / "run", steps=2)


def test_samples_and_validations_change_nothing_that_is_learnt(prepared, tmp_path):
    changes = dict(steps=2, dropout=0.2)
    run(prepared, tmp_path / "quiet", valid_every=0, **changes)
    looks = dict(valid_every=1, sample_every=1, sample_texts=["Hi."])
    run(prepared, tmp_path / "looking", **looks, **changes)
    assert len(list((tmp_path / "looking" / "samples").glob("step-*/0.wav"))) == 2
    assert same(adapter(tmp_path / "quiet"), adapter(tmp_path / "looking"))


def test_codebook_weights_are_relative(prepared, tmp_path):
    norms = {}
    for name, weights in {"none": None, "threes": [3.0] * 8, "first": [1.0] + [0.0] * 7}.items():
        metrics = run(prepared, tmp_path / name, steps=1, valid_every=0, codebook_weights=weights)
        norms[name] = curve(metrics, "grad_norm")[0]
    assert norms["threes"] == pytest.approx(norms["none"], rel=1e-4)
    assert abs(norms["first"] / norms["none"] - 1) > 0.2


def test_trap34_one_pack_of_all_equals_accumulated_packs(prepared, nano):
    """The gradient depends on the cells, not on how they are cut into packs."""
    from higgs_lab.batches import pack
    from higgs_lab.loss import codebook_loss

    vocab = Vocab.from_pretrained(nano)
    data = TrainingSet(prepared_rows(4), vocab, Modes(0.0, 0.0))
    talker = load_talker(nano).float()
    examples = [data.build(i, 0) for i in range(4)]

    def gradient(groups):
        talker.zero_grad()
        batches = [pack(g) for g in groups]
        cells = sum(int(b.supervised.sum()) for b in batches)
        for batch in batches:
            at = batch.supervised.any(-1)
            logits = talker(**batch.inputs(), logits_at=at).logits
            sums = codebook_loss(logits, batch.labels[at], batch.supervised[at])
            (sums.weighted()[0] / cells).backward()
        return talker.codebooks.weight.grad.clone()

    whole, parts = gradient([examples]), gradient([[e] for e in examples])
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-7)


def test_trap36_only_the_adapter_trains(prepared, nano):
    from higgs_lab.adapter import attach_lora, trainable_names

    names = trainable_names(attach_lora(load_talker(nano), "attention_mlp", 8))
    assert len(names) == 3 * 7 * 2 and all("lora_" in name for name in names)


@pytest.mark.parametrize("changes", [{"method": "full"}, {"preset": "attention_mlp_table"}])
def test_bf16_moves_the_table_and_writes_it_whole(prepared, nano, tmp_path, changes):
    """As on a GPU: autocast to bf16, what trains in fp32, the result in the stored dtype."""
    import higgs_lab

    out = tmp_path / "run"
    metrics = run(
        prepared, out, precision="bf16", steps=3, valid_every=0, sample_every=3, **changes
    )
    assert abs(curve(metrics, "loss")[0] - np.log(1026)) < 0.4
    old = load_talker(nano).codebooks.weight
    if "method" in changes:
        new = load_talker(out / "model").codebooks.weight
    else:
        new = higgs_lab.load(nano, out, dtype=torch.bfloat16).talker.codebooks.weight
    assert new.dtype == old.dtype == torch.bfloat16
    assert 0.5 < float((new != old).float().mean())  # most entries: it was not stuck in rounding


def test_qlora_trains_an_adapter_for_the_unquantised_base(prepared, nano, tmp_path):
    pytest.importorskip("bitsandbytes", reason="pip install -e .[qlora]; .ci/run does")
    from higgs_lab.adapter import adapter_effect, load_adapter
    from higgs_lab.prompt import render_prompt
    from recipes.finetune import build_model

    config = TrainConfig(data="", out="", **SMALL | {"method": "qlora"})
    model = build_model(config, nano, "cpu", bf16=False)
    block = model.base_model.model.model.layers[0]
    full = load_talker(nano).model.layers[0]
    packed, before = block.self_attn.q_proj.base_layer.weight, full.self_attn.q_proj.weight
    assert packed.dtype == torch.uint8 and packed.numel() == before.numel() / 2
    x = torch.randn(5, before.shape[1], generator=torch.Generator().manual_seed(0))
    wanted = x @ before.float().T
    error = float((block.self_attn.q_proj(x) - wanted).norm() / wanted.norm())
    assert 0.01 < error < 0.15  # four bits: near, but not the same
    metrics = run(prepared, tmp_path / "run", method="qlora", steps=4, valid_every=0)
    loss = curve(metrics, "loss")
    assert abs(loss[0] - np.log(1026)) < 0.4 and loss[-1] < loss[0]
    vocab = Vocab.from_pretrained(nano)
    loaded = load_adapter(load_talker(nano, dtype=torch.float32), tmp_path / "run", base=nano)
    assert adapter_effect(loaded, render_prompt(vocab, "Hello.")) > 0


def test_qlora_without_bitsandbytes_names_the_extra(prepared, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"higgs_lab\[qlora\].*or use method=lora"):
        run(prepared, tmp_path / "run", method="qlora")
    assert not (tmp_path / "run").exists()


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


def test_adamw8bit_without_bitsandbytes_names_the_extra(prepared, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"higgs_lab\[qlora\].*or use optimizer=adamw"):
        run(prepared, tmp_path / "run", optimizer="adamw8bit")
    assert not (tmp_path / "run").exists()


def test_a_sharding_launcher_is_refused(prepared, tmp_path, monkeypatch):
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match="set to FSDP.*plain multi-GPU"):
        run(prepared, tmp_path / "run")


def test_full_fine_tune_writes_a_native_directory(prepared, nano, tmp_path):

    run(prepared, tmp_path / "run", method="full", steps=2, valid_every=0, lr=1e-4)
    model = tmp_path / "run" / "model"
    assert NativeFiles(model).shard.keys() == NativeFiles(nano).shard.keys()
    new, old = load_talker(model), load_talker(nano)
    assert not torch.equal(new.codebooks.weight, old.codebooks.weight)
    assert torch.equal(new.model.embed_tokens.weight, old.model.embed_tokens.weight)


def test_learning_rate_warms_up_and_ends_where_it_should():
    config = TrainConfig(steps=100, warmup_steps=10, lr=1.0, min_lr_ratio=0.1)
    assert learning_rate(config, 0) == 0.1 and learning_rate(config, 9) == 1.0
    rates = [learning_rate(config, s) for s in range(10, 101)]
    assert rates == sorted(rates, reverse=True) and abs(rates[-1] - 0.1) < 1e-9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "dora"}, "choose lora, qlora, full"),
        ({"preset": "everything"}, "choose attention"),
        ({"steps": 0}, "at least 1"),
        ({"keep_checkpoints": 0}, "at least 1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0: must be above 0"),
        ({"clone_share": 0.8, "clone_text_share": 0.5}, "at most 1"),
        ({"budget_positions": 60}, "longer than the budget"),
        ({"codebook_weights": [1.0, 2.0]}, "2 values, the model 8"),
        ({"codebook_weights": [0.0] * 8}, "at least 0 and not all 0"),
    ],
)
def test_contradictions_are_refused_before_anything_is_written(
    prepared, tmp_path, changes, message
):
    with pytest.raises(ValueError, match=message):
        run(prepared, tmp_path / "run", **changes)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_trap16_data_of_another_codec_is_refused(nano, tmp_path):
    info = {"codec_hash": "0" * 16, "splits": {"train": {"clips": 2}}, "model": {}}
    info["model"] = {"name": "other", "revision": "abc"}
    save_prepared(tmp_path / "data", prepared_rows(2), 8, info, [])
    with pytest.raises(ValueError, match="Prepare the data again"):
        run(tmp_path / "data", tmp_path / "run", steps=1)


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


def test_a_fine_tune_that_cannot_clone_says_so(nano, tmp_path, capsys):
    rows = [row | {"speaker": None} for row in prepared_rows(2)]
    info = {"codec_hash": Codec.from_pretrained(nano).hash, "splits": {"train": {"clips": 2}}}
    save_prepared(tmp_path / "data", rows, 8, info | {"model": {}}, [])
    run(tmp_path / "data", tmp_path / "run", steps=1)
    assert "no reference for any clip" in capsys.readouterr().out


CONFIGS = sorted(p for p in (ROOT / "recipes" / "configs").glob("*.yaml")
                 if p.stem.endswith(("lora", "full")))  # fmt: skip


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_are_valid_and_say_how_to_run_them(path):
    config = load_config(TrainConfig, path, ["data=a", "out=b"])
    check(config)
    assert f"accelerate launch recipes/finetune.py --config recipes/configs/{path.name}" in (
        path.read_text()
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_trap28_no_shipped_recipe_trains_cloning_or_bare_prompts_away(path, nano):
    """A voice learnt from one kind of prompt alone is lost to the others. What a fine-tune really
    costs other voices and languages, eval.compare says."""
    config = load_config(TrainConfig, path, ["data=a", "out=b"])
    modes = Modes(config.clone_share, config.clone_text_share)
    shares = TrainingSet(prepared_rows(200), Vocab.from_pretrained(nano), modes).mode_shares()
    assert min(shares.values()) > 0.15
