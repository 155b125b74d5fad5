"""Train the nano ecapa: SpeechBrain's ECAPA-TDNN with narrow layers, AAM-softmax over the voices.

    python -m recipes.nano.train_ecapa --data /dev/shm/nano --out runs/nano/ecapa --seconds 240

Writes `embedding_model.ckpt`; `recipes.nano.pack` adds the folder files that
`EncoderClassifier.from_hparams` reads.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from recipes.nano import upstream
from recipes.nano.pool import SpeechPool, add_floor, augment
from recipes.nano.train_codec import ship
from recipes.nano.train_whisper import refresh_codec, through_codec
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


def equal_error_rate(same: torch.Tensor, other: torch.Tensor) -> float:
    """The rate at which false accepts equal false rejects."""
    thresholds = torch.cat([same, other]).sort().values
    accept = 1 - torch.searchsorted(other.sort().values, thresholds).float() / len(other)
    reject = torch.searchsorted(same.sort().values, thresholds).float() / len(same)
    at = (accept - reject).abs().argmin()
    return float((accept[at] + reject[at]) / 2)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--hours", type=float, default=60)
    parser.add_argument("--wait-hours", type=float, default=4)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--codec", type=Path)
    parser.add_argument("--codec-part", type=float, default=0.25)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(2)
    torch.set_float32_matmul_precision("high")
    ECAPA_TDNN, Fbank, InputNormalization = upstream.ecapa_parts()
    import torchaudio

    device = torch.device(args.device)
    model = ECAPA_TDNN(**SIZES).to(device)
    fbank = Fbank(n_mels=80).to(device)
    normalise = InputNormalization(norm_type="sentence", std_norm=False).to(device)
    resample = torchaudio.transforms.Resample(24_000, 16_000).to(device)
    classes = sum(voice.split == "train" for voice in all_voices())
    weight = torch.nn.Parameter(torch.randn(classes, SIZES["lin_neurons"], device=device) * 0.05)
    optimizer = torch.optim.AdamW([*model.parameters(), weight], lr=args.lr, weight_decay=2e-4)
    pool = SpeechPool(args.data, device, args.hours)
    pool.wait(min(args.wait_hours, args.hours))
    autocast = torch.autocast(
        device.type, torch.bfloat16, enabled=device.type == "cuda" or "NANO_BF16" in os.environ
    )
    print(
        f"ecapa {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
        f"{classes} voices",
        flush=True,
    )

    def embed(wav: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            features = fbank(resample(wav))
            features = normalise(features, torch.ones(len(wav), device=device))
        with autocast:
            return model(features)[:, 0].float()

    begin = last_save = time.time()
    step, logged, codec_state = 0, 0, {}
    while (elapsed := time.time() - begin) < args.seconds:
        progress = elapsed / args.seconds
        rate = min(1, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * progress)) + 3e-3
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate
        if step % 100 == 50:
            pool.refresh()
        index = torch.randint(len(pool.rows), (args.batch,), device=device)
        samples = (24_960, 36_480, 48_000, 72_000)[step % 4]
        with torch.no_grad():
            wav = pool.crops(index, samples)
            codec = refresh_codec(args.codec, codec_state, device)
            if codec is not None:
                part = int(len(wav) * args.codec_part)
                with autocast:
                    wav[:part] = through_codec(codec, add_floor(wav[:part]))
            wav = augment(wav) + torch.randn_like(wav) * 10 ** (
                -(torch.rand(len(wav), 1, device=device) * 2 + 3)
            )
        cosine = F.normalize(embed(wav)) @ F.normalize(weight).T
        label = pool.voice[index]
        margin = MARGIN * min(1.0, progress / 0.3)
        right = cosine.gather(1, label[:, None]).clamp(-0.9999, 0.9999)
        harder = torch.cos(torch.acos(right) + margin)
        loss = F.cross_entropy(cosine.scatter(1, label[:, None], harder.to(cosine)) * SCALE, label)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        step += 1
        if time.time() - begin > logged * 10:
            logged += 1
            accuracy = (cosine.argmax(-1) == label).float().mean()
            print(
                f"ecapa {elapsed:5.0f}s step {step} loss {loss.item():.4f} accuracy "
                f"{accuracy.item():.3f} hours {pool.hours:.1f} codec {'codec' in codec_state}",
                flush=True,
            )
        if time.time() - last_save > 60:
            save(model, args.out)
            last_save = time.time()
    save(model, args.out)
    if args.test:
        report(model, embed, SpeechPool(args.test, device, 2.0))


def save(model, out: Path) -> None:
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    torch.save(state, out / "embedding_model.tmp")
    os.replace(out / "embedding_model.tmp", out / "embedding_model.ckpt")
    ship(state, "ecapa")


@torch.no_grad()
def report(model, embed, pool) -> None:
    """EER over all pairs of held-out voices; `recipes.nano.evaluate` measures the strict trials."""
    pool.wait(0.1)
    model.eval()
    index = torch.arange(min(2000, len(pool.rows)), device=pool.device)
    parts = [embed(add_floor(pool.crops(part, 48_000))) for part in index.split(200)]
    vectors = F.normalize(torch.cat(parts))
    scores, voice = vectors @ vectors.T, pool.voice[index]
    pairs = torch.ones_like(scores, dtype=torch.bool).triu(1)
    same = voice[:, None] == voice[None, :]
    rate = equal_error_rate(scores[pairs & same], scores[pairs & ~same])
    print(f"ecapa held-out voices: EER {100 * rate:.2f} % over all pairs", flush=True)


if __name__ == "__main__":
    main()
