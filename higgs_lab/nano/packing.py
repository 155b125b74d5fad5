"""Packaged weights of the nano family: int8 with a scale per row, unpacked to what users see.

A packaged file holds less than the upstream format wants: matrices as int8 rows with a bf16 scale,
no unused vocabulary rows, no sinusoids, no zero channels. What `unpack` returns is exactly
representable in bf16, so that a native checkpoint, stored in bf16 as the 4B one is, changes no
value once more: the codes that the talker learnt are the codes that users get.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

SCALE = "|scale"
MIN_ELEMENTS = 2048  # smaller tensors stay bf16


def quantise(value: Tensor) -> tuple[Tensor, Tensor]:
    """Tensor [N, ...] -> (int8 of the same shape, bf16 scales [N]); symmetric, a scale a row."""
    rows = value.detach().float().reshape(len(value), -1)
    scale = (rows.abs().amax(dim=1) / 127).clamp(min=1e-12).bfloat16()
    # the scale itself was rounded: 127 may no longer reach the largest value, so clamp
    whole = (rows / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    return whole.reshape(value.shape), scale


def dequantise(whole: Tensor, scale: Tensor) -> Tensor:
    """The values, float32 but exactly representable in bf16."""
    wide = whole.float() * scale.float().reshape(-1, *([1] * (whole.ndim - 1)))
    return wide.bfloat16().float()


def round_trip(value: Tensor, as_int8: bool) -> Tensor:
    """What `unpack` will give for a tensor that is packed as int8, or as bf16."""
    return dequantise(*quantise(value)) if as_int8 else value.bfloat16().float()


def wants_int8(name: str, value: Tensor) -> bool:
    """Matrices and kernels, but not the codec's codebooks, whose errors would change codes."""
    large = value.ndim >= 2 and value.numel() >= MIN_ELEMENTS
    return large and value.is_floating_point() and not name.endswith("codebook.embed")


def pack(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str]) -> int:
    """Write a packaged file; returns its bytes."""
    packed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if wants_int8(name, value):
            packed[name], packed[name + SCALE] = quantise(value)
        else:
            packed[name] = value.detach().bfloat16() if value.is_floating_point() else value
    packed = {name: value.contiguous().cpu() for name, value in packed.items()}
    save_file(packed, str(path), metadata=metadata)
    return Path(path).stat().st_size


def unpack(path: str | Path) -> dict[str, Tensor]:
    """Read a packaged file; float tensors come as float32 that bf16 holds exactly."""
    packed = load_file(str(path))
    out: dict[str, Tensor] = {}
    for name, value in packed.items():
        if name.endswith(SCALE):
            continue
        if name + SCALE in packed:
            out[name] = dequantise(value, packed[name + SCALE])
        else:
            out[name] = value.float() if value.is_floating_point() else value
    return out


def is_packaged(path: str | Path) -> bool:
    """Whether a safetensors file holds int8 with scales, and not the weights themselves."""
    with safe_open(str(path), framework="pt") as file:
        return any(name.endswith(SCALE) for name in file.keys())


def metadata(path: str | Path) -> dict[str, str]:
    """What `pack` was told about the file: sizes, figures, how it was trained."""
    with safe_open(str(path), framework="pt") as file:
        return file.metadata() or {}


# --- codec ---------------------------------------------------------------------------------------
def widen_decoder(tensors: dict[str, Tensor], hidden: int = 1024) -> dict[str, Tensor]:
    """A narrow DAC decoder inside one of `hidden` channels: the same function, zeros elsewhere.

    The serving engine fixes the decoder's width (vllm-omni higgs_audio_v3_code2wav.py). New
    channels have zero weights in and out and a bias of 0; snake(0) = 0 for any alpha, so they stay
    silent.
    tensors: `acoustic_decoder.*` keys of `HiggsAudioV2TokenizerModel`, others are passed through.
    """
    prefix = "acoustic_decoder."
    narrow = tensors[prefix + "conv1.weight"].shape[0]
    if hidden % narrow and hidden < narrow:
        raise ValueError(f"a decoder of {narrow} channels does not fit into {hidden}")
    out = dict(tensors)

    def grow(name: str, sizes: dict[int, int]) -> None:
        value = tensors[prefix + name]
        shape = [sizes.get(axis, size) for axis, size in enumerate(value.shape)]
        wide = value.new_ones(shape) if name.endswith("alpha") else value.new_zeros(shape)
        wide[tuple(slice(0, size) for size in value.shape)] = value
        out[prefix + name] = wide

    grow("conv1.weight", {0: hidden})
    grow("conv1.bias", {0: hidden})
    blocks = 1 + max(int(k.split(".")[2]) for k in tensors if k.startswith(prefix + "block."))
    for index in range(blocks):
        wide_in, wide_out = hidden >> index, hidden >> (index + 1)
        block = f"block.{index}."
        grow(block + "snake1.alpha", {1: wide_in})
        grow(block + "conv_t1.weight", {0: wide_in, 1: wide_out})
        grow(block + "conv_t1.bias", {0: wide_out})
        for unit in ("res_unit1.", "res_unit2.", "res_unit3."):
            for name in ("snake1.alpha", "snake2.alpha"):
                grow(block + unit + name, {1: wide_out})
            for name in ("conv1.", "conv2."):
                grow(block + unit + name + "weight", {0: wide_out, 1: wide_out})
                grow(block + unit + name + "bias", {0: wide_out})
    last = hidden >> blocks
    grow("snake1.alpha", {1: last})
    grow("conv2.weight", {1: last})
    return out


