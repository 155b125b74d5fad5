"""Ids, sizes and rates come from the checkpoint; what is no Higgs checkpoint is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from higgs_lab.vocab import BOC, EOC, Vocab

# facts §1.7, each id named there
GOLDEN_IDS = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|asr|>": 151665,
    "<|streaming_asr|>": 151666,
    "<|tts|>": 151667,
    "<|streaming_tts|>": 151668,
    "<|audio_cont_txt|>": 151669,
    "<|audio|>": 151670,
    "<|audio_end|>": 151671,
    "<|text|>": 151672,
    "<|text_end|>": 151673,
    "<|eoc|>": 151674,
    "<|user|>": 151675,
    "<|assistant|>": 151676,
    "<|system|>": 151677,
    "<|await_audio|>": 151678,
    "<|ref_audio|>": 151679,
    "<|ref_text|>": 151680,
    "<|emotion:elation|>": 151681,
    "<|emotion:helplessness|>": 151701,
    "<|env:music|>": 151702,
    "<|env:noise|>": 151703,
    "<|style:singing|>": 151704,
    "<|style:whispering|>": 151706,
    "<|sfx:cough|>": 151707,
    "<|sfx:sneeze|>": 151715,
    "<|prosody:speed_very_slow|>": 151716,
    "<|prosody:pause|>": 151722,
    "<|prosody:long_pause|>": 151723,
    "<|chatml|>": 151724,
    "<|prosody:expressive_high|>": 151725,
    "<|prosody:expressive_low|>": 151726,
}


@pytest.fixture(scope="module")
def vocab(nano) -> Vocab:
    return Vocab.from_pretrained(nano)


@pytest.fixture
def folder(nano, tmp_path) -> Path:
    """The checkpoint without its weights, to be spoilt."""
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(nano / name, tmp_path / name)
    return tmp_path


def edit(file: Path, change) -> None:
    value = json.loads(file.read_text(encoding="utf-8"))
    change(value)
    file.write_text(json.dumps(value), encoding="utf-8")


def test_trap07_control_tokens_have_higgs_ids(vocab):
    added = vocab.tokenizer.get_added_vocab()
    assert {token: added[token] for token in GOLDEN_IDS} == GOLDEN_IDS
    assert len(added) == 84
    assert sorted(added.values()) == list(range(151643, 151727))
    assert (vocab.tts_id, vocab.text_id, vocab.audio_id) == (151667, 151672, 151670)
    assert (vocab.ref_audio_id, vocab.ref_text_id) == (151679, 151680)


def test_trap07_ids_follow_the_checkpoint_not_the_code(folder):
    """The lookup is by token string: a checkpoint that moves <|tts|> moves the prompt with it."""

    def swap(tokenizer):
        a, b = "<|tts|>", "<|streaming_tts|>"
        vocab = tokenizer["model"]["vocab"]
        vocab[a], vocab[b] = vocab[b], vocab[a]
        for entry in tokenizer["added_tokens"]:
            entry["content"] = {a: b, b: a}.get(entry["content"], entry["content"])

    edit(folder / "tokenizer.json", swap)
    assert Vocab.from_pretrained(folder).tts_id == 151668


def test_trap07_a_stock_qwen3_tokenizer_is_refused(folder):
    """Stock Qwen3 has <tool_response> and <think> where Higgs has its control tokens."""
    stock = ["<tool_response>", "</tool_response>", "<think>", "</think>"]

    def to_stock(tokenizer):
        vocab = tokenizer["model"]["vocab"]
        kept = []
        for entry in tokenizer["added_tokens"]:
            place = entry["id"] - 151665
            if place >= 0:
                del vocab[entry["content"]]
            if 0 <= place < len(stock):
                entry["content"] = stock[place]
                vocab[stock[place]] = entry["id"]
            if place < len(stock):
                kept.append(entry)
        tokenizer["added_tokens"] = kept

    edit(folder / "tokenizer.json", to_stock)
    with pytest.raises(ValueError, match=r"lacks the control tokens.*<\|tts\|>.*stock Qwen3"):
        Vocab.from_pretrained(folder)


def test_trap15_rates_are_those_of_the_v2_codec(vocab):
    assert (vocab.sample_rate_hz, vocab.samples_per_frame, vocab.frame_rate_hz) == (24000, 960, 25)
    assert (vocab.num_codebooks, vocab.codebook_size) == (8, 1026)
    assert (BOC, EOC) == (1024, 1025)


def test_rates_follow_a_codec_folder_when_there_is_one(folder):
    from higgs_lab.vocab import CODEC_CONFIG

    acoustic = CODEC_CONFIG["acoustic_model_config"] | {"downsampling_ratios": [8, 5, 4, 3]}
    config = CODEC_CONFIG | {"sample_rate": 12000, "acoustic_model_config": acoustic}
    (folder / "audio_tokenizer").mkdir()
    (folder / "audio_tokenizer" / "config.json").write_text(json.dumps(config))
    vocab = Vocab.from_pretrained(folder)
    assert (vocab.sample_rate_hz, vocab.samples_per_frame, vocab.frame_rate_hz) == (12000, 480, 25)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        Vocab.from_pretrained(folder)


def test_another_models_config_is_refused(folder):
    edit(folder / "config.json", lambda c: c.pop("audio_encoder_config"))
    with pytest.raises(ValueError, match="audio_encoder_config"):
        Vocab.from_pretrained(folder)


def test_another_codebook_size_is_refused(folder):
    edit(folder / "config.json", lambda c: c["audio_encoder_config"].update(vocab_size=1024))
    with pytest.raises(ValueError, match="vocab_size is 1024.*must be 1026"):
        Vocab.from_pretrained(folder)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hi", [72, 105]),
        (" a ", [32, 97, 32]),  # nothing is stripped: neither engine does
        ("é", [0xC3, 0xA9]),
        ("e\u0301", [0xC3, 0xA9]),  # NFC, as in the released tokenizer
        ("12", [49, 50]),
        ("<|emotion:awe|>Oh", [151692, 79, 104]),
    ],
)
def test_trap06_text_ids_have_nothing_added_or_stripped(vocab, text, ids):
    assert vocab.encode(text) == ids
    assert isinstance(vocab.tokenizer, PreTrainedTokenizerFast)


@pytest.mark.parametrize("token", sorted(GOLDEN_IDS))
def test_no_control_token_can_be_smuggled(vocab, token):
    """43 tags pass; everything else of the 84 is refused, whatever it looks like."""
    from higgs_lab.tags import BY_LITERAL

    text = f"Say {token} now."
    if token in BY_LITERAL:
        assert vocab.tokenizer.get_added_vocab()[token] in vocab.encode(text)
        return
    with pytest.raises(ValueError, match="row 3: "):
        vocab.encode(text, where="row 3")


def test_every_text_without_tags_gives_base_ids_only(vocab):
    text = "Zahlen 3.14, Ümläute, 你好，ภาษาไทย 🙂 </s> [INST] <s>"
    ids = vocab.encode(text)
    assert max(ids) < 256
    assert vocab.tokenizer.decode(ids) == text
