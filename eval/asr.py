"""Recognisers: waveform at 16 kHz in, text out, with what the recogniser thought of it.

A spec says who hears what; `load_recognizer` takes it, `--asr` is it:

- a Whisper name ("large-v3"), checkpoint file or "nano": openai-whisper (eval.asr_whisper)
- "mms", "mms:FOLDER", "mms:org/name@revision": MMS with its adapter per language (eval.asr_mms)
- "worker:COMMAND": anything in an environment of its own, over JSON lines (eval.asr_worker)
- "auto": by the table of eval.languages (below)
- several, by language: "large-v3, zu=mms, xh=worker:COMMAND"; without a first part that names
  nobody, the languages not named have no recogniser

"auto" takes Whisper where the table trusts it; elsewhere omniASR if a worker is named for it
("auto, omniasr=worker:COMMAND"), else MMS where that has an adapter, else Whisper where that has a
token. "whisper=" and "mms=" in the same list say which checkpoints are meant. A language's own part
goes before all of this.

Every recogniser is made repeatable: the language is forced (a guess would turn a wrong accent into
another language), decoding is greedy without temperature fallback (which samples), earlier text is
no prompt (one error would breed the next), nothing is dropped for looking like silence: that is
flagged and left to the score.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from eval.languages import LANGUAGES, language

SAMPLE_RATE_HZ = 16000
FAMILIES = {"whisper": "large-v3", "mms": "mms:facebook/mms-1b-all", "omniasr": None}


@dataclass(frozen=True)
class Transcript:
    """What a recogniser wrote. Figures that it does not give are None."""

    text: str
    avg_logprob: float | None = None  # of the tokens; the mean over windows of a long clip
    no_speech_prob: float | None = None  # the largest over windows
    compression_ratio: float | None = None  # the largest over windows: 2.4 and more is repetition
    cut: bool = False  # a window filled the recogniser's limit, so words are missing
    guessed: str | None = None  # the language that it takes the sound for
    guessed_prob: float | None = None
    expected_prob: float | None = None  # of the language that it was told
    error: str = ""  # why it could not hear this clip

    def as_dict(self) -> dict:
        return asdict(self)


class Recognizer:
    """What all recognisers do. name: as given by the user."""

    name: str

    def hears(self, lang: str) -> bool:
        """Whether a language of eval.languages can be asked for."""
        raise NotImplementedError

    def transcribe_all(
        self, wavs: Sequence[np.ndarray], langs: Sequence[str]
    ) -> list[Transcript | None]:
        """Words of many clips, mono float32 [n] at 16 kHz; None where `hears` says no."""
        raise NotImplementedError

    def transcribe(self, wav: np.ndarray, lang: str) -> Transcript:
        """Words of one clip. Raises ValueError for a language that it does not hear."""
        (transcript,) = self.transcribe_all([wav], [lang])
        if transcript is None:
            raise ValueError(f"{self.name} does not hear language {lang!r}")
        return transcript

    def close(self) -> None:
        """End what was started; the recogniser is of no use afterwards."""


def load_recognizer(
    spec: str,
    device: str | None = None,
    fp16: bool = False,
    download_root: str | None = None,
    batch: int | None = None,
) -> Recognizer:
    """Load what a spec names (see above); several are loaded when their turn comes.

    fp16 halves memory and time on a GPU and changes a word now and then; it is refused on a CPU,
    which has no fast fp16. batch: clips decoded at once, by default what memory allows; 1 is
    openai-whisper's own loop, the reference. Raises FileNotFoundError or ValueError with what can
    be given.
    """
    routes = parse_spec(spec)
    if list(routes) != [""] or routes[""] == "auto":
        return Router(spec, device, fp16, download_root, batch)
    options = {"device": device, "fp16": fp16, "batch": batch}
    kind, _, rest = routes[""].partition(":")
    if kind == "worker":
        from eval.asr_worker import WorkerRecognizer

        return WorkerRecognizer(rest, name=spec)
    if kind == "mms":
        from eval.asr_mms import load_mms

        return load_mms(spec, rest, **options)
    from eval.asr_whisper import load_whisper

    return load_whisper(spec, download_root=download_root, **options)


def recognizer_details(
    spec: str, fp16: bool = False, languages: Sequence[str] | None = None
) -> dict:
    """What decides the words, found without loading a model.

    For config.yaml, and for refusing to compare unequal runs. languages: those of the set; a spec
    of several recognisers is looked up for these (default: all). `revision` identifies weights:
    the start of a file's sha256, a hub commit, or what a worker says of itself.
    Raises FileNotFoundError or ValueError with what can be given.
    """
    routes = parse_spec(spec)
    if list(routes) == [""] and routes[""] != "auto":
        return _details(spec, fp16)
    found: dict[str, str] = {}
    titles = {}
    for code in sorted(languages if languages is not None else LANGUAGES):
        judge = judge_of(routes, code)
        if judge not in found:
            found[judge] = "none" if judge == "none" else recognizer_title(_details(judge, fp16))
        titles[language(code).code] = found[judge]
    revision = hashlib.sha256(repr(sorted(titles.items())).encode()).hexdigest()[:16]
    return {"name": spec, "revision": revision, "routes": titles}


def recognizer_title(details: dict) -> str:
    """Such as "large-v3@e5b1a55b (openai-whisper 20250625, fp32)"."""
    if "routes" in details:
        first = details["name"].split(",")[0].strip()
        return "by language" if "=" in first else Path(first).name
    name = Path(details["name"].split("@")[0].split(":")[-1]).name
    if details["name"].startswith("worker:"):
        name = details["package"]
    inside = ", ".join(details[key] for key in ("package", "precision") if details[key] != name)
    return f"{name}@{short_revision(details['revision'])} ({inside})"


def short_revision(revision: str) -> str:
    """Eight digits of a hash; what a worker calls its revision stays whole."""
    return revision[:8] if re.fullmatch(r"[0-9a-f]{9,}", revision) else revision


def parse_spec(spec: str) -> dict[str, str]:
    """A spec's parts: {"": who hears the rest, language or family: who hears that}.

    Raises ValueError for an unknown language, a part given twice, or a family without "auto".
    """
    routes: dict[str, str] = {}
    # A comma starts a part only before the next "name=", so that commands may hold commas.
    for part in re.split(r",\s*(?=[\w-]+\s*=)", spec.strip()):
        match = re.fullmatch(r"([\w-]+)\s*=\s*(.+)", part.strip(), re.DOTALL)
        key, judge = ("", part.strip()) if match is None else (match[1], match[2].strip())
        if not judge:
            raise ValueError(f"recogniser {spec!r}: write a name, or language=name parts")
        if key and key not in FAMILIES:
            key = language(key).code
        if key in routes:
            raise ValueError(f"recogniser {spec!r}: {key or 'the first part'} is given twice")
        routes[key] = judge
    families = [key for key in routes if key in FAMILIES]
    if families and routes.get("") != "auto":
        raise ValueError(
            f"recogniser {spec!r}: {families[0]}= says what 'auto' takes; begin with 'auto,'"
        )
    routes.setdefault("", "none")
    return routes


def judge_of(routes: dict[str, str], lang: str) -> str:
    """Whom the parts of a spec name for a language: a spec of one recogniser, or "none"."""
    row = language(lang)
    if row.code in routes:
        return routes[row.code]
    if routes[""] != "auto":
        return routes[""]
    families = FAMILIES | {key: routes[key] for key in FAMILIES if key in routes}
    can = {"whisper": row.whisper, "mms": row.mms, "omniasr": row.omniasr}
    order = dict.fromkeys([row.recognizer, "omniasr", "mms", "whisper"])
    return next((families[f] for f in order if can.get(f) and families.get(f)), "none")


def together(spec: str, lang: str) -> str:
    """Languages with the same answer are best handed over at once: same model, same adapter."""
    judge = judge_of(parse_spec(spec), lang)
    return f"{judge} {language(lang).mms}" if judge.split(":")[0] == "mms" else judge


class Router(Recognizer):
    """Several recognisers, by language; one is in memory at a time."""

    def __init__(self, spec, device=None, fp16=False, download_root=None, batch=None):
        self.name, self.routes = spec, parse_spec(spec)
        self._options = (device, fp16, download_root, batch)
        self._loaded: tuple[str, Recognizer] | None = None

    def hears(self, lang: str) -> bool:
        judge = judge_of(self.routes, lang)
        return judge != "none" and self._use(judge).hears(lang)

    def transcribe_all(self, wavs, langs):
        judges = [judge_of(self.routes, lang) for lang in langs]
        found: list[Transcript | None] = [None] * len(wavs)
        for judge in dict.fromkeys(judges):
            if judge == "none":
                continue
            mine = [i for i, name in enumerate(judges) if name == judge]
            heard = self._use(judge).transcribe_all(
                [wavs[i] for i in mine], [langs[i] for i in mine]
            )
            for i, transcript in zip(mine, heard, strict=True):
                found[i] = transcript
        return found

    def close(self) -> None:
        if self._loaded:
            self._loaded[1].close()
            self._loaded = None

    def _use(self, judge: str) -> Recognizer:
        if self._loaded is None or self._loaded[0] != judge:
            self.close()
            free_memory()
            self._loaded = judge, load_recognizer(judge, *self._options)
        return self._loaded[1]


def compression_ratio(text: str) -> float:
    """Length over zlib-compressed length, as Whisper counts it: repetition compresses well."""
    data = text.encode()
    return len(data) / len(zlib.compress(data))


def free_memory() -> None:
    """Give the memory of deleted models back to the GPU's other users."""
    import gc
    import sys

    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _details(spec: str, fp16: bool) -> dict:
    kind, _, rest = spec.partition(":")
    if kind == "worker":
        from eval.asr_worker import worker_details

        return worker_details(rest, spec)
    if kind == "mms":
        from eval.asr_mms import mms_details

        return mms_details(spec, rest, fp16)
    from eval.asr_whisper import whisper_details

    return whisper_details(spec, fp16)
