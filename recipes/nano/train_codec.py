"""Train the nano codec: straight-through RVQ, EMA codebooks, multi-resolution spectral losses.

    python -m recipes.nano.train_codec --data /dev/shm/nano --out runs/nano/codec --seconds 540
    python -m recipes.nano.train_codec ... --init codec.safetensors --decoder-only --lr 5e-4

Time is the budget: the learning rate is a cosine over `--seconds`. `codec.safetensors` in `--out`
is rewritten every 15 seconds, so that the other parts can pick it up and a time-out loses nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from higgs_lab.nano.packing import (
    codec_core,
    expand_codec,
    is_packaged,
    pack,
    round_trip,
    wants_int8,
)
from recipes.nano.codec_model import (
    DECODER_HIDDEN,
    TrainableRVQ,
    build_codec,
    encode_hidden,
)
from recipes.nano.common import (
    Clock,
    LastGood,
    atomically,
    autocast,
    hann,
    mel_filters,
    options,
    state_of,
)
from recipes.nano.discriminator import Discriminator, feature_distance
from recipes.nano.listener import Listener, train_listener
from recipes.nano.pool import SpeechPool, add_floor
from recipes.nano.voices import all_voices

SCALES = ((128, 12), (256, 24), (512, 48), (1024, 80), (2048, 128))  # window, mel bands
# With more of the adversary (0.5 and matching 2, or matching 3) the quantisers lost hold of what
# the encoder says: what they leave over ("left") grew from 0.45 to 0.8, where it ends at 0.56 with
# these, and word errors with it.
WEIGHTS = {
    "commit": 0.1,
    "left": 0.1,
    "adversarial": 0.1,
    "matching": 1.0,
    "voice": 2.0,
    "words": 2.0,
}  # beside the spectral loss
START_CROPS = 512  # of one second: 12,800 vectors for the k-means of 1,024 codes


def spectral_loss(fake: Tensor, real: Tensor) -> Tensor:
    """Mean L1 of log-mel over five windows, plus L1 of log magnitudes on three of them."""
    total = fake.new_zeros(())
    for n_fft, bands in SCALES:
        window = hann(n_fft, str(fake.device))
        both = torch.stft(
            torch.cat([fake, real]).float(), n_fft, n_fft // 4, window=window, return_complex=True
        ).abs()
        mel = torch.einsum("bft,fm->bmt", both, mel_filters(n_fft, bands, str(fake.device)))
        a, b = torch.log10(mel.clamp(min=1e-3)).chunk(2)
        total = total + (a - b).abs().mean()
        if n_fft >= 512:
            a, b = both.chunk(2)
            total = total + (a.clamp(min=2e-3).log10() - b.clamp(min=2e-3).log10()).abs().mean()
            total = total + 0.3 * (a - b).norm() / (b.norm() + 1e-6)
    return total


def snake(x: Tensor, alpha: Tensor) -> Tensor:
    """DAC's activation, computed in fp32 and returned in x's dtype."""
    wide = x.float()
    return (wide + (alpha + 1e-9).reciprocal() * torch.sin(alpha * wide).pow(2)).to(x.dtype)


def fuse_snakes(model, backend: str) -> None:
    """Run every Snake activation as one compiled kernel: most of what compiling the whole model
    gains, for seconds instead of minutes of compilation."""
    torch._dynamo.config.suppress_errors = True
    torch._dynamo.config.force_parameter_static_shapes = False
    torch._dynamo.config.recompile_limit = 64
    fused = torch.compile(snake, backend=backend, dynamic=True)
    for module in model.modules():
        if type(module).__name__ == "Snake1d":
            module.forward = lambda x, alpha=module.alpha: fused(x, alpha)


def save(model, args: argparse.Namespace, ship: bool = True) -> None:
    """The whole state, and the packaged one in --ship."""
    tensors = state_of(model)
    atomically(args.out / "codec.safetensors", lambda path: save_file(tensors, path))
    if args.ship and ship:
        args.ship.mkdir(parents=True, exist_ok=True)
        atomically(args.ship / "codec.safetensors", lambda path: package(tensors, args, path))


def package(tensors: dict[str, Tensor], args: argparse.Namespace, path: Path) -> None:
    """The packaged file. What makes codes is taken from --init as it stands if it was not trained:
    packed once more, rows would get other scales, and users other codes than the talker learns."""
    core = codec_core(tensors)
    if not args.decoder_only:
        pack(core, path, {})
        return
    pack({name: value for name, value in core.items() if decodes(name)}, path, {})
    trained = load(path.read_bytes())
    kept = {name: value for name, value in load_file(args.init).items() if not decodes(name)}
    save_file(trained | kept, path)


def decodes(name: str) -> bool:
    """Whether a weight plays its part behind the codes."""
    return name.startswith(("acoustic_decoder.", "fc2."))


@torch.no_grad()
def finish(model, args: argparse.Namespace) -> None:
    """Round the weights to what the packaged file holds, so that all later parts see those.

    That file is written before: packed once more, it would be another, as above.
    """
    save(model, args)
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not (args.decoder_only and not decodes(name)):
            value.copy_(round_trip(value, wants_int8(name, value)))
    save(model, args, ship=False)


class Training:
    """The codec with its losses and optimisers; each method is one whole step on `clip`.

    Methods give what is logged. All tensors stay where they are, so that a step can be recorded as
    a CUDA graph: launched one by one, its many small kernels keep the device waiting for the host.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device, listener: Listener | None):
        self.args, self.model = args, build_codec(decoder_hidden=args.decoder_hidden).to(device)
        model, self.listener = self.model, listener
        if args.init:
            model.load_state_dict(expand_codec(args.init, None))
        if args.compile:
            fuse_snakes(model, args.compile)
        self.rvq = TrainableRVQ(model.quantizer).to(device)
        parts = [model.acoustic_decoder, model.fc2]
        if args.decoder_only:
            model.requires_grad_(False)
            self.rvq.eval()
        else:
            parts += [model.acoustic_encoder, model.fc, model.quantizer]
        self.parameters = [p.requires_grad_() for part in parts for p in part.parameters()]
        self.alphas = [m.alpha.data for m in model.modules() if type(m).__name__ == "Snake1d"]
        gpu = device.type == "cuda"
        options = dict(betas=(0.8, 0.99), capturable=gpu)
        lr = torch.tensor(args.lr, device=device) if gpu else args.lr
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=1e-3, **options)
        self.discriminator = Discriminator(len(all_voices())).to(
            device, memory_format=torch.channels_last
        )
        self.discriminator_optimizer = torch.optim.AdamW(
            self.discriminator.parameters(), lr=3e-4, **options
        )
        self.clip = torch.zeros(args.batch, 960 * args.crop_frames, device=device)
        self.voice = torch.zeros(args.batch, dtype=torch.long, device=device)
        self.keep = torch.full((args.batch,), 8, device=device)

    def plain(self) -> dict[str, Tensor]:
        """Without codes: an autoencoder."""
        return self._update(self._decode(self._encode().float()))

    def coded(self) -> dict[str, Tensor]:
        quantised, commit, left = self.rvq(self._encode(), self.keep)
        fake = self._decode(quantised)
        return self._update(fake, commit=commit, left=left, **self._words(fake))

    def adversarial(self) -> dict[str, Tensor]:
        """`coded`, with a step of the discriminator before."""
        quantised, commit, left = self.rvq(self._encode(), self.keep)
        fake = self._decode(quantised)
        with self._autocast():
            told, named = self.discriminator.loss(fake.detach(), self.clip, self.voice)
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        (told + named).backward()
        self.discriminator_optimizer.step()
        with self._autocast():
            terms = self.discriminator.generator_losses(fake, self.clip)
        found = self._update(fake, commit=commit, left=left, **self._words(fake), **terms)
        return found | {"discriminator": told.detach(), "named": named.detach()}

    def _autocast(self):
        return autocast(self.args)

    def _encode(self) -> Tensor:
        with self._autocast():
            return encode_hidden(self.model, self.clip)

    def _decode(self, hidden: Tensor) -> Tensor:
        with self._autocast():
            acoustic = self.model.fc2(hidden.transpose(1, 2)).transpose(1, 2)
            return self.model.acoustic_decoder(acoustic)[:, 0].float()

    def _words(self, fake: Tensor) -> dict[str, Tensor]:
        """Distance of what the listener makes of `fake` from what it makes of the clip."""
        if self.listener is None:
            return {}
        with self._autocast():
            with torch.no_grad():
                _, wanted = self.listener(self.clip)
            _, features = self.listener(fake)
        return {"words": feature_distance(features, wanted) / len(features)}

    def _update(self, fake: Tensor, **terms: Tensor) -> dict[str, Tensor]:
        loss = spectral_loss(fake, self.clip)
        total = loss + sum(WEIGHTS[name] * term for name, term in terms.items())
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 2.0)
        self.optimizer.step()
        torch._foreach_clamp_min_(self.alphas, 0.02)  # Snake divides by them
        return {name: term.detach() for name, term in ({"loss": loss} | terms).items()}


