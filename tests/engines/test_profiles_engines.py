"""Our deploy profiles, read by vLLM-Omni's own configuration classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from load import ENGINES

PROFILES = Path(__file__).parents[2] / "serve" / "profiles"
DEPLOY = ENGINES / "vllm_omni" / "vllm_omni" / "deploy"
NAMES = sorted(p.stem for p in PROFILES.glob("*.yaml"))


@pytest.fixture
def config(vllm):
    return vllm["vllm_omni.config.stage_config"]


def test_base_is_the_engines_own_default_to_the_key(config):
    ours = yaml.safe_load((PROFILES / "base" / "vllm_omni_0.30.yaml").read_text())
    assert ours == yaml.safe_load((DEPLOY / "higgs_multimodal_qwen3.yaml").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_profile_parses_and_all_keys_are_known(config, name):
    deploy = config.load_deploy_config(PROFILES / f"{name}.yaml")
    stock = config.load_deploy_config(DEPLOY / "higgs_multimodal_qwen3.yaml")
    assert [s.stage_id for s in deploy.stages] == [0, 1]
    for ours, theirs in zip(deploy.stages, stock.stages, strict=True):
        # a misspelt key would land in engine_extras, where nothing checks it
        assert set(ours.engine_extras) == set(theirs.engine_extras)
        assert ours.default_sampling_params.keys() == theirs.default_sampling_params.keys()
    assert deploy.async_chunk and deploy.connectors == stock.connectors


@pytest.mark.parametrize("name", NAMES)
def test_profile_fits_higgs_pipeline(config, vllm, name):
    """Merged with the engine's pipeline, as at a server's start."""
    pipeline = vllm["vllm_omni.model_executor.models.higgs_audio_v3.pipeline"]
    deploy = config.load_deploy_config(PROFILES / f"{name}.yaml")
    config.validate_stage_async_chunk_edges(pipeline.HIGGS_AUDIO_V3_PIPELINE, deploy)
    assert pipeline.HIGGS_AUDIO_V3_PIPELINE.default_deploy_config_name == (
        "higgs_multimodal_qwen3.yaml"
    )


def test_profiles_differ_where_they_say(config):
    def stage(name: str, number: int):
        return config.load_deploy_config(PROFILES / f"{name}.yaml").stages[number]

    engine = config.load_deploy_config(DEPLOY / "higgs_multimodal_qwen3_low_latency.yaml").stages[0]
    ours = stage("low_latency", 0)
    assert ours.compilation_config == engine.compilation_config
    assert ours.enforce_eager is engine.enforce_eager is False
    engine = config.load_deploy_config(DEPLOY / "higgs_multimodal_qwen3_high_throughput.yaml")
    assert stage("throughput", 0).max_num_seqs == engine.stages[0].max_num_seqs == 64
    assert (stage("two_gpu", 0).devices, stage("two_gpu", 1).devices) == ("0", "1")
    small = stage("small_gpu", 0).gpu_memory_utilization, stage("small_gpu", 1)
    assert small[0] + small[1].gpu_memory_utilization < 0.9


def test_trap24_request_limit_reaches_the_talker_stage(vllm):
    """max_new_tokens replaces the max_tokens of the YAML; a max_tokens in a request is dropped."""
    protocol = vllm["vllm_omni.entrypoints.openai.protocol.audio"]
    request = protocol.OpenAICreateSpeechRequest(input="Hi.", max_new_tokens=50, max_tokens=9)
    assert request.max_new_tokens == 50 and not hasattr(request, "max_tokens")


def test_trap25_what_the_client_sends_is_what_the_request_class_reads(vllm):
    from serve.client import request_body

    protocol = vllm["vllm_omni.entrypoints.openai.protocol.audio"]
    body = request_body(
        "Hi.", "data:audio/wav;base64,AA", "Ref.", temperature=0.5, seed=3, speed=None, stream=True,
        response_format="pcm", max_new_tokens=9,
    )  # fmt: skip
    request = protocol.OpenAICreateSpeechRequest(**body)
    assert request.extra_params == {"temperature": 0.5} and request.is_raw_audio_stream()
    unread = set(body) - set(protocol.OpenAICreateSpeechRequest.model_fields)
    assert not unread


def test_trap25_sglangs_request_class_reads_its_own_dialect(sglang):
    from serve.client import request_body

    protocol = sglang["sglang_omni.serve.protocol"]
    body = request_body(
        "Hi.", "data:audio/wav;base64,AA", "Ref.", dialect="sglang", temperature=0.5, top_p=0.9,
        top_k=30, seed=3, stream=True, response_format="pcm", max_new_tokens=9,
    )  # fmt: skip
    request = protocol.CreateSpeechRequest(**body)
    assert (request.temperature, request.top_p, request.top_k, request.seed) == (0.5, 0.9, 30, 3)
    (reference,) = request.references
    assert (reference.audio_path, reference.text) == ("data:audio/wav;base64,AA", "Ref.")
    assert request.stream and request.stream_format == "audio" and request.max_new_tokens == 9
    assert not set(body) - set(protocol.CreateSpeechRequest.model_fields)


def test_trap38_several_references_are_refused(vllm):
    from serve.client import request_body

    protocol = vllm["vllm_omni.entrypoints.openai.protocol.audio"]
    two = [{"audio_path": "data:a"}, {"audio_path": "data:b"}]
    with pytest.raises(ValueError, match="single reference"):
        protocol.OpenAICreateSpeechRequest(input="Hi.", references=two)
    with pytest.raises(ValueError, match="unknown option"):
        request_body("Hi.", references=two)
