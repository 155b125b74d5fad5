"""Our exports through the engines' own loading code: keys, shapes, codec, configuration."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from higgs_lab.checkpoint import CODEC_PREFIX, TIED_COPIES, NativeFiles, load_talker
from higgs_lab.codec import Codec
from serve.check import CODE2WAV_SHAPES, TOKEN_IDS, check_export, failures
from serve.export import export

TALKER = "vllm_omni.model_executor.models.higgs_audio_v3.higgs_audio_v3_talker"
CODE2WAV = "vllm_omni.model_executor.models.higgs_audio_v3.higgs_audio_v3_code2wav"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def exported(nano_path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("export") / "nano"
    export(nano_path, out)
    return out


def mapper(vllm):
    """vLLM-Omni's own `_map_weight_name`, as for a tied model."""
    cls = vllm[TALKER].HiggsAudioV3TalkerForConditionalGeneration
    return lambda key: cls._map_weight_name(SimpleNamespace(tie_modality=True), key)


def test_trap12_export_has_every_key_that_vllm_omni_requires_and_no_other(vllm, exported):
    cls = vllm[TALKER].HiggsAudioV3TalkerForConditionalGeneration
    layers = json.loads((exported / "config.json").read_text())["text_config"]["num_hidden_layers"]
    required = cls._build_required_keys(layers)
    keys = NativeFiles(exported).keys()
    assert required <= set(keys)
    others = set(keys) - required - set(TIED_COPIES)
    assert all(key.startswith(CODEC_PREFIX) for key in others)
    map_name = mapper(vllm)
    for key in keys:
        mapped = map_name(key)  # raises on a key it does not know
        assert (mapped is None) == (key in others or key == "tied.head.modality_heads.0.weight")


def test_required_keys_of_the_4b_model_are_the_399_of_its_index(vllm):
    """927 keys in the index less 528 of the codec."""
    cls = vllm[TALKER].HiggsAudioV3TalkerForConditionalGeneration
    assert len(cls._build_required_keys(36)) == 399


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
        "body_lora_A.weight",
        "model.layers.0.mlp.up_proj.weight",
    ],
)
def test_keys_that_vllm_omni_refuses_are_refused_by_our_table_too(vllm, key):
    from higgs_lab.checkpoint import to_talker_key

    with pytest.raises(ValueError):
        mapper(vllm)(key)
    with pytest.raises(ValueError):
        to_talker_key(key)


def test_weights_end_up_in_vllm_omnis_tensors_of_the_same_shape(vllm, exported):
    """The mapped names, without vLLM's fused linears, are those of a Qwen3 model."""
    map_name, talker = mapper(vllm), load_talker(exported)
    ours = {f"model.{k.removeprefix('model.')}": v for k, v in talker.state_dict().items()}
    for key, tensor in NativeFiles(exported).items():
        mapped = map_name(key)
        if mapped is None or mapped.startswith("lm_head."):
            continue
        name = mapped.replace("multimodal_embedding.", "model.codebooks.")
        assert ours[name].shape == tensor.shape and torch.equal(ours[name], tensor)


def test_sglang_maps_every_key_of_the_export(sglang, exported):
    model = sglang["sglang_omni.models.higgs_tts.model"]
    loader = sglang["sglang_omni.models.higgs_tts.weight_loader"]
    table = loader.DiscreteWeightMapper(text_prefix_map=model._BACKBONE_PREFIX_MAP)
    mapped = {key: table.map(key) for key in NativeFiles(exported).keys()}
    for key, name in mapped.items():
        if key.startswith(CODEC_PREFIX):
            assert name is None
        elif key == "tied.head.modality_heads.0.weight":
            assert name == key  # no parameter of that name: dropped
        else:
            assert name.startswith(("backbone.", "multimodal_embedding.modality_embedding_0."))
    names = [n for n in mapped.values() if n is not None]
    assert len(names) == len(set(names))


def test_trap40_sglang_drops_an_unknown_table_without_a_word(sglang):
    """Why serve.check fails an export whose audio table is missing or renamed."""
    model = sglang["sglang_omni.models.higgs_tts.model"]
    loader = sglang["sglang_omni.models.higgs_tts.weight_loader"]
    table = loader.DiscreteWeightMapper(text_prefix_map=model._BACKBONE_PREFIX_MAP)
    assert table.map("tied.embedding.audio_embedding.weight") == (
        "tied.embedding.audio_embedding.weight"
    )


def test_sglang_reads_the_whole_codec_through_our_index(sglang, exported):
    codec = sglang["sglang_omni.models.higgs_tts.audio_codec"]
    state = codec.load_codec_state_dict(str(exported))
    bundled = dict(NativeFiles(exported).items())
    assert {CODEC_PREFIX + k for k in state} == {k for k in bundled if k.startswith(CODEC_PREFIX)}
    assert all(torch.equal(v, bundled[CODEC_PREFIX + k]) for k, v in state.items())


