"""The nano checkpoint in the complete native layout: the packaged weights, or random ones.

What the serving engine hard-codes keeps its size (facts §1.2; vllm-omni
higgs_audio_v3_code2wav.py): 8 codebooks of 1024 codes and 64 channels, a codec decoder of 256 ->
1024 channels, a text table that reaches beyond id 151671. Everything else is small.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import HiggsAudioV2TokenizerConfig, HiggsAudioV2TokenizerModel

from higgs_lab.checkpoint import CODEC_PREFIX, INDEX, TIED_COPIES, to_native_key
from higgs_lab.nano import ASSETS, packing
from higgs_lab.nano.tokenizer import write_tokenizer
from higgs_lab.runlog import atomic_path, write_json_atomic
from higgs_lab.talker import Talker, talker_config
from higgs_lab.vocab import CODEC_CONFIG, EOC

TEXT_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 384,
    "hidden_act": "silu",
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "max_window_layers": 3,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "layer_types": ["full_attention"] * 3,
    "sliding_window": None,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "use_cache": True,
    "initializer_range": 0.02,
    "dtype": "bfloat16",
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
}

SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
)


def native_config(text_config: dict) -> dict:
    """config.json of the 4B checkpoint (facts §1.4) around another text_config."""
    return {
        "architectures": ["HiggsMultimodalQwen3ForConditionalGeneration"],
        "model_type": "higgs_multimodal_qwen3",
        "_hidden_size": text_config["hidden_size"],
        "_vocab_size": text_config["vocab_size"],
        "audio_token_id": -100,
        "ignore_index": -100,
        "audio_encoder_config": {
            "encoder_type": "discrete",
            "model_type": "higgs_audio_encoder",
            "num_codebooks": 8,
            "vocab_size": EOC + 1,
            "out_dim": text_config["hidden_size"],
            "tie_word_embeddings": True,
            "use_delay_pattern": True,
            "max_chunk_size": 50,
            "mel_per_sample": 8,
        },
        "text_config": text_config,
    }


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


def is_trained() -> bool:
    """Whether the talker and its codec are packaged."""
    return all((ASSETS / f"{part}.safetensors").is_file() for part in ("codec", "talker"))


def write_checkpoint(out: str | Path) -> None:
    """Write the native directory of the trained talker and codec; atomic.

    The text table gets its full height and the codec's decoder its full width (packing.py).
    """
    packaged, talker = packing.expand_talker(ASSETS / "talker.safetensors")
    layers = packaged["num_hidden_layers"]
    sizes = {name: packaged[name] for name in SIZES}
    shape = {"max_window_layers": layers, "layer_types": ["full_attention"] * layers}
    config = native_config(TEXT_CONFIG | sizes | shape)
    codec = packing.expand_codec(ASSETS / "codec.safetensors")
    tensors = {to_native_key(key): value for key, value in talker.items()}
    tensors |= {CODEC_PREFIX + key: value for key, value in codec.items()}
    # the released file has this one too, which no codec reads
    width = len(codec["semantic_model.encoder.layer_norm.weight"])
    tensors[CODEC_PREFIX + "semantic_model.masked_spec_embed"] = torch.zeros(width)
    write_native(tensors, config, out)


def random_checkpoint(out: str | Path, seed: int = 0) -> None:
    """Write a native directory of random weights; atomic."""
    torch.manual_seed(seed)
    config = native_config(TEXT_CONFIG)
    audio = config["audio_encoder_config"]
    talker = Talker(talker_config(TEXT_CONFIG), audio["num_codebooks"], audio["vocab_size"])
    codec = random_codec(small_codec_config(), seed)
    tensors = {to_native_key(key): value for key, value in talker.state_dict().items()}
    tensors |= {CODEC_PREFIX + key: value for key, value in codec.state_dict().items()}
    width = codec.config.semantic_model_config.hidden_size
    tensors[CODEC_PREFIX + "semantic_model.masked_spec_embed"] = torch.rand(width)
    write_native(tensors, config, out)


def write_native(tensors: dict[str, Tensor], config: dict, out: str | Path) -> None:
    """Native directory from native keys; bf16 and the two tied copies as in the 4B checkpoint."""
    tensors = {
        key: value.detach().to(torch.bfloat16).contiguous() for key, value in tensors.items()
    }
    total = sum(value.nbytes for value in tensors.values())
    weight_map = {key: "model.safetensors" for key in sorted(tensors)}
    copies = {copy_: tensors[source].clone() for copy_, source in TIED_COPIES.items()}
    with atomic_path(Path(out)) as temporary:
        temporary.mkdir()
        save_file({**tensors, **copies}, temporary / "model.safetensors", metadata={"format": "pt"})
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json_atomic(temporary / INDEX, index)
        (temporary / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        write_tokenizer(temporary)


@torch.no_grad()
def random_codec(config: dict, seed: int) -> HiggsAudioV2TokenizerModel:
    """A codec of random weights whose codes still depend on the sound.

    Codebooks are drawn from the residuals of the model's own features of noise and tones, stage by
    stage, so that all of them are used; the output is scaled to the level of speech.
    """
    torch.manual_seed(seed)
    model = HiggsAudioV2TokenizerModel(HiggsAudioV2TokenizerConfig(**copy.deepcopy(config))).eval()
    model.double()  # so that weights rounded to bf16 are the same on any machine and thread count
    rate, seconds = model.config.sample_rate, 48
    time = torch.arange(rate * seconds).double() / rate
    sweep = torch.sin(2 * torch.pi * (100 * time + 40 * time**2)) * (1 + torch.sin(9 * time)) / 4
    wav = (sweep + 0.1 * torch.randn_like(time) * torch.sin(3 * time).abs())[None, None]
    grabbed: list[Tensor] = []
    hook = model.fc.register_forward_hook(lambda module, args, out: grabbed.append(out))
    model.encode(wav)
    hook.remove()
    residual = grabbed[0].transpose(1, 2)  # [1, hidden, T]
    for layer in model.quantizer.quantizers:
        flat = residual.transpose(1, 2).reshape(-1, residual.shape[1])
        layer.project_in.weight.div_(layer.project_in(flat).std())
        projected = layer.project_in(flat)
        pick = torch.randperm(len(projected))[: layer.codebook.codebook_size]
        layer.codebook.embed.copy_(projected[pick])
        layer.codebook.embed_avg.copy_(5 * projected[pick])
        layer.codebook.cluster_size.fill_(5)
        # the way back, so that each stage really removes something; the ridge steadies it
        gram = projected.T @ projected + 1e-3 * len(projected) * torch.eye(len(projected.T))
        inverse = torch.linalg.solve(gram, projected.T @ (flat - flat.mean(0)))
        layer.project_out.weight.copy_(inverse.T)
        layer.project_out.bias.copy_(flat.mean(0))
        residual = residual - layer.decode(layer.encode(residual))
    codes = model.encode(wav).audio_codes
    last = model.float().acoustic_decoder.conv2
    wave = model.decode(codes[..., :200]).audio_values
    last.weight.div_(wave.std() / 0.05)
    last.bias.zero_()
    return model
