"""higgs_lab: fine-tune, evaluate and serve Higgs TTS 3.

Importing this package loads no torch, so that `serve.client` and other light users stay light:

>>> import higgs_lab
>>> m = higgs_lab.load("bosonai/higgs-tts-3-4b", adapter="runs/my_voice/adapter")  # doctest: +SKIP
>>> wav, info = m.speak("Hello.", ref_audio="voice.wav", ref_text="...")           # doctest: +SKIP
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from higgs_lab.speech import Higgs, load

# Where bitsandbytes is installed, PEFT imports it, and on some CPUs it warns of a missing kernel.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0"
__all__ = ["Higgs", "load", "__version__"]


def __getattr__(name: str):
    if name in ("Higgs", "load"):
        from higgs_lab import speech

        return getattr(speech, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
