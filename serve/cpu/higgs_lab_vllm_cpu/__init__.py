"""An out-of-tree vLLM-Omni platform: the real server on a CPU."""

from __future__ import annotations


def platform() -> str | None:
    """Entry point of `vllm_omni.platform_plugins`: our class where vLLM itself runs on a CPU."""
    from vllm.platforms import current_platform

    return "higgs_lab_vllm_cpu.platform.CpuOmniPlatform" if current_platform.is_cpu() else None