def recorded(step: Callable[[], dict], device: torch.device) -> Callable[[], dict]:
    """The step as a CUDA graph, after some as it is; on a CPU as it is for ever."""
    if device.type != "cuda":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(4):  # compiles, chooses convolutions, makes the optimisers' state
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()

    def replay() -> dict:
        graph.replay()
        return found

    return replay


def main(argv: list[str] | None = None) -> None:
    parser = options(__doc__, seconds=540, hours=20, batch=24, lr=8e-4)
    parser.add_argument("--decoder-hidden", type=int, default=DECODER_HIDDEN)
    parser.add_argument("--crop-frames", type=int, default=16, help="of 40 ms")
    parser.add_argument(
        "--plain", type=float, default=0.025, help="share of the time without codes"
    )
    parser.add_argument(
        "--adversarial", type=float, default=0.12, help="share of the time before the discriminator"
    )
    parser.add_argument(
        "--listen", type=float, default=30, help="seconds of the listener's own; 0: none"
    )
    parser.add_argument(
        "--decoder-only", action="store_true", help="leave the codes of --init as they are"
    )
    parser.add_argument(
        "--compile",
        default="inductor" if torch.cuda.is_available() else "",
        help="torch.compile backend of the Snake activations; empty: run eagerly",
    )
    args = parser.parse_args(argv)
    if args.decoder_only and not (args.init and is_packaged(args.init)):
        parser.error("--decoder-only keeps a packaged codec's codes: give one of --ship by --init")
    if not 0 <= args.listen < args.seconds:
        parser.error("--listen takes its seconds, 0 for none, out of --seconds")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    device = torch.device(args.device)
    pool = SpeechPool(args.data, device, args.hours)
    pool.wait(min(1.0, args.hours))
    test = SpeechPool(args.test, device, 1.0) if args.test else None
    args.seconds -= args.listen
    listener = train_listener(pool, args, args.listen) if args.listen else None
    training = Training(args, device, listener)
    phase, step = "", lambda: {}
    clock = Clock(args, warm_steps=100)
    good = LastGood(
        [training.model, training.discriminator],
        [training.optimizer, training.discriminator_optimizer],
        clock,
    )
    while clock.tick(training.optimizer):
        if clock.step % 200 == 100:
            pool.refresh()
        wanted = "plain" if clock.progress < args.plain and not args.init else "coded"
        if clock.progress >= args.adversarial:
            wanted = "adversarial"
        feed(training, pool, clock.step)
        if wanted != phase:
            if wanted != "plain" and (phase == "plain" or not phase and not args.init):
                start_codes(training, pool)
                good.restart()  # without codes the loss is lower, and there are no codebooks yet
            phase = wanted
            step = recorded(getattr(training, phase), device)
        found = step()
        if clock.to_log():
            figures = " ".join(f"{name} {value.item():.3f}" for name, value in found.items())
            print(
                f"codec {clock.elapsed:5.0f}s {phase} step {clock.step} {figures} "
                f"hours {pool.hours:.1f}",
                flush=True,
            )
            good.check(found["loss"].item())
        if phase != "plain" and clock.to_save():
            save(training.model, args)
    report(training.model, training.rvq, test or pool)
    finish(training.model, args)
    report(training.model, training.rvq, test or pool)


