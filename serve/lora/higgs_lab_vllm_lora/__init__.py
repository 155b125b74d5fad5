"""LoRA adapters on vLLM-Omni's Higgs talker, chosen by a request's model name.

vLLM wraps the talker's linear layers like those of any Qwen3. What vLLM-Omni 0.30 lacks is put in
here: its deploy files refuse LoRA's settings, its talker does not say that it supports LoRA, its
own CUDA graph of the MLPs would replay one adapter for all, its speech route drops the adapter that
a model name stands for, and adapters are loaded into the codec stage too, which has none.

`register` is the entry point in `vllm.general_plugins`; vLLM calls it in each of its processes. It
patches classes of vLLM's own, and vLLM-Omni's only where they are imported anyway. A server without
the settings behaves as before.
"""

from __future__ import annotations

import functools
from contextvars import ContextVar

TALKER = "HiggsAudioV3TalkerForConditionalGeneration"
TALKER_STAGE = 0
# In a deploy file, under the talker's stage:
#   additional_config: {higgs_lab_lora: {enable_lora: true, max_loras: 4, max_lora_rank: 16}}
SETTINGS = "higgs_lab_lora"

_lora_request: ContextVar = ContextVar("higgs_lab_lora_request", default=None)


def register() -> None:
    """Entry point of `vllm.general_plugins`."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    _wrap(EngineArgs, "create_engine_config", _create_engine_config)
    _wrap(LoRAModelRunnerMixin, "load_lora_model", _load_lora_model)
    _wrap(LoRAModelRunnerMixin, "add_lora", _add_lora)
    _wrap(OpenAIServingModels, "init_static_loras", _init_static_loras)


def _wrap(cls: type, name: str, wrapper) -> None:
    """Replace a method by wrapper(original, self, ...), once."""
    original = getattr(cls, name)
    if getattr(original, "_higgs_lab", False):
        return

    @functools.wraps(original)
    def method(self, *args, **kwargs):
        return wrapper(original, self, *args, **kwargs)

    method._higgs_lab = True
    setattr(cls, name, method)


def _create_engine_config(original, args, *rest, **kwargs):
    """vLLM-Omni's stages refuse LoRA's own settings; `additional_config` is passed on unread."""
    for name, value in (args.additional_config or {}).get(SETTINGS, {}).items():
        setattr(args, name, value)
    return original(args, *rest, **kwargs)


def _load_lora_model(original, runner, model, *args, **kwargs):
    """In the worker, between loading the weights and wrapping the linear layers."""
    cls = type(model)
    if cls.__name__ == TALKER and not getattr(cls, "supports_lora", False):
        # What vllm.model_executor.models.interfaces.SupportsLoRA asks for.
        cls.supports_lora = True
        cls.packed_modules_mapping = {
            "qkv_proj": ["q_proj", "k_proj", "v_proj"],
            "gate_up_proj": ["gate_proj", "up_proj"],
        }
        # The tables are not factored: their sum over codebooks runs outside vLLM's layers.
        cls.embedding_modules = {}
        cls.is_3d_moe_weight = cls.is_non_gated_moe = False
        cls.lora_skip_prefixes = []
        cls.lora_manager = None
    if cls.__name__ == TALKER:
        # Captured once per layer and batch size, whatever adapter was active then.
        model.config.enable_mlp_cudagraph = False
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    _wrap(PunicaWrapperCPU, "_apply_shrink", _apply_shrink)
    return original(runner, model, *args, **kwargs)


def _apply_shrink(original, punica, y, x, weights, scale):
    """vLLM's torch operators take -1, "no adapter", for the last slot, so that base requests in a
    batch with others spoke with some adapter. (Its GPU kernels skip such rows.)"""
    original(punica, y, x, weights, scale)
    y.view(-1, y.shape[-1])[punica.token_lora_indices == -1] = 0


def _add_lora(original, runner, request):
    """A request that came by RPC from another process is its fields in a list."""
    from msgspec import convert
    from vllm.lora.request import LoRARequest

    return original(runner, convert(request, LoRARequest) if isinstance(request, list) else request)


async def _init_static_loras(original, models):
    """In the API server, before the first adapter is loaded and the first request served."""
    from vllm_omni.entrypoints.async_omni import AsyncOmni
    from vllm_omni.entrypoints.openai.serving_speech import OmniOpenAIServingSpeech

    for name in ("add_lora", "remove_lora", "pin_lora", "list_loras"):
        _wrap(AsyncOmni, name, functools.partial(_on_the_talker, name))
    _wrap(AsyncOmni, "generate", _generate)
    _wrap(OmniOpenAIServingSpeech, "_prepare_speech_generation", _prepare_speech_generation)
    return await original(models)


async def _on_the_talker(name, original, engine, *args):
    """The codec stage has no adapters, and raises when asked about them."""
    results = await engine.collective_rpc(method=name, args=args, stage_ids=[TALKER_STAGE])
    for result in results:  # one a replica; the engine logs a worker's error and goes on
        if isinstance(result, dict) and "error" in result:
            raise RuntimeError(f"{name}: {result['error']}")
    if name == "list_loras":
        return sorted({i for workers in results for ids in workers for i in ids})
    return all(engine._coerce_stage_bool(result) for result in results)


async def _prepare_speech_generation(original, speech, request, *args, **kwargs):
    token = _lora_request.set(speech.models.lora_requests.get(request.model))
    try:
        return await original(speech, request, *args, **kwargs)
    finally:
        _lora_request.reset(token)


def _generate(original, engine, *args, lora_request=None, **kwargs):
    # A plain function, so that this runs when the generator is made, inside
    # _prepare_speech_generation, and not when its first item is awaited.
    return original(engine, *args, lora_request=lora_request or _lora_request.get(), **kwargs)
