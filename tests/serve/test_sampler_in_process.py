"""vLLM's own top-k and top-p keep what ours keep. (No server: one short process of its Python.)"""

from __future__ import annotations

import subprocess

import torch

from higgs_lab.generate import Sampling, SamplingTensors, keep_probabilities

KNOBS = [(1.0, 50, 0.95), (0.8, 50, 1.0), (0.7, 0, 0.9), (1.3, 30, 0.8), (0.8, 5, 0.3)]
THEIRS = """
import sys, torch
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
folder = sys.argv[1]
logits = torch.load(folder + "/logits.pt")
found = []
for temperature, top_k, top_p in torch.load(folder + "/knobs.pt").tolist():
    k = torch.full((len(logits),), int(top_k) or logits.shape[-1])
    p = torch.full((len(logits),), top_p, dtype=torch.float32)
    found.append(apply_top_k_top_p(logits / temperature, k, p).softmax(-1))
torch.save(torch.stack(found), folder + "/theirs.pt")
"""


def test_distribution_is_vllms(serve_env, tmp_path):
    noise = torch.randn(2, 8, 1026, generator=torch.Generator().manual_seed(5))
    logits = torch.cat([noise[0], 5 * noise[1]])  # flat and peaked
    torch.save(logits, tmp_path / "logits.pt")
    torch.save(torch.tensor(KNOBS, dtype=torch.float64), tmp_path / "knobs.pt")
    command = [str(serve_env / "python"), "-c", THEIRS, str(tmp_path)]
    subprocess.run(command, check=True, timeout=200, capture_output=True)
    theirs = torch.load(tmp_path / "theirs.pt")
    for (temperature, top_k, top_p), expected in zip(KNOBS, theirs, strict=True):
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        options = SamplingTensors.of([sampling], logits.shape[-1], "cpu")
        probs, ids = keep_probabilities(logits[None], options)
        ours = torch.zeros_like(logits).scatter(-1, ids[0], probs[0])
        ours = ours / ours.sum(-1, keepdim=True)
        assert torch.equal(ours > 0, expected > 0), (temperature, top_k, top_p)
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)
