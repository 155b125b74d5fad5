"""Fine-tune the talker, LoRA or full, on prepared data.

    accelerate launch recipes/finetune.py --config recipes/configs/speaker_lora.yaml \
        data=my/prepared model=bosonai/higgs-tts-3-4b out=runs/my_voice

Run directory: config.yaml, provenance.json, metrics.jsonl, checkpoints/step-N/, samples/, and at the
end adapter/ (a PEFT folder) or model/ (a native directory). The same command resumes a killed run.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed

from higgs_lab.adapter import TARGETS, attach_lora, base_fingerprint, save_adapter
from higgs_lab.attention import VARLEN, varlen_available
from higgs_lab.batches import Batch, PackedLoader
from higgs_lab.checkpoint import load_talker, resolve_checkpoint, save_native
from higgs_lab.codec import Codec
from higgs_lab.config import cli, save_config
from higgs_lab.loss import LossSums, codebook_loss
from higgs_lab.prepared import load_prepared, prepared_info
from higgs_lab.resume import load_step, random_state, save_step, saved_steps, trainable_state
from higgs_lab.runlog import RunLog, duration, provenance, write_json_atomic
from higgs_lab.training_set import Modes, TrainingSet
from higgs_lab.vocab import Vocab


@dataclass
class TrainConfig:
    data: str = "???"  # prepared data, made by recipes/prepare.py
    out: str = "???"  # run directory; an interrupted run there is resumed
    model: str = "nano"  # base: nano, a native directory, or org/name@revision

    method: str = "lora"  # lora, or full
    preset: str = (
        "attention_mlp"  # what LoRA touches: attention, attention_mlp, attention_mlp_table
    )
    rank: int = 16  # LoRA rank
    alpha: float = 32  # LoRA scale is alpha / rank
    dropout: float = 0.0  # LoRA dropout

    steps: int = 500  # optimiser steps
    budget_positions: int = 8192  # positions of one pack: audio frames + text + reference
    packs_per_step: int = 1  # packs of one optimiser step, over all processes
    lr: float = 1e-4  # peak learning rate
    schedule: str = "cosine"  # after the warm-up: cosine, linear or constant
    min_lr_ratio: float = 0.1  # the schedule ends at lr times this
    warmup_steps: int = 20
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    codebook_weights: list[float] | None = None  # K weights of the loss; none: all alike
    supervise_boc: bool = False  # loss on the cells that both engines force

    clone_share: float = 0.25  # examples with a reference and no transcript
    clone_text_share: float = 0.5  # with a reference and its transcript; the rest has none
    max_ref_sec: float = 10.0  # longer clips are no references

    precision: str = "auto"  # bf16, fp32; auto: bf16 on a GPU that has it
    attention: str = "auto"  # varlen, sdpa; auto: varlen where it runs
    gradient_checkpointing: bool = False  # less memory, about a third slower
    seed: int = 0

    valid_every: int = 100  # steps between validations; 0: never
    valid_rows: int = 256  # at most so many rows of the split "valid"
    save_every: int = 100  # steps between checkpoints
    keep_checkpoints: int = 2
    sample_every: int = 0  # steps between spoken samples; 0: never
    sample_texts: list[str] = field(default_factory=list)  # none: texts of the validation rows
    log_every: int = 1
    trackers: list[str] = field(
        default_factory=list
    )  # tensorboard, wandb (WANDB_MODE=offline works)
    project: str = "higgs_lab"  # name under which trackers file the run


def main(argv: list[str] | None = None) -> None:
    config = cli(TrainConfig, "Fine-tune the talker on prepared data.", argv)
    try:
        train(config)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"finetune: {error}")


def check(config: TrainConfig) -> None:
    """Raise ValueError for settings that contradict each other."""
    known = {"method": ("lora", "full"), "schedule": ("cosine", "linear", "constant")}
    known |= {"precision": ("auto", "bf16", "fp32"), "attention": ("auto", "varlen", "sdpa")}
    known |= {"preset": tuple(TARGETS)}
    for name, choices in known.items():
        if getattr(config, name) not in choices:
            raise ValueError(f"{name}={getattr(config, name)!r}: choose {', '.join(choices)}")
    for name in ("steps", "budget_positions", "packs_per_step", "rank", "save_every", "log_every"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)}: must be at least 1")


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of optimiser step `step`, counted from 0.

    A function of the step and of nothing else: a scheduler object that `accelerate` prepares steps
    once per process, and with two processes reaches its end at half the run.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    span = max(1, config.steps - config.warmup_steps)
    done = min(1.0, (step - config.warmup_steps) / span)
    shape = (1 + math.cos(math.pi * done)) / 2 if config.schedule == "cosine" else 1 - done
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * shape)


def train(config: TrainConfig) -> None:
    check(config)
    out = Path(config.out)
    bf16 = config.precision == "bf16" or (
        config.precision == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    )
    accelerator = Accelerator(
        mixed_precision="bf16" if bf16 else "no",
        log_with=list(config.trackers) or None,
        project_dir=str(out),
    )
    say = accelerator.print
    world, rank = accelerator.num_processes, accelerator.process_index
    if config.packs_per_step % world:
        raise ValueError(
            f"packs_per_step={config.packs_per_step} cannot be shared by {world} processes: "
            "choose a multiple of the number of processes"
        )
    set_seed(config.seed)
    with accelerator.main_process_first():  # one process downloads or builds
        base = resolve_checkpoint(config.model)
    vocab = Vocab.from_pretrained(base.path)
    codec = Codec.from_pretrained(base.path, accelerator.device)
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
    )

    model = build_model(config, base.path, accelerator.device, bf16)
    parameters = list(trainable_state(model))
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=config.lr,
        betas=(0.9, 0.95),
        weight_decay=config.weight_decay,
    )
    run = Run(config, accelerator, model, optimizer, vocab, codec, loader, valid, out)
    facts = dict(
        base=asdict(base) | {"path": base.path.name}, codec_hash=codec.hash, processes=world
    )
    facts |= dict(base_fingerprint=base_fingerprint(base.path), data=info["splits"])
    run.facts = facts
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        refuse_other_run(config, out)
        save_config(config, out / "config.yaml")
        write_json_atomic(out / "provenance.json", provenance(**facts))
    accelerator.wait_for_everyone()
    start = run.resume()
    per_epoch = loader.steps_per_epoch()
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shares = ", ".join(f"{m} {s:.0%}" for m, s in data.mode_shares().items())
    hours = sum(data.frames) / vocab.frame_rate_hz / 3600
    say(
        f"{len(data)} clips, {hours:.2f} h; prompts: {shares}\n"
        f"{count:,} trainable values in {len(parameters)} tensors; {world} process(es), "
        f"{config.packs_per_step} packs of {config.budget_positions} positions a step\n"
        f"{config.steps} steps = {config.steps / max(per_epoch, 1):.1f} epochs, "
        f"{'from step ' + str(start) if start else 'from the base'}; run directory {out}"
    )
    run.start_trackers()
    finished = run.loop(start)
    accelerator.end_training()
    if not finished:
        say(f"stopped by SIGTERM; the same command goes on from {out / 'checkpoints'}")
        return
    if accelerator.is_main_process:
        run.save_result(base.path)
    accelerator.wait_for_everyone()
    say(f"done: {out / ('adapter' if config.method == 'lora' else 'model')}")


def build_model(config: TrainConfig, base: Path, device, bf16: bool) -> torch.nn.Module:
    """The model with what shall be trained set to train."""
    # A frozen base may be bf16; weights that are updated stay fp32 and are cast by autocast.
    frozen = torch.bfloat16 if bf16 else torch.float32
    talker = load_talker(base, device, frozen if config.method == "lora" else torch.float32)
    varlen = varlen_available(talker.device, torch.bfloat16 if bf16 else torch.float32)
    if config.attention == "varlen" and not varlen:
        raise ValueError("attention=varlen needs CUDA, bf16 and a torch with varlen_attn: use sdpa")
    if varlen and config.attention != "sdpa":
        talker.model.set_attn_implementation(VARLEN)
    if config.gradient_checkpointing:
        talker.model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.method == "lora":
        return attach_lora(
            talker, config.preset, config.rank, config.alpha, config.dropout, seed=config.seed
        ).train()
    talker.requires_grad_(True)
    talker.model.embed_tokens.requires_grad_(False)  # text has no loss; its table would only drift
    return talker.train()


def refuse_other_run(config: TrainConfig, out: Path) -> None:
    """A run directory with checkpoints may only be continued with the same settings."""
    file = out / "config.yaml"
    if not file.is_file() or not saved_steps(out / "checkpoints"):
        return
    from higgs_lab.config import load_config

    old, new = asdict(load_config(TrainConfig, str(file), [])), asdict(config)
    free = ("steps", "trackers", "log_every", "keep_checkpoints", "save_every", "out")
    changed = [k for k in new if k not in free and old[k] != new[k]]
    if changed:
        name = changed[0]
        raise ValueError(
            f"{out} holds a run with {name}={old[name]!r}, now {name}={new[name]!r}: take the old "
            "value to resume it, or another out="
        )


@dataclass
class Run:
    """A training under way."""

    config: TrainConfig
    accelerator: Accelerator
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    vocab: Vocab
    codec: Codec
    loader: PackedLoader
    valid: TrainingSet | None
    out: Path
    facts: dict = field(default_factory=dict)

    def __post_init__(self):
        self.wrapped = self.accelerator.prepare_model(self.model)
        self.terminated = False
        weights = self.config.codebook_weights
        K = self.vocab.num_codebooks
        if weights is not None and len(weights) != K:
            raise ValueError(f"codebook_weights has {len(weights)} values, the model {K} codebooks")
        self.weights = torch.tensor(weights or [1.0] * K, device=self.accelerator.device)
        self.log: RunLog | None = None

    def resume(self) -> int:
        """Go back to the last checkpoint; returns the step to start with."""
        folder = self.out / "checkpoints"
        steps = saved_steps(folder)
        start = steps[-1] if steps else 0
        if start:
            state = load_step(
                folder, start, self.model, self.optimizer, self.accelerator.process_index
            )
            self.loader.load_state_dict(state)
        if self.accelerator.is_main_process:
            self.log = RunLog(self.out / "metrics.jsonl")
            self.log.cut_after(start if start else -1)
        return start

    def start_trackers(self) -> None:
        if self.config.trackers:
            flat = {k: str(v) for k, v in asdict(self.config).items()}
            named = {"wandb": {"name": self.out.name, "dir": str(self.out)}}
            try:
                self.accelerator.init_trackers(self.config.project, flat, named)
            except Exception as error:  # each tracker raises its own kind
                raise ValueError(
                    f"tracker did not start ({error}); for wandb without an account set "
                    "WANDB_MODE=offline, or leave it out of trackers"
                ) from error

    def loop(self, start: int) -> bool:
        """Train to the end; False when SIGTERM stopped it."""
        config, accelerator = self.config, self.accelerator
        previous = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "terminated", True))
        try:
            batches = iter(self.loader)
            if start == 0 and self.valid is not None:
                self.validate(0)
            began, positions, frames = time.monotonic(), 0, 0
            for step in range(start, config.steps):
                micro = config.packs_per_step // accelerator.num_processes
                packs = [next(batches) for _ in range(micro)]
                sums, norm, totals, stop = self.step(step, packs)
                positions, frames = positions + totals[0], frames + totals[1]
                done = step + 1
                if done % config.log_every == 0 or done == config.steps:
                    seconds = time.monotonic() - began
                    rate = positions / seconds
                    left = (config.steps - done) * seconds / (done - start)
                    figures = sums.means() | {
                        "lr": learning_rate(config, step),
                        "grad_norm": norm,
                        "positions_per_sec": rate,
                        "audio_sec_per_sec": frames / self.vocab.frame_rate_hz / seconds,
                        "pack_fill": totals[0] / (config.packs_per_step * config.budget_positions),
                        "epoch": self.loader.epoch,
                    }
                    self.record(done, figures)
                    accelerator.print(
                        f"step {done}/{config.steps}  loss {figures['loss']:.3f}  eoc "
                        f"{figures.get('loss_eoc', float('nan')):.3f}  lr {figures['lr']:.2e}  "
                        f"{rate:,.0f} positions/s  left {duration(left)}",
                        flush=True,
                    )
                last = done == config.steps
                if self.valid is not None and (done % config.valid_every == 0 or last):
                    self.validate(done)
                if config.sample_every and (done % config.sample_every == 0 or last):
                    self.speak_samples(done)
                if done % config.save_every == 0 or last or stop:
                    self.save(done)
                if stop and not last:
                    return False
            return True
        finally:
            signal.signal(signal.SIGTERM, previous)
            if self.log is not None:
                self.log.close()

    def step(self, step: int, packs: list[Batch]) -> tuple[LossSums, float, list[int], bool]:
        """One optimiser step over packs of this process.

        Returns sums over all processes, the gradient norm, [positions, audio rows] over all, and
        whether any process was told to stop. The divisor is the number of supervised cells in all
        packs of all processes, so how they are split changes nothing (facts trap 34).
        """
        accelerator, device = self.accelerator, self.accelerator.device
        packs = [pack.to(device, non_blocking=True) for pack in packs]
        cells = sum((pack.supervised.sum((0, 1)) * self.weights).sum() for pack in packs)
        mine = [sum(p.real_positions for p in packs), sum(int(p.is_audio.sum()) for p in packs)]
        shared = torch.tensor([*mine, int(self.terminated)], dtype=torch.float64, device=device)
        shared = torch.cat([cells.double().reshape(1), shared])
        cells, *totals, stop = accelerator.reduce(shared, "sum").tolist()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)
        self.optimizer.zero_grad(set_to_none=True)
        collected: LossSums | None = None
        for i, pack in enumerate(packs):
            last = i == len(packs) - 1
            with nullcontext() if last else accelerator.no_sync(self.wrapped):
                sums = self.sums(self.wrapped, pack)
                loss, _ = sums.weighted(self.weights)
                # DDP averages gradients over processes; the sum is wanted
                accelerator.backward(loss * (accelerator.num_processes / cells))
            part = LossSums(*(t.detach() for t in sums.stack()))
            collected = part if collected is None else collected + part
        norm = torch.nn.utils.clip_grad_norm_(
            [p for p in self.model.parameters() if p.requires_grad], self.config.max_grad_norm
        )
        if not torch.isfinite(norm):
            raise ValueError(
                f"step {step + 1}: the gradient is not finite; lower lr, or set precision=fp32. The "
                "last checkpoint is unharmed"
            )
        self.optimizer.step()
        stacked = accelerator.reduce(collected.stack(), "sum")
        return LossSums.unstack(stacked), float(norm), [int(t) for t in totals], stop > 0

    def sums(self, model: torch.nn.Module, pack: Batch) -> LossSums:
        at = pack.supervised.any(-1)  # [1, L]
        logits = model(**pack.inputs(), logits_at=at).logits
        return codebook_loss(logits, pack.labels[at], pack.supervised[at])

    @torch.no_grad()
    def validate(self, step: int) -> None:
        """Loss per codebook and EOC over the validation rows, each shown the same way each time."""
        accelerator, valid = self.accelerator, self.valid
        self.model.eval()
        loader = PackedLoader(valid.lengths, valid.build, self.config.budget_positions)
        packs = loader.epoch_packs(0)
        mine = packs[accelerator.process_index :: accelerator.num_processes]
        K = self.vocab.num_codebooks
        total = LossSums(*torch.zeros(4, K, device=accelerator.device))
        from higgs_lab.batches import pack

        with accelerator.autocast():
            for members in mine:
                batch = pack([valid.build(i, 0) for i in members]).to(accelerator.device)
                total = total + self.sums(self.model, batch)
        total = LossSums.unstack(accelerator.reduce(total.stack(), "sum"))
        self.model.train()
        figures = {f"valid/{name}": value for name, value in total.means().items()}
        self.record(step, figures)
        accelerator.print(
            f"step {step}  valid loss {figures['valid/loss']:.3f}  codebooks "
            + " ".join(f"{figures[f'valid/loss_code/{k}']:.2f}" for k in range(K))
            + f"  eoc {figures['valid/loss_eoc']:.3f}",
            flush=True,
        )

    @torch.no_grad()
    def speak_samples(self, step: int) -> None:
        """A few texts spoken by the model as it is, as wavs and in the trackers."""
        if not self.accelerator.is_main_process:
            return
        from higgs_lab.audio import write_wav
        from higgs_lab.checkpoint import Checkpoint
        from higgs_lab.generate import Sampling
        from higgs_lab.speech import Higgs

        source = self.valid if self.valid is not None else None
        texts = list(self.config.sample_texts) or (source.texts[:4] if source else [])
        if not texts:
            return
        saved = random_state()
        self.model.eval()
        higgs = Higgs(self.model, self.codec, self.vocab, Checkpoint(self.out, self.out.name))
        reference, said = None, None
        if source is not None:
            row = source.rows[len(source) - 1]
            reference, said = torch.as_tensor(row["codes"]), row["text"]
        with self.accelerator.autocast():
            spoken = higgs.speak(texts, reference, said, sampling=Sampling(seed=self.config.seed))
        folder = self.out / "samples" / f"step-{step}"
        for i, (wav, info) in enumerate(spoken):
            write_wav(folder / f"{i}.wav", wav, higgs.sample_rate_hz)
            self.to_trackers(f"sample/{i}", wav, higgs.sample_rate_hz, step, texts[i])
        write_json_atomic(
            folder / "texts.json",
            [
                {"text": t, "stop_reason": i.stop_reason}
                for t, (_, i) in zip(texts, spoken, strict=True)
            ],
        )
        self.model.train()
        from higgs_lab.resume import set_random_state

        set_random_state(saved)  # samples must not change what training draws

    def to_trackers(self, name: str, wav, rate_hz: int, step: int, caption: str) -> None:
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_audio(name, wav[None], step, sample_rate=rate_hz)
            elif tracker.name == "wandb":
                import wandb

                audio = wandb.Audio(wav, sample_rate=rate_hz, caption=caption)
                tracker.run.log({name: audio}, step=step)

    def record(self, step: int, figures: dict) -> None:
        if self.log is not None:
            self.log.log(step=step, **figures)
        if self.config.trackers:
            self.accelerator.log(figures, step=step)

    def save(self, step: int) -> None:
        states = gather_object([random_state()])
        if self.accelerator.is_main_process:
            folder = self.out / "checkpoints"
            loader = self.loader.state_dict()
            keep = self.config.keep_checkpoints
            save_step(folder, step, self.model, self.optimizer, loader, states, keep)
        self.accelerator.wait_for_everyone()

    def save_result(self, base: Path) -> None:
        """The adapter folder, or a native directory after a full fine-tune."""
        if self.config.method == "full":
            save_native(self.model, base, self.out / "model")
            return
        facts = self.facts
        meta = {
            "base": facts["base"]["name"],
            "revision": facts["base"]["revision"],
            "fingerprint": facts["base_fingerprint"],
            "codec_hash": facts["codec_hash"],
            "preset": self.config.preset,
            "steps": self.config.steps,
            "data": facts["data"],
        }
        save_adapter(self.model, self.out / "adapter", meta)


if __name__ == "__main__":
    main()
