"""What vLLM-Omni asks a platform: which workers, which device, how many."""

from __future__ import annotations

import torch
from vllm.platforms.cpu import CpuPlatform
from vllm_omni.platforms.interface import OmniPlatform, OmniPlatformEnum

# The codec stage asks on every decode whether a CUDA graph is being captured, and torch raises
# instead of answering when there is no driver (higgs_audio_v3_code2wav.py, _validate_codes).
if not torch.cuda.is_available():
    torch.cuda.is_current_stream_capturing = lambda: False


class CpuOmniPlatform(OmniPlatform, CpuPlatform):
    """vLLM's CPU platform with the answers that vLLM-Omni needs on top."""

    _omni_enum = OmniPlatformEnum.OOT

    @classmethod
    def get_omni_ar_worker_cls(cls) -> str:
        return "higgs_lab_vllm_cpu.workers.CpuARWorker"

    @classmethod
    def get_omni_generation_worker_cls(cls) -> str:
        return "higgs_lab_vllm_cpu.workers.CpuGenerationWorker"

    @classmethod
    def get_torch_device(cls, local_rank: int | None = None) -> torch.device:
        return torch.device("cpu")

    @classmethod
    def get_device_count(cls) -> int:
        return 1

    @classmethod
    def supports_torch_inductor(cls) -> bool:
        return False
