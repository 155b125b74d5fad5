"""Train the nano codec: straight-through RVQ, EMA codebooks, multi-resolution spectral losses.

    python -m recipes.nano.train_codec --data /dev/shm/nano --out runs/nano/codec --seconds 360

Time is the budget: the learning rate is a cosine over `--seconds`. `codec.safetensors` in `--out`
is rewritten every minute, so that the other parts can pick it up and a time-out loses nothing.
"""

from __future__ import annotations

import argparse
from functools import lru_cache

import torch
from safetensors.torch import save_file
from torch import Tensor

from higgs_lab.nano.packing import codec_core, expand_codec, pack, round_trip, wants_int8
from recipes.nano.codec_model import (
    DECODER_HIDDEN,
    LEVEL,
    TrainableRVQ,
    build_codec,
    encode_hidden,
)
from recipes.nano.common import Clock, atomically, autocast, options, state_of
from recipes.nano.discriminator import Discriminator
from recipes.nano.pool import SpeechPool, add_floor

SCALES = ((128, 12), (256, 24), (512, 48), (1024, 80), (2048, 128))  # window, mel bands
START_CROPS = 512  # of one second: 12,800 vectors for the k-means of 1,024 codes


@lru_cache(maxsize=16)
def mel_filters(n_fft: int, bands: int, device: str) -> Tensor:
    """[n_fft/2+1, bands] triangles on the HTK mel scale, 0 to 12 kHz."""
    import torchaudio

    filters = torchaudio.functional.melscale_fbanks(n_fft // 2 + 1, 0.0, 12_000.0, bands, 24_000)
    return filters.to(device)


def spectral_loss(fake: Tensor, real: Tensor) -> Tensor:
    """Mean L1 of log-mel over five windows, plus L1 of log magnitudes on three of them."""
    total = fake.new_zeros(())
    for n_fft, bands in SCALES:
        window = torch.hann_window(n_fft, device=fake.device)
        both = torch.stft(
            torch.cat([fake, real]).float(), n_fft, n_fft // 4, window=window, return_complex=True
        ).abs()
        mel = torch.einsum("bft,fm->bmt", both, mel_filters(n_fft, bands, str(fake.device)))
        a, b = torch.log10(mel.clamp(min=1e-3)).chunk(2)
        total = total + (a - b).abs().mean()
        if n_fft >= 512:
            a, b = both.chunk(2)
            total = (
                total + 0.5 * (a.clamp(min=2e-3).log10() - b.clamp(min=2e-3).log10()).abs().mean()
            )
            total = total + 0.1 * (a - b).norm() / (b.norm() + 1e-6)
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


def save(model, args: argparse.Namespace) -> None:
    """The whole state, and the packaged one in --ship."""
    tensors = state_of(model)
    atomically(args.out / "codec.safetensors", lambda path: save_file(tensors, path))
    if args.ship:
        args.ship.mkdir(parents=True, exist_ok=True)
        core = codec_core(tensors)
        atomically(args.ship / "codec.safetensors", lambda path: pack(core, path, {}))


@torch.no_grad()
def finish(model, args: argparse.Namespace) -> None:
    """Round the weights to what the packaged file can hold, so that all later parts see those."""
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(round_trip(value, wants_int8(name, value)))
    save(model, args)


def main(argv: list[str] | None = None) -> None:
    parser = options(__doc__, seconds=360, hours=20, batch=64, lr=1.2e-3)
    parser.add_argument("--decoder-hidden", type=int, default=DECODER_HIDDEN)
    parser.add_argument("--warm", type=float, default=0.2, help="share of the time without codes")
    parser.add_argument("--crop-frames", type=int, default=25, help="of 40 ms")
    parser.add_argument(
        "--adversary",
        type=float,
        default=0.4,
        help="share of the time before it joins; 1: never",
    )
    parser.add_argument("--wave", type=float, default=1.0, help="weight of the wave, after --warm")
    parser.add_argument(
        "--compile",
        default="inductor" if torch.cuda.is_available() else "",
        help="torch.compile backend of the Snake activations; empty: run eagerly",
    )
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    device = torch.device(args.device)
    model = build_codec(decoder_hidden=args.decoder_hidden).to(device)
    if args.init:
        model.load_state_dict(expand_codec(args.init, None))
    rvq = TrainableRVQ(model.quantizer).to(device)
    parts = [model.acoustic_encoder, model.acoustic_decoder, model.fc, model.fc2, model.quantizer]
    parameters = [p for part in parts for p in part.parameters()]
    alphas = [m.alpha.data for m in model.modules() if type(m).__name__ == "Snake1d"]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.8, 0.99), weight_decay=1e-3)
    adversary = Discriminator().to(device)
    opponent = torch.optim.AdamW(adversary.parameters(), lr=3e-4, betas=(0.8, 0.99))
    if args.compile:
        fuse_snakes(model, args.compile)
    pool = SpeechPool(args.data, device, args.hours)
    pool.wait(min(1.0, args.hours))
    test = SpeechPool(args.test, device, 1.0) if args.test else None
    started = bool(args.init)  # with codes; before, it is a plain autoencoder of waves
    clock = Clock(args, warm_steps=100)
    while clock.tick(optimizer):
        if clock.step % 200 == 100:
            pool.refresh()
        clip = crops(pool, args.batch, 960 * args.crop_frames)
        with autocast(args):
            hidden = encode_hidden(model, clip)
        if not started and clock.progress < args.warm:
            quantised, commit, left = hidden.float(), hidden.new_zeros(()), hidden.new_zeros(())
        else:
            if not started:
                started = True
                with torch.no_grad(), autocast(args):
                    seen = crops(pool, START_CROPS).split(args.batch)
                    rvq.start(torch.cat([encode_hidden(model, c) for c in seen]))
            some = torch.rand(args.batch, device=device) < 0.15  # quantiser dropout
            keep = torch.where(some, torch.randint(1, 9, (args.batch,), device=device), 8)
            quantised, commit, left = rvq(hidden, keep)
        with autocast(args):
            acoustic = model.fc2(quantised.transpose(1, 2)).transpose(1, 2)
            fake = model.acoustic_decoder(acoustic)[:, 0]
        fake = fake.float()
        loss = spectral_loss(fake, clip)
        wave = (fake - clip).square().mean() / LEVEL**2
        if started:
            total = loss + args.wave * wave + 0.1 * commit + 0.1 * left
        else:
            total = 0.2 * loss + 5 * wave
        told = score = distance = loss.new_zeros(())
        if clock.progress >= args.adversary:
            with autocast(args):
                told = adversary.loss(fake.detach(), clip)
            opponent.zero_grad(set_to_none=True)
            told.backward()
            opponent.step()
            with autocast(args):
                score, distance = adversary.judge(fake, clip)
            total = total + 0.1 * score + 0.5 * distance
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 2.0)
        optimizer.step()
        torch._foreach_clamp_min_(alphas, 0.02)  # Snake divides by them
        if clock.to_log():
            print(
                f"codec {clock.elapsed:5.0f}s step {clock.step} loss {loss.item():.3f} wave "
                f"{wave.item():.3f} commit "
                f"{commit.item():.3f} left {left.item():.3f} told {told.item():.3f} "
                f"score {score.item():.3f} features {distance.item():.3f} hours {pool.hours:.1f}",
                flush=True,
            )
        if started and clock.to_save():
            save(model, args)
    report(model, rvq, test or pool)
    finish(model, args)
    report(model, rvq, test or pool)


def crops(pool: SpeechPool, count: int, samples: int = 24_000) -> Tensor:
    """[count, samples] of random speech at slightly varied levels, with the noise floor."""
    index = torch.randint(len(pool.rows), (count,), device=pool.device)
    level = 10 ** (torch.randn(count, 1, device=pool.device) * 0.15)
    return add_floor(pool.crops(index, samples) * level)


@torch.no_grad()
def report(model, rvq, pool) -> None:
    """Held-out loss and the number of codes used per codebook."""
    pool.wait(0.05)
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
    rvq.train()


if __name__ == "__main__":
    main()
