"""What the codec's training hears words with: a small recogniser whose features are matched.

Spectral losses weigh what is loud, the adversary what is natural; which of a consonant's faint
traits carries the word neither knows. A convolutional recogniser of the training speech does (CTC,
Graves et al. 2006, over the UTF-8 bytes of the text). It learns first, for some seconds, on clean
speech, and is not the family's recogniser, which judges.
"""

from __future__ import annotations

import argparse
import random

import torch
from torch import Tensor, nn
from torch.nn.functional import ctc_loss

from recipes.nano.common import Clock, autocast, log_mel
from recipes.nano.pool import SpeechPool, add_floor

BLANK = 0  # bytes of text, which has no NUL
LONGEST_SEC = 3.0  # of the utterances that it learns from: most of them


class Listener(nn.Module):
    """wav [B, n] at 24 kHz -> (logits of bytes [B, 256, T], every layer's output [B, width, T]);
    T is about n / 480, 50 a second."""

    def __init__(self, width: int = 256, bands: int = 80):
        super().__init__()
        self.bands = bands
        shapes = [(bands, 2, 1)] + [(width, 1, d) for d in (1, 2, 4, 8)]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv1d(a, width, 5, s, 2 * d, d), nn.BatchNorm1d(width), nn.ReLU())
            for a, s, d in shapes
        )
        self.spell = nn.Conv1d(width, 256, 1)

    def forward(self, wav: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, features = log_mel(wav, 512, 240, self.bands), []
        for number, layer in enumerate(self.layers):
            y = layer(x)
            x = x + y if number else y
            features.append(x)
        return self.spell(x), features


def spoken_bytes(text: str) -> bytes:
    """What is said of an utterance's text, without its tag."""
    return text.split("|>")[-1].encode()


def train_listener(pool: SpeechPool, args: argparse.Namespace, seconds: float) -> Listener:
    """A listener that has learnt from the pool for `seconds`; it does not learn any more.

    args: the codec's, of which it takes the device and twice the batch. Raises ValueError when the
    pool holds no utterance of LONGEST_SEC or less.
    """
    device, batch = torch.device(args.device), 2 * args.batch
    listener = Listener().to(device)
    optimizer = torch.optim.AdamW(listener.parameters(), lr=0.0, weight_decay=1e-2)
    mine = argparse.Namespace(seconds=seconds, lr=2e-3)
    clock, rng, rows = Clock(mine, warm_steps=100), random.Random(0), []
    while clock.tick(optimizer):
        if clock.step % 100 == 1:
            pool.refresh()
            rows = [i for i, row in enumerate(pool.rows) if row.samples <= LONGEST_SEC * 24_000]
            if not rows:
                raise ValueError(f"{pool.folder}: no utterance is {LONGEST_SEC} s or shorter")
        index = rng.choices(rows, k=batch)
        texts = [spoken_bytes(pool.rows[i].text) for i in index]
        wav = pool.gather(torch.tensor(index, device=device), int(LONGEST_SEC * 24_000))
        level = 10 ** (torch.randn(batch, 1, device=device) * 0.15)
        with autocast(args):
            logits, _ = listener(add_floor(wav * level))
        loss = ctc_loss(
            logits.float().log_softmax(1).permute(2, 0, 1),
            torch.tensor(list(b"".join(texts)), device=device),
            torch.tensor([pool.rows[i].samples // 480 for i in index]),
            torch.tensor([len(text) for text in texts]),
            blank=BLANK,
            zero_infinity=True,
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(listener.parameters(), 1.0)
        optimizer.step()
        if clock.to_log():
            print(
                f"listener {clock.elapsed:4.0f}s step {clock.step} ctc {loss.item():.3f}",
                flush=True,
            )
    return listener.eval().requires_grad_(False)
