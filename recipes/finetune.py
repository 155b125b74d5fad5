"""Fine-tune the talker, by LoRA, QLoRA or in full, on prepared data.

    accelerate launch recipes/finetune.py --config recipes/configs/speaker_lora.yaml \
        data=my/prepared model=bosonai/higgs-tts-3-4b out=runs/my_voice

Run directory: config.yaml, provenance.json, metrics.jsonl, checkpoints/step-N/, samples/, and at
the end adapter/ (a PEFT folder) or model/ (a native directory). The same command resumes a killed
run.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, set_seed

from higgs_lab.adapter import attach_lora, base_fingerprint
from higgs_lab.attention import VARLEN, attention_kind, heads_of, varlen_available
from higgs_lab.batches import PackedLoader
from higgs_lab.checkpoint import load_talker, resolve_checkpoint
from higgs_lab.codec import Codec
from higgs_lab.config import cli, load_config, one_line_errors, save_config
from higgs_lab.fused import fuse, unfusable
from higgs_lab.optimizer import make_optimizer
from higgs_lab.prefetch import one_thread_beside_a_gpu
from higgs_lab.prepared import load_prepared, prepared_info
from higgs_lab.quantize import quantize_nf4
from higgs_lab.resume import saved_steps, trainable_state
from higgs_lab.runlog import provenance, write_json_atomic
from higgs_lab.text_table import text_on_host
from higgs_lab.training_set import Modes, TrainingSet
from higgs_lab.vocab import Vocab
from recipes.train_config import TrainConfig, check
from recipes.train_plan import plan
from recipes.train_run import Run

COMPILE_FROM_STEPS = 200
DATA_PARALLEL = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


def main(argv: list[str] | None = None) -> None:
    with one_line_errors("finetune"):
        one_thread_beside_a_gpu()
        train(cli(TrainConfig, __doc__, argv))


def train(config: TrainConfig) -> None:
    launched = time.monotonic()
    check(config)
    out = Path(config.out)
    bf16 = config.precision == "bf16" or (
        config.precision == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    )
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),  # Apple's GPU has no float64 and is untested
        mixed_precision="bf16" if bf16 else "no",
        log_with=list(config.trackers) or None,
        project_dir=str(out),
        # no buffer of the talker changes; gradients lie in DDP's buckets, not beside them
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        ],
    )
    say = accelerator.print
    world, rank = accelerator.num_processes, accelerator.process_index
    if accelerator.distributed_type not in DATA_PARALLEL:
        raise ValueError(
            f"accelerate is set to {accelerator.distributed_type.value}; this recipe keeps a whole "
            "model per process: choose plain multi-GPU in `accelerate config`, or pass --multi_gpu"
        )
    if config.packs_per_step % world:
        raise ValueError(
            f"packs_per_step={config.packs_per_step} cannot be shared by {world} processes: "
            "choose a multiple of the number of processes"
        )
    set_seed(config.seed)
    with accelerator.main_process_first():  # one process downloads or builds
        base = resolve_checkpoint(config.model)
    vocab = Vocab.from_pretrained(base.path)
    codec = Codec.from_pretrained(base.path)  # on the card only while samples are spoken
    info = prepared_info(config.data)
    train_rows = load_prepared(config.data, codec.hash, split="train")
    has_valid = bool(info["splits"].get("valid", {}).get("clips"))
    modes = Modes(config.clone_share, config.clone_text_share)
    options = dict(modes=modes, seed=config.seed, max_ref_sec=config.max_ref_sec)
    options |= dict(budget_positions=config.budget_positions, supervise_boc=config.supervise_boc)
    data = TrainingSet(train_rows, vocab, **options)
    valid = None
    if config.valid_every and has_valid:
        rows = load_prepared(config.data, codec.hash, split="valid")
        valid = TrainingSet(rows.select(range(min(len(rows), config.valid_rows))), vocab, **options)
    loader = PackedLoader(
        data.lengths,
        data.build,
        config.budget_positions,
        seed=config.seed,
        rank=rank,
        world_size=world,
        packs_per_step=config.packs_per_step,
        # what is compiled, FlexAttention in any case, wants packs of one size
        pad=compiles(config, accelerator.device) or config.attention == "flex",
    )

    model = build_model(config, base.path, accelerator.device, bf16)
    parameters = list(trainable_state(model))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(trained, config.optimizer, config.lr, config.weight_decay)
    run = Run(config, accelerator, model, optimizer, vocab, codec, loader, valid, out)
    facts = dict(
        base=asdict(base) | {"path": base.path.name}, codec_hash=codec.hash, processes=world
    )
    facts |= dict(base_fingerprint=base_fingerprint(base.path), data=info["splits"])
    facts |= dict(data_fingerprint=info.get("fingerprint"))
    run.facts, run.launched = facts, launched
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        refuse_other_run(config, facts, out)
        save_config(config, out / "config.yaml")
        write_json_atomic(out / "provenance.json", provenance(**facts))
    accelerator.wait_for_everyone()
    start = run.resume()
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"{count:,} trainable values in {len(parameters)} tensors; run directory {out}")
    say(plan(config, run, data, start), flush=True)
    if data.mode_shares()["zero_shot"] == 1 and modes.clone + modes.clone_text > 0:
        say(
            "note: no reference for any clip, so the model may forget how to clone: name the "
            "speakers (recipes/prepare.py speaker=NAME, if all are one), or give rows a ref_audio"
        )
    run.start_trackers()
    finished = run.loop(start)
    result = out / ("model" if config.method == "full" else "adapter")
    # A finished run, started again, leaves what may have been judged and exported as it is.
    if finished and accelerator.is_main_process and not (start == config.steps and result.is_dir()):
        run.save_result(base.path)
    accelerator.wait_for_everyone()
    if finished:
        say(f"done: {result}")
    else:
        say(f"stopped by SIGTERM; the same command goes on from {out / 'checkpoints'}")
    accelerator.end_training()  # last: the processes can no longer wait for each other then


def build_model(config: TrainConfig, base: Path, device, bf16: bool) -> torch.nn.Module:
    """The model with what shall be trained set to train."""
    # A frozen base may be bf16; weights that are updated stay fp32 and are cast by autocast.
    frozen = torch.bfloat16 if bf16 else torch.float32
    if config.method == "qlora":
        talker = load_talker(base, "cpu", frozen)
        text_on_host(talker)
        talker = quantize_nf4(talker, device)
    elif config.method == "lora":
        talker = load_talker(base, device, frozen)
        text_on_host(talker)
    else:
        talker = load_talker(base, device, torch.float32)
    dtype = torch.bfloat16 if bf16 else torch.float32
    kind = attention_kind(config.attention, talker.device, dtype, heads_of(talker.config))
    # what cannot be fused goes through the modules, which know torch's kernel
    if kind in ("triton", "varlen") and varlen_available(talker.device, dtype):
        talker.model.set_attn_implementation(VARLEN)
    if config.method == "full":
        model = talker.requires_grad_(True)
        # text has no loss; its table would only drift
        talker.model.embed_tokens.requires_grad_(False)
    else:
        model = attach_lora(
            talker, config.preset, config.rank, config.alpha, config.dropout, seed=config.seed
        )
    if unfusable(model) is None:
        fuse(model, kind, config.checkpointing, compiles(config, talker.device), dtype)
    elif config.checkpointing != "none":  # by modules: all of a block again
        talker.model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def compiles(config: TrainConfig, device: torch.device) -> bool:
    """Whether blocks are compiled: it takes a minute, which a short run does not earn back."""
    if config.compile is None:
        return device.type == "cuda" and config.steps >= COMPILE_FROM_STEPS
    return config.compile


def refuse_other_run(config: TrainConfig, facts: dict, out: Path) -> None:
    """A run directory with checkpoints may only be continued with the same settings and inputs."""
    file, steps = out / "config.yaml", saved_steps(out / "checkpoints")
    if not file.is_file() or not steps:
        return
    old, new = asdict(load_config(TrainConfig, str(file), [])), asdict(config)
    free = ("steps", "trackers", "log_every", "keep_checkpoints", "save_every", "out")
    changed = [k for k in new if k not in free and old[k] != new[k]]
    if changed:
        name = changed[0]
        raise ValueError(
            f"{out} holds a run with {name}={old[name]!r}, now {name}={new[name]!r}: take the old "
            "value to resume it, or another out="
        )
    # The names are the same; what they stand for may have changed meanwhile.
    began = json.loads((out / "provenance.json").read_text(encoding="utf-8"))
    inputs = {"base_fingerprint": "another base", "data_fingerprint": "other prepared data"}
    for name, what in inputs.items():
        if began.get(name) != facts[name]:
            raise ValueError(
                f"{out} holds a run on {what} than now stands there: take another out="
            )
    if steps[-1] > config.steps:
        raise ValueError(f"{out} has {steps[-1]} steps already, more than steps={config.steps}")


if __name__ == "__main__":
    main()
