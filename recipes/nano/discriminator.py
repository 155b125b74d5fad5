"""What the codec's training has tell its speech from real speech, and voices from each other.

Spectral losses alone leave voices hoarse: they say how loud a band is, hardly whether a harmonic is
a line. Complex spectra in three sizes (EnCodec, arXiv:2210.13438, §3.4) and the wave folded at five
periods (HiFi-GAN, arXiv:2010.05646, §2.3), both narrower than there. A classifier of the family's
voices beside them knows what makes a voice; it is not the family's speaker encoder, which judges.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, leaky_relu, normalize, pad

from recipes.nano.common import hann, log_mel

WINDOWS = (2048, 1024, 512)
PERIODS = (2, 3, 5, 7, 11)


def stft_image(wav: Tensor, n_fft: int) -> Tensor:
    """wav [B, n] -> its complex spectrum [B, 2, frames, n_fft / 2 + 1], real and imaginary."""
    window = hann(n_fft, str(wav.device))
    spectrum = torch.stft(
        wav.float(), n_fft, n_fft // 4, window=window, normalized=True, return_complex=True
    )
    x = torch.view_as_real(spectrum).permute(0, 3, 2, 1)
    return 15 * x  # speech of the family's level then has a spread of about one


def period_image(wav: Tensor, period: int) -> Tensor:
    """wav [B, n] -> folded [B, 1, ceil(n / period), period]."""
    wav = pad(wav, (0, -wav.shape[-1] % period))
    return 10 * wav.unflatten(-1, (-1, period))[:, None]


class ImageDiscriminator(nn.Module):
    """Convolutions over an image of the wave.

    image: wav [B, n] -> [B, C, H, W]; channels: of each layer's input and output; the first layer
    does not stride. `forward` gives (scores [B, 1, H', W'], the output of every layer).
    """

    def __init__(
        self,
        image: Callable[[Tensor], Tensor],
        channels: list[int],
        kernel: tuple[int, int],
        stride: tuple[int, int],
        dilations: tuple[int, ...],
    ):
        super().__init__()
        self.image = image
        pairs = zip(channels, channels[1:], dilations, strict=False)
        self.layers = nn.ModuleList(
            nn.Conv2d(
                a, b, kernel, stride if i else 1, (kernel[0] // 2 * d, kernel[1] // 2), (d, 1)
            )
            for i, (a, b, d) in enumerate(pairs)
        )
        self.last = nn.Conv2d(channels[-1], 1, 3, padding=1)

    def forward(self, wav: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, features = self.image(wav).contiguous(memory_format=torch.channels_last), []
        for layer in self.layers:
            x = leaky_relu(layer(x), 0.2)
            features.append(x)
        return self.last(x), features


class VoiceClassifier(nn.Module):
    """Which of the family's voices a wave [B, n] is of: convolutions over its log-mel spectrum.

    `forward` gives (logits [B, voices], the output of every layer and the embedding).
    """

    def __init__(self, voices: int, width: int = 256, bands: int = 80):
        super().__init__()
        self.bands = bands
        self.layers = nn.ModuleList(
            nn.Conv1d(a, width, 5, stride, 2 * dilation, dilation)
            for a, stride, dilation in ((bands, 1, 1), (width, 2, 1), (width, 1, 2), (width, 1, 3))
        )
        self.embed = nn.Linear(2 * width, 128)
        self.classify = nn.Linear(128, voices, bias=False)

    def forward(self, wav: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, features = log_mel(wav, 1024, 256, self.bands), []
        for layer in self.layers:
            x = leaky_relu(layer(x), 0.2)
            features.append(x)
        wide = x.float()
        embedding = normalize(self.embed(torch.cat([wide.mean(-1), wide.std(-1)], 1)).float())
        features.append(embedding)
        return 16 * nn.functional.linear(embedding, normalize(self.classify.weight)), features


def feature_distance(mine: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Sum over layers of the mean distance, relative to the targets' level."""
    return sum(
        (a - b).abs().mean(dtype=torch.float32) / b.abs().mean(dtype=torch.float32).clamp(min=1e-3)
        for a, b in zip(mine, targets, strict=True)
    )


class Discriminator(nn.Module):
    """Several spectra and periods of a wave [B, n] at 24 kHz, beside a classifier of voices."""

    def __init__(self, voices: int, width: int = 32):
        super().__init__()
        self.voice = VoiceClassifier(voices)
        spectra = [2] + [width] * 4
        folded = [1, width // 2, width, 2 * width, 2 * width]
        self.parts = nn.ModuleList(
            [
                ImageDiscriminator(
                    partial(stft_image, n_fft=n), spectra, (3, 9), (1, 2), (1, 1, 2, 4)
                )
                for n in WINDOWS
            ]
            + [
                ImageDiscriminator(
                    partial(period_image, period=p), folded, (5, 1), (3, 1), (1, 1, 1, 1)
                )
                for p in PERIODS
            ]
        )

    def forward(self, wav: Tensor) -> list[tuple[Tensor, list[Tensor]]]:
        return [part(wav) for part in self.parts]

    def loss(self, fake: Tensor, real: Tensor, voice: Tensor) -> tuple[Tensor, Tensor]:
        """The discriminator's own losses: least squares of telling fake from real (LSGAN), and of
        naming the `voice` [B] of what is real."""
        total = fake.new_zeros(())
        for score, _ in self(torch.cat([fake, real])):
            of_fake, of_real = score.float().chunk(2)
            total = total + of_fake.square().mean() + (1 - of_real).square().mean()
        logits, _ = self.voice(real)
        return total / len(self.parts), cross_entropy(logits.float(), voice)

    def generator_losses(self, fake: Tensor, real: Tensor) -> dict[str, Tensor]:
        """What the codec makes small: adversarial, and features' distances, relative to real."""
        self.requires_grad_(False)  # no gradients of weights that this step leaves alone
        with torch.no_grad():
            wanted, (_, wanted_voice) = self(real), self.voice(real)
        score, distance, layers = fake.new_zeros(()), fake.new_zeros(()), 0
        for (mine, features), (_, targets) in zip(self(fake), wanted, strict=True):
            score = score + (1 - mine.float()).square().mean()
            distance = distance + feature_distance(features, targets)
            layers += len(targets)
        _, features = self.voice(fake)
        self.requires_grad_(True)
        return {
            "adversarial": score / len(self.parts),
            "matching": distance / layers,
            "voice": feature_distance(features, wanted_voice) / len(features),
        }
