"""What the codec's training has tell its speech from real speech.

Spectral losses alone leave voices hoarse: they say how loud a band is, hardly whether a harmonic is
a line. Complex spectra in three sizes (EnCodec, arXiv:2210.13438, §3.4) and the wave folded at five
periods (HiFi-GAN, arXiv:2010.05646, §2.3), both narrower than there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, pad

from recipes.nano.common import hann

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
        x, features = self.image(wav), []
        for layer in self.layers:
            x = leaky_relu(layer(x), 0.2)
            features.append(x)
        return self.last(x), features


class Discriminator(nn.Module):
    """Multi-resolution spectra and multiple periods, judged together; wav [B, n] at 24 kHz."""

    def __init__(self, width: int = 32):
        super().__init__()
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

    def loss(self, fake: Tensor, real: Tensor) -> Tensor:
        """Least squares of telling fake from real (LSGAN), the discriminator's own loss."""
        total = fake.new_zeros(())
        for score, _ in self(torch.cat([fake, real])):
            of_fake, of_real = score.float().chunk(2)
            total = total + of_fake.square().mean() + (1 - of_real).square().mean()
        return total / len(self.parts)

    def generator_losses(self, fake: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """What the codec makes small: (adversarial loss, feature matching, relative to real)."""
        score, distance, layers = fake.new_zeros(()), fake.new_zeros(()), 0
        with torch.no_grad():
            wanted = self(real)
        for (mine, features), (_, targets) in zip(self(fake), wanted, strict=True):
            score = score + (1 - mine.float()).square().mean()
            for a, b in zip(features, targets, strict=True):
                b = b.float()
                distance = distance + (a.float() - b).abs().mean() / b.abs().mean().clamp(min=1e-3)
                layers += 1
        return score / len(self.parts), distance / layers
