"""Every id, size and rate of a checkpoint, read from the checkpoint.

Glossary used all over the project
    B batch · K codebooks (8) · V entries per codebook with specials (1026)
    T codec frames (25 per second) · S = T+K-1 delayed rows · L positions of a sequence · D hidden
    `codes` is always [T, K] int; `rows` always [S, K] int.
    BOC and EOC are ids of the codec vocabulary, never text ids.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from higgs_lab.tags import check_text

# Begin and end of a codebook's stream, the two entries after the 1024 real codes. Both engines fix
# them (vllm-omni higgs_audio_v3_tokenizer.py, sglang-omni higgs_tts/utils.py).
BOC, EOC = 1024, 1025

CODEC_CONFIG = json.loads(Path(__file__).with_name("codec_v2.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Vocab:
    """Text tokenizer, control ids, sizes and rates of one checkpoint."""

    tokenizer: PreTrainedTokenizerFast
    num_codebooks: int  # K
    codebook_size: int  # V, with BOC and EOC
    sample_rate_hz: int
    samples_per_frame: int
    tts_id: int  # <|tts|>: the task; without it the model speaks fluently, but wrong text
    text_id: int  # <|text|>: target text follows
    audio_id: int  # <|audio|>: its hidden state predicts row 0
    ref_audio_id: int  # <|ref_audio|>: delayed reference rows follow
    ref_text_id: int  # <|ref_text|>: transcript of the reference follows

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Vocab:
        """Read config.json and tokenizer.json of a native checkpoint directory.

        Raises FileNotFoundError when a file is missing and ValueError when the tokenizer lacks
        Higgs control tokens (a stock Qwen3 tokenizer has others at the same ids).
        """
        path = Path(path)
        for name in ("config.json", "tokenizer.json"):
            if not (path / name).is_file():
                raise FileNotFoundError(f"{path / name} is missing: not a native Higgs checkpoint")
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        audio = config.get("audio_encoder_config")
        if not audio:
            raise ValueError(
                f"{path / 'config.json'}: no 'audio_encoder_config'; not a Higgs TTS 3 config"
            )
        if audio["vocab_size"] != EOC + 1:
            raise ValueError(
                f"{path / 'config.json'}: audio_encoder_config.vocab_size is "
                f"{audio['vocab_size']}, but codebooks end with BOC={BOC} and EOC={EOC}, so it "
                f"must be {EOC + 1}"
            )
        # tokenizer.json is read directly: AutoTokenizer also follows tokenizer_config.json, which
        # drifted between releases (sglang-omni engine_builder.py notes the same).
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))
        added = tokenizer.get_added_vocab()
        names = {"tts_id": "<|tts|>", "text_id": "<|text|>", "audio_id": "<|audio|>"}
        names |= {"ref_audio_id": "<|ref_audio|>", "ref_text_id": "<|ref_text|>"}
        missing = [token for token in names.values() if token not in added]
        if missing:
            raise ValueError(
                f"{path / 'tokenizer.json'} lacks the control tokens {missing}: use the "
                "checkpoint's own tokenizer, a stock Qwen3 one has other tokens at these ids"
            )
        codec = CODEC_CONFIG
        if (path / "audio_tokenizer" / "config.json").is_file():
            codec = json.loads(
                (path / "audio_tokenizer" / "config.json").read_text(encoding="utf-8")
            )
        return cls(
            tokenizer=tokenizer,
            num_codebooks=audio["num_codebooks"],
            codebook_size=audio["vocab_size"],
            sample_rate_hz=codec["sample_rate"],
            samples_per_frame=math.prod(codec["acoustic_model_config"]["downsampling_ratios"]),
            **{field: added[token] for field, token in names.items()},
        )

    @property
    def frame_rate_hz(self) -> float:
        return self.sample_rate_hz / self.samples_per_frame

    @cached_property
    def added_tokens(self) -> frozenset[str]:
        """All control tokens, which user text must not contain unless they are known tags."""
        return frozenset(self.tokenizer.get_added_vocab())

    def encode(self, text: str, where: str = "text") -> list[int]:
        """Text ids without specials added and nothing stripped, as both engines do.

        Raises ValueError (naming `where`) for empty text, an unknown tag or a control token
        smuggled into the text: the engines would turn it into the control id.
        """
        check_text(text, where=where, added_tokens=self.added_tokens)
        return self.tokenizer.encode(text, add_special_tokens=False)
