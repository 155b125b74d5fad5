"""A codec's sizes come out of its weights' shapes, whatever its configuration says."""

from __future__ import annotations

import copy

import torch
from transformers import HiggsAudioV2TokenizerConfig, HiggsAudioV2TokenizerModel

from higgs_lab.codec import codec_config
from higgs_lab.vocab import CODEC_CONFIG


def small_codec_config() -> dict:
    """The released topology and rates with small widths."""
    config = copy.deepcopy(CODEC_CONFIG)
    config["acoustic_model_config"]["encoder_hidden_size"] = 8
    config["semantic_model_config"] |= {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "conv_dim": [32] * 7,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
    }
    return config


def test_sizes_of_the_released_codec_come_out_of_its_shapes():
    """Facts §1.5: 527 tensors, 201,400,553 elements; every width wiped from the base first."""
    with torch.device("meta"):
        real = HiggsAudioV2TokenizerModel(
            HiggsAudioV2TokenizerConfig(**copy.deepcopy(CODEC_CONFIG))
        )
    state = real.state_dict()
    assert len(state) == 527
    assert sum(v.numel() for v in state.values()) == 201_400_553
    assert codec_config(state, CODEC_CONFIG) == CODEC_CONFIG
    wiped = small_codec_config()
    wiped["acoustic_model_config"] |= {"hidden_size": 3, "decoder_hidden_size": 3}
    wiped |= {"codebook_size": 3, "codebook_dim": 3}
    assert codec_config(state, wiped) == CODEC_CONFIG
    assert "semantic_model.masked_spec_embed" not in state


def test_sizes_of_a_small_codec_come_out_of_its_shapes():
    config = HiggsAudioV2TokenizerConfig(**small_codec_config())
    with torch.device("meta"):
        state = HiggsAudioV2TokenizerModel(config).state_dict()
    assert codec_config(state, CODEC_CONFIG) == small_codec_config()
    assert CODEC_CONFIG["semantic_model_config"]["hidden_size"] == 768  # the constant is not edited
