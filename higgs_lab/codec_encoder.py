"""The codec's encoder again, for clips of any length in a batch: HuBERT and what surrounds DAC.

Same weights, same formulas as transformers' model, which stays the reference; results differ by
rounding alone. Alone, a clip is followed by each convolution's zero padding; in a batch what lies
behind its end is set to zero before every convolution, HuBERT attends to its frames only, and the
one normalisation over time takes each clip by itself. On a GPU HuBERT's convolutions have their
channels last; its grouped one, for which cuDNN has no kernel on them in half precision, its first,
of a single channel, and the semantic encoder's, which cuDNN computes wrongly, are matrix products.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torchaudio
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import group_norm, pad
from transformers import HiggsAudioV2TokenizerModel

from higgs_lab.codec_fast import (
    begin,
    convolution_by_product,
    convolve,
    length_behind,
    run_dac,
    stage_lengths,
)


def embed_clips(model: HiggsAudioV2TokenizerModel, wavs: Tensor, samples: Sequence[int]) -> Tensor:
    """What `model.encode` gives to `fc`: wavs [B, n], samples of each clip -> [B, T, hidden].

    Behind a clip's end wavs must be zero, and the result means nothing.
    """
    frames = semantic_frames(model, samples)
    semantic = encode_semantic(model, _hubert(model, wavs, samples).transpose(1, 2), frames)
    # The model pads both ends by half a frame where the numbers of frames would differ.
    plain = [stage_lengths(model.acoustic_encoder, n)[-1] for n in samples]
    before = [0 if a == b else model.pad for a, b in zip(plain, frames, strict=True)]
    moved = wavs.new_zeros(len(wavs), 1, wavs.shape[-1] + 2 * model.pad)  # one width for all
    for row, wav, n, p in zip(moved, wavs, samples, before, strict=True):
        row[0, p : p + n] = wav[:n]
    ends = [n + 2 * p for n, p in zip(samples, before, strict=True)]
    # in half precision cuDNN's kernels and the fused unit want channels last
    half = moved.is_cuda and torch.is_autocast_enabled("cuda")
    acoustic = run_dac(model.acoustic_encoder, moved, ends, channels_last=half)
    count = min(acoustic.shape[-1], semantic.shape[-1])
    both = torch.cat(
        [acoustic[..., :count].to(wavs.dtype), semantic[..., :count].to(wavs.dtype)], 1
    )
    return both.transpose(1, 2)


def semantic_frames(model: HiggsAudioV2TokenizerModel, samples: Sequence[int]) -> list[int]:
    """Frames, and rows of codes, of clips of so many samples."""
    found = _hubert_lengths(model, samples)[-1]
    return [math.ceil(n / model.config.semantic_downsample_factor) for n in found]


def encode_semantic(
    model: HiggsAudioV2TokenizerModel,
    x: Tensor,
    frames: Sequence[int],
    for_gpu: bool | None = None,
) -> Tensor:
    """`model.encoder_semantic` of x [B, C, T], of clip i only the first frames[i] counting.

    for_gpu: by products; None: where x is on one.
    """
    ends = torch.tensor(frames, device=x.device)[:, None]
    inside = (torch.arange(x.shape[-1], device=x.device) < ends)[:, None]
    for_gpu = x.is_cuda if for_gpu is None else for_gpu
    apply = convolution_by_product if for_gpu else nn.Conv1d.__call__
    net = model.encoder_semantic
    x = apply(net.conv, x * inside)
    for block in net.conv_blocks:
        if block.conv.stride != (1,):
            raise ValueError("a semantic encoder that strides is not of a Higgs v2 tokenizer")
        for unit in block.res_units:
            y = apply(unit.conv1, unit.activation(x * inside))
            x = x + apply(unit.conv2, unit.activation(y))  # of width 1: sees no neighbour
        x = apply(block.conv, x * inside)
    return x


def takes_lengths(model: HiggsAudioV2TokenizerModel) -> bool:
    """Whether `embed_clips` knows this codec's HuBERT; else only its own code does."""
    return model.config.semantic_model_config.feat_extract_norm == "group"


# without cuDNN's, which torch prefers in half precision: it is made anew for every shape. It is a
# switch of the whole process: other threads meanwhile do without it, too
READY_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
HUBERT_MARGIN = 160  # samples of silence on both sides, a constant of transformers' model


def _hubert_lengths(model: HiggsAudioV2TokenizerModel, samples: Sequence[int]) -> list[list[int]]:
    """Of each clip: samples at HuBERT's rate, those with margins, and steps after each layer."""
    config = model.config
    at_rate = [math.ceil(n * config.semantic_sample_rate / config.sample_rate) for n in samples]
    lengths = [at_rate, [n + 2 * HUBERT_MARGIN for n in at_rate]]
    for layer in model.semantic_model.feature_extractor.conv_layers:
        lengths.append([length_behind(layer.conv, n) for n in lengths[-1]])
    return lengths