@torch.no_grad()
def feed(training: Training, pool: SpeechPool, number: int) -> None:
    """The next clips, and how many codebooks each may use: mostly all."""
    B, device = len(training.clip), training.clip.device
    clip, voice = crops(pool, B, training.clip.shape[1])
    training.clip.copy_(clip)
    training.voice.copy_(voice)
    fewer = torch.rand(B, device=device) < 0.15
    training.keep.copy_(torch.where(fewer, torch.randint(1, 9, (B,), device=device), 8))
    training.rvq.revive.fill_(number % 10 == 0)


@torch.no_grad()
def start_codes(training: Training, pool: SpeechPool) -> None:
    hidden = []
    for clip in crops(pool, START_CROPS)[0].split(training.args.batch):
        with autocast(training.args):
            hidden.append(encode_hidden(training.model, clip))
    training.rvq.start(torch.cat(hidden).float())


def crops(pool: SpeechPool, count: int, samples: int = 24_000) -> tuple[Tensor, Tensor]:
    """[count, samples] of random speech at slightly varied levels, with the noise floor; and the
    voices [count]."""
    index = torch.randint(len(pool.rows), (count,), device=pool.device)
    level = 10 ** (torch.randn(count, 1, device=pool.device) * 0.15)
    return add_floor(pool.crops(index, samples) * level), pool.voice[index]


@torch.no_grad()
def report(model, rvq, pool) -> None:
    """Held-out loss and the number of codes used per codebook."""
    pool.wait(0.05)
    training = rvq.training
    rvq.eval()
    index = torch.arange(min(192, len(pool.rows)), device=pool.device)
    clip = add_floor(pool.crops(index, 36_480))
    hidden = encode_hidden(model, clip).float()
    codes = model.quantizer.encode(hidden)  # [K, B, T]
    fake = model.decode(codes.transpose(0, 1), return_dict=False)[:, 0]
    used = [int(c.unique().numel()) for c in codes]
    print(
        f"codec held-out loss {spectral_loss(fake.float(), clip).item():.4f} codes used {used}",
        flush=True,
    )
    rvq.train(training)


if __name__ == "__main__":
    main()
