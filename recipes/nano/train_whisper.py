"""Train the nano whisper: openai-whisper's architecture and tokenizer on the closed domain.

    python -m recipes.nano.train_whisper --data /dev/shm/nano --out runs/nano/whisper --seconds 400

The encoder works on shortened windows first (cheap) and on whisper's full 30 s in the end. When a
codec checkpoint appears at `--codec`, part of each batch passes through it, so that the recogniser
hears speech and not one system's fingerprint. Writes `whisper.pt` ({"dims", "model_state_dict"}).
"""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.nano import upstream
from recipes.nano.codec_model import refresh_codec, through_codec
from recipes.nano.common import Clock, atomically, autocast, options, ship, state_of
from recipes.nano.pool import Row, SpeechPool, add_floor, augment
from recipes.nano.texts import LANGUAGES, draw_text

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
SHORT_CONTEXT, FULL_CONTEXT = 375, 1500  # encoder positions of 20 ms: 7.5 s and whisper's 30 s
MAX_SAMPLES = 24_000 * 7 + 2 * 2_400
LEAD = 4_800  # silence before the speech, at most
TIMESTAMPS = 0.15  # part of the examples written with begin and end times


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


def save(vocabulary: CompactVocabulary, args: argparse.Namespace) -> None:
    """whisper's own checkpoint, and the compact one in --ship, in fp16."""
    checkpoint = {"dims": DIMS, "model_state_dict": vocabulary.state_dict()}
    atomically(args.out / "whisper.pt", lambda path: torch.save(checkpoint, path))
    ship(state_of(vocabulary.model) | {"used": vocabulary.used.cpu()}, args.ship, "whisper")


def main(argv: list[str] | None = None) -> None:
    parser = options(__doc__, seconds=400, hours=60, batch=160, lr=1.6e-3)
    parser.add_argument("--wait-hours", type=float, default=2, help="speech to begin with")
    parser.add_argument("--full-window", type=float, default=0.2, help="last part, at 30 s")
    parser.add_argument("--codec", type=Path, help="codec.safetensors, may come while training")
    parser.add_argument("--codec-part", type=float, default=0.25, help="of a batch, through it")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    whisper = upstream.whisper()
    device = torch.device(args.device)
    model = build_whisper(whisper).to(device)
    targets = Targets(whisper)
    pool = SpeechPool(args.data, device, args.hours)
    pool.wait(min(args.wait_hours, args.hours))
    used = used_tokens(targets, drawn_rows()).to(device)
    vocabulary = CompactVocabulary(model, used)
    if args.init:  # the `whisper.safetensors` of an earlier --ship
        from safetensors.torch import load_file

        state = load_file(args.init)
        if not torch.equal(state.pop("used"), used.cpu()):
            raise ValueError(f"{args.init} was trained for another vocabulary")
        model.load_state_dict({name: value.float() for name, value in state.items()})
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01,
        fused=device.type == "cuda",
    )  # fmt: skip
    examples = Examples(whisper, targets, pool, args)
    print(
        f"whisper {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
        f"{len(used)} tokens used",
        flush=True,
    )
    clock, generator = Clock(args, warm_steps=300), torch.Generator().manual_seed(4)
    while clock.tick(optimizer):
        if clock.step % 100 == 50:
            pool.refresh()
        full = clock.progress > 1 - args.full_window
        size = args.batch // 2 if full else args.batch
        index = torch.randint(len(pool.rows), (size,), generator=generator)
        batch = examples.train(index, FULL_CONTEXT if full else SHORT_CONTEXT)
        loss, right = loss_of(vocabulary, *batch, autocast(args))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if clock.to_log():
            print(
                f"whisper {clock.elapsed:5.0f}s step {clock.step} full {full} loss "
                f"{loss.item():.4f} whole sentences right {right.item():.3f} hours "
                f"{pool.hours:.1f} codec {'codec' in examples.codec}",
                flush=True,
            )
        if clock.to_save():
            save(vocabulary, args)
    save(vocabulary, args)
    if args.test:
        report(vocabulary, Examples(whisper, targets, SpeechPool(args.test, device, 2.0), args))


def build_whisper(whisper) -> torch.nn.Module:
    """openai-whisper's model with random weights; its own code leaves torch's defaults."""
    model = whisper.model.Whisper(whisper.model.ModelDimensions(**DIMS))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=0.03)
            if getattr(module, "bias", None) is not None:
                torch.nn.init.zeros_(module.bias)
    torch.nn.init.normal_(model.decoder.positional_embedding, std=0.02)
    return model


