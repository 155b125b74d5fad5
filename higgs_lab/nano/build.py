"""The nano checkpoint in the complete native layout, from the packaged weights.

What the serving engine hard-codes keeps its size (facts §1.2; vllm-omni
higgs_audio_v3_code2wav.py): 8 codebooks of 1024 codes and 64 channels, a codec decoder of 256 ->
1024 channels, a text table that reaches beyond id 151671. Everything else is small.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from higgs_lab.checkpoint import CODEC_PREFIX, INDEX, TIED_COPIES, to_native_key
from higgs_lab.nano import ASSETS, packing
from higgs_lab.nano.tokenizer import write_tokenizer
from higgs_lab.runlog import atomic_path, write_json_atomic
from higgs_lab.vocab import EOC

TEXT_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 768,
    "hidden_act": "silu",
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "max_window_layers": 8,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "layer_types": ["full_attention"] * 8,
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
