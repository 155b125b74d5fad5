"""vLLM's CPU worker and runner under vLLM-Omni's autoregressive and generation stages.

The method resolution order does the work: Omni runner, then vLLM's CPU runner, then vLLM's GPU
runner that both descend from. So Omni's hooks stay outermost and everything that would touch a
device lands in the CPU version.

With `HIGGS_LAB_DUMP_DIR` set, the talker stage writes every row it emits to
`<dir>/<request id>.jsonl`: a header line with the prompt (token ids, reference rows and their
positions), then one line of codes per step. That is how served codes are compared with ours.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm_omni.worker.gpu_ar_model_runner import GPUARModelRunner
from vllm_omni.worker.gpu_generation_model_runner import GPUGenerationModelRunner
from vllm_omni.worker.mixins import OmniWorkerMixin

DUMP_DIR = os.environ.get("HIGGS_LAB_DUMP_DIR")


class CpuARModelRunner(GPUARModelRunner, CPUModelRunner):
    """The talker stage on a CPU."""

    def _update_intermediate_buffer(self, req_id: str, upd: dict[str, Any]) -> None:
        super()._update_intermediate_buffer(req_id, upd)
        if DUMP_DIR and isinstance(upd, dict) and isinstance(upd.get("codes"), dict):
            self._dump_rows(req_id, upd["codes"].get("audio"))

    def _dump_rows(self, req_id: str, rows: torch.Tensor | None) -> None:
        request = self.requests.get(req_id)
        if request is None or rows is None or rows.numel() == 0:
            return
        path = Path(DUMP_DIR) / f"{req_id}.jsonl"
        lines = [json.dumps(row) for row in rows.reshape(-1, rows.shape[-1]).tolist()]
        if not path.exists():
            buffer = self.model_intermediate_buffer.get(req_id, {})
            header = {"prompt_token_ids": list(request.prompt_token_ids or [])}
            for name in ("audio_input_ids", "audio_placeholder_positions"):
                value = buffer.get(name)
                value = value[0] if isinstance(value, list) and value else value
                header[name] = value.tolist() if isinstance(value, torch.Tensor) else None
            lines.insert(0, json.dumps(header))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as f:
            f.write("\n".join(lines) + "\n")


class CpuGenerationModelRunner(GPUGenerationModelRunner, CPUModelRunner):
    """The codec stage on a CPU."""


class _RunnerOfStage(OmniWorkerMixin, CPUWorker):
    # vLLM-Omni reads this attribute before any worker exists (omni_connector_validation.py).
    model_runner_cls: type[CPUModelRunner]

    def init_device(self) -> None:
        super().init_device()
        # vLLM put in its own runner; Omni's hooks exist for the v1 runner only, as in XPUARWorker.
        self.use_v2_model_runner = False
        self.model_runner = self.model_runner_cls(self.vllm_config, self.device)


class CpuARWorker(_RunnerOfStage):
    model_runner_cls = CpuARModelRunner


class CpuGenerationWorker(_RunnerOfStage):
    model_runner_cls = CpuGenerationModelRunner
