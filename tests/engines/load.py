"""Load single modules of the two serving engines without the rest of the engines.

vllm-omni and sglang-omni are installed without dependencies into `.engines` (make engines). Their
Higgs modules are mostly plain torch; what they import from vllm or sglang is listed below, name by
name, and replaced by a stand-in that can be subclassed or annotated with, but raises when used for
real. A name that is not listed fails to import, so a new dependency of a new engine version shows
up as an error here instead of being papered over.

Packages of the engines themselves are opened without running their `__init__`, so that importing
one file does not import the engine.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

ENGINES = Path(__file__).resolve().parents[2] / ".engines"


def _stand_in(name: str) -> type:
    """A class for annotations and inheritance; making or calling one says what is missing."""

    def refuse(self, *args, **kwargs):
        raise RuntimeError(f"{name} is a stand-in of the tests; the real one needs the engine")

    return type(name.rpartition(".")[2], (), {"__init__": refuse})


def _stand_in_function(name: str):
    def refuse(*args, **kwargs):
        raise RuntimeError(f"{name} is a stand-in of the tests; the real one needs the engine")

    return refuse


def _logger(name: str):
    import logging

    return logging.getLogger(name)


# Where a value stands instead of None it is one that the loaded code really uses.
STUBS: dict[str, dict[str, dict[str, object]]] = {
    "vllm_omni": {
        "vllm.config": {"VllmConfig": None},
        "vllm.logger": {"init_logger": _logger},
        "vllm.model_executor.layers.logits_processor": {"LogitsProcessor": None},
        "vllm.model_executor.layers.vocab_parallel_embedding": {"ParallelLMHead": None},
        "vllm.model_executor.models.qwen3": {"Qwen3Model": None},
        "vllm.platforms": {"current_platform": None},
        "vllm.v1.core.sched.scheduler": {"Scheduler": None},
        "vllm.v1.outputs": {"SamplerOutput": None},
        "vllm.v1.sample.metadata": {"SamplingMetadata": None},
        "vllm.v1.sample.ops.topk_topp_sampler": {
            "apply_top_k_top_p": _stand_in_function("vllm.apply_top_k_top_p")
        },
        # FastAPI middleware; the deploy schema only annotates with it.
        "vllm_omni.config.endpoint_policy": {"EndpointRestriction": None},
        # Modules of vllm-omni whose own imports reach deep into vLLM, cut at the names used.
        "vllm_omni.core.sched.omni_ar_scheduler": {
            "OmniARAsyncScheduler": None,
            "OmniARScheduler": None,
        },
        "vllm_omni.core.sched.omni_generation_scheduler": {"OmniGenerationScheduler": None},
        "vllm_omni.data_entry_keys": {
            "CodesStruct": None,
            "MetaStruct": None,
            "OmniPayload": None,
            "OmniPayloadStruct": None,
        },
        # A TypedDict over there: a plain dict of its keyword arguments.
        "vllm_omni.inputs.data": {"OmniTokensPrompt": dict},
        "vllm_omni.model_executor.models.output_templates": {"OmniOutput": None},
        "vllm_omni.platforms": {
            "current_omni_platform": SimpleNamespace(
                device_name="cpu", get_torch_device=lambda: torch.device("cpu")
            )
        },
    },
    "sglang_omni": {
        "sglang.srt.layers.logits_processor": {"LogitsProcessorOutput": None},
        "sglang.srt.layers.sampler": {
            "multinomial_with_seed": _stand_in_function("sglang.multinomial_with_seed")
        },
        "sglang.srt.models.qwen3": {"Qwen3ForCausalLM": None},
        "sglang.srt.runtime_context": {"get_schedule": _stand_in_function("sglang.get_schedule")},
        # Decoding of media files and the HTTP client around it; the tests bring samples.
        "sglang_omni.preprocessing.audio": {"AudioMediaIO": None},
        "sglang_omni.preprocessing.resource_connector": {"global_http_connection": None},
        # Messages between stages, and the scheduler around the decoding that is tested.
        "sglang_omni.proto": {"StagePayload": None},
        "sglang_omni.scheduling.streaming_vocoder": {
            "INITIAL_CODEC_CHUNK_FRAMES_PARAM": "initial_codec_chunk_frames",
            "resolve_initial_codec_chunk_frames": _stand_in_function("sglang chunk frames"),
            "StreamingVocoderBase": type(
                "StreamingVocoderBase", (), {"__class_getitem__": classmethod(lambda cls, _: cls)}
            ),
        },
        "sglang_omni.platforms": {"current_platform": SimpleNamespace(device_type="cpu")},
    },
}

_loaded: dict[str, dict[str, ModuleType]] = {}  # engine -> its modules, kept between uses


def installed(engine: str) -> bool:
    return (ENGINES / engine / engine).is_dir()


@contextmanager
def engine(name: str) -> Iterator[EngineModules]:
    """Make the engine's modules importable for a while; `name` is a key of STUBS."""
    before = set(sys.modules)
    modules = _loaded.setdefault(name, {})
    taken = [m for m in modules if m in sys.modules]
    assert not taken, f"already imported from elsewhere: {taken[:3]}"
    sys.modules.update(modules)
    finder = _Finder(name)
    sys.meta_path.insert(0, finder)
    try:
        yield EngineModules()
    finally:
        sys.meta_path.remove(finder)
        roots = tuple({m.partition(".")[0] for m in STUBS[name]} | {name})
        for module in sorted(set(sys.modules) - before):
            if module.partition(".")[0] in roots:
                modules[module] = sys.modules.pop(module)


class EngineModules:
    """`engine("vllm_omni")["config.stage_config"]`-like access by full dotted name."""

    def __getitem__(self, dotted: str) -> ModuleType:
        return importlib.import_module(dotted)


class _Finder:
    """Finds stubs, their parent packages, and the engine's own files."""

    def __init__(self, name: str):
        self.stubs, self.root, self.name = STUBS[name], ENGINES / name, name

    def find_spec(self, fullname, path=None, target=None):
        from importlib.machinery import ModuleSpec
        from importlib.util import spec_from_file_location

        if fullname in self.stubs:
            spec = ModuleSpec(fullname, self, is_package=self._is_parent(fullname))
            folder = self.root.joinpath(*fullname.split("."))
            if folder.is_dir():  # a stub for a package's __init__; its other files stay real
                spec.submodule_search_locations = [str(folder)]
            return spec
        if fullname.partition(".")[0] == self.name:
            file = self.root.joinpath(*fullname.split("."))
            if file.is_dir():
                spec = ModuleSpec(fullname, self, is_package=True)
                spec.submodule_search_locations = [str(file)]
                return spec
            if file.with_suffix(".py").is_file():
                return spec_from_file_location(fullname, file.with_suffix(".py"))
            return None
        if self._is_parent(fullname):
            return ModuleSpec(fullname, self, is_package=True)
        return None

    def _is_parent(self, fullname: str) -> bool:
        return any(stub.startswith(fullname + ".") for stub in self.stubs)

    def create_module(self, spec):
        return None

    def exec_module(self, module: ModuleType) -> None:
        for name, value in self.stubs.get(module.__name__, {}).items():
            full = f"{module.__name__}.{name}"
            setattr(module, name, _stand_in(full) if value is None else value)