CODEC_DROPPED = (".codebook.embed_avg", ".codebook.cluster_size", ".codebook.inited")


def codec_core(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is packaged of a codec: everything but the codebooks' training statistics."""
    return {name: value for name, value in state.items() if not name.endswith(CODEC_DROPPED)}


def complete_codec(core: dict[str, Tensor]) -> dict[str, Tensor]:
    """`codec_core` undone. The statistics play no part in use; `embed_avg` is made five times too
    large, as the real checkpoint's is, so that whoever decodes with it hears the mistake."""
    out = dict(core)
    for name, value in core.items():
        if name.endswith(".codebook.embed"):
            stem = name.removesuffix("embed")
            out[stem + "inited"] = torch.ones(1)
            out[stem + "cluster_size"] = torch.full((len(value),), 5.0)
            out[stem + "embed_avg"] = 5 * value
    return out


def expand_codec(path: str | Path, decoder_hidden: int | None = 1024) -> dict[str, Tensor]:
    """State dict of `HiggsAudioV2TokenizerModel`; decoder_hidden None leaves the decoder narrow."""
    state = complete_codec(unpack(path))
    return state if decoder_hidden is None else widen_decoder(state, decoder_hidden)


# --- talker --------------------------------------------------------------------------------------
FIRST_ADDED_ID = 151_643  # true id of the first added token (facts §1.7)
ADDED_AT = 512  # where its row stands in the packaged text table
TEXT_ROWS = ADDED_AT + 84


def compact_ids(ids: Tensor) -> Tensor:
    """Rows of text ids in the packaged table: bytes first, the 84 added tokens from 512 on."""
    return torch.where(ids < ADDED_AT, ids, ids - FIRST_ADDED_ID + ADDED_AT)


def expand_talker(path: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """(text_config of the packaged file, state dict of `Talker` with the text table at full
    height). The config's `vocab_size` is the packaged table's."""
    state = unpack(path)
    name = "model.embed_tokens.weight"
    state[name] = expand_text_table(state[name])
    return json.loads(metadata(path)["text_config"]), state


def expand_text_table(table: Tensor, height: int = 151_936) -> Tensor:
    """[TEXT_ROWS, D] -> [height, D] with the rows at their true ids, zeros between."""
    wide = table.new_zeros((height, table.shape[1]))
    wide[:ADDED_AT] = table[:ADDED_AT]
    wide[FIRST_ADDED_ID : FIRST_ADDED_ID + 84] = table[ADDED_AT:TEXT_ROWS]
    return wide


# --- whisper -------------------------------------------------------------------------------------
def sinusoids(length: int, channels: int, max_timescale: float = 10_000) -> Tensor:
    """whisper.model.sinusoids, here so that unpacking needs no whisper."""
    step = math.log(max_timescale) / (channels // 2 - 1)
    scaled = torch.arange(length)[:, None] * torch.exp(-step * torch.arange(channels // 2))[None]
    return torch.cat([torch.sin(scaled), torch.cos(scaled)], dim=1)


def expand_whisper(path: str | Path) -> dict:
    """The checkpoint `whisper.load_model` reads: {"dims", "model_state_dict"}.

    The packaged vocabulary has a row per used token and a last row that all others share. That row
    was trained to lose: a zero row would have logit 0 and could win.
    """
    tensors = unpack(path)
    dims = json.loads(metadata(path)["dims"])
    used = tensors.pop("used").long()
    row = torch.full((dims["n_vocab"],), len(used))
    row[used] = torch.arange(len(used))
    name = "decoder.token_embedding.weight"
    tensors[name] = tensors[name][row].contiguous()
    tensors["encoder.positional_embedding"] = sinusoids(dims["n_audio_ctx"], dims["n_audio_state"])
    positional = tensors["decoder.positional_embedding"]
    full = positional.new_zeros((dims["n_text_ctx"], positional.shape[1]))
    full[: len(positional)] = positional
    tensors["decoder.positional_embedding"] = full
    return {"dims": dims, "model_state_dict": tensors}
