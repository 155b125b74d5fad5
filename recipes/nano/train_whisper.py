"""Train the nano whisper: openai-whisper's architecture and tokenizer on the closed domain.

    python -m recipes.nano.train_whisper --data /dev/shm/nano --out runs/nano/whisper --seconds 400

The encoder works on shortened windows first (cheap) and on whisper's full 30 s in the end. When a
codec checkpoint appears at `--codec`, part of each batch passes through it, so that the recogniser
hears speech and not one system's fingerprint. Writes `whisper.pt` ({"dims", "model_state_dict"}).
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.nano import upstream
from recipes.nano.pool import SpeechPool, add_floor, augment
from recipes.nano.texts import LANGUAGES
from recipes.nano.train_codec import ship

DIMS = dict(
    n_mels=80,
    n_vocab=51865,
    n_audio_ctx=1500,
    n_audio_state=192,
    n_audio_head=3,
    n_audio_layer=4,
    n_text_ctx=448,
    n_text_state=192,
    n_text_head=3,
    n_text_layer=2,
)
MAX_SAMPLES = 24_000 * 7 + 2 * 2_400
TIMESTAMPS = 0.25  # part of the examples written with begin and end times


def log_mel(wav_16khz: Tensor, filters: Tensor, frames: int) -> Tensor:
    """whisper.audio.log_mel_spectrogram for a batch [B, n] of 30 s windows cut to `frames`.

    The clip is taken as followed by silence, as `pad_or_trim` does, so the clamp and its floor are
    the same; only the silent frames that are cut off are not computed.
    """
    wav = F.pad(wav_16khz, (0, max(0, frames * 160 + 400 - wav_16khz.shape[-1])))
    window = torch.hann_window(400, device=wav.device)
    power = torch.stft(wav, 400, 160, window=window, return_complex=True)[..., :frames].abs() ** 2
    log = torch.clamp(filters @ power, min=1e-10).log10()
    log = torch.maximum(log, log.amax(dim=(1, 2), keepdim=True) - 8.0)
    return (log + 4.0) / 4.0


class Targets:
    """Token sequences: <|sot|> <|lang|> <|transcribe|> [times | no times] text <|eot|>."""

    def __init__(self, whisper):
        self.by_language = {
            code: whisper.tokenizer.get_tokenizer(True, language=code, task="transcribe")
            for code in LANGUAGES
        }
        self.cache: dict[tuple[str, str], list[int]] = {}

    def tokens(self, text: str, language: str, end_sec: float | None) -> list[int]:
        tokenizer = self.by_language[language]
        key = (language, text)
        if key not in self.cache:
            spoken = text.split("|>")[-1]
            self.cache[key] = tokenizer.encode(" " + spoken if language != "zh" else spoken)
        words = self.cache[key]
        head = list(tokenizer.sot_sequence)
        if end_sec is None:
            return [*head, tokenizer.no_timestamps, *words, tokenizer.eot]
        begin = tokenizer.timestamp_begin
        return [*head, begin, *words, begin + round(end_sec / 0.02), tokenizer.eot]

    def batch(self, sequences: list[list[int]], device) -> tuple[Tensor, Tensor]:
        """(inputs [B, L], labels [B, L], -100 where no loss falls)."""
        length = -(-max(map(len, sequences)) // 8) * 8
        eot = self.by_language["en"].eot
        inputs = torch.full((len(sequences), length - 1), eot)
        labels = torch.full((len(sequences), length - 1), -100)
        for i, sequence in enumerate(sequences):
            inputs[i, : len(sequence) - 1] = torch.tensor(sequence[:-1])
            labels[i, : len(sequence) - 1] = torch.tensor(sequence[1:])
            labels[i, 1] = -100  # the task is forced
        return inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def used_tokens(targets: Targets, rows) -> Tensor:
    """Sorted ids that training ever shows; all other rows share one vector."""
    used = set(range(50_257, 51_865))  # specials, languages, timestamps
    for row in rows:
        used.update(targets.tokens(row.text, row.language, None))
    return torch.tensor(sorted(used))


class CompactVocabulary:
    """Train only the used rows and one row that stands for all others.

    The model is whisper's own with a table of len(used) + 1 rows. The last row's logit counts once
    per unused token (plus ln n), so the loss is exactly that of the full table whose unused rows
    share one vector; that vector is trained, since a zero row has logit 0 and could win.
    """

    def __init__(self, model, used: Tensor):
        full = model.decoder.token_embedding.weight.data
        self.used, self.model, self.size = used, model, len(full)
        unused = torch.ones(self.size, dtype=torch.bool, device=full.device)
        unused[used] = False
        self.to_compact = torch.full((self.size,), len(used), device=full.device)
        self.to_compact[used] = torch.arange(len(used), device=full.device)
        table = torch.nn.Embedding(len(used) + 1, full.shape[1], device=full.device)
        table.weight.data = torch.cat([full[used], full[unused].mean(0, keepdim=True)])
        model.decoder.token_embedding = table
        self.bonus = torch.zeros(len(used) + 1, device=full.device)
        self.bonus[-1] = math.log(int(unused.sum()))

    def state_dict(self) -> dict[str, Tensor]:
        """Whisper's full state."""
        state = {
            k: v.detach().float().cpu().contiguous() for k, v in self.model.state_dict().items()
        }
        name = "decoder.token_embedding.weight"
        state[name] = state[name][self.to_compact.cpu()].contiguous()
        return state


