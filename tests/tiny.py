"""Tiny seeded builders: a talker of 20,000 weights beside the tables, a vocabulary of 340 ids.

The nano checkpoint has the full text table of 151,936 rows; where a test only needs the same code
to run, these are a hundred times faster.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from higgs_lab.checkpoint import CODEC_PREFIX, NativeFiles, to_native_key
from higgs_lab.nano.build import native_config, write_native
from higgs_lab.nano.tokenizer import ADDED_TOKENS, byte_alphabet
from higgs_lab.prompt import Example, Prompt, render_example, render_prompt
from higgs_lab.talker import Talker, talker_config
from higgs_lab.vocab import Vocab

K, V = 8, 1026
TEXT_CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "hidden_act": "silu",
    "vocab_size": 352,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "layer_types": ["full_attention"] * 2,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "dtype": "bfloat16",
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
}
# facts §1.4, as in the released config.json
TEXT_CONFIG_4B = TEXT_CONFIG | {
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9728,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "layer_types": ["full_attention"] * 36,
}


@cache
def tiny_vocab() -> Vocab:
    """Bytes at 0..255 and the 84 control tokens behind them."""
    tokens = [*byte_alphabet(), *ADDED_TOKENS]
    raw = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(ADDED_TOKENS)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    fields = ("tts", "text", "audio", "ref_audio", "ref_text")
    ids = {f"{name}_id": tokens.index(f"<|{name}|>") for name in fields}
    return Vocab(tokenizer, K, V, sample_rate_hz=24000, samples_per_frame=960, **ids)


def tiny_talker(seed: int = 0, scale: float = 1.0, dtype=torch.float32, **changes) -> Talker:
    """Random talker in eval mode. scale > 1 spreads its weights, so that logits differ visibly."""
    torch.manual_seed(seed)
    talker = Talker(talker_config(copy.deepcopy(TEXT_CONFIG) | changes), K, V)
    with torch.no_grad():
        for parameter in talker.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return talker.to(dtype).eval()


def meta_talker(text_config: dict) -> Talker:
    with torch.device("meta"):
        return Talker(talker_config(copy.deepcopy(text_config)), K, V)


def random_codes(frames: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 1024, (frames, K), generator=torch.Generator().manual_seed(seed))


def three_prompts() -> list[Prompt]:
    """One of each mode, of very different lengths."""
    vocab = tiny_vocab()
    return [
        render_prompt(vocab, "Hi."),
        render_prompt(vocab, "A longer line to speak.", random_codes(9, 1)),
        render_prompt(vocab, "Three.", random_codes(12, 2), "What the reference says."),
    ]


def three_examples() -> list[Example]:
    """One of each mode, of very different lengths."""
    vocab = tiny_vocab()
    return [
        render_example(vocab, "Hi.", random_codes(10, 3)),
        render_example(vocab, "A longer line to speak.", random_codes(17, 4), random_codes(9, 1)),
        render_example(vocab, "Three.", random_codes(8, 5), random_codes(12, 2), "It says this."),
    ]


def pad_examples(examples: list[Example]) -> dict[str, Tensor]:
    """Every column of the examples as one padded batch [B, L, ...], and its attention_mask."""
    longest = max(map(len, examples))

    def column(name: str) -> Tensor:
        values = [getattr(example, name) for example in examples]
        return torch.stack(
            [torch.cat([v, v.new_zeros(longest - len(v), *v.shape[1:])]) for v in values]
        )

    names = ("ids", "is_audio", "rows", "labels", "supervised")
    mask = torch.stack([(torch.arange(longest) < len(e)).long() for e in examples])
    return {name: column(name) for name in names} | {"attention_mask": mask}


def run_one(talker: Talker, sequence: Prompt, **kwargs) -> Tensor:
    """Logits [L, K, V] of one sequence alone."""
    batch = (sequence.ids[None], sequence.is_audio[None], sequence.rows[None])
    return talker(*batch, **kwargs).logits[0]


def tiny_tensors(talker: Talker) -> dict[str, Tensor]:
    """Native tensors: the talker's, and stand-ins for a codec, whose inside nobody reads."""
    tensors = {to_native_key(key): value for key, value in talker.state_dict().items()}
    generator = torch.Generator().manual_seed(9)
    for name in ("fc.weight", "acoustic_decoder.conv1.weight", "semantic_model.masked_spec_embed"):
        tensors[CODEC_PREFIX + name] = torch.randn(5, 3, generator=generator)
    return tensors


def tiny_native(out: Path, talker: Talker | None = None, **config_changes) -> Path:
    """A native directory with a tiny talker; tokenizer as in nano."""
    config = native_config(copy.deepcopy(TEXT_CONFIG)) | config_changes
    write_native(tiny_tensors(talker or tiny_talker()), config, out)
    return out


def narrow_native(nano: Path, out: Path) -> Path:
    """A native directory that engines take: a narrow talker of full vocabulary, nano's codec."""
    sizes = {"vocab_size": 151936, "hidden_size": 16}
    files = NativeFiles(nano)
    tensors = {to_native_key(k): v for k, v in tiny_talker(**sizes).state_dict().items()}
    tensors |= dict(files.items(files.keys(CODEC_PREFIX)))
    write_native(tensors, native_config(TEXT_CONFIG | sizes), out)
    return out


def voice_like(seconds: float, seed: int = 0, sample_rate_hz: int = 24000) -> np.ndarray:
    """A buzz of moving pitch and loudness with some breath, so that all codebooks get work."""
    rng = np.random.default_rng(seed)
    n = round(seconds * sample_rate_hz)
    time = np.arange(n) / sample_rate_hz
    pitch = 120 + 40 * np.sin(2 * np.pi * 0.7 * time + seed)
    phase = 2 * np.pi * np.cumsum(pitch) / sample_rate_hz
    buzz = sum(np.sin(h * phase) / h for h in range(1, 12))
    loud = 0.2 + 0.8 * np.abs(np.sin(2 * np.pi * 1.3 * time))
    return (0.1 * loud * buzz + 0.01 * rng.standard_normal(n)).astype(np.float32)


def noise_file(path: Path, seed: int = 0, seconds: float = 1.0) -> Path:
    """A recording of quiet noise at 24 kHz, in the format that its name says."""
    import soundfile  # here, since GPU machines that run tests/gpu have none

    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(seed).uniform(-0.1, 0.1, int(seconds * 24000))
    soundfile.write(path, samples.astype(np.float32), 24000, format=path.suffix[1:].upper())
    return path


def prepared_rows(count: int, split: str = "train", seed: int = 0, speakers: int = 2) -> list[dict]:
    """Rows as prepared data holds them; codes are random."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        frames = int(rng.integers(25, 60))
        made.append(
            {
                "id": f"{split}{i}",
                "text": f"Sentence number {i} of {split}.",
                "language": "en",
                "speaker": f"s{i % speakers}",
                "codes": rng.integers(0, 1024, (frames, 8)).astype(np.uint16),
                "frames": frames,
                "seconds": frames / 25,
                "ref_codes": np.zeros((0, 8), np.uint16),
                "ref_text": None,
                "split": split,
                "audio": f"{i}.wav",
            }
        )
    return made


def num_layers(checkpoint: Path) -> int:
    """Blocks of a native checkpoint's talker: tests must not know the nano's size."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    return config["text_config"]["num_hidden_layers"]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two state dicts hold the same names, dtypes and numbers."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )
