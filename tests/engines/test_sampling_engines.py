"""Sampling distributions are SGLang-Omni's. (vLLM's own top-k/top-p is compiled into vLLM; the live
server tests compare with it.)"""

from __future__ import annotations

import pytest
import torch

from higgs_lab.generate import ENGINE_DEFAULTS, Sampling, SamplingTensors, keep_probabilities

KNOBS = [(1.0, 0, 1.0), (0.8, 50, 1.0), (0.7, 0, 0.9), (1.3, 30, 0.8), (0.8, 5, 0.3), (1.0, 1, 1.0)]


def distribution(logits: torch.Tensor, temperature: float, top_k: int, top_p: float):
    """Our probabilities after temperature, top-k and top-p over the whole vocabulary, [K, V]."""
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, mode="vllm")
    options = SamplingTensors.of([sampling], logits.shape[-1], "cpu")
    probs, ids = keep_probabilities(logits[None], options)
    full = torch.zeros_like(logits).scatter(-1, ids[0], probs[0])
    return full / full.sum(-1, keepdim=True)


class _Multinomial(Exception):
    pass


def sglang_distribution(sampler, monkeypatch, logits, temperature, top_k, top_p):
    """The probabilities that sample_independent hands to multinomial."""

    def caught(self, num_samples):
        raise _Multinomial(self)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "multinomial", caught)
        with pytest.raises(_Multinomial) as probs:
            sampler.sample_independent(
                logits, temperature=temperature, top_k=top_k or None, top_p=top_p
            )
    return probs.value.args[0]


@pytest.mark.parametrize("knobs", KNOBS)
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_distribution_is_sglang_omnis(sglang, monkeypatch, knobs, scale):
    sampler = sglang["sglang_omni.models.higgs_tts.sampler"]
    logits = scale * torch.randn(8, 1026, generator=torch.Generator().manual_seed(3))
    temperature, top_k, top_p = knobs
    ours = distribution(logits, temperature, top_k, top_p)
    theirs = sglang_distribution(sampler, monkeypatch, logits, temperature, top_k, top_p)
    assert torch.equal(ours > 0, theirs > 0)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_batched_sampler_over_there_has_the_same_support(sglang):
    """Their production path renormalises probabilities instead of masking logits."""
    fallback = sglang["sglang_omni.models.higgs_tts.npu_fallback"]
    logits = 4 * torch.randn(8, 1026, generator=torch.Generator().manual_seed(4))
    probs = fallback.top_k_renorm_prob((logits / 0.8).softmax(-1), torch.full((8,), 30))
    probs = fallback.top_p_renorm_prob(probs, torch.full((8,), 0.8))
    torch.testing.assert_close(distribution(logits, 0.8, 30, 0.8), probs, atol=1e-6, rtol=1e-5)


def test_trap23_defaults_are_the_engines(vllm, sglang):
    import yaml
    from load import ENGINES

    file = ENGINES / "vllm_omni/vllm_omni/deploy/higgs_multimodal_qwen3.yaml"
    stage = yaml.safe_load(file.read_text())["stages"][0]["default_sampling_params"]
    assert ENGINE_DEFAULTS["vllm"] == {
        k: stage[k] for k in ("temperature", "top_p", "top_k", "seed")
    }
    source = ENGINES / "sglang_omni/sglang_omni/models/higgs_tts/stages.py"
    found = {}
    # stages.py imports the whole scheduler; its table of defaults is a literal.
    import ast

    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.AnnAssign) and node.target.id == "SPEECH_SAMPLING_DEFAULTS":
            found = ast.literal_eval(node.value)
    assert found == {k: ENGINE_DEFAULTS["sglang"][k] for k in ("temperature", "top_p", "top_k")}


def test_greedy_thresholds_are_the_engines(sglang):
    sampler = sglang["sglang_omni.models.higgs_tts.sampler"]
    assert sampler._GREEDY_TEMP_THRESHOLD == 1e-5
    assert Sampling(temperature=1e-5).greedy and not Sampling(temperature=2e-5).greedy
    assert Sampling(temperature=1.0, top_k=1, mode="sglang").greedy