def save(vocabulary: CompactVocabulary, out: Path) -> None:
    checkpoint = {"dims": DIMS, "model_state_dict": vocabulary.state_dict()}
    torch.save(checkpoint, out / "whisper.tmp")
    os.replace(out / "whisper.tmp", out / "whisper.pt")
    compact = {
        k: v.detach().half().cpu().contiguous() for k, v in vocabulary.model.state_dict().items()
    }
    ship(compact | {"used": vocabulary.used.cpu()}, "whisper")


def load_codec(path: Path, device):
    """A narrow codec from a trained or a packaged file."""
    from higgs_lab.nano.packing import expand_codec
    from recipes.nano.codec_model import build_codec

    model = build_codec()
    model.load_state_dict(expand_codec(path, None))
    return model.to(device).eval()


@torch.no_grad()
def through_codec(codec, wav: Tensor) -> Tensor:
    """[B, n] -> [B, n], encoded and decoded."""
    from recipes.nano.codec_model import decode_codes, encode_codes

    return decode_codes(codec, encode_codes(codec, wav))[:, : wav.shape[-1]].float()


def refresh_codec(path: Path | None, state: dict, device):
    """The newest codec checkpoint at `path`, loaded again when the file has changed."""
    if path and path.exists() and path.stat().st_mtime != state.get("time"):
        state["time"] = path.stat().st_mtime
        state["codec"] = load_codec(path, device)
    return state.get("codec")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--batch", type=int, default=160)
    parser.add_argument("--hours", type=float, default=60)
    parser.add_argument("--wait-hours", type=float, default=2)
    parser.add_argument("--lr", type=float, default=1.6e-3)
    parser.add_argument("--full-window", type=float, default=0.3, help="last part, at 30 s")
    parser.add_argument("--codec", type=Path)
    parser.add_argument("--codec-part", type=float, default=0.25)
    parser.add_argument("--init", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    whisper = upstream.whisper()
    import torchaudio

    device = torch.device(args.device)
    dims = whisper.model.ModelDimensions(**DIMS)
    model = whisper.model.Whisper(dims)
    for module in model.modules():  # GPT-like start; openai's own code leaves torch's defaults
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=0.03)
            if getattr(module, "bias", None) is not None:
                torch.nn.init.zeros_(module.bias)
    torch.nn.init.normal_(model.decoder.positional_embedding, std=0.02)
    model = model.to(device)
    targets = Targets(whisper)
    pool = SpeechPool(args.data, device, args.hours)
    pool.wait(min(args.wait_hours, args.hours))
    # the domain's tokens, from texts drawn anew: the shards still coming hold no others
    import random

    from recipes.nano.pool import Row
    from recipes.nano.texts import draw_text

    rng = random.Random(7)
    drawn = [
        Row(0, 0, draw_text(code, rng, None), code, 0) for code in LANGUAGES for _ in range(6000)
    ]
    used = used_tokens(targets, drawn).to(device)
    vocabulary = CompactVocabulary(model, used)
    if args.init:  # a `whisper.fp16.safetensors` of an earlier run
        from safetensors.torch import load_file

        state = load_file(args.init)
        if not torch.equal(state.pop("used"), used.cpu()):
            raise ValueError(f"{args.init} was trained for another vocabulary")
        model.load_state_dict({name: value.float() for name, value in state.items()})
    mel_path = Path(whisper.__file__).parent / "assets" / "mel_filters.npz"
    filters = torch.from_numpy(np.load(mel_path)["mel_80"]).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    resample = torchaudio.transforms.Resample(24_000, 16_000).to(device)
    positional = model.encoder.positional_embedding.clone()
    autocast = torch.autocast(
        device.type, torch.bfloat16, enabled=device.type == "cuda" or "NANO_BF16" in os.environ
    )
    print(
        f"whisper {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
        f"{len(used)} tokens used",
        flush=True,
    )

    def forward(index: Tensor, context: int, train: bool) -> tuple[Tensor, Tensor]:
        rows = [pool.rows[i] for i in index.tolist()]
        lead = torch.randint(0, 4_800, (len(rows),), device=device) if train else None
        samples = min(MAX_SAMPLES + 4_800, context * 480)
        if train:
            wav = pool.gather(index, samples)
            position = torch.arange(samples, device=device) - lead[:, None]
            wav = wav.gather(1, position.clamp(min=0)) * (position >= 0)
            codec = refresh_codec(args.codec, codec_state, device)
            if codec is not None:
                part = int(len(rows) * args.codec_part)
                longest = int(pool.samples[index[:part]].max()) + 4_800 + 960
                longest = -(-longest // 9_600) * 9_600
                with autocast:
                    wav[:part, :longest] = through_codec(codec, add_floor(wav[:part, :longest]))
            wav = augment(wav) + torch.randn_like(wav) * 10 ** (
                -(torch.rand(len(rows), 1, device=device) * 2 + 3)
            )
        else:
            wav = add_floor(pool.gather(index, samples))
        sequences = []
        for i, row in enumerate(rows):
            timed = train and i % 100 < 100 * TIMESTAMPS
            end = None
            if timed:
                end = (row.samples + int(lead[i])) / 24_000
            sequences.append(targets.tokens(row.text, row.language, end))
        inputs, labels = targets.batch(sequences, device)
        mel = log_mel(resample(wav), filters, context * 2)
        # the encoder insists on its whole positional table: lend it the part in use
        model.encoder.positional_embedding = positional[:context]
        with autocast:
            hidden = model.encoder(mel)
            logits = model.decoder(vocabulary.to_compact[inputs], hidden) + vocabulary.bonus
        labels = torch.where(labels < 0, labels, vocabulary.to_compact[labels.clamp(min=0)])
        model.encoder.positional_embedding = positional
        loss = F.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, label_smoothing=0.02
        )
        right = (logits.argmax(-1) == labels) | (labels == -100)
        return loss, right[:, 2:].all(-1).float().mean()

    begin = last_save = time.time()
    step, logged, codec_state = 0, 0, {}
    while (elapsed := time.time() - begin) < args.seconds:
        progress = elapsed / args.seconds
        rate = min(1, (step + 1) / 300) * (0.5 + 0.5 * math.cos(math.pi * progress)) + 3e-3
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate
        if step % 100 == 50:
            pool.refresh()
        full = progress > 1 - args.full_window
        context = 1500 if full else 375
        size = args.batch
        index = torch.randint(len(pool.rows), (size,), device=device)
        loss, right = forward(index, context, train=True)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if time.time() - begin > logged * 10:
            logged += 1
            print(
                f"whisper {elapsed:5.0f}s step {step} context {context} loss {loss.item():.4f} "
                f"whole sentences right {right.item():.3f} hours {pool.hours:.1f} "
                f"codec {'codec' in codec_state}",
                flush=True,
            )
        if time.time() - last_save > 60:
            save(vocabulary, args.out)
            last_save = time.time()
    save(vocabulary, args.out)
    if args.test:
        pool = SpeechPool(args.test, device, 2.0)
        pool.wait(0.1)
        with torch.no_grad():
            parts = torch.arange(min(1024, len(pool.rows)), device=device).split(128)
            scores = [forward(part, 1500, train=False) for part in parts]
        print(
            f"whisper held-out loss {np.mean([s[0].item() for s in scores]):.4f}, teacher-forced "
            f"whole sentences right {np.mean([s[1].item() for s in scores]):.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
