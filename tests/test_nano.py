"""The nano checkpoint: the complete native layout with the sizes that engines hard-code."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from higgs_lab.checkpoint import CODEC_PREFIX, NativeFiles, load_talker, read_config
from higgs_lab.codec import Codec
from higgs_lab.nano import nano_checkpoint
from higgs_lab.nano.tokenizer import ADDED_TOKENS, byte_alphabet
from higgs_lab.tags import TAGS
from higgs_lab.vocab import Vocab
from tests.tiny import voice_like


def test_config_is_the_released_one_with_other_sizes(nano):
    """Facts §1.4: every field that an engine reads, by name and value."""
    config = read_config(nano)
    assert config["architectures"] == ["HiggsMultimodalQwen3ForConditionalGeneration"]
    assert config["model_type"] == "higgs_multimodal_qwen3"
    assert config["audio_token_id"] == config["ignore_index"] == -100
    text, audio = config["text_config"], config["audio_encoder_config"]
    assert text["rope_parameters"] == {"rope_theta": 1000000, "rope_type": "default"}
    assert "rope_theta" not in text
    assert (text["vocab_size"], text["tie_word_embeddings"]) == (151936, True)
    assert config["_vocab_size"] == text["vocab_size"]
    assert config["_hidden_size"] == text["hidden_size"] == audio["out_dim"]
    assert (audio["num_codebooks"], audio["vocab_size"]) == (8, 1026)
    assert audio["tie_word_embeddings"] and audio["use_delay_pattern"]
    assert "dtype" not in config and "tie_word_embeddings" not in config


def test_sizes_that_the_server_hard_codes(nano):
    """vllm-omni higgs_audio_v3_code2wav.py builds its decoder with these, whatever config says."""
    files = NativeFiles(nano)
    shapes = {k: tuple(v.shape) for k, v in files.items(files.keys(CODEC_PREFIX))}
    codec = {k.removeprefix(CODEC_PREFIX): v for k, v in shapes.items()}
    for n in range(8):
        assert codec[f"quantizer.quantizers.{n}.codebook.embed"] == (1024, 64)
        assert codec[f"quantizer.quantizers.{n}.project_out.weight"][1] == 64
    assert codec["acoustic_decoder.conv1.weight"][:2] == (1024, 256)
    assert codec["fc2.weight"] == (256, codec["quantizer.quantizers.0.project_out.weight"][0])
    assert shapes[CODEC_PREFIX + "semantic_model.masked_spec_embed"]


def test_the_text_table_reaches_every_id_the_server_uses(nano):
    """It stops on 151643 and 151671: a shorter table would index beyond its end."""
    talker = load_talker(nano)
    assert talker.model.embed_tokens.weight.shape[0] == 151936
    assert len(Vocab.from_pretrained(nano).tokenizer) <= 151936


def test_trap07_both_ways_of_loading_the_tokenizer_agree(nano):
    """SGLang-Omni reads tokenizer.json, vLLM-Omni goes through AutoTokenizer."""
    raw, auto = Vocab.from_pretrained(nano).tokenizer, AutoTokenizer.from_pretrained(nano)
    for text in ("Hello <|prosody:pause|>there.", "Zahl 3.14 你好 e\u0301\n", "<|tts|><|audio|>"):
        assert auto.encode(text, add_special_tokens=False) == raw.encode(
            text, add_special_tokens=False
        )
    assert auto.get_added_vocab() == raw.get_added_vocab()
    assert (auto.eos_token, auto.pad_token) == ("<|endoftext|>", "<|endoftext|>")


def test_the_added_tokens_hold_all_43_tags():
    assert len(ADDED_TOKENS) == len(set(ADDED_TOKENS)) == 84
    assert {tag.literal for tag in TAGS} <= set(ADDED_TOKENS)
    assert len(set(byte_alphabet())) == 256


def test_codes_depend_on_the_sound(nano):
    """All codebooks work: else no test on them would mean anything."""
    codec = Codec.from_pretrained(nano)
    a, b = codec.encode(voice_like(2.0, 1)), codec.encode(voice_like(2.0, 2))
    assert float((a == b).float().mean()) < 0.7
    for c in range(8):
        assert len(a[:, c].unique()) > 1, c
    wave = codec.decode(a)
    assert 0.005 < float(wave.std()) < 0.5  # the level of speech


def test_it_is_built_once_and_appears_whole(nano, tmp_path, monkeypatch):
    assert nano_checkpoint() == nano
    assert not list(nano.parent.glob(".tmp-*nano*"))
    monkeypatch.setenv("HIGGS_LAB_CACHE", str(tmp_path))
    calls = []

    def build(path):
        calls.append(path)
        path.mkdir(parents=True)

    monkeypatch.setattr("higgs_lab.nano.build.write_checkpoint", build)
    first, second = nano_checkpoint(), nano_checkpoint()
    assert first == second and first.parent == tmp_path
    assert len(calls) == 1
    assert nano_checkpoint(tmp_path / "given").parent == tmp_path / "given"
    assert len(calls) == 2


@pytest.mark.slow
def test_it_is_built_the_same_whatever_the_threads(nano, tmp_path):
    """Else each machine has a codec of its own, and prepared data of another is refused."""
    torch.set_num_threads(2)
    try:
        again = nano_checkpoint(tmp_path)
    finally:
        torch.set_num_threads(1)
    ours, theirs = (dict(NativeFiles(p).items()) for p in (nano, again))
    assert set(ours) == set(theirs)
    assert [k for k in ours if not torch.equal(ours[k], theirs[k])] == []
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (again / name).read_bytes() == (nano / name).read_bytes()
