"""Higgs's control tokens at their true ids over a base vocabulary of bytes.

Byte-level BPE without merges: 256 entries, every text encodes, no file larger than needed. The 84
added tokens stand at the ids of the 4B checkpoint (facts §1.7), 151643 and up, so the vocabulary
has a hole between 256 and 151643; `tokenizers` loads it, but its own `save` warns of every missing
id, so the JSON is written here.
"""

from __future__ import annotations

import json
from pathlib import Path

FIRST_ADDED_ID = 151643
_FIM = "fim_prefix fim_middle fim_suffix fim_pad repo_name file_sep"
_EMOTIONS = (
    "elation amusement enthusiasm determination pride contentment affection relief "
    "contemplation confusion surprise awe longing arousal anger fear disgust bitterness "
    "sadness shame helplessness"
)
_SFX = "cough laughter crying screaming burping humming sigh sniff sneeze"


def _piped(names: str, category: str = "") -> list[str]:
    prefix = f"{category}:" if category else ""
    return [f"<|{prefix}{name}|>" for name in names.split()]


ADDED_TOKENS: list[str] = [
    *_piped("endoftext im_start im_end object_ref_start object_ref_end box_start box_end"),
    *_piped("quad_start quad_end vision_start vision_end vision_pad image_pad video_pad"),
    "<tool_call>",
    "</tool_call>",
    *_piped(_FIM),
    *_piped("asr streaming_asr tts streaming_tts audio_cont_txt audio audio_end text text_end eoc"),
    *_piped("user assistant system await_audio ref_audio ref_text"),
    *_piped(_EMOTIONS, "emotion"),
    *_piped("music noise", "env"),
    *_piped("singing shouting whispering", "style"),
    *_piped(_SFX, "sfx"),
    *_piped("speed_very_slow speed_slow speed_fast speed_very_fast", "prosody"),
    *_piped("pitch_low pitch_high pause long_pause", "prosody"),
    "<|chatml|>",
    *_piped("expressive_high expressive_low", "prosody"),
]
NOT_SPECIAL = {"<tool_call>", "</tool_call>", *_piped(_FIM)}


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins of byte-level BPE, in byte order (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table, spare = {}, 256
    for byte in range(256):
        if byte in printable:
            table[byte] = chr(byte)
        else:
            table[byte] = chr(spare)
            spare += 1
    return [table[byte] for byte in range(256)]


def write_tokenizer(out: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into `out`."""
    added = [
        {
            "id": FIRST_ADDED_ID + i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": token not in NOT_SPECIAL,
        }
        for i, token in enumerate(ADDED_TOKENS)
    ]
    pre_split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )  # Qwen2's, with single digits
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": pre_split},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {**byte_level, "use_regex": False},
            ],
        },
        "post_processor": {**byte_level, "use_regex": False},
        "decoder": {**byte_level, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            # The control tokens stand here too: `tokenizers` numbers added tokens after the
            # vocabulary and heeds their "id" only where the vocabulary says the same.
            "vocab": {
                **{char: byte for byte, char in enumerate(byte_alphabet())},
                **{entry["content"]: entry["id"] for entry in added},
            },
            "merges": [],
        },
    }
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "errors": "replace",
        "model_max_length": 131072,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
        "added_tokens_decoder": {
            str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in added
        },
    }
    dump = {"tokenizer.json": tokenizer, "tokenizer_config.json": config}
    for name, value in dump.items():
        (out / name).write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