def drawn_rows(texts: int = 6000) -> list[Row]:
    """Texts drawn anew, for the tokens of the domain: shards still to come hold no others."""
    rng = random.Random(7)
    return [
        Row(0, 0, draw_text(code, rng, None), code, 0) for code in LANGUAGES for _ in range(texts)
    ]


class Examples:
    """Utterances of a pool as log-mels and token targets."""

    def __init__(self, whisper, targets: Targets, pool: SpeechPool, args: argparse.Namespace):
        import torchaudio

        device = torch.device(args.device)
        mel = np.load(Path(whisper.__file__).parent / "assets" / "mel_filters.npz")["mel_80"]
        self.filters = torch.from_numpy(mel).to(device)
        self.resample = torchaudio.transforms.Resample(24_000, 16_000).to(device)
        self.targets, self.pool, self.args, self.device = targets, pool, args, device
        self.codec: dict = {}

    def train(self, index: Tensor, context: int) -> tuple[Tensor, Tensor, Tensor]:
        """(log-mel [B, 80, 2 * context], inputs, labels) of augmented speech; index on the CPU."""
        pool, device = self.pool, self.device
        rows = [pool.rows[i] for i in index.tolist()]
        samples = min(MAX_SAMPLES + LEAD, context * 480)
        lead = torch.randint(0, LEAD, (len(rows),))
        wav = pool.gather(index.to(device), samples)
        position = torch.arange(samples, device=device) - lead.to(device)[:, None]
        wav = wav.gather(1, position.clamp(min=0)) * (position >= 0)
        codec = refresh_codec(self.args.codec, self.codec, device)
        part = int(len(rows) * self.args.codec_part)
        if codec is not None and part:
            longest = max(row.samples for row in rows[:part]) + LEAD
            longest = min(-(-longest // 9_600) * 9_600, samples)  # few shapes: cuDNN plans each
            with autocast(self.args):
                wav[:part, :longest] = through_codec(codec, add_floor(wav[:part, :longest]))
        level = 10 ** -(torch.rand(len(rows), 1, device=device) * 2 + 3)
        wav = augment(wav) + torch.randn_like(wav) * level
        timed = torch.rand(len(rows)) < TIMESTAMPS
        ends = [
            (row.samples + int(first)) / 24_000 if say else None
            for row, first, say in zip(rows, lead, timed, strict=True)
        ]
        return self._batch(wav, rows, ends, context)

    def test(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same without augmentation, at whisper's own 30 s."""
        rows = [self.pool.rows[i] for i in index.tolist()]
        wav = add_floor(self.pool.gather(index.to(self.device), MAX_SAMPLES))
        return self._batch(wav, rows, [None] * len(rows), FULL_CONTEXT)

    def _batch(self, wav: Tensor, rows: list[Row], ends: list[float | None], context: int):
        sequences = [
            self.targets.tokens(row.text, row.language, end)
            for row, end in zip(rows, ends, strict=True)
        ]
        mel = log_mel(self.resample(wav), self.filters, context * 2)
        return mel, *self.targets.batch(sequences, self.device)


def loss_of(
    vocabulary: CompactVocabulary, mel: Tensor, inputs: Tensor, labels: Tensor, precision
) -> tuple[Tensor, Tensor]:
    """(cross-entropy, share of sentences with every token right)."""
    model, context = vocabulary.model, mel.shape[-1] // 2
    positional = model.encoder.positional_embedding
    # the encoder insists on its whole positional table: lend it the part in use
    model.encoder.positional_embedding = positional[:context]
    with precision:
        hidden = model.encoder(mel)
        logits = model.decoder(vocabulary.to_compact[inputs], hidden) + vocabulary.bonus
    model.encoder.positional_embedding = positional
    labels = torch.where(labels < 0, labels, vocabulary.to_compact[labels.clamp(min=0)])
    loss = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, label_smoothing=0.02
    )
    right = (logits.argmax(-1) == labels) | (labels == -100)
    return loss, right[:, 2:].all(-1).float().mean()


@torch.no_grad()
def report(vocabulary: CompactVocabulary, examples: Examples) -> None:
    """Teacher-forced figures on held-out speech; recipes.nano.evaluate measures the WER."""
    examples.pool.wait(0.1)
    parts = torch.arange(min(1024, len(examples.pool.rows))).split(128)
    scores = [loss_of(vocabulary, *examples.test(p), autocast(examples.args)) for p in parts]
    loss, right = (np.mean([score[i].item() for score in scores]) for i in (0, 1))
    print(
        f"whisper held-out loss {loss:.4f}, teacher-forced whole sentences right {right:.4f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
