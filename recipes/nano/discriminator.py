"""What the codec's training has tell its speech from real speech: complex spectra in three sizes.

After EnCodec (Défossez et al. 2022, arXiv:2210.13438, §3.4), narrower. Spectral losses alone leave
voices hoarse: they tell how loud a band is, hardly whether a harmonic is a line.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

WINDOWS = (2048, 1024, 512)


class SpectrumDiscriminator(nn.Module):
    """wav [B, n] -> (scores [B, 1, T, F], features of every layer)."""

    def __init__(self, n_fft: int, width: int):
        super().__init__()
        self.n_fft = n_fft
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        sizes = [(2, (3, 9), (1, 1), 1), *((width, (3, 9), (1, 2), d) for d in (1, 2, 4))]
        layers = [
            nn.Conv2d(inputs, width, kernel, stride, (dilation, kernel[1] // 2), (dilation, 1))
            for inputs, kernel, stride, dilation in [*sizes, (width, (3, 3), (1, 1), 1)]
        ]
        self.layers = nn.ModuleList(weight_norm(layer) for layer in layers)
        self.last = weight_norm(nn.Conv2d(width, 1, (3, 3), padding=1))

    def forward(self, wav: Tensor) -> tuple[Tensor, list[Tensor]]:
        spectrum = torch.stft(
            wav, self.n_fft, self.n_fft // 4, window=self.window, normalized=True,
            return_complex=True,
        )  # fmt: skip
        x = torch.view_as_real(spectrum).permute(0, 3, 2, 1)  # [B, 2, T, F]
        x = 30 * x  # speech of the family's level has a spread of about one
        features = []
        for layer in self.layers:
            x = nn.functional.leaky_relu(layer(x), 0.2)
            features.append(x)
        return self.last(x), features


class Discriminator(nn.Module):
    def __init__(self, width: int = 24):
        super().__init__()
        self.parts = nn.ModuleList(SpectrumDiscriminator(n, width) for n in WINDOWS)

    def forward(self, wav: Tensor) -> list[tuple[Tensor, list[Tensor]]]:
        return [part(wav) for part in self.parts]

    def loss(self, fake: Tensor, real: Tensor) -> Tensor:
        """Hinge loss of telling them apart."""
        total = fake.new_zeros(())
        for score, _ in self(torch.cat([fake, real])):
            of_fake, of_real = score.float().chunk(2)
            total = total + (1 + of_fake).relu().mean() + (1 - of_real).relu().mean()
        return total / len(self.parts)

    def judge(self, fake: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """What the codec makes small: (hinge loss of its scores, relative distance of features)."""
        score, distance, layers = fake.new_zeros(()), fake.new_zeros(()), 0
        with torch.no_grad():
            wanted = self(real)
        for (mine, features), (_, targets) in zip(self(fake), wanted, strict=True):
            score = score - mine.float().mean()
            for a, b in zip(features, targets, strict=True):
                b = b.float()
                distance = distance + (a.float() - b).abs().mean() / b.abs().mean().clamp(min=1e-3)
                layers += 1
        return score / len(self.parts), distance / layers
