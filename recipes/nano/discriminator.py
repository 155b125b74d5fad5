"""What the codec's training has tell its speech from real speech.

Spectral losses alone leave voices hoarse: they say how loud a band is, hardly whether a harmonic is
a line. Complex spectra in three sizes (EnCodec, arXiv:2210.13438, §3.4) and the wave folded at five
periods (HiFi-GAN, arXiv:2010.05646, §2.3), both narrower than there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, pad

WINDOWS = (2048, 1024, 512)
PERIODS = (2, 3, 5, 7, 11)


class Part(nn.Module):
    """Convolutions over an image of the wave: `forward` gives scores and every layer's features."""

    def __init__(self, channels: list[int], kernel, stride, dilations, padding):
        super().__init__()
        pairs = list(zip(channels, channels[1:], strict=False))
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, kernel, stride if i else 1, padding(d), (d, 1))
            for i, ((a, b), d) in enumerate(zip(pairs, dilations, strict=True))
        )
        self.last = nn.Conv2d(channels[-1], 1, 3, padding=1)

    def image(self, wav: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, wav: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, features = self.image(wav), []
        for layer in self.layers:
            x = leaky_relu(layer(x), 0.2)
            features.append(x)
        return self.last(x), features


class OfSpectrum(Part):
    def __init__(self, n_fft: int, width: int):
        super().__init__([2] + [width] * 4, (3, 9), (1, 2), (1, 1, 2, 4), lambda d: (d, 4))
        self.n_fft = n_fft
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)

    def image(self, wav: Tensor) -> Tensor:
        spectrum = torch.stft(
            wav.float(), self.n_fft, self.n_fft // 4, window=self.window, normalized=True,
            return_complex=True,
        )  # fmt: skip
        x = torch.view_as_real(spectrum).permute(0, 3, 2, 1)  # [B, 2, T, F]
        return 15 * x  # speech of the family's level then has a spread of about one


class OfPeriod(Part):
    def __init__(self, period: int, width: int):
        channels = [1, width // 2, width, 2 * width, 2 * width]
        super().__init__(channels, (5, 1), (3, 1), (1, 1, 1, 1), lambda d: (2, 0))
        self.period = period

    def image(self, wav: Tensor) -> Tensor:
        wav = pad(wav, (0, -wav.shape[-1] % self.period))
        return 10 * wav.unflatten(-1, (-1, self.period))[:, None]  # [B, 1, n / period, period]


class Discriminator(nn.Module):
    def __init__(self, width: int = 32):
        super().__init__()
        self.parts = nn.ModuleList(
            [OfSpectrum(n, width) for n in WINDOWS] + [OfPeriod(p, width) for p in PERIODS]
        )

    def forward(self, wav: Tensor) -> list[tuple[Tensor, list[Tensor]]]:
        return [part(wav) for part in self.parts]

    def loss(self, fake: Tensor, real: Tensor) -> Tensor:
        """Least squares of telling them apart."""
        total = fake.new_zeros(())
        for score, _ in self(torch.cat([fake, real])):
            of_fake, of_real = score.float().chunk(2)
            total = total + of_fake.square().mean() + (1 - of_real).square().mean()
        return total / len(self.parts)

    def judge(self, fake: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """What the codec makes small: (its scores' distance from real, that of the features)."""
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