def test_trap12_sglang_loses_what_the_index_forgets_and_check_says_so(sglang, exported, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(exported, bad)
    index = json.loads((bad / INDEX).read_text())
    lost = CODEC_PREFIX + "fc2.bias"
    del index["weight_map"][lost]
    (bad / INDEX).write_text(json.dumps(index))
    codec = sglang["sglang_omni.models.higgs_tts.audio_codec"]
    assert "fc2.bias" not in codec.load_codec_state_dict(str(bad))
    assert "index lists the codec" in {f.rule for f in failures(check_export(bad), "sglang")}


def test_codec_topology_is_the_one_that_sglang_bundles(sglang):
    """trap 15: their JSON is the released configuration, ours must say the same."""
    from higgs_lab.vocab import CODEC_CONFIG

    codec = sglang["sglang_omni.models.higgs_tts.audio_codec"]
    theirs = codec.HiggsAudioV2TokenizerConfig.from_json_file(codec._BUNDLED_CODEC_CONFIG_PATH)
    ours = codec.HiggsAudioV2TokenizerConfig(**copy.deepcopy(CODEC_CONFIG))
    same = ("sample_rate", "codebook_size", "codebook_dim", "hop_length", "num_quantizers")
    assert [getattr(ours, n) for n in same] == [getattr(theirs, n) for n in same]
    assert ours.hop_length == 960
    for part in ("acoustic_model_config", "semantic_model_config"):
        left, right = (getattr(c, part).to_dict() for c in (ours, theirs))
        noise = {"transformers_version", "dtype", "torch_dtype", "_name_or_path"}
        assert {k: v for k, v in left.items() if k not in noise} == {
            k: v for k, v in right.items() if k not in noise
        }


def code2wav(vllm, exported):
    """vLLM-Omni's own codec stage, loaded from the export through its strict loader."""
    module = vllm[CODE2WAV]
    config = vllm["vllm_omni.transformers_utils.configs.higgs_audio_v3"].HiggsAudioV3Config
    stage = module.HiggsAudioV3Code2Wav(config=config(text_config={"model_type": "qwen3"}))
    stage.load_weights(iter(NativeFiles(exported).items()), device=torch.device("cpu"))
    return stage


def test_vllm_omnis_codec_stage_loads_the_export_and_decodes_as_we_do(vllm, exported, monkeypatch):
    # torch raises here without a CUDA driver; serve/cpu replaces it in the same way
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    stage = code2wav(vllm, exported)
    codes = torch.randint(0, 1024, (30, 8), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        theirs = stage.decode_codes(codes.T[None]).flatten()
    ours = torch.from_numpy(Codec.from_pretrained(exported).decode(codes))
    assert len(theirs) == len(ours) == 30 * 960
    assert (theirs - ours).abs().max() < 1e-4


@pytest.mark.parametrize("lost", ["fc2.bias", "quantizer.quantizers.3.codebook.embed"])
def test_trap13_codec_stage_and_check_agree_on_a_missing_tensor(vllm, exported, lost):
    key = CODEC_PREFIX + lost
    tensors = ((k, v) for k, v in NativeFiles(exported).items() if k != key)
    module = vllm[CODE2WAV]
    config = vllm["vllm_omni.transformers_utils.configs.higgs_audio_v3"].HiggsAudioV3Config
    stage = module.HiggsAudioV3Code2Wav(config=config(text_config={"model_type": "qwen3"}))
    with pytest.raises((KeyError, RuntimeError)):
        stage.load_weights(tensors, device=torch.device("cpu"))


def test_sizes_that_check_holds_fixed_are_the_stages(vllm, exported):
    stage = code2wav(vllm, exported)
    state = {f"acoustic_decoder.{k}": v for k, v in stage.acoustic_decoder.state_dict().items()}
    state |= {"fc2.weight": stage.fc2.weight}
    first = stage.quantizer.quantizers[0]
    state["quantizer.quantizers.0.codebook.embed"] = first.codebook.weight
    state["quantizer.quantizers.0.project_out.weight"] = first.project_out.weight
    for key, shape in CODE2WAV_SHAPES.items():
        assert all(want in (None, got) for want, got in zip(shape, state[key].shape, strict=True))
    assert isinstance(stage.acoustic_decoder, nn.Module)


def test_vllm_omnis_config_class_reads_the_export(vllm, exported, vocab):
    module = vllm["vllm_omni.transformers_utils.configs.higgs_audio_v3"]
    config = module.HiggsAudioV3Config.from_pretrained(exported)
    assert (config.num_codebooks, config.codebook_size) == (8, 1026)
    assert (config.tts_token_id, config.text_token_id) == (vocab.tts_id, vocab.text_id)
    assert config.audio_continuation_id == vocab.audio_id and config.eos_token_id == 151643
    assert config.tie_modality_embeddings and config.audio_hidden_size == config.hidden_size
    assert config.text_config.rope_parameters["rope_theta"] == 1_000_000  # trap 8
    assert config.sample_rate == vocab.sample_rate_hz and config.frame_rate == vocab.frame_rate_hz


def test_sglang_omnis_config_class_reads_the_export(sglang, exported):
    module = sglang["sglang_omni.models.higgs_tts.hf_config"]
    config = module.HiggsMultimodalQwen3Config.from_pretrained(exported)
    assert config.audio_encoder_config["num_codebooks"] == 8
    assert config.text_config.rope_parameters["rope_theta"] == 1_000_000


def test_stop_ids_of_the_pipeline_are_the_tokens_that_check_wants(vllm, vocab):
    pipeline = vllm["vllm_omni.model_executor.models.higgs_audio_v3.pipeline"]
    stage = pipeline.HIGGS_AUDIO_V3_PIPELINE.stages[0]
    stops = stage.sampling_constraints["stop_token_ids"]
    assert stops == [TOKEN_IDS["<|endoftext|>"], TOKEN_IDS["<|audio_end|>"]]
    added = vocab.tokenizer.get_added_vocab()
    assert all(added[token] == number for token, number in TOKEN_IDS.items())