def _hubert(
    model: HiggsAudioV2TokenizerModel,
    wavs: Tensor,
    samples: Sequence[int],
    for_gpu: bool | None = None,
) -> Tensor:
    """`model._extract_semantic_features` of clips of any length.

    for_gpu: with what is fast there; None: where wavs are on one.
    """
    config, hubert = model.config, model.semantic_model
    for_gpu = wavs.is_cuda if for_gpu is None else for_gpu
    if not takes_lengths(model):
        raise ValueError(
            "a HuBERT without a group norm is not of a Higgs v2 tokenizer: this codec encodes with "
            "precision=fp32 only, clips of one length together"
        )
    at_rate, with_margins, first = _hubert_lengths(model, samples)[:3]
    extractor, places = hubert.feature_extractor, hubert.encoder.pos_conv_embed.conv
    replaced: dict[nn.Module, Callable[[Tensor], Tensor]] = {
        extractor: partial(extract_features, extractor, lengths=first, channels_last=for_gpu)
    }
    if for_gpu:
        replaced[places] = partial(grouped_convolution, places)
    if min(samples) == wavs.shape[-1]:
        with _replaced(replaced), sdpa_kernel(READY_ATTENTION):
            return model._extract_semantic_features(wavs[:, None])
    x = torchaudio.functional.resample(wavs, config.sample_rate, config.semantic_sample_rate)
    ends = torch.tensor(at_rate, device=x.device)[:, None]
    x = x * (torch.arange(x.shape[-1], device=x.device) < ends)  # the filter's tail
    x = pad(x, (HUBERT_MARGIN, HUBERT_MARGIN))
    ends = torch.tensor(with_margins, device=x.device)[:, None]
    mask = (torch.arange(x.shape[-1], device=x.device) < ends).long()
    with _replaced(replaced), sdpa_kernel(READY_ATTENTION):
        hidden = hubert(x, attention_mask=mask, output_hidden_states=True).hidden_states
    return torch.stack(hidden, dim=1).mean(dim=1)[:, :: config.semantic_downsample_factor]


def extract_features(
    extractor: nn.Module, x: Tensor, lengths: Sequence[int], channels_last: bool = False
) -> Tensor:
    """HuBERT's convolutions: x [B, n] -> [B, C, T], where each clip's norm sees its own steps.

    x is zero behind each clip's end. lengths: steps of each clip behind the first convolution.
    """
    if channels_last:
        # The first convolution pads nothing, so its norm sees no constant; sums of squares would.
        steps = torch.tensor(lengths, dtype=x.dtype, device=x.device)
        x = x - (x.sum(1) / (steps * extractor.conv_layers[0].conv.stride[0]))[:, None]
    x = x[:, None]
    for i, layer in enumerate(extractor.conv_layers):
        x = begin(layer.conv, x, channels_last) if i == 0 else convolve(layer.conv, x)
        if layer.conv.bias is not None:
            x = x + layer.conv.bias[:, None].to(x.dtype)
        if i == 0:
            normalise = _normalised if channels_last else _normalised_alone
            x = normalise(layer.layer_norm, x, lengths)
        x = layer.activation(x)
    return x


def _normalised(norm: nn.GroupNorm, x: Tensor, lengths: Sequence[int]) -> Tensor:
    """`_normalised_alone` with channels last, a group each; behind a clip's end anything."""
    rows = x.transpose(1, 2)  # [B, T, C]
    count = torch.tensor(lengths, dtype=torch.float32, device=x.device)[:, None]
    parts = (
        [rows]
        if min(lengths) == rows.shape[1]
        else [row[None, :n] for row, n in zip(rows, lengths, strict=True)]
    )
    total = torch.cat([part.sum(1, dtype=torch.float32) for part in parts])
    power = torch.cat([vector_norm(part, dim=1, dtype=torch.float32) for part in parts]).square()
    mean = total / count
    variance = (power / count - mean.square()).clamp(min=0)  # [B, C]
    scale = norm.weight * (variance + norm.eps).rsqrt()
    shift = norm.bias - mean * scale
    scale, shift = (t[:, None].to(x.dtype) for t in (scale, shift))
    return torch.addcmul(shift, rows, scale).transpose(1, 2)


def _normalised_alone(norm: nn.GroupNorm, x: Tensor, lengths: Sequence[int]) -> Tensor:
    """HuBERT's group norm, whose statistics are over time, of each clip's own steps."""
    if min(lengths) == x.shape[-1]:
        return norm(x)
    made = [
        group_norm(clip[None, :, :n], norm.num_groups, norm.weight, norm.bias, norm.eps)
        for clip, n in zip(x, lengths, strict=True)
    ]
    return torch.cat([pad(clip, (0, x.shape[-1] - clip.shape[-1])) for clip in made])


def grouped_convolution(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """conv(x) of stride 1, no dilation and a bias, x [B, C, T], as one matrix product a group."""
    weight, B, G = conv.weight, len(x), conv.groups
    out, channels, width = weight.shape
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    rows = pad(x, (*conv.padding, *conv.padding)).view(B, G, channels, -1).permute(1, 0, 3, 2)
    rows = rows.contiguous()  # [G, B, steps, channels of a group]: a window lies in one piece
    steps = rows.shape[2] - width + 1
    sums = weight.view(G, out // G, channels, width).permute(0, 3, 2, 1).flatten(1, 2).to(x.dtype)
    size, stride = (B, steps, width * channels), (rows.stride(1), channels, 1)
    made = [
        group.as_strided(size, stride).flatten(0, 1) @ one
        for group, one in zip(rows, sums, strict=True)
    ]
    y = torch.stack([part.view(B, steps, -1) for part in made], dim=2).flatten(2)
    return (y + conv.bias.to(y.dtype)).transpose(1, 2)


_one_at_a_time = threading.Lock()


@contextmanager
def _replaced(forwards: dict[nn.Module, Callable[[Tensor], Tensor]]):
    """Inside, these modules compute otherwise; for other threads they are what they are."""
    thread = threading.get_ident()

    def of(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            if threading.get_ident() != thread:
                return type(module).forward(module, x)
            return forward(x)

        return call

    with _one_at_a_time:
        for module, forward in forwards.items():
            module.forward = of(module, forward)
        try:
            yield
        finally:
            for module in forwards:
                del module.forward  # the class's own is seen again
