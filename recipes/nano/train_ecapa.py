"""Train the nano ecapa: SpeechBrain's ECAPA-TDNN with narrow layers, AAM-softmax over the voices.

    python -m recipes.nano.train_ecapa --data /dev/shm/nano --out runs/nano/ecapa --seconds 240

Writes `embedding_model.ckpt`; `recipes.nano.pack` adds the folder files that
`EncoderClassifier.from_hparams` reads.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.nano import upstream
from recipes.nano.codec_model import refresh_codec, through_codec
from recipes.nano.common import Clock, atomically, autocast, options, ship, state_of
from recipes.nano.pool import SpeechPool, add_floor, augment
from recipes.nano.voices import all_voices

SIZES = dict(
    input_size=80,
    channels=[192, 192, 192, 192, 576],
    kernel_sizes=[5, 3, 3, 3, 1],
    dilations=[1, 2, 3, 4, 1],
    attention_channels=64,
    lin_neurons=128,
    res2net_scale=4,
    se_channels=64,
)
MARGIN, SCALE = 0.2, 30.0
CROPS = (24_960, 36_480, 48_000, 72_000)  # samples, whole codec frames


def equal_error_rate(same: torch.Tensor, other: torch.Tensor) -> float:
    """The rate at which false accepts equal false rejects."""
    thresholds = torch.cat([same, other]).sort().values
    accept = 1 - torch.searchsorted(other.sort().values, thresholds).float() / len(other)
    reject = torch.searchsorted(same.sort().values, thresholds).float() / len(same)
    at = (accept - reject).abs().argmin()
    return float((accept[at] + reject[at]) / 2)


def main(argv: list[str] | None = None) -> None:
    parser = options(__doc__, seconds=240, hours=60, batch=256, lr=2e-3)
    parser.add_argument("--wait-hours", type=float, default=4, help="speech to begin with")
    parser.add_argument("--codec", type=Path, help="codec.safetensors, may come while training")
    parser.add_argument("--codec-part", type=float, default=0.25, help="of a batch, through it")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(2)
    torch.set_float32_matmul_precision("high")
    device = torch.device(args.device)
    embedder = Embedder(args)
    classes = sum(voice.split == "train" for voice in all_voices())
    weight = torch.nn.Parameter(torch.randn(classes, SIZES["lin_neurons"], device=device) * 0.05)
    optimizer = torch.optim.AdamW(
        [*embedder.model.parameters(), weight], lr=args.lr, weight_decay=2e-4,
        fused=device.type == "cuda",
    )  # fmt: skip
    pool = SpeechPool(args.data, device, args.hours)
    pool.wait(min(args.wait_hours, args.hours))
    count = sum(p.numel() for p in embedder.model.parameters())
    print(f"ecapa {count / 1e6:.2f} M parameters, {classes} voices", flush=True)
    clock, codec_state = Clock(args, warm_steps=200), {}
    while clock.tick(optimizer):
        if clock.step % 100 == 50:
            pool.refresh()
        index = torch.randint(len(pool.rows), (args.batch,), device=device)
        samples = CROPS[clock.step % len(CROPS)]
        wav = speech_of(pool, index, samples, refresh_codec(args.codec, codec_state, device), args)
        cosine = F.normalize(embedder(wav)) @ F.normalize(weight).T
        label = pool.voice[index]
        margin = MARGIN * min(1.0, clock.progress / 0.3)
        right = cosine.gather(1, label[:, None]).clamp(-0.9999, 0.9999)
        harder = torch.cos(torch.acos(right) + margin)
        loss = F.cross_entropy(cosine.scatter(1, label[:, None], harder.to(cosine)) * SCALE, label)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(embedder.model.parameters(), 5.0)
        optimizer.step()
        if clock.to_log():
            accuracy = (cosine.argmax(-1) == label).float().mean()
            print(
                f"ecapa {clock.elapsed:5.0f}s step {clock.step} loss {loss.item():.4f} accuracy "
                f"{accuracy.item():.3f} hours {pool.hours:.1f} codec {'codec' in codec_state}",
                flush=True,
            )
        if clock.to_save():
            save(embedder.model, args)
    save(embedder.model, args)
    if args.test:
        report(embedder, SpeechPool(args.test, device, 2.0))


class Embedder:
    """SpeechBrain's ECAPA behind its own features, wav [B, n] at 24 kHz -> [B, lin_neurons]."""

    def __init__(self, args: argparse.Namespace):
        import torchaudio

        ECAPA_TDNN, Fbank, InputNormalization = upstream.ecapa_parts()
        device = torch.device(args.device)
        self.model = ECAPA_TDNN(**SIZES).to(device)
        if args.init:
            self.model.load_state_dict(torch.load(args.init, map_location=device))
        self.fbank = Fbank(n_mels=80).to(device)
        self.normalise = InputNormalization(norm_type="sentence", std_norm=False).to(device)
        self.resample = torchaudio.transforms.Resample(24_000, 16_000).to(device)
        self.precision = autocast(args)

    def __call__(self, wav: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.fbank(self.resample(wav))
            features = self.normalise(features, torch.ones(len(wav), device=wav.device))
        with self.precision:
            return self.model(features)[:, 0].float()


@torch.no_grad()
def speech_of(pool: SpeechPool, index: Tensor, samples: int, codec, args) -> Tensor:
    """[B, samples] augmented windows, a part of them through the codec."""
    wav = pool.crops(index, samples)
    if codec is not None:
        part = int(len(wav) * args.codec_part)
        with autocast(args):
            wav[:part] = through_codec(codec, add_floor(wav[:part]))
    level = 10 ** -(torch.rand(len(wav), 1, device=wav.device) * 2 + 3)
    return augment(wav) + torch.randn_like(wav) * level


def save(model: torch.nn.Module, args: argparse.Namespace) -> None:
    state = state_of(model)
    atomically(args.out / "embedding_model.ckpt", lambda path: torch.save(state, path))
    ship(state, args.ship, "ecapa")


@torch.no_grad()
def report(embedder: Embedder, pool: SpeechPool) -> None:
    """EER over all pairs of held-out voices; `recipes.nano.evaluate` measures the strict trials."""
    pool.wait(0.1)
    embedder.model.eval()
    index = torch.arange(min(2000, len(pool.rows)), device=pool.device)
    parts = [embedder(add_floor(pool.crops(part, 48_000))) for part in index.split(200)]
    vectors = F.normalize(torch.cat(parts))
    scores, voice = vectors @ vectors.T, pool.voice[index]
    pairs = torch.ones_like(scores, dtype=torch.bool).triu(1)
    same = voice[:, None] == voice[None, :]
    rate = equal_error_rate(scores[pairs & same], scores[pairs & ~same])
    print(f"ecapa held-out voices: EER {100 * rate:.2f} % over all pairs", flush=True)


if __name__ == "__main__":
    main()
