"""Tiny judges of random weights in the real classes: MMS, WavLM. Seeded; they judge nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch


def tones(samples: int, seed: int = 0) -> np.ndarray:
    """Tenths of a second of one random pitch each, at 16 kHz: something to write letters about."""
    rng = np.random.default_rng(seed)
    hz = np.repeat(rng.uniform(100, 4000, samples // 1600 + 1), 1600)[:samples]
    wav = 0.2 * np.sin(2 * np.pi * hz * np.arange(samples) / 16000)
    return (wav + 0.01 * rng.normal(size=samples)).astype(np.float32)


def shake(model: torch.nn.Module) -> None:
    """Random weights large enough for the output to follow the input."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.5 / parameter[0].numel() ** 0.5)


def talkative_whisper(
    path: Path, seed: int = 1, timestamps: float = 0.1, multilingual: bool = True
) -> Path:
    """An openai-whisper checkpoint whose words depend on the sound and end at various lengths.

    timestamps: scale of their embeddings; at 1 they come as often as other tokens.
    """
    from whisper.model import ModelDimensions, Whisper
    from whisper.tokenizer import get_tokenizer

    dims = dict(n_mels=80, n_vocab=51865 if multilingual else 51864, n_audio_ctx=1500)
    dims["n_text_ctx"] = 64
    for side in ("audio", "text"):
        dims |= {f"n_{side}_state": 16, f"n_{side}_head": 2, f"n_{side}_layer": 1}
    model, random = Whisper(ModelDimensions(**dims)), torch.Generator().manual_seed(seed)
    tokenizer = get_tokenizer(multilingual, num_languages=99)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                std = 2.5 / parameter[0].numel() ** 0.5
                parameter.normal_(std=0.4 if "embedding" in name else std, generator=random)
            else:
                parameter.fill_(float("ln" in name and "weight" in name))
        table = model.decoder.token_embedding.weight
        table[tokenizer.eot] *= 5.0 / table[tokenizer.eot].norm()  # else one in 50,000
        table[tokenizer.timestamp_begin :] *= timestamps
    torch.save({"dims": dims, "model_state_dict": model.state_dict()}, path)
    return path


def tiny_mms(folder: Path, alphabets: dict[str, str], seed: int = 0) -> Path:
    """An MMS folder of random weights: one Wav2Vec2ForCTC, an adapter and an alphabet a code."""
    from safetensors.torch import save_file
    from transformers import (
        Wav2Vec2Config,
        Wav2Vec2CTCTokenizer,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2ForCTC,
    )

    vocab = {
        code: {mark: i for i, mark in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *letters])}
        for code, letters in alphabets.items()
    }
    folder.mkdir(parents=True)
    vocab_file = folder / "vocab.json"
    vocab_file.write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    first = next(iter(vocab))
    Wav2Vec2CTCTokenizer(str(vocab_file), target_lang=first).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder)
    torch.manual_seed(seed)
    config = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        conv_dim=(8,) * 7, conv_bias=True, feat_extract_norm="layer", do_stable_layer_norm=True,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, adapter_attn_dim=4,
        vocab_size=len(vocab[first]),
    )  # fmt: skip
    model = Wav2Vec2ForCTC(config)
    shake(model)
    model.save_pretrained(folder)
    for code, marks in vocab.items():
        model.lm_head = torch.nn.Linear(16, len(marks))
        shake(model)
        adapter = {name: value.detach().clone() for name, value in model._get_adapters().items()}
        adapter["lm_head.bias"][1:4] = -100.0  # a trained head never writes these
        save_file(adapter, folder / f"adapter.{code}.safetensors", metadata={"format": "pt"})
    return folder


def tiny_wavlm(folder: Path, seed: int = 0) -> Path:
    """A WavLMForXVector folder of random weights, as microsoft/wavlm-base-plus-sv is laid out."""
    from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMForXVector

    torch.manual_seed(seed)
    config = WavLMConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        conv_dim=(8,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
        tdnn_dim=(16, 16, 32), tdnn_kernel=(5, 3, 1), tdnn_dilation=(1, 2, 1),
        xvector_output_dim=24, use_weighted_layer_sum=True,
    )  # fmt: skip
    WavLMForXVector(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True).save_pretrained(folder)
    return folder
