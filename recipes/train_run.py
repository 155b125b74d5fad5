"""A fine-tune under way: the loop, one exact optimiser step, validation, samples, checkpoints."""

from __future__ import annotations

import os
import signal
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from higgs_lab.adapter import save_adapter
from higgs_lab.audio import write_wav
from higgs_lab.batches import Batch, PackedLoader, pack
from higgs_lab.checkpoint import Checkpoint, save_native
from higgs_lab.codec import Codec
from higgs_lab.cost import GIB, Shape
from higgs_lab.generate import Sampling
from higgs_lab.loss import LossSums
from higgs_lab.prefetch import Prefetch
from higgs_lab.resume import load_step, random_state, save_step, saved_steps, set_random_state
from higgs_lab.runlog import RunLog, duration, write_json_atomic
from higgs_lab.speech import Higgs
from higgs_lab.talker import Talker
from higgs_lab.text_table import HostTable
from higgs_lab.training_set import TrainingSet
from higgs_lab.vocab import Vocab
from recipes.train_config import TrainConfig, learning_rate
from recipes.train_plan import card_peak


class Clock:
    """Positions and audio rows a second, over the time that training itself took."""

    def __init__(self):
        self.began, self.positions, self.frames = time.monotonic(), 0, 0

    def add(self, positions: int, frames: int, _: int) -> None:
        self.positions, self.frames = self.positions + positions, self.frames + frames

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def rates(self) -> tuple[float, float]:
        return self.positions / self.seconds(), self.frames / self.seconds()


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
    launched: float = field(default_factory=time.monotonic)  # for seconds to the first step

    def __post_init__(self):
        self.talker = next(m for m in self.model.modules() if isinstance(m, Talker))
        table_rows = self.vocab.num_codebooks * self.vocab.codebook_size
        self.shape = Shape.of(self.talker.config, table_rows)
        table = self.talker.model.embed_tokens
        self.host_table = table if isinstance(table, HostTable) else None
        self.peak = card_peak(self.accelerator.device)
        self.wrapped = self.accelerator.prepare_model(self.model)
        self.terminated = False
        # `accelerate launch` passes no SIGTERM on to a single process: it dies and leaves it alone
        self.launcher = os.getppid() if "ACCELERATE_MIXED_PRECISION" in os.environ else None
        weights = self.config.codebook_weights
        K = self.vocab.num_codebooks
        if weights is not None and len(weights) != K:
            raise ValueError(f"codebook_weights has {len(weights)} values, the model {K} codebooks")
        self.host_weights = torch.tensor(weights or [1.0] * K)
        self.log: RunLog | None = None

    def resume(self) -> int:
        """Go back to the last checkpoint; returns the step to start with."""
        folder = self.out / "checkpoints"
        steps = saved_steps(folder)
        start = steps[-1] if steps else 0
        if len(seen := set(gather_object([start]))) > 1:
            raise ValueError(
                f"the processes see different checkpoints in {folder} (steps {sorted(seen)}): put "
                "out= on storage that all machines share"
            )
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
        if start < config.steps:
            self.try_largest()
        pin = accelerator.device.type == "cuda"
        micro = config.packs_per_step // accelerator.num_processes
        depth = min(2 * micro, 8)  # of 42 MB of pinned text each, at 8192 positions of the 4B
        self.batches = Prefetch(self.loader, depth=depth, pin=pin, table=self.host_table)
        try:
            if start == 0 and self.valid is not None:
                self.validate(0)
            clock = Clock()
            for step in range(start, config.steps):
                packs = [next(self.batches) for _ in range(micro)]
                sums, norm, totals, stop = self.step(step, packs)
                clock.add(*totals)
                done = step + 1
                if step == start:
                    float(norm)  # waits for the device
                    seconds = time.monotonic() - self.launched
                    accelerator.print(f"first step done {seconds:.1f} s after the launch")
                last = done == config.steps
                logs = done % config.log_every == 0 or last
                saves = done % config.save_every == 0 or last or stop
                validates = self.valid is not None and (done % config.valid_every == 0 or last)
                speaks = config.sample_every and (done % config.sample_every == 0 or last)
                if (logs or saves or validates or speaks) and not torch.isfinite(norm):
                    # not each step, as it waits for the device; weights that are NaN stay so
                    raise ValueError(
                        f"step {done}: the gradient is not finite; lower lr, or set "
                        "precision=fp32. The last checkpoint is unharmed"
                    )
                if logs:
                    self.report(done, start, sums, norm, totals, clock)
                pause = time.monotonic()
                if validates:
                    self.validate(done)
                if speaks:
                    self.speak_samples(done)
                if saves:
                    self.save(done)
                clock.began += time.monotonic() - pause
                if stop and not last:
                    return False
            return True
        finally:
            signal.signal(signal.SIGTERM, previous)
            self.batches.close()
            if self.log is not None:
                self.log.close()

    def try_largest(self) -> None:
        """Forth and back on the largest pack, for nothing: memory fails now or not at all, and what
        is compiled is compiled before the clock runs. Twice where a step has several packs: from
        the second on their gradients lie beside the activations."""
        saved, device = random_state(), self.accelerator.device
        batch = self.loader.largest()
        if device.type == "cuda":  # what loading took is another matter
            torch.cuda.reset_peak_memory_stats(device)
        moments = []
        try:
            if not self.optimizer.state:  # the first step makes these, 29 GB of a full fine-tune
                trained = [p for p in self.model.parameters() if p.requires_grad]
                kind = torch.uint8 if self.config.optimizer == "adamw8bit" else None
                moments = [torch.zeros_like(p, dtype=kind) for p in trained for _ in range(2)]
            packs = self.config.packs_per_step // self.accelerator.num_processes
            with self.accelerator.no_sync(self.wrapped):
                for _ in range(min(2, packs)):
                    loss, _ = self.sums(self.wrapped, batch)
                    self.accelerator.backward(loss * 0)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"the largest pack ({batch.real_positions} positions) does not fit the memory: "
                "lower budget_positions (and raise packs_per_step as much), or set "
                f"checkpointing=selective or full, or method=qlora ({error})"
            ) from error
        del moments
        self.optimizer.zero_grad(set_to_none=True)
        set_random_state(saved)
        if device.type == "cuda":
            held = torch.cuda.max_memory_allocated(device) / GIB
            self.accelerator.print(f"memory: {held:.1f} GiB measured on the largest pack")

    def report(self, done: int, start: int, sums: LossSums, norm, totals, clock: Clock) -> None:
        """A line of figures. positions/s, its share of the card's peak and the real positions."""
        config, accelerator = self.config, self.accelerator
        figures = sums.means()  # waits for the device, so that the clock is right
        rate, frames = clock.rates()
        left = (config.steps - done) * clock.seconds() / (done - start)
        figures |= {
            "lr": learning_rate(config, done - 1),
            "grad_norm": float(norm),
            "positions_per_sec": rate,
            "audio_sec_per_sec": frames / self.vocab.frame_rate_hz,
            "real_share": totals[0] / totals[2],
            "pack_fill": totals[0] / (config.packs_per_step * config.budget_positions),
            "epoch": self.batches.state_dict()["epoch"],
        }
        peak = ""
        if self.peak is not None:
            flops = rate * self.shape.useful_flops(config.method) / accelerator.num_processes
            figures["peak_share"] = flops / (self.peak * 1e12)
            peak = f" ({figures['peak_share']:.0%} of peak)"
        self.record(done, figures)
        accelerator.print(
            f"step {done}/{config.steps}  loss {figures['loss']:.3f}  eoc "
            f"{figures.get('loss_eoc', float('nan')):.3f}  lr {figures['lr']:.2e}  "
            f"{rate:,.0f} positions/s{peak}  real {figures['real_share']:.1%}  "
            f"left {duration(left)}",
            flush=True,
        )

    def step(self, step: int, packs: list[Batch]) -> tuple[LossSums, Tensor, list[int], bool]:
        """One optimiser step over packs of this process.

        Returns sums over all processes, the gradient norm, [real positions, audio rows, positions]
        over all, and whether any process was told to stop. The divisor is the number of supervised
        cells in all packs of all processes, so how they are split changes nothing (facts trap 34).
        All of it is counted on the host: with one process nothing waits for the device.
        """
        accelerator, device = self.accelerator, self.accelerator.device
        cells = sum(float((p.supervised.sum((0, 1)) * self.host_weights).sum()) for p in packs)
        mine = [
            sum(p.real_positions for p in packs),
            sum(int(p.is_audio.sum()) for p in packs),
            sum(p.ids.shape[1] for p in packs),
        ]
        stop = self.terminated or self.launcher not in (None, os.getppid())
        shared = [cells, *mine, int(stop)]
        if accelerator.num_processes > 1:
            tensor = torch.tensor(shared, dtype=torch.float64, device=device)
            shared = accelerator.reduce(tensor, "sum").tolist()
        cells, *totals, stop = shared
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)
        self.optimizer.zero_grad(set_to_none=True)
        collected: LossSums | None = None
        for i, batch in enumerate(packs):
            last = i == len(packs) - 1
            with nullcontext() if last else accelerator.no_sync(self.wrapped):
                loss, sums = self.sums(self.wrapped, batch)
                # DDP averages gradients over processes; the sum is wanted
                accelerator.backward(loss * (accelerator.num_processes / cells))
            collected = sums if collected is None else collected + sums
        norm = torch.nn.utils.clip_grad_norm_(
            [p for p in self.model.parameters() if p.requires_grad], self.config.max_grad_norm
        )
        self.optimizer.step()
        stacked = accelerator.reduce(collected.stack(), "sum")
        return LossSums.unstack(stacked), norm, [int(t) for t in totals], stop > 0

    def sums(self, model: torch.nn.Module, pack: Batch) -> tuple[Tensor, LossSums]:
        """(weighted loss sum, sums without gradient) of a pack that is still on the host."""
        device = self.accelerator.device
        if pack.text is None and self.host_table is not None:  # not from `Prefetch`
            pack = replace(pack, text=self.host_table(pack.ids))
        targets = pack.targets(self.host_weights).to(device)
        out = model(**pack.to(device, non_blocking=True).inputs(), targets=targets)
        return out.loss, out.sums

    @torch.no_grad()
    def validate(self, step: int) -> None:
        """Loss per codebook and EOC over the validation rows, each shown the same way each time."""
        accelerator, valid = self.accelerator, self.valid
        self.model.eval()
        budget, pad = self.config.budget_positions, self.loader.pad
        loader = PackedLoader(valid.lengths, valid.build, budget, pad=pad)
        packs = loader.epoch_packs(0)
        mine = packs[accelerator.process_index :: accelerator.num_processes]
        K = self.vocab.num_codebooks
        total = LossSums(*torch.zeros(4, K, device=accelerator.device))
        with accelerator.autocast():
            for members in mine:
                batch = pack([valid.build(i, 0) for i in members], budget if pad else None)
                total = total + self.sums(self.model, batch)[1]
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
        source = self.valid if self.valid is not None else None
        texts = list(self.config.sample_texts) or (source.texts[:4] if source else [])
        if not texts:
            return
        saved = random_state()
        self.model.eval()
        # a few clips, decoded in fp32: kernels of half precision would be compiled for them
        higgs = Higgs(self.model, self.codec, self.vocab, Checkpoint(self.out, self.out.name))
        reference, said = None, None
        if source is not None:
            row = source.rows[len(source) - 1]
            reference, said = torch.as_tensor(row["codes"]), row["text"]
        # its own text is spoken without it: copying the answer would sound best of all
        refs = [None if text == said else (reference, said) for text in texts]
        self.codec.model.to(self.accelerator.device)
        with self.accelerator.autocast():
            spoken = higgs.speak(
                texts,
                [ref and ref[0] for ref in refs],
                [ref and ref[1] for ref in refs],
                sampling=Sampling(seed=self.config.seed),
            )
        self.codec.model.to("cpu")
        folder = self.out / "samples" / f"step-{step}"
        for i, (wav, _) in enumerate(spoken):
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
            loader = self.batches.state_dict()
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
