"""The judges' model classes from openai-whisper and SpeechBrain, also where only their source is.

A training machine may have torch but not these packages' other needs (numba, soundfile,
hyperpyyaml, ...). Their source may then lie in a folder named by `NANO_SOURCES`; whatever it
imports and cannot find is replaced by an empty stand-in. Training touches only the model classes,
the tokenizer and the feature extractors, which need none of it.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from unittest.mock import MagicMock

_OPTIONAL = ("numba", "soundfile", "hyperpyyaml", "ruamel", "joblib", "sentencepiece", "yaml")


class _StandIn(MagicMock):
    __path__: list[str] = []
    __spec__ = None
    __file__ = "<stand-in>"


class _Finder:
    """Last on sys.meta_path: a stand-in for optional packages that nothing else finds."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in _OPTIONAL:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _StandIn(name=spec.name)

    def exec_module(self, module):
        pass


def _prepare(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        folder = os.environ.get("NANO_SOURCES")
        if not folder:
            raise ImportError(
                f"{package} is missing: pip install it, or name a folder with its "
                "source in NANO_SOURCES"
            )
        sys.path.append(folder)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def whisper():
    """The `whisper` package."""
    _prepare("whisper")
    import whisper

    return whisper


def ecapa_parts():
    """(ECAPA_TDNN class, Fbank class, InputNormalization class) of SpeechBrain."""
    _prepare("speechbrain")
    from speechbrain.lobes.features import Fbank
    from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
    from speechbrain.processing.features import InputNormalization

    return ECAPA_TDNN, Fbank, InputNormalization
