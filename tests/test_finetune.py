"""recipes/finetune.py: what is learnt and written, and what is refused."""

from __future__ import annotations

import json
import sys
from functools import partial

import pytest
import torch
from accelerate import DistributedType

from higgs_lab.audio import audio_info
from higgs_lab.checkpoint import NativeFiles, load_talker
from higgs_lab.codec import Codec
from higgs_lab.config import load_config
from higgs_lab.generate import Sampling
from higgs_lab.prepared import save_prepared
from higgs_lab.runlog import read_jsonl
from higgs_lab.training_set import Modes, TrainingSet
from higgs_lab.vocab import Vocab
from recipes import train_run
from recipes.train_config import TrainConfig, check, learning_rate
from recipes.train_run import Run
from tests.tiny import num_layers, prepared_rows, same
from tests.tiny_finetune import (
    ROOT,
    SMALL,
    adapter,
    curve,
    loss_before,
    run,
)


def speak_briefly(monkeypatch) -> None:
    """Ends every sample after 20 frames: a model of a few steps may go on for a minute."""
    monkeypatch.setattr(train_run, "Sampling", partial(Sampling, max_frames=20))


def test_trackers_get_the_curves_and_the_spoken_samples(prepared, tmp_path, monkeypatch):
    """tensorboard, and wandb as on a machine without network or account."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    speak_briefly(monkeypatch)
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


def test_a_gradient_that_is_not_finite_ends_the_run_and_is_never_saved(prepared, tmp_path):
    """Asked where a line, a checkpoint or a sample is due: the first step here leaves NaN."""
    looks = {
        "lines": {},
        "saves": dict(save_every=2),
        "samples": dict(sample_every=2, sample_texts=["Hi."]),
    }
    for name, more in looks.items():
        step = 2 if more else 3
        changes = dict(steps=4, lr=float("inf"), valid_every=0, log_every=3) | more
        with pytest.raises(ValueError, match=f"step {step}: the gradient is not finite; lower lr"):
            run(prepared, tmp_path / name, **changes)
        assert not list((tmp_path / name).glob("checkpoints/step-*"))
        assert not (tmp_path / name / "metrics.jsonl").read_text()


def test_what_does_not_fit_fails_before_the_first_step(prepared, tmp_path, monkeypatch):
    def full(self, model, pack):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Run, "sums", full)
    with pytest.raises(ValueError, match=r"the largest pack \(\d+ positions\) does not fit"):
        run(prepared, tmp_path / "run", steps=2)
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()


def test_what_fits_alone_but_not_beside_gradients_fails_then_too(prepared, tmp_path, monkeypatch):
    """Of a step's several packs the second finds the first one's gradients in the memory."""
    sums = Run.sums

    def second(self, model, pack):
        if any(p.grad is not None for p in model.parameters()):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sums(self, model, pack)

    monkeypatch.setattr(Run, "sums", second)
    with pytest.raises(ValueError, match="the largest pack .* does not fit"):
        run(prepared, tmp_path / "several", steps=1, packs_per_step=2, valid_every=0)
    run(prepared, tmp_path / "one", steps=1, packs_per_step=1, valid_every=0)


def test_samples_and_validations_change_nothing_that_is_learnt(prepared, tmp_path, monkeypatch):
    speak_briefly(monkeypatch)
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
    assert len(names) == num_layers(nano) * 7 * 2 and all("lora_" in name for name in names)


@pytest.mark.parametrize("changes", [{"method": "full"}, {"preset": "attention_mlp_table"}])
def test_bf16_moves_the_table_and_writes_it_whole(prepared, nano, tmp_path, changes):
    """As on a GPU: autocast to bf16, what trains in fp32, the result in the stored dtype."""
    import higgs_lab

    out = tmp_path / "run"
    metrics = run(
        prepared, out, precision="bf16", steps=3, valid_every=0, sample_every=3, **changes
    )
    assert abs(curve(metrics, "loss")[0] - loss_before(nano)) < 0.1
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
    assert abs(loss[0] - loss_before(nano)) < 0.1 and loss[-1] < loss[0]
    vocab = Vocab.from_pretrained(nano)
    loaded = load_adapter(load_talker(nano, dtype=torch.float32), tmp_path / "run", base=nano)
    assert adapter_effect(loaded, render_prompt(vocab, "Hello.")) > 0


def test_qlora_without_bitsandbytes_names_the_extra(prepared, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"higgs_lab\[qlora\].*or use method=lora"):
        run(prepared, tmp_path / "run", method="qlora")
    assert not (tmp_path / "run").exists()


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
