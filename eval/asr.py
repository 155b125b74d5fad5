"""Recognisers: waveform at 16 kHz in, text out, with what the recogniser thought of it.

openai-whisper, by name or by path to a checkpoint file. Its settings are fixed so that a run can be
repeated: the language is forced (a guess would turn a wrong accent into another language), decoding
is greedy without temperature fallback (which samples), earlier text is no prompt (one error would
breed the next), nothing is dropped for looking like silence: that is flagged and left to the score.
"""

from __future__ import annotations

import hashlib
import math
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from eval.languages import language

SAMPLE_RATE_HZ = 16000
WINDOW_SEC = 30


@dataclass(frozen=True)
class Transcript:
    text: str
    avg_logprob: float | None  # of the tokens; the mean over windows of a long clip
    no_speech_prob: float | None  # the largest over windows
    compression_ratio: float | None  # the largest over windows: 2.4 and more is repetition
    cut: bool  # a window filled Whisper's token limit, so words are missing

    def as_dict(self) -> dict:
        return asdict(self)


class WhisperRecognizer:
    """openai-whisper with fixed, repeatable settings.

    name: as given by the user.
    """

    def __init__(self, model, name: str, fp16: bool = False):
        from whisper.tokenizer import LANGUAGES

        self.model, self.name, self.fp16 = model, name, fp16
        if model.is_multilingual:
            self._languages = set(list(LANGUAGES)[: model.num_languages])
        else:
            self._languages = {"en"}

    def hears(self, lang: str) -> bool:
        """Whether the model has a token for a language of eval.languages."""
        return language(lang).whisper in self._languages

    def transcribe(self, wav: np.ndarray, lang: str) -> Transcript:
        """Words in a waveform: mono float32 [n] at 16 kHz, any length.

        Raises ValueError for a language that the model has no token for.
        """
        if not self.hears(lang):
            raise ValueError(f"{self.name} has no token for language {lang!r}")
        # Clips of one window are decoded without timestamps: with them Whisper goes back to the
        # last timestamp and decodes the silence behind it again, where it invents words. Longer
        # clips need them to move on at a word boundary.
        one_window = len(wav) <= WINDOW_SEC * SAMPLE_RATE_HZ
        result = self.model.transcribe(
            np.ascontiguousarray(wav, dtype=np.float32),
            language=language(lang).whisper,
            task="transcribe",
            temperature=0.0,
            condition_on_previous_text=False,
            compression_ratio_threshold=None,
            logprob_threshold=None,
            no_speech_threshold=None,
            without_timestamps=one_window,
            fp16=self.fp16,
            verbose=None,
        )
        segments = result["segments"]
        tokens: dict[int, int] = {}  # written in each window
        for segment in segments:
            tokens[segment["seek"]] = tokens.get(segment["seek"], 0) + len(segment["tokens"])

        def extreme(key: str, pick) -> float | None:
            values = [s[key] for s in segments if math.isfinite(s[key])]
            return float(pick(values)) if values else None

        return Transcript(
            text=result["text"].strip(),
            avg_logprob=extreme("avg_logprob", lambda v: sum(v) / len(v)),
            no_speech_prob=extreme("no_speech_prob", max),
            compression_ratio=extreme("compression_ratio", max),
            cut=max(tokens.values(), default=0) >= self.model.dims.n_text_ctx // 2,
        )


def recognizer_details(spec: str, fp16: bool = False) -> dict:
    """What decides the words, found without loading the model.

    For config.yaml, and for refusing to compare unequal runs. `revision` is the start of the
    sha256 of the weights' file. Raises FileNotFoundError with what can be given.
    """
    import importlib.metadata

    return {
        "name": spec,
        "revision": _revision(_source(spec)),
        "package": f"openai-whisper {importlib.metadata.version('openai-whisper')}",
        "precision": "fp16" if fp16 else "fp32",
        "options": "language forced, greedy, no fallback, no previous text",
    }


def load_recognizer(
    spec: str, device: str | None = None, fp16: bool = False, download_root: str | None = None
) -> WhisperRecognizer:
    """Load a recogniser: an openai-whisper name ("large-v3"), a checkpoint file, or "nano".

    fp16 halves memory and time on a GPU and changes a word now and then; it is refused on a CPU,
    which has no fast fp16. Raises FileNotFoundError or ValueError with what can be given.
    """
    import torch
    import whisper

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if fp16 and torch.device(device).type == "cpu":
        raise ValueError("fp16 recognition needs a GPU: leave it off on a CPU")
    source = _source(spec)
    try:
        model = whisper.load_model(source, device=device, download_root=download_root)
    except (KeyError, TypeError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{source} is not an openai-whisper checkpoint (a .pt file of 'dims' and "
            f"'model_state_dict'): {error}"
        ) from error
    model.eval()
    return WhisperRecognizer(model, spec, fp16)


def _source(spec: str) -> str:
    """What whisper.load_model is given: one of its names, or the path of a file."""
    import whisper

    if spec == "nano":
        return str(_nano_whisper())
    if spec not in whisper.available_models() and not Path(spec).is_file():
        raise FileNotFoundError(
            f"recogniser {spec!r} is no checkpoint file and no Whisper model; give a path to a "
            f".pt file or one of: {', '.join(whisper.available_models())}"
        )
    return spec


def _revision(source: str) -> str:
    """Whisper's download addresses hold the sha256 of the files they lead to."""
    import whisper

    if source in whisper.available_models():
        return whisper._MODELS[source].split("/")[-2][:16]
    with Path(source).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _nano_whisper() -> Path:
    from higgs_lab import nano

    if not hasattr(nano, "nano_whisper"):
        raise ValueError(
            "this release has no trained nano recogniser yet: give the path of a Whisper "
            "checkpoint (higgs_lab.nano.judges.random_whisper writes one that runs but hears "
            "nothing)"
        )
    return nano.nano_whisper()
