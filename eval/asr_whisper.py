"""openai-whisper: its own loop for one clip, and many clips at once with the same words out.

Clips of at most 30 s are decoded together (eval.asr_greedy), with openai-whisper's weights, rules
and window; anything that its loop would treat in more than one pass goes through the loop itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import pickle
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from eval.asr import SAMPLE_RATE_HZ, Recognizer, Transcript, compression_ratio
from eval.languages import ALIASES, language

if TYPE_CHECKING:
    from eval.asr_greedy import Decoded

WINDOW_SEC = 30
MAX_BATCH = 128


class WhisperRecognizer(Recognizer):
    """openai-whisper with fixed, repeatable settings.

    precision: fp32, fp16 or bf16, of weights and arithmetic. batch: clips decoded at once; 1 is
    openai-whisper's own loop; None is as many as memory allows. languages: Whisper's codes of those
    that it was trained on, if these are fewer than its tokens.
    """

    def __init__(
        self,
        model,
        name: str,
        precision: str = "fp32",
        batch: int | None = None,
        languages: Collection[str] | None = None,
    ):
        import torch
        from whisper.tokenizer import LANGUAGES

        from eval.asr_greedy import GreedyDecoder, in_precision, most_clips

        self.name, self._fp16 = name, precision == "fp16"
        if model.is_multilingual:
            self._languages = set(list(LANGUAGES)[: model.num_languages])
        else:
            self._languages = {"en"}
        if languages is not None:
            self._languages &= set(languages)
        dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        dtype = dtypes[precision]
        self.model = in_precision(model, dtype)
        self.batch = batch or min(MAX_BATCH, most_clips(model, dtype))
        self._decoder = GreedyDecoder(model, dtype)

    def hears(self, lang: str) -> bool:
        """Whether the model has a token for a language of eval.languages."""
        return language(lang).whisper in self._languages

    def transcribe(self, wav: np.ndarray, lang: str) -> Transcript:
        """Words of mono float32 [n] at 16 kHz, any length, by openai-whisper's own loop.

        Raises ValueError for a language that the model has no token for.
        """
        if not self.hears(lang):
            raise ValueError(f"{self.name} has no token for language {lang!r}")
        # Clips of one window are decoded without timestamps: with them Whisper goes back to the
        # last timestamp and decodes the silence behind it again, where it invents words. Longer
        # clips need them to move on at a word boundary.
        wav = np.ascontiguousarray(wav, dtype=np.float32)
        with exact_fp32():
            result = self.model.transcribe(
                wav,
                language=language(lang).whisper,
                task="transcribe",
                temperature=0.0,
                condition_on_previous_text=False,
                compression_ratio_threshold=None,
                logprob_threshold=None,
                no_speech_threshold=None,
                without_timestamps=_one_window(wav),
                fp16=self._fp16,
                verbose=None,
            )
            guess = self._decoder.guess_language(self._mel(wav)[None])[0]
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
            **self._guessed(guess, lang),
        )

    def transcribe_all(
        self, wavs: Sequence[np.ndarray], langs: Sequence[str]
    ) -> list[Transcript | None]:
        """Words of many clips, the same as one by one; None where the language has no token."""
        found: list[Transcript | None] = [None] * len(wavs)
        heard = [i for i, lang in enumerate(langs) if self.hears(lang)]
        short = [i for i in heard if self.batch > 1 and _one_window(wavs[i])]
        decoded = self.decode_all([wavs[i] for i in short], [langs[i] for i in short])
        for i, one in zip(short, decoded, strict=True):
            # A timestamp, which was not asked for, makes openai-whisper's loop move on to there.
            if all(token < self._decoder.timestamp_begin for token in one.tokens):
                found[i] = self._transcript(one, langs[i])
        for i in heard:
            if found[i] is None:
                found[i] = self.transcribe(wavs[i], langs[i])
        return found

    def decode_all(
        self, wavs: Sequence[np.ndarray], langs: Sequence[str], max_tokens: int | None = None
    ) -> list[Decoded]:
        """What openai-whisper's `decode` writes for clips of one window, in batches."""
        decoded: list[Decoded] = []
        with exact_fp32(), ThreadPoolExecutor(1) as ahead:
            begins = range(0, len(wavs), self.batch)
            coming = [ahead.submit(self.mels, wavs[b : b + self.batch]) for b in begins[:1]]
            for begin in begins:
                mels = coming.pop().result()
                if begin + self.batch < len(wavs):  # while the device works on these
                    after = wavs[begin + self.batch : begin + 2 * self.batch]
                    coming.append(ahead.submit(self.mels, after))
                codes = [language(lang).whisper for lang in langs[begin : begin + self.batch]]
                decoded += self._decoder.decode(mels, codes, max_tokens)
        return decoded

    def _transcript(self, one: Decoded, lang: str) -> Transcript:
        text = self._decoder.text(one.tokens).strip()
        return Transcript(
            text=text,
            avg_logprob=one.sum_logprob / (len(one.tokens) + 1),
            no_speech_prob=one.no_speech_prob,
            compression_ratio=compression_ratio(text),
            cut=len(one.tokens) >= self.model.dims.n_text_ctx // 2,
            **self._guessed(one.language_probs, lang),
        )

    def mels(self, wavs: Sequence[np.ndarray]):
        """Log-mel spectrograms [B, n_mels, 3000] of clips of one window, as the loop pads them.

        By openai-whisper's own function on the CPU, which has threads to spare: a GPU's transform
        rounds quiet bins otherwise, and a close call would fall to another word.
        """
        import torch

        with ThreadPoolExecutor(min(8, torch.get_num_threads())) as pool:
            return torch.stack(list(pool.map(self._mel, wavs)))

    def _mel(self, wav: np.ndarray):
        """[n_mels, 3000], zeros after the clip's end (a mel of silence would not be zero)."""
        import torch
        from whisper.audio import HOP_LENGTH, N_FFT, N_FRAMES, log_mel_spectrogram, pad_or_trim

        wav = torch.from_numpy(np.ascontiguousarray(wav[: WINDOW_SEC * SAMPLE_RATE_HZ]))
        # The loop pads by 30 s; beyond the transform's reach they change nothing.
        mel = log_mel_spectrogram(wav.float(), self.model.dims.n_mels, padding=N_FFT)
        return pad_or_trim(mel[:, : len(wav) // HOP_LENGTH], N_FRAMES)

    def _guessed(self, probs: dict[str, float], lang: str) -> dict:
        if not probs:
            return {}
        likeliest = max(probs, key=probs.__getitem__)
        return {
            "guessed": ALIASES.get(likeliest, likeliest),
            "guessed_prob": probs[likeliest],
            "expected_prob": probs[language(lang).whisper],
        }


def whisper_details(spec: str, fp16: bool = False) -> dict:
    """`revision` is the start of the sha256 of the weights' file."""
    import importlib.metadata

    return {
        "name": spec,
        "revision": _revision(_source(spec)),
        "package": f"openai-whisper {importlib.metadata.version('openai-whisper')}",
        "precision": "fp16" if fp16 else "fp32",
        "options": "language forced, greedy, no fallback, no previous text",
    }


def load_whisper(
    spec: str,
    device: str | None = None,
    fp16: bool = False,
    download_root: str | None = None,
    batch: int | None = None,
) -> WhisperRecognizer:
    """Load an openai-whisper name, a checkpoint file, or "nano"; device: see `chosen_device`."""
    import torch
    import whisper

    from higgs_lab.device import chosen_device

    device = chosen_device(device)
    if fp16 and device.type == "cpu":
        raise ValueError("fp16 recognition needs a GPU: leave it off on a CPU")
    source = _source(spec)
    try:
        model = whisper.load_model(source, device=device, download_root=download_root)
    except (KeyError, TypeError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        # Of a name that Whisper knows, or for want of memory, the error says what it is itself.
        if source in whisper.available_models() or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"{source} is not an openai-whisper checkpoint (a .pt file of 'dims' and "
            f"'model_state_dict'): {error}"
        ) from error
    model.eval()
    languages = None
    if spec == "nano":
        from higgs_lab.nano import LANGUAGES as languages
    return WhisperRecognizer(model, spec, "fp16" if fp16 else "fp32", batch, languages)


@contextlib.contextmanager
def exact_fp32():
    """fp32 that is fp32: cuDNN's convolutions round to TF32 unless told not to."""
    import torch

    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def _one_window(wav: np.ndarray) -> bool:
    return len(wav) <= WINDOW_SEC * SAMPLE_RATE_HZ


def _source(spec: str) -> str:
    """What whisper.load_model is given: one of its names, or the path of a file."""
    import whisper

    if spec == "nano":
        from higgs_lab.nano import nano_whisper

        return str(nano_whisper())
    if spec not in whisper.available_models() and not Path(spec).is_file():
        raise FileNotFoundError(
            f"recogniser {spec!r} is no checkpoint file and no Whisper model; give a path to a "
            f".pt file or one of: {', '.join(whisper.available_models())} "
            "(or mms:NAME, worker:COMMAND, auto)"
        )
    return spec


def _revision(source: str) -> str:
    """Whisper's download addresses hold the sha256 of the files they lead to."""
    import whisper

    if source in whisper.available_models():
        return whisper._MODELS[source].split("/")[-2][:16]
    with Path(source).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
