"""A checkpoint of random weights in the size of Higgs TTS 3 4B: to measure with, not to hear.

    python -m higgs_lab.nano.random_4b --out /big/random_4b
    python -m higgs_lab.nano.random_4b --out /big/random_4b --shards 3 --adapter /big/random_lora

929 tensors of the released names, shapes and dtype (9.3 GB), the codec at its released size, nano's
tokenizer. Time, memory and file handling are those of the real one; what it says is noise. Written
tensor by tensor, in 3 GB of memory. The adapter is a PEFT folder of random matrices that
changes the weights visibly, again in the sizes of the real one.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import HiggsAudioV2TokenizerConfig, HiggsAudioV2TokenizerModel

from higgs_lab.adapter import TARGETS
from higgs_lab.checkpoint import CODEC_PREFIX, INDEX, TIED_COPIES, to_native_key
from higgs_lab.nano.build import TEXT_CONFIG, native_config
from higgs_lab.nano.tokenizer import write_tokenizer
from higgs_lab.runlog import Progress, atomic_path, write_json_atomic
from higgs_lab.safetensors_stream import SafetensorsWriter
from higgs_lab.talker import Talker, talker_config
from higgs_lab.vocab import CODEC_CONFIG

# text_config of the released config.json (facts §1.4): what differs from nano's.
TEXT_CONFIG_4B = TEXT_CONFIG | {
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9728,
    "max_window_layers": 36,
    "layer_types": ["full_attention"] * 36,
}


def write_random(
    out: str | Path,
    text_config: dict = TEXT_CONFIG_4B,
    codec: dict = CODEC_CONFIG,
    seed: int = 0,
    shards: int = 1,
) -> None:
    """Write a native directory of random weights; atomic. `shards`: files of about equal size."""
    config = native_config(text_config)
    state = _codec(codec, seed).state_dict()
    fixed = {CODEC_PREFIX + key: value.to(torch.bfloat16) for key, value in state.items()}
    width = codec["semantic_model_config"]["hidden_size"]
    fixed[CODEC_PREFIX + "semantic_model.masked_spec_embed"] = torch.rand(width).bfloat16()
    shapes = {to_native_key(k): list(v.shape) for k, v in _meta(config).state_dict().items()}
    shapes |= {key: list(value.shape) for key, value in fixed.items()}
    shapes |= {twin: shapes[source] for twin, source in TIED_COPIES.items()}
    files = _split(shapes, shards)
    total = 2 * sum(math.prod(shape) for shape in shapes.values())
    with atomic_path(Path(out)) as temporary, Progress(total / 1e9, "GB", "write") as progress:
        temporary.mkdir()
        for file, keys in files.items():
            specs = {key: ("BF16", shapes[key]) for key in keys}
            with SafetensorsWriter(temporary / file, specs, {"format": "pt"}) as writer:
                for key in keys:
                    tensor = fixed[key] if key in fixed else _random(key, shapes[key], seed)
                    writer.write(key, tensor)
                    progress.update(tensor.nbytes / 1e9)
        listed = {k: file for file, keys in files.items() for k in keys if k not in TIED_COPIES}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(listed.items()))}
        write_json_atomic(temporary / INDEX, index)
        (temporary / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        write_tokenizer(temporary)


def write_random_adapter(
    base: str | Path, out: str | Path, rank: int = 16, preset: str = "attention_mlp", seed: int = 0
) -> None:
    """A PEFT adapter for a native directory, as if trained; atomic."""
    from peft import LoraConfig

    config = json.loads((Path(base) / "config.json").read_text(encoding="utf-8"))
    options = TARGETS[preset]
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in _meta(config).named_modules():
        if name.rpartition(".")[2] in options["target_modules"]:
            a = torch.randn(rank, module.in_features, generator=generator)
            b = torch.randn(module.out_features, rank, generator=generator)
            key = f"base_model.model.{name}"
            tensors[f"{key}.lora_A.weight"] = a / math.sqrt(module.in_features)
            tensors[f"{key}.lora_B.weight"] = 0.01 * b
    with atomic_path(Path(out)) as temporary:
        temporary.mkdir()
        LoraConfig(r=rank, lora_alpha=2 * rank, **options).save_pretrained(temporary)
        save_file(tensors, temporary / "adapter_model.safetensors")


@torch.no_grad()
def _codec(config: dict, seed: int) -> HiggsAudioV2TokenizerModel:
    """As initialised, with random codebooks."""
    torch.manual_seed(seed)
    model = HiggsAudioV2TokenizerModel(HiggsAudioV2TokenizerConfig(**copy.deepcopy(config)))
    for layer in model.quantizer.quantizers:
        layer.codebook.embed.normal_()
        layer.codebook.embed_avg.copy_(5 * layer.codebook.embed)
        layer.codebook.cluster_size.fill_(5)
    return model


def _meta(config: dict) -> Talker:
    audio = config["audio_encoder_config"]
    with torch.device("meta"):
        return Talker(
            talker_config(config["text_config"]), audio["num_codebooks"], audio["vocab_size"]
        )


def _random(key: str, shape: list[int], seed: int) -> Tensor:
    """A function of the key, so that a tied copy is its source whatever the order."""
    if len(shape) == 1:  # the norms
        return torch.ones(shape, dtype=torch.bfloat16)
    source = TIED_COPIES.get(key, key)
    generator = torch.Generator().manual_seed(seed + zlib.crc32(source.encode()))
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    for rows in _blocks(shape[0]):  # in fp32 the text table would be 1.6 GB
        tensor[rows] = (
            0.02 * torch.randn(rows.stop - rows.start, shape[1], generator=generator)
        ).to(torch.bfloat16)
    return tensor


def _blocks(length: int, size: int = 8192) -> Iterator[slice]:
    return (slice(i, min(i + size, length)) for i in range(0, length, size))


def _split(shapes: dict[str, list[int]], shards: int) -> dict[str, list[str]]:
    """file -> its keys, in equal parts by size."""
    if shards == 1:
        return {"model.safetensors": list(shapes)}
    total, seen = sum(math.prod(shape) for shape in shapes.values()), 0
    files: dict[str, list[str]] = {}
    for key, shape in shapes.items():
        number = 1 + min(shards - 1, seen * shards // total)
        files.setdefault(f"model-{number:05d}-of-{shards:05d}.safetensors", []).append(key)
        seen += math.prod(shape)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m higgs_lab.nano.random_4b",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", required=True, help="native directory to write, 9.3 GB")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--adapter", help="write a random LoRA of this base too")
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    write_random(args.out, seed=args.seed, shards=args.shards)
    if args.adapter:
        write_random_adapter(args.out, args.adapter, args.rank, seed=args.seed)


if __name__ == "__main__":
    main()
