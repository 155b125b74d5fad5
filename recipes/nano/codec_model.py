"""The nano codec: `HiggsAudioV2TokenizerModel` with small widths, and a differentiable pass.

Rates, codebooks and the topology are the real codec's; encoder, decoder and HuBERT are narrow. The
HuBERT branch is random and frozen, and the columns of `fc` that read it are zero: nobody needs a
semantic teacher for a synthetic voice, and codes then do not depend on a clip's padding.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ENCODER_HIDDEN, DECODER_HIDDEN = 16, 512  # no channel count that tensor cores would pad
SEMANTIC_HIDDEN = 32
LEVEL = 0.08  # of the family's speech
ACOUSTIC_HIDDEN = 256  # the serving engine's decoder input; must stay


def codec_config(decoder_hidden: int = DECODER_HIDDEN, encoder_hidden: int = ENCODER_HIDDEN):
    from transformers import DacConfig, HiggsAudioV2TokenizerConfig, HubertConfig

    return HiggsAudioV2TokenizerConfig(
        sample_rate=24_000,
        semantic_sample_rate=16_000,
        downsample_factor=320,
        codebook_dim=64,
        codebook_size=1024,
        target_bandwidths=[0.5, 1, 1.5, 2],
        kernel_size=3,
        unit_kernel_size=3,
        strides=[1, 1],
        channel_ratios=[1, 1],
        block_dilations=[1, 1],
        acoustic_model_config=DacConfig(
            encoder_hidden_size=encoder_hidden,
            decoder_hidden_size=decoder_hidden,
            hidden_size=ACOUSTIC_HIDDEN,
            downsampling_ratios=[8, 5, 4, 2, 3],
            upsampling_ratios=[8, 5, 4, 2, 3],
            codebook_dim=8,
            codebook_size=1024,
            n_codebooks=9,
            sampling_rate=16_000,
        ),
        semantic_model_config=HubertConfig(
            hidden_size=SEMANTIC_HIDDEN,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            conv_dim=[16] * 7,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            mask_time_prob=0.0,
            apply_spec_augment=False,
        ),
    )


def build_codec(**sizes: int):
    """A codec with random weights and a silent semantic branch."""
    from transformers import HiggsAudioV2TokenizerModel

    model = HiggsAudioV2TokenizerModel(codec_config(**sizes))
    _start_linear(model)
    return model


@torch.no_grad()
def _start_linear(model) -> None:
    """Weights with which encoder and decoder begin as almost linear maps that keep the level.

    From the usual starts (0.02 everywhere, or PyTorch's own, and alpha 1) thin layers pass on
    hardly anything of a wave at first.
    """
    parts = (model.acoustic_encoder, model.acoustic_decoder)
    for module in (module for part in parts for module in part.modules()):
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            fan_in = module.in_channels * module.kernel_size[0]
            if isinstance(module, nn.ConvTranspose1d):
                fan_in /= module.stride[0]  # what reaches one sample
            nn.init.normal_(module.weight, 0, fan_in**-0.5)
            nn.init.zeros_(module.bias)
        elif type(module).__name__ == "Snake1d":
            module.alpha.fill_(0.1)  # x + sin(alpha x)^2 / alpha
    for module in (module for part in parts for module in part.modules()):
        if type(module).__name__ == "DacResidualUnit":
            module.conv2.weight.mul_(0.1)
    model.acoustic_encoder.conv1.weight.div_(LEVEL)
    model.acoustic_decoder.conv2.weight.mul_(LEVEL)
    for layer in (model.fc, model.fc2):
        nn.init.normal_(layer.weight, 0, ACOUSTIC_HIDDEN**-0.5)
        nn.init.zeros_(layer.bias)
    model.fc.weight[:, ACOUSTIC_HIDDEN:] = 0


def encode_hidden(model, wav: Tensor) -> Tensor:
    """wav [B, n] (n a multiple of 960) -> embeddings before the quantiser [B, hidden, n / 960]."""
    frames = wav.shape[-1] // 960
    wav = wav[:, None]
    if model._get_conv1d_output_lengths(wav.shape[-1], model.acoustic_encoder) != frames:
        wav = F.pad(wav, (model.pad, model.pad))  # as HiggsAudioV2TokenizerModel.encode does
    acoustic = model.acoustic_encoder(wav)
    weight = model.fc.weight[:, :ACOUSTIC_HIDDEN]
    return F.conv1d(acoustic, weight[..., None].to(acoustic.dtype), model.fc.bias)


def quantise(model, hidden: Tensor) -> Tensor:
    """hidden [B, hidden, T] -> codes [B, T, K], as the model's own quantiser."""
    return model.quantizer.encode(hidden.float()).permute(1, 2, 0)


def decode_codes(model, codes: Tensor) -> Tensor:
    """codes [B, T, K] -> wav [B, T * 960]."""
    return model.decode(codes.transpose(1, 2), return_dict=False)[:, 0]


def encode_codes(model, wav: Tensor) -> Tensor:
    """wav [B, n] -> codes [B, ceil(n / 960), K]; pads with zeros to whole frames."""
    wav = F.pad(wav, (0, -wav.shape[-1] % 960))
    return quantise(model, encode_hidden(model, wav))


def load_codec(path: Path, device):
    """A narrow codec from a trained or a packaged file, as wide as that is."""
    from higgs_lab.nano.packing import expand_codec

    state = expand_codec(path, None)
    model = build_codec(
        decoder_hidden=state["acoustic_decoder.conv1.weight"].shape[0],
        encoder_hidden=state["acoustic_encoder.conv1.weight"].shape[0],
    )
    model.load_state_dict(state)
    return model.to(device).eval()


@torch.no_grad()
def through_codec(codec, wav: Tensor) -> Tensor:
    """[B, n] -> [B, n], encoded and decoded."""
    return decode_codes(codec, encode_codes(codec, wav))[:, : wav.shape[-1]].float()


def refresh_codec(path: Path | None, state: dict, device):
    """The newest codec checkpoint at `path`, loaded again when the file has changed."""
    if path and path.exists() and path.stat().st_mtime != state.get("time"):
        state["time"] = path.stat().st_mtime
        state["codec"] = load_codec(path, device)
    return state.get("codec")


def _project_on_most(layer, x: Tensor) -> None:
    """project_in and project_out of a quantiser onto the principal directions of x [N, hidden]."""
    mean = x.mean(0)
    _, directions = torch.linalg.eigh((x - mean).T @ (x - mean))  # the largest last
    basis = directions[:, -layer.project_in.out_features :]
    layer.project_in.weight.copy_(basis.T)
    layer.project_in.bias.copy_(-mean @ basis)
    layer.project_out.weight.copy_(basis)
    layer.project_out.bias.copy_(mean)


class TrainableRVQ(nn.Module):
    """Straight-through residual quantisation over the model's quantisers, with EMA codebooks."""

    def __init__(self, quantizer, decay: float = 0.99):
        super().__init__()
        self.quantizer, self.decay = quantizer, decay
        # a tensor, so that a recorded step can be told
        self.register_buffer("revive", torch.zeros((), dtype=torch.bool), persistent=False)

    @torch.no_grad()
    def start(self, hidden: Tensor, rounds: int = 12) -> None:
        """k-means of every codebook on real data, each on what the ones before left over, in the
        directions where that varies most."""
        residual = hidden.float().transpose(1, 2)
        for layer in self.quantizer.quantizers:
            _project_on_most(layer, residual.flatten(0, 1))
            x = layer.project_in(residual).flatten(0, 1)
            book = layer.codebook
            centres = x[torch.randperm(len(x), device=x.device)[: book.codebook_size]].clone()
            if len(centres) < book.codebook_size:  # tiny smoke runs
                centres = centres.repeat(-(-book.codebook_size // len(centres)), 1)
                centres = (
                    centres[: book.codebook_size]
                    + 1e-3 * torch.randn_like(centres)[: book.codebook_size]
                )
            for _ in range(rounds):
                nearest = torch.cdist(x, centres).argmin(-1)
                count = torch.bincount(nearest, minlength=len(centres)).float()
                total = torch.zeros_like(centres).index_add_(0, nearest, x)
                empty = count == 0
                centres = total / count.clamp(min=1)[:, None]
                centres[empty] = x[torch.randint(len(x), (int(empty.sum()),), device=x.device)]
            book.embed.copy_(centres)
            book.cluster_size.fill_(len(x) / len(centres))
            book.embed_avg.copy_(centres * book.cluster_size[:, None])
            residual = residual - layer.project_out(centres[nearest].view(*residual.shape[:2], -1))

    def forward(self, hidden: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [B, H, T], keep [B] number of codebooks to use -> (quantised [B, H, T],
        commitment loss, residual loss). Updates the codebooks in training mode."""
        hidden = hidden.float().transpose(1, 2)
        residual, total = hidden, torch.zeros_like(hidden)
        commit = left = hidden.new_zeros(())
        scale = hidden.detach().var() + 1e-6
        for depth, layer in enumerate(self.quantizer.quantizers):
            x = layer.project_in(residual)
            book = layer.codebook
            flat = x.detach().flatten(0, 1)
            index = book.quantize(flat)
            q = F.embedding(index, book.embed).view_as(x)
            if self.training:
                self._update(book, flat, index)
            commit = commit + F.mse_loss(x, q) / (flat.var() + 1e-6)
            out = layer.project_out(x + (q - x).detach())
            used = (keep > depth).to(out)[:, None, None]
            total = total + out * used
            residual = residual - out
            left = left + F.mse_loss(layer.project_out(q), (residual + out).detach()) / scale
        K = len(self.quantizer.quantizers)
        return total.transpose(1, 2), commit / K, left / K

    @torch.no_grad()
    def _update(self, book, flat: Tensor, index: Tensor) -> None:
        count = torch.zeros_like(book.cluster_size).index_add_(
            0, index, torch.ones_like(flat[:, 0])
        )
        total = torch.zeros_like(book.embed).index_add_(0, index, flat)
        book.cluster_size.lerp_(count, 1 - self.decay)
        book.embed_avg.lerp_(total, 1 - self.decay)
        # revive what nobody chose lately with vectors of this batch
        mean = len(flat) / len(count)
        dead = (book.cluster_size < 0.06 * mean) & self.revive
        fresh = flat[torch.randint(len(flat), (len(count),), device=flat.device)]
        book.embed_avg.copy_(torch.where(dead[:, None], fresh * mean * 0.5, book.embed_avg))
        book.cluster_size.copy_(book.cluster_size.masked_fill(dead, mean * 0.5))
        book.embed.copy_(book.embed_avg / book.cluster_size.clamp(min=1e-5)[:, None])
