"""WavLM x-vectors through transformers, such as microsoft/wavlm-base-plus-sv.

A second opinion beside ECAPA: another architecture, other training, another scale of cosines. (The
WavLM-large of Seed-TTS-eval is a different checkpoint, outside transformers.)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from eval.speaker import SAMPLE_RATE_HZ, SpeakerEncoder


class WavLMEncoder(SpeakerEncoder):
    """A WavLMForXVector on its device, with the feature extractor that it was trained with."""

    def __init__(self, model, extractor, name: str):
        self.model, self.extractor, self.name = model, extractor, name
        self.min_samples = _least_samples(model.config)

    def _vector(self, wav: np.ndarray) -> np.ndarray:
        import torch

        inputs = self.extractor(wav, sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt")
        with torch.inference_mode():
            values = inputs.input_values.to(self.model.device)
            return self.model(values).embeddings[0].float().cpu().numpy()


def load_wavlm(folder: Path, name: str, at: dict, device: str) -> WavLMEncoder:
    """Load a folder, or a hub name (`at` holds its revision).

    Raises ValueError for what is no WavLM with an x-vector head.
    """
    import torch
    from transformers import AutoConfig, Wav2Vec2FeatureExtractor, WavLMForXVector

    source = name.partition("@")[0] if at else str(folder)
    config = AutoConfig.from_pretrained(folder)
    if "WavLMForXVector" not in (config.architectures or []):
        raise ValueError(
            f"encoder {name!r} is a {', '.join(config.architectures or ['model without a class'])}"
            ", not a WavLMForXVector: give a speaker verification model"
        )
    model = WavLMForXVector.from_pretrained(source, **at).eval().to(device, torch.float32)
    return WavLMEncoder(model, Wav2Vec2FeatureExtractor.from_pretrained(source, **at), name)


def _least_samples(config) -> int:
    """The shortest clip that leaves two frames after the x-vector layers, to take statistics of."""
    length = 2 + sum(
        (kernel - 1) * dilation
        for kernel, dilation in zip(config.tdnn_kernel, config.tdnn_dilation, strict=True)
    )
    for kernel, stride in reversed(list(zip(config.conv_kernel, config.conv_stride, strict=True))):
        length = (length - 1) * stride + kernel
    return length
