"""What the nano family's training scripts share: options, a clock, files that get home."""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn


def options(doc: str, *, seconds: float, hours: float, batch: int, lr: float):
    """Parser of a part's training script, with the options that all parts have."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of shards, see recipes.nano.data")
    add("--test", type=Path, help="folder of shards of held-out voices and texts")
    add("--out", type=Path, required=True, help="folder for what is trained")
    add("--ship", type=Path, help="folder for small copies, rewritten while training")
    add("--init", type=Path, help="weights to go on from")
    add("--seconds", type=float, default=seconds, help="the learning rate is a cosine over these")
    add("--hours", type=float, default=hours, help="speech held on the device at most")
    add("--batch", type=int, default=batch)
    add("--lr", type=float, default=lr)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--bf16", action="store_true", help="autocast on a CPU too, to try what a GPU will do")
    return parser


def autocast(args: argparse.Namespace) -> torch.autocast:
    kind = torch.device(args.device).type
    return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda" or args.bf16)


@lru_cache(maxsize=16)  # made before a step is recorded, not in it
def hann(n_fft: int, device: str) -> Tensor:
    return torch.hann_window(n_fft, device=device)


@lru_cache(maxsize=16)
def mel_filters(n_fft: int, bands: int, device: str) -> Tensor:
    """[n_fft/2+1, bands] triangles on the HTK mel scale, 0 to 12 kHz."""
    import torchaudio

    filters = torchaudio.functional.melscale_fbanks(n_fft // 2 + 1, 0.0, 12_000.0, bands, 24_000)
    return filters.to(device)


def log_mel(wav: Tensor, n_fft: int, hop: int, bands: int) -> Tensor:
    """wav [B, n] at 24 kHz -> log10 mel magnitudes [B, bands, n / hop + 1], about -2 to 2."""
    device = str(wav.device)
    window = hann(n_fft, device)
    spectrum = torch.stft(wav.float(), n_fft, hop, window=window, return_complex=True).abs()
    mel = torch.einsum("bft,fm->bmt", spectrum, mel_filters(n_fft, bands, device))
    return 1 + mel.clamp(min=1e-3).log10()


class Clock:
    """Time is the budget: progress, learning rate, and when to log and to save."""

    def __init__(self, args: argparse.Namespace, warm_steps: int, log_sec=10.0, save_sec=15.0):
        self.seconds, self.lr, self.warm_steps = args.seconds, args.lr, warm_steps
        self.begin = self.saved = time.time()
        self.log_sec, self.save_sec, self.logged, self.step = log_sec, save_sec, 0, 0

    @property
    def elapsed(self) -> float:
        return time.time() - self.begin

    @property
    def progress(self) -> float:
        return min(1.0, self.elapsed / self.seconds)

    def tick(self, optimizer: torch.optim.Optimizer) -> bool:
        """Set the learning rate of the next step; False when the time is up."""
        if self.elapsed >= self.seconds:
            return False
        cosine = 0.5 + 0.5 * math.cos(math.pi * self.progress)
        rate = min(1.0, (self.step + 1) / self.warm_steps) * cosine + 3e-3
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):  # of a recorded step
                group["lr"].fill_(self.lr * rate)
            else:
                group["lr"] = self.lr * rate
        self.step += 1
        return True

    def to_log(self) -> bool:
        due = self.elapsed > self.logged * self.log_sec
        self.logged += due
        return due

    def to_save(self) -> bool:
        due = time.time() - self.saved > self.save_sec
        if due:
            self.saved = time.time()
        return due


class LastGood:
    """A copy of all that training changes, to go back to when the loss has run away.

    Ten minutes on a rented card should not be lost to one bad moment: a rate that was right for
    four trainings made the fifth diverge in its first minute. Copies go into the same tensors, so
    that recorded steps stay valid.
    """

    def __init__(
        self, modules: list[nn.Module], optimizers: list[torch.optim.Optimizer], clock: Clock
    ):
        self.modules, self.optimizers, self.clock = modules, optimizers, clock
        self.restart()

    def restart(self) -> None:
        """Forget what was reached, where losses from now on cannot be compared with it."""
        self.best = math.inf
        self.copies: list[tuple[Tensor, Tensor]] = []

    def check(self, loss: float, run_away: float = 2.0) -> None:
        """Keep the state when `loss` is near the best so far; else go back and halve the rate.

        Raises RuntimeError when the loss is not finite and there is nothing to go back to.
        """
        if math.isfinite(loss) and loss < run_away * self.best:
            self.best = min(self.best, loss)
            self.copies = [(tensor, tensor.detach().clone()) for tensor in self._tensors()]
            return
        if not self.copies:
            raise RuntimeError(f"the first loss is {loss}")
        with torch.no_grad():
            known = {id(tensor) for tensor, _ in self.copies}
            for tensor, copy in self.copies:
                tensor.copy_(copy)
            for tensor in self._tensors():  # an optimiser that has begun since
                if id(tensor) not in known:
                    tensor.zero_()
        self.clock.lr /= 2
        print(f"loss {loss:.3g}: back to the last good state, rate {self.clock.lr:.2g}", flush=True)

    def _tensors(self) -> list[Tensor]:
        found = [t for m in self.modules for t in (*m.parameters(), *m.buffers())]
        states = [state for o in self.optimizers for state in o.state.values()]
        return found + [t for state in states for t in state.values() if isinstance(t, Tensor)]


def atomically(path: Path, write: Callable[[Path], None]) -> None:
    """`write(temporary)`, then the name: a reader never meets half a file."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """The weights on the CPU, as they are."""
    return {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}


def ship(tensors: dict[str, Tensor], folder: Path | None, name: str) -> None:
    """`name`.safetensors in `folder`, floats as fp16; nothing without a folder."""
    if folder is None:
        return
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    half = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
    atomically(folder / f"{name}.safetensors", lambda path: save_file(half, path))
